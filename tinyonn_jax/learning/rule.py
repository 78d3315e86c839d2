"""What a learning rule is, and the two rules that need no surprise: `none` and `backprop`.

A rule is a NamedTuple of pure functions, like an optax transformation. It sees the routers of a model, the routings of one
step and their signals, each a dict from the name of a routed layer (the dotted path of its params) to its part, so a signal
cannot meet the wrong router. Letters: N tokens, K slots, M modules.
"""

from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, TypeVar

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tinyonn_jax.layers.routing import Router, Routing, effective, pooled, routing_logits, select, served, totals
from tinyonn_jax.learning import variational
from tinyonn_jax.learning.signals import Surprise

Routers = dict[str, Router]
Routings = dict[str, Routing]
Metrics = dict[str, Any]
T = TypeVar("T")


@flax.struct.dataclass
class MetaState:
    """What learning remembers between steps.

    `records`: for each routed layer, the slots its modules have served so far, `[M]` (`[L,M]` with blocks of their own);
    `accuracy`: moving average of the main accuracy; `prior`: moving average of each layer's mean routing distribution, of the
    same shape as its records, even at first; `rule`: whatever else the rule keeps.
    """

    records: dict[str, Array]
    accuracy: Array
    prior: dict[str, Array]
    rule: Any = None


def _unchanged(grads, params, routings, signals, meta):
    return grads


class LearningRule(NamedTuple):
    """What a rule does at each point of a step.

    `init(params, routings)` → state, of routings or of what `jax.eval_shape` tells of them; `objective` → the routers' own loss;
    `adjust(grads, params, …)` → gradients after gating or decay; `restrain(updates, params, …)` → what the optimizers make of
    them, after gating or protection (AdamW and Muon divide by a gradient's size, so that one made smaller moves its parameter as
    far); `update` → next state. `isolate` says what the model must do: cut routers off the main loss (True), or let it teach
    them. `renew(params, state, key)` → params and state with some prototypes made anew after the step, and for each layer a mask
    `[M]` of them, whose optimizer moments and average start again; None for rules that never do.
    """

    init: Callable[[Any, Routings], MetaState]
    objective: Callable[[Routers, Routings, Surprise, MetaState], tuple[Array, Metrics]]
    adjust: Callable[[Any, Any, Routings, Surprise, MetaState], Any]
    update: Callable[[MetaState, Routings, Surprise, Metrics], MetaState]
    restrain: Callable[[Any, Any, Routings, Surprise, MetaState], Any] = _unchanged
    isolate: bool = True
    renew: Callable[[Any, MetaState, Array], tuple[Any, MetaState, dict[str, Array]]] | None = None


def layers(params: Any, path: tuple[str, ...] = ()) -> dict[str, Any]:
    """Every routed layer of a params tree, by the dotted path to it: the sub-structs that hold a `router`.

    Raises:
        ValueError: a key on the way to one has a dot in it.
    """
    children = _children(params)
    if isinstance(children.get("router"), Router):
        return {".".join(path): params}
    found: dict[str, Any] = {}
    for key, child in children.items():
        inner = layers(child, (*path, key))
        if inner and "." in key:
            raise ValueError(f"routed layers are named by dotted paths: rename {key!r}, which has a dot in its name")
        found |= inner
    return found


def _children(params: Any) -> dict[str, Any]:
    """The parts of a params struct by name; none of an array."""
    if isinstance(params, Mapping):
        return {str(key): child for key, child in params.items()}
    if hasattr(params, "__dataclass_fields__"):
        return {name: getattr(params, name) for name in params.__dataclass_fields__}
    if hasattr(params, "_fields"):
        return params._asdict()
    return {str(i): child for i, child in enumerate(params)} if isinstance(params, list | tuple) else {}


def routers(params: Any) -> Routers:
    """The routers of a params tree, by the name of their layer."""
    return {name: part(layer, "router") for name, layer in layers(params).items()}


