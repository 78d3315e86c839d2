"""Surprise: how strongly the task loss pulls on each module's output and parameters.

Reads the gradients of a step's taps into named signals, and summarises routing for a person to watch. For module m used by
token n in slot k, with y_n = Σ_k w·f_m(x_n) and g_n = dL/dy_n. Letters: N tokens, K slots, M modules; a leading axis of
recursions or layers where the model has one. Source: seed 1 §3, seed 3.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from tinyonn_jax.layers import tap as taps
from tinyonn_jax.layers.routing import Routing, pooled, served, totals


@flax.struct.dataclass
class Signals:
    """Norms, float32; zero in idle slots (see `Routing.active`) and for modules nobody used.

    Per token and slot `[N,K]`: `output` w‖g_n‖, `attribution` |⟨g_n, w f_m(x_n)⟩|, `param` the norm of the parameter gradient
    this token causes in this module ("ghost norm"). Per module `[M]`: `module_output` √Σ_n w²‖g_n‖² over its tokens,
    `module_param` ‖dL/dθ_m‖.
    """

    output: Float[Array, "*R N K"]
    attribution: Float[Array, "*R N K"]
    param: Float[Array, "*R N K"]
    module_output: Float[Array, "*R M"]
    module_param: Float[Array, "*R M"]


@flax.struct.dataclass
class NeuronSignals:
    """The same of neurons (see `layers.spl`), from `delta` δ_nm, the gradient of the pre-activation, and `token` ‖x_n‖: their
    `output` and `attribution` are both |δ_nm|, `param` is |δ_nm|·‖x_n‖, each made where it is asked for."""

    delta: Float[Array, "*R N M"]
    token: Float[Array, "*R N"]
    module_output: Float[Array, "*R M"]
    module_param: Float[Array, "*R M"]

    @property
    def output(self) -> Float[Array, "*R N M"]:
        return jnp.abs(self.delta)

    @property
    def attribution(self) -> Float[Array, "*R N M"]:
        return jnp.abs(self.delta)

    @property
    def param(self) -> Float[Array, "*R N M"]:
        return self.output * self.token[..., None]


Surprise = dict[str, Signals | NeuronSignals]
"""The signals of every routed layer, by its name."""


def read(tapped: taps.Taps, routings: dict[str, Routing]) -> Surprise:
    """The signals of every routed layer, from the gradients of its tap."""
    return {name: _signals(tap, routings[name]) for name, tap in tapped.items()}


def _signals(tap: taps.Tap | taps.NeuronTap, routing: Routing) -> Signals | NeuronSignals:
    module_param = jnp.sqrt(tap.module)
    if isinstance(tap, taps.NeuronTap):
        return NeuronSignals(tap.delta, tap.token, jnp.sqrt(tap.output), module_param)
    output, attribution, param = (jnp.sqrt(v) for v in (tap.output, tap.attribution, tap.param))
    return Signals(output, attribution, param, jnp.sqrt(totals(tap.output, routing)), module_param)


def l1_norm(values: Float[Array, "*R N M"]) -> Float[Array, "*R N"]:
    """Σ_m |values| of every token; of each recursion or block by itself, or XLA would lay all of them side by side first, and
    behind a barrier, or it would go through all values again for each sum of these sums."""
    blocks = jnp.unstack(values) if values.ndim == 3 else [values]
    sums = jax.lax.optimization_barrier([jnp.sum(jnp.abs(block), -1) for block in blocks])
    return jnp.stack(sums) if values.ndim == 3 else sums[0]


def make_taps(routings: Any) -> taps.Taps:
    """Zero taps that fit the routings (or their `jax.eval_shape`)."""
    return {name: taps.zeros(routing) for name, routing in routings.items()}


def summary(routing: Routing, signals: Signals | NeuronSignals, like: Float[Array, "*L M"]) -> dict[str, Array]:
    """What a person watches of one routed layer, over valid tokens and all recursions.

    `like` has the shape of the layer's modules: stacked blocks have modules of their own, whose figures are averaged and
    `dead_modules` counted, and told apart in `load [L,M]` and `active_share_by_block [L]`. `load [M]` share of the slots in use
    that each module serves; `active_share` share of modules that a token uses; `usage_entropy` of load, over its maximum;
    `max_load` largest load times M, 1 when even; `dead_modules` how many served no token of the batch; `unrouted` share of tokens
    without a module above zero (see `Routing`); `surprise_output`, `surprise_param` mean norms of the slots in use (see
    `Signals`); `gating_acc` share of (token, group) decisions with several active modules, any of them surprised, whose top logit
    is the least surprised (by parameter gradient): NaN when there is none, and not there where there cannot be one, as with one
    slot for each group, or neurons, of which a token uses many at once and prefers none; `dropped` share of the slots in use that
    went without their module, where that can be.
    """
    used = pooled(served(routing), like)  # [*L,M]
    modules = used.shape[-1]
    load = used / jnp.maximum(jnp.sum(used, -1, keepdims=True), 1)
    valid = jnp.maximum(jnp.sum(routing.valid), 1)
    slots = jnp.sum(used)  # those in use
    dropped = None if routing.dropped is None else jnp.sum(routing.dropped)
    computed = jnp.maximum(slots if dropped is None else slots - dropped, 1)
    choice = routing.index is not None and routing.config.slots_per_group > 1
    if isinstance(signals, NeuronSignals):
        output = l1_norm(signals.delta)
        param = output * signals.token
    else:
        output, param = signals.output, signals.param
    apart = {"active_share_by_block": jnp.sum(used, -1) / (jnp.maximum(jnp.sum(routing.valid, -1), 1) * modules)}
    return {
        "load": load,
        **(apart if like.ndim == 2 else {}),
        "active_share": slots / (valid * modules),
        "usage_entropy": -jnp.mean(jnp.sum(load * jnp.log(jnp.maximum(load, 1e-9)), -1)) / jnp.log(max(modules, 2)),
        "max_load": jnp.mean(jnp.max(load, -1)) * modules,
        "dead_modules": jnp.sum(used == 0),
        "unrouted": jnp.sum(routing.unrouted) / valid,
        **({} if dropped is None else {"dropped": dropped / jnp.maximum(slots, 1)}),
        **({"gating_acc": _gating_accuracy(routing, signals)} if choice else {}),
        "surprise_output": jnp.sum(output) / computed,
        "surprise_param": jnp.sum(param) / computed,
    }


def _computed(routing: Routing) -> Bool[Array, "*R N K"]:
    """The active slots whose module ran."""
    return routing.active if routing.dropped is None else routing.active & ~routing.dropped


def _gating_accuracy(routing: Routing, signals: Signals | NeuronSignals) -> Array:
    slots = routing.config.slots_per_group
    by_slot = lambda v: jnp.moveaxis(v.reshape(*v.shape[:-1], -1, slots), -1, 0)  # noqa: E731

    def meet(so_far, slot):
        met, several, felt, first, least = so_far
        active, surprise = slot
        first = jnp.where(active & ~met, surprise, first)
        least = jnp.where(active, jnp.minimum(least, surprise), least)
        return (met | active, several | (met & active), felt | (active & (surprise > 0)), first, least), None

    # Slot by slot, in order of their logits: a CPU is slow at many sums over a few numbers.
    found = by_slot(_computed(routing)), by_slot(signals.param)
    no, highest = jnp.zeros(found[0].shape[1:], bool), jnp.full(found[1].shape[1:], jnp.inf, jnp.float32)
    (_, several, felt, first, least), _ = jax.lax.scan(meet, (no, no, no, highest, highest), found, unroll=min(slots, 8))
    contested = several & felt
    return jnp.sum(contested & (first == least)) / jnp.sum(contested)


def averages(layers: Sequence[Mapping[str, Array]]) -> dict[str, Array]:
    """Of every scalar that some of the layers have, the mean over those in which it is finite; NaN if it is in none."""
    names = [*dict.fromkeys(name for layer in layers for name, value in layer.items() if jnp.ndim(value) == 0)]
    if not names:
        return {}
    table = jnp.stack([jnp.asarray(layer.get(name, jnp.nan), jnp.float32) for layer in layers for name in names])
    table = table.reshape(len(layers), len(names))
    finite = jnp.isfinite(table)
    return dict(zip(names, jnp.unstack(jnp.sum(jnp.where(finite, table, 0), 0) / jnp.sum(finite, 0)), strict=True))
