"""Routed layers on many devices: every device runs its own modules on its own tokens.

Tokens are split over some mesh axes, modules over others. Automatic partitioning is good at everything but the sorted rows,
for which it gathers all tokens and all modules. So a routed layer is handed here as a function of its arrays, `f(w, x, routing,
tap)`, and runs under `shard_map`: each device takes the slots of its own modules, and the shares of all devices are summed.
Which axes those are comes in from outside (`over`); without that, and on one device, f is called as it is.

Letters: N tokens, D model, M modules, K slots, S shards of the modules.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from tinyonn_jax.layers import tap as taps
from tinyonn_jax.layers.routing import Routing, part

Axes = tuple[str | None, ...]
Layer = Callable[[Any, Array, Routing, taps.Tap | None], Array]


@dataclass(frozen=True)
class Layout:
    """A mesh, and `split(axes, shape)`: how an array with these logical axes lies on it."""

    mesh: Mesh
    split: Callable[[Axes, tuple[int, ...]], PartitionSpec]


_layout: ContextVar[Layout | None] = ContextVar("layout", default=None)


@contextmanager
def over(layout: Layout | None) -> Iterator[None]:
    """Routed layers that are traced within (or by a function decorated with it) run over `layout`; None: as on one device."""
    token = _layout.set(layout)
    try:
        yield
    finally:
        _layout.reset(token)


def run(
    f: Layer, w: Any, axes: Any, x: Float[Array, "N *I"], routing: Routing, tap: taps.Tap | None = None
) -> Float[Array, "N *O"]:
    """f(w, x, routing, tap), which must be zero where a token has no active slot, for it is added up over the modules.

    `w` is a list of weights, one module a row, and `axes` their logical axes, the module axis first. Where the tokens do not
    divide by the devices, f is partitioned automatically: the same numbers, more slowly.
    """
    layout = _layout.get()
    tokens = layout and layout.split(("batch",), x.shape[:1])[0]
    if layout is None or tokens is None:
        return f(w, x, routing, tap)

    splits = [layout.split(names, leaf.shape) for names, leaf in zip(axes, w, strict=True)]
    over_modules = splits[0][0]
    own = NamedSharding(layout.mesh, splits[0]).shard_shape(w[0].shape)[0]

    def share(w, x, routing, slot_tap):
        """This device's part of the sum."""
        w = [_whole(leaf, split) for leaf, split in zip(w, splits, strict=True)]
        if over_modules is not None:
            routing = part(routing, jax.lax.axis_index(over_modules) * own, own)
        mine = None if slot_tap is None else replace(slot_tap, module=jnp.zeros(own))
        return f(w, x, routing, mine)[None]

    if tap is not None:  # the gradient of a module's weights is summed over all tokens before its norm is taken
        w = [taps.watch(leaf, tap.module) for leaf in w]
        tap = replace(tap, module=None)
    share = jax.checkpoint(share, prevent_cse=False, policy=_all_but_gathered)
    by_token = PartitionSpec(tokens)
    y = jax.shard_map(
        share,
        mesh=layout.mesh,
        in_specs=(splits, by_token, by_token, by_token),
        out_specs=PartitionSpec(over_modules, tokens),
        check_vma=False,
    )(w, x, routing, tap)
    return y.sum(0)  # [S,N,…]; a gradient of x, a weight or a slot's statistic is summed likewise, as the transpose of this


def _whole(w: Array, split: PartitionSpec) -> Array:
    """A device's own modules, their other axes put together; the gradient is summed and split again in one operation."""
    for axis, names in enumerate(split[1:], 1):
        if names:
            w = jax.lax.all_gather(w, names, axis=axis, tiled=True)
    return w


def _all_but_gathered(primitive: Any, *_: Any, **__: Any) -> bool:
    """What is kept for the backward pass: everything but gathered weights, which are gathered again."""
    return primitive.name != "all_gather"
