"""Routed layers on many devices: every device runs its own modules on its own tokens.

Automatic partitioning gathers all tokens and all modules for the sorted rows. So a routed layer is handed here as a function of
its arrays, `f(w, x, routing, tap)`, and runs under `shard_map`: tokens are split over some mesh axes, modules over others; each
device takes the slots of its own modules, and the shares of all are summed. Without a layout f is called as it is.

Letters: N tokens, I inputs, O outputs, M modules, S shards of the modules.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from tinyonn_jax.layers import tap as taps
from tinyonn_jax.layers.layout import Axes, current
from tinyonn_jax.layers.routing import Routing, part

Layer = Callable[[list[Array], Array, Routing, taps.Tap | None], Array]


def run(
    f: Layer, w: list[Array], axes: Sequence[Axes], x: Float[Array, "N *I"], routing: Routing, tap: taps.Tap | None = None
) -> Float[Array, "N *O"]:
    """f(w, x, routing, tap), which must be zero where a token has no active slot, for it is added up over the modules.

    `axes` are the logical axes of the weights, the module axis first. Where the tokens do not divide by the devices, f is
    partitioned automatically: the same numbers, more slowly.
    """
    layout = current()
    tokens = layout and layout.tokens(x.shape[0])
    if layout is None or tokens is None:
        return f(w, x, routing, tap)

    splits = [layout.split(names, leaf.shape) for names, leaf in zip(axes, w, strict=True)]
    over_modules = splits[0][0]
    own = NamedSharding(layout.mesh, splits[0]).shard_shape(w[0].shape)[0]

    def share(w, x, routing, tap):
        """This device's part of the sum."""
        w = [_whole(leaf, split) for leaf, split in zip(w, splits, strict=True)]
        if over_modules is not None:
            routing = part(routing, jax.lax.axis_index(over_modules) * own, own)
        if tap is not None:
            tap = replace(tap, module=jnp.zeros(own))
        return f(w, x, routing, tap)[None]

    if tap is not None:  # here, where a gradient is the sum over all devices, so that the norm is taken of that
        w = [taps.watch(leaf, tap.module) for leaf in w]
        tap = replace(tap, module=None)
    shares = jax.shard_map(
        jax.checkpoint(share, prevent_cse=False, policy=_all_but_gathered),
        mesh=layout.mesh,
        in_specs=(splits, tokens, tokens, tokens),
        out_specs=PartitionSpec(over_modules, *tokens),
        check_vma=False,
    )(w, x, routing, tap)
    return shares.sum(0)  # of [S,N,…]; gradients of x and of the taps are summed likewise, as the transpose of being handed out


def _whole(w: Array, split: PartitionSpec) -> Array:
    """A device's own modules, put together along their other axes; the gradient is summed and split again in one operation."""
    for axis, names in enumerate(split[1:], 1):
        if names is not None and jax.lax.axis_size(names) > 1:
            w = jax.lax.all_gather(w, names, axis=axis, tiled=True)
    return w


def _all_but_gathered(primitive: Any, *_: Any, **__: Any) -> bool:
    """What is kept for the backward pass: everything but gathered weights, which are gathered again."""
    return primitive.name != "all_gather"