def part(layer: Any, name: str) -> Any:
    """One part of a layer, be it a struct or a dict.

    Raises:
        ValueError: it has none of that name.
    """
    parts = _children(layer)
    if name not in parts:
        raise ValueError(
            f"a routed layer holds its router as `router` and its modules as `modules`; this one has {sorted(parts)}"
        )
    return parts[name]


def replace_layer(params: Any, name: str, layer: Any) -> Any:
    """`params` with the layer of that name replaced."""
    if not name:
        return layer
    head, _, rest = name.partition(".")
    child = replace_layer(_children(params)[head], rest, layer)
    if isinstance(params, Mapping):  # of its own type
        key = next(key for key in params if str(key) == head)
        if not isinstance(params, dict):
            return type(params)({**params, key: child})  # pyright: ignore[reportCallIssue]
        changed = copy(params)
        changed[key] = child
        return changed
    if hasattr(params, "_fields"):
        return params._replace(**{head: child})
    if isinstance(params, list | tuple):
        return type(params)(child if i == int(head) else c for i, c in enumerate(params))
    return replace(params, **{head: child})


def replace_part(params: Any, layer: str, name: str, value: Any) -> Any:
    """`params` with one part of the layer of that name replaced."""
    return replace_layer(params, f"{layer}.{name}".lstrip("."), value)


def without_routers(params: Any) -> Any:
    """A params tree, or its gradients, with None in place of every router."""
    for name in layers(params):
        params = replace_part(params, name, "router", None)
    return params


def logits_of(router: Router, routing: Routing) -> Float[Array, "*R N M"]:
    """The logits as functions of the router's parameters alone, the input detached: the only way a meta loss reaches a router.

    Their values are those that the step routed by; what is computed anew is the gradient, which costs one matmul.
    """
    return _known(effective(router), routing.input, routing.logits, routing.config)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _known(router, x, logits, config):
    return logits


def _known_bwd(config, saved, g):
    router, x = saved

    def of_one(router, x, g):
        return jax.vjp(lambda r: routing_logits(r, x, config), router)[1](g)[0]

    if router.proto.ndim == 2:
        return of_one(router, x, g), None, None
    # Stacked blocks have routers of their own. One by one: to stack what is refined and take it apart again are copies.
    each = [of_one(*jax.tree.map(lambda leaf, i=i: leaf[i], (router, x, g))) for i in range(len(g))]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *each), None, None


_known.defvjp(lambda router, x, logits, config: (logits, (router, x)), _known_bwd)


def by_block(f: Callable[..., T], routing: Routing, *others: Any) -> T:
    """`f(routing, *others)`. Of neurons with a leading axis, of recursions or stacked blocks, f is called for each by itself and
    the results are stacked: arrays as large as outputs are not laid side by side first, and stay in a CPU's cache.
    """
    if routing.index is not None or routing.logits.ndim == 2:
        return f(routing, *others)
    leaves, tree = jax.tree.flatten((routing, *others))
    # As jnp.unstack, but the gradient is one stack: that of slices is a sum of arrays, each zero but for one of them.
    apart = ([jnp.squeeze(part, 0) for part in jax.lax.split(leaf, [1] * len(leaf))] for leaf in leaves)
    found = [f(*tree.unflatten(block)) for block in zip(*apart, strict=True)]
    return jax.tree.map(lambda *results: jnp.stack(results), *found)


def mean_over_tokens(values: Float[Array, "*R N"], routing: Routing) -> Array:
    """The mean over valid tokens, of all recursions or layers."""
    return jnp.sum(jnp.where(routing.valid, values, 0)) / jnp.maximum(jnp.sum(routing.valid), 1)


