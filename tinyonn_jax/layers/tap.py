"""Taps: zeros handed to a layer whose gradients are statistics of the gradients flowing past.

A tap changes nothing in the forward pass, and main gradients do not know of it; its backward rule returns norms, so that one
`jax.grad` over (parameters, taps) gives the main gradients and every surprise signal. Squared norms, in float32, where a tap
is shared by several matrices, so that they add up. The statistics are not linear in the cotangent: scale the loss by c and
squared norms scale by c².

Letters: N tokens, K slots, M modules, D model. Source: seed 1 (section 3), seed 3; per-token norms after Goodfellow (2015).
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tinyonn_jax.layers.routing import Routing


@flax.struct.dataclass
class Tap:
    """One routed layer's tap: zeros going in, squared norms coming out as its gradient.

    `output [N,K]` (w‖g_n‖)²; `attribution [N,K]` ⟨g_n, w f_m(x_n)⟩²; `param [N,K]` squared norm of the parameter gradient that
    one token causes in one module; `module [M]` squared norm of the module's parameter gradient over the whole batch. g_n is
    dL/dy_n, w the slot's weight.
    """

    output: Float[Array, "*R N K"]
    attribution: Float[Array, "*R N K"]
    param: Float[Array, "*R N K"]
    module: Float[Array, "*R M"]


@flax.struct.dataclass
class NeuronTap:
    """The tap of routed neurons (see `layers.spl`), whose every output is a coordinate of its own.

    `delta [N,M]` δ_nm, the gradient of a neuron's pre-activation; `token [N]` ‖x_n‖, 0 for padding, so that |δ_nm|·‖x_n‖ is the
    norm of the parameter gradient that one token causes in one neuron; `output [M]` Σ_n δ_nm²; `module [M]` ‖dL/dmu_m‖².
    """

    delta: Float[Array, "*R N M"]
    token: Float[Array, "*R N"]
    output: Float[Array, "*R M"]
    module: Float[Array, "*R M"]


Taps = dict[str, Tap | NeuronTap]
"""By the name of their layer, or by role within it."""


def by_role(taps: Any, roles: Sequence[str]) -> dict[str, Any]:
    """The taps of a layer's roles; None for each without any.

    Raises:
        ValueError: taps of other roles, of which nothing would be measured.
    """
    if not taps:
        return dict.fromkeys(roles)
    if set(taps) != set(roles):
        raise ValueError(f"taps of this layer go by role, {', '.join(roles)}; got {', '.join(map(str, taps))}")
    return taps


def zeros(routing: Routing) -> Tap | NeuronTap:
    """The tap that fits a routing (or its `jax.eval_shape`), recursions or layers leading as they do there."""
    slots, modules = routing.weight.shape, routing.logits.shape[:-2] + routing.logits.shape[-1:]
    zero = partial(jnp.zeros, dtype=jnp.float32)
    if routing.index is None:
        return NeuronTap(zero(slots), zero(slots[:-1]), zero(modules), zero(modules))
    return Tap(zero(slots), zero(slots), zero(slots), zero(modules))


def noted(taps: Taps, reached: set[str]) -> Taps:
    """The taps as they are; a backward pass, when it is traced, adds the names of those that it comes to to `reached`."""

    def note(name: str, tap: Tap | NeuronTap) -> Tap | NeuronTap:
        same = jax.custom_vjp(lambda tap: tap)

        def back(_, g):
            reached.add(name)
            return (g,)

        same.defvjp(lambda tap: (tap, None), back)
        return same(tap)

    return {name: note(name, tap) for name, tap in taps.items()}


def combine(outputs: Float[Array, "N K D"], weight: Float[Array, "N K"], tap: Tap | None = None) -> Float[Array, "N D"]:
    """y_n = Σ_k weight_nk · outputs_nk, tapped for output gradients and attributions."""
    if tap is None:
        return _combine(outputs, weight)
    return _tapped_combine(outputs, weight, tap.output, tap.attribution)


def _combine(outputs, weight):
    return jnp.einsum("nkd,nk->nd", outputs, weight.astype(outputs.dtype))


@jax.custom_vjp
def _tapped_combine(outputs, weight, output_tap, attribution_tap):
    return _combine(outputs, weight)


def _tapped_combine_fwd(outputs, weight, output_tap, attribution_tap):
    return _combine(outputs, weight), (outputs, weight)


def _tapped_combine_bwd(saved, g):
    outputs, weight = saved
    d_outputs = g[:, None, :] * weight[..., None].astype(g.dtype)
    d_weight = jnp.einsum("nkd,nd->nk", outputs, g, preferred_element_type=jnp.float32)
    norm = jnp.sum(jnp.square(g.astype(jnp.float32)), -1, keepdims=True)  # [N,1]
    output, attribution = jnp.square(weight) * norm, jnp.square(weight * d_weight)
    return d_outputs, d_weight.astype(weight.dtype), output.astype(jnp.float32), attribution.astype(jnp.float32)


_tapped_combine.defvjp(_tapped_combine_fwd, _tapped_combine_bwd)


@jax.custom_vjp
def watch(w: Float[Array, "M *I"], module_tap: Float[Array, " M"]) -> Float[Array, "M *I"]:
    """w as it is; the gradient of `module_tap` is the squared norm of w's, module by module."""
    return w


def _watch_bwd(_, g):
    return g, jnp.sum(jnp.square(g.astype(jnp.float32)).reshape(g.shape[0], -1), -1)


watch.defvjp(lambda w, module_tap: (w, None), _watch_bwd)
