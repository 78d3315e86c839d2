"""Routed layers on many devices: every device runs its own modules on its own tokens.

Automatic partitioning gathers all tokens and all modules for the sorted rows. So a routed layer is handed here as a function of
its arrays, `f(w, x, routing, tap)`, and runs under `shard_map`: tokens are split over some mesh axes, modules over others; each
device takes the slots of its own modules, and the shares of all are summed. Without a layout f is called as it is.

Where tokens are split over the modules' own axis too, one of the two must travel. Tokens do where a layer says so: each slot's
token is sent to the device of its module, and what that makes of it is sent back (all-to-all; Lepikhin et al., 2020), by a ragged
all-to-all where the layout says that there is one. Otherwise the modules do: every device puts all of them together.

Letters: N tokens, K slots, P = N·K pairs, I inputs, O outputs, M modules, S shards of the modules, C room from one to another.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from tinyonn_jax.layers import exchange
from tinyonn_jax.layers import tap as taps
from tinyonn_jax.layers.layout import Axes, Layout, current
from tinyonn_jax.layers.routing import Routing, given, part

Layer = Callable[[list[Array], Array, Routing, taps.Tap | None], Array]


def run(
    f: Layer,
    w: list[Array],
    axes: Sequence[Axes],
    x: Float[Array, "N *I"],
    routing: Routing,
    tap: taps.Tap | None = None,
    send: bool = False,
) -> Float[Array, "N *O"]:
    """f(w, x, routing, tap), which must be zero where a token has no active slot, for it is added up over the modules.

    `axes` are the logical axes of the weights, the module axis first. Where tokens or modules do not divide by the devices, f is
    partitioned automatically: the same numbers, more slowly. `send`: tokens travel, not modules, where one of them must; f must
    then be a sum over slots times their weights, of x `[N,I]`, and the routing come from `fit`.

    Raises:
        ValueError: tokens are to be sent, but the routing did not go through `fit`.
    """
    layout = current()
    tokens = layout and layout.tokens(x.shape[0])
    if layout is None or tokens is None:
        return f(w, x, routing, tap)

    splits = [layout.split(names, leaf.shape) for names, leaf in zip(axes, w, strict=True)]
    over_modules = splits[0][0]
    if over_modules is None:
        return f(w, x, routing, tap)
    own = NamedSharding(layout.mesh, splits[0]).shard_shape(w[0].shape)[0]
    meet = _meet(tokens, over_modules)
    if meet and send and routing.dropped is None:
        raise ValueError("tokens are sent to their modules here, with limited room: hand the routing through parallel.fit first")
    if meet and not send:
        own, over_modules = w[0].shape[0], None

    def share(w, x, routing, tap):
        """This device's part of the sum."""
        w = [_whole(leaf, split, modules=meet and not send) for leaf, split in zip(w, splits, strict=True)]
        if tap is not None:
            tap = replace(tap, module=jnp.zeros(own, jnp.float32))
        if meet and send:
            return _sent(f, w, x, routing, tap, over_modules, own, layout)[None]
        if over_modules is not None:
            routing = part(routing, jax.lax.axis_index(over_modules) * own, own)
        return f(w, x, routing, tap)[None]

    if tap is not None:  # here, where a gradient is the sum over all devices, so that the norm is taken of that
        w = [taps.watch(leaf, tap.module) for leaf in w]
        tap = replace(tap, module=None)
    shares = jax.shard_map(
        jax.checkpoint(share, prevent_cse=False, policy=_all_but_gathered),
        mesh=layout.mesh,
        in_specs=(splits, tokens, tokens, tokens),
        out_specs=PartitionSpec(None if meet else over_modules, *tokens),
        check_vma=False,
    )(w, x, routing, tap)
    return shares.sum(0)  # of [S,N,…]; gradients of x and of the taps are summed likewise, as the transpose of being handed out


def _meet(tokens: PartitionSpec, over_modules: Any) -> bool:
    """Whether tokens are split over the axis of the modules."""
    along = lambda names: {names} if isinstance(names, str) else set(names or ())  # noqa: E731
    return bool(along(tokens[0]) & along(over_modules))


def _whole(w: Array, split: PartitionSpec, modules: bool) -> Array:
    """A device's own modules, put together along their other axes; the gradient is summed and split again in one operation.

    `modules`: also those of the other devices.
    """
    for axis, names in enumerate(split):
        if names is not None and (axis > 0 or modules) and jax.lax.axis_size(names) > 1:
            w = jax.lax.all_gather(w, names, axis=axis, tiled=True)
    return w


def _all_but_gathered(primitive: Any, *_: Any, **__: Any) -> bool:
    """What is kept for the backward pass: everything but gathered weights, which are gathered again."""
    return primitive.name != "all_gather"


# --- tokens that travel -------------------------------------------------------------------------------------------------


def fit(routing: Routing) -> Routing:
    """The routing with its `dropped` slots marked: those for which there is no room where tokens are sent to their modules.

    From one device to another go the first C pairs, by token and slot, C = capacity × P / S, of the P pairs of a device.
    """
    layout = current()
    tokens = layout and layout.tokens(routing.weight.shape[0])
    if layout is None or tokens is None:
        return routing
    modules = routing.logits.shape[-1]
    over_modules = layout.split(("modules",), (modules,))[0]
    if not _meet(tokens, over_modules):
        return routing

    def late(index, active):
        shards = jax.lax.axis_size(over_modules)
        plan, _, rank = exchange.queues(index, active, modules // shards, shards)
        return active & (rank >= _room(plan.order.size, shards, layout)).reshape(active.shape)

    late = jax.shard_map(late, mesh=layout.mesh, in_specs=tokens, out_specs=tokens, check_vma=False)
    return replace(routing, dropped=late(routing.slots, routing.active))


def _room(pairs: int, shards: int, layout: Layout) -> int:
    """C, at most all pairs of a device."""
    return math.ceil(min(pairs, layout.capacity * pairs / shards))


def _sent(
    f: Layer, w: list[Array], x: Array, routing: Routing, tap: taps.Tap | None, name: Any, own: int, layout: Layout
) -> Array:
    """f on this device's tokens, each pair computed where its module is."""
    assert routing.dropped is not None
    n, slots = routing.weight.shape
    kept, index = routing.active & ~routing.dropped, routing.slots
    room = _room(n * slots, jax.lax.axis_size(name), layout)
    route = exchange.route(index, kept, own, room, name, layout.ragged)

    module = exchange.forth(index.reshape(-1, 1) % own + 1, route) - 1  # -1: nobody came
    there = given(jnp.maximum(module, 0), module >= 0, own)
    rows_tap = None
    if tap is not None:
        param = exchange.forth(tap.param.reshape(-1, 1), route)
        rows_tap = taps.Tap(jnp.zeros_like(param), jnp.zeros_like(param), param, tap.module)
    outputs = exchange.back(f(w, exchange.forth(jnp.repeat(x, slots, 0), route), there, rows_tap), route)
    return taps.combine(outputs.reshape(n, slots, -1), jnp.where(kept, routing.weight, 0), tap)