def initial(params: Any, routings: Routings) -> MetaState:
    """A state with zero records, for rules that keep nothing else.

    Raises:
        ValueError: the routings' names are not those of the routed layers in `params`, or a layer's parameters have more than
            one leading axis.
    """
    found = routers(params)
    if set(found) != set(routings):
        raise ValueError(
            f"routings {sorted(routings)} do not match the routed layers of params {sorted(found)}: name each by its dotted path"
            + ("" if found else f" ({type(params).__name__}: layers are found in dicts, structs, named tuples, lists and tuples)")
        )
    for name, router in found.items():
        if router.proto.ndim > 3:
            shape = list(router.proto.shape)
            raise ValueError(f"layer {name!r} may have one leading axis, of stacked blocks, before [modules, dim]; got {shape}")
    records = {name: jnp.zeros(router.proto.shape[:-1], jnp.float32) for name, router in found.items()}
    even = {name: jnp.full_like(total, 1 / total.shape[-1]) for name, total in records.items()}
    return MetaState(records=records, accuracy=jnp.float32(0), prior=even)


def record(meta: MetaState, routings: Routings, signals: Surprise, metrics: Metrics, decay: float = 0.99) -> MetaState:
    """Adds this step's use of every module, and moves the averages: of routing, and of `metrics["main_acc"]`, if it is there."""
    records = {}
    for name, total in meta.records.items():
        records[name] = total + pooled(served(routings[name]), total)
    accuracy = jnp.asarray(metrics.get("main_acc", meta.accuracy), meta.accuracy.dtype)
    accuracy = jnp.where(jnp.isfinite(accuracy), accuracy, meta.accuracy)  # of a batch in which nothing counts
    prior = {name: variational.follow(old, routings[name], decay) for name, old in meta.prior.items()}
    return replace(meta, records=records, prior=prior, accuracy=decay * meta.accuracy + (1 - decay) * accuracy)


def load_balance(weight: Float[Array, "*R N K"], routing: Routing) -> Array:
    """½ (M Σ load² / (Σ load)² + M Σ imp² / (Σ imp)²): load counts tokens, importance sums weights; 1 when even, or when nobody
    uses any (seed 3, §7)."""

    def unevenness(total):  # [*R,M]
        everything = jnp.sum(total, -1)
        uneven = total.shape[-1] * jnp.sum(total**2, -1) / jnp.maximum(everything, 1e-6) ** 2
        return jnp.mean(jnp.where(everything > 0, uneven, 1.0))

    load = jax.lax.stop_gradient(served(routing))
    return 0.5 * (unevenness(load) + unevenness(totals(weight, routing)))


def none() -> LearningRule:
    """Routers stay as initialised, whatever the optimizer makes of gradients that are zero, decay for one."""

    def restrain(updates, params, routings, signals, meta):
        for name, router in routers(updates).items():
            updates = replace_part(updates, name, "router", jax.tree.map(jnp.zeros_like, router))
        return updates

    return LearningRule(initial, lambda *_: (jnp.float32(0), {}), _unchanged, record, restrain)


def backprop(balance: float = 0.0) -> LearningRule:
    """Routers learn from the main loss through their weights, as in a conventional mixture of experts: not where weights are
    constant, as of the one module of a group that a token uses, or of hard ones.

    `balance` weighs a load-balance loss (0: none).
    """

    def objective(routers, routings, signals, meta):
        if not balance:
            return jnp.float32(0), {}
        losses = []
        for name, routing in routings.items():
            logits = logits_of(routers[name], routing)
            if routing.index is None:
                weight = jax.nn.relu(logits) if routing.config.select == "relu" else routing.weight
            else:
                weight = select(logits.reshape(-1, logits.shape[-1]), routing.config)[1].reshape(routing.weight.shape)
            losses.append(load_balance(jnp.where(routing.active, weight, 0), routing))
        mean = sum(losses, jnp.float32(0)) / max(len(losses), 1)
        return balance * mean, {"loss_balance": mean}

    return LearningRule(initial, objective, _unchanged, record, isolate=False)
