"""Where tokens and modules lie when there are many devices. Layers know no mesh: it comes in from outside, by `over`, and only
what automatic partitioning does badly asks for it, here and in `layers.parallel`.

Letters: N tokens.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

Axes = tuple[str | None, ...]


@dataclass(frozen=True)
class Layout:
    """A mesh, and `split(axes, shape)`: how an array with these logical axes lies on it.

    Where tokens are split over the axis of the modules, they are sent to them; `capacity` is how many may go from one device to
    another, as a multiple of an even share (inf: all of them); `ragged`: whether only those that go travel, or all that may.
    """

    mesh: Mesh
    split: Callable[[Axes, tuple[int, ...]], PartitionSpec]
    capacity: float = math.inf
    ragged: bool = False

    def tokens(self, count: int) -> PartitionSpec | None:
        """How arrays whose leading axis is this many tokens lie; None if they do not divide by the devices."""
        split = self.split(("batch",), (count,))
        return None if split == PartitionSpec(None) else split


_layout: ContextVar[Layout | None] = ContextVar("layout", default=None)


@contextmanager
def over(layout: Layout | None) -> Iterator[None]:
    """What is traced within (or by a function decorated with it) runs over `layout`; None: as on one device.

    `jax.jit` traces a function once for arguments of one kind: what it has traced before stays on the layout of then.
    """
    token = _layout.set(layout)
    try:
        yield
    finally:
        _layout.reset(token)


def current() -> Layout | None:
    """The layout that the code being traced runs over."""
    return _layout.get()


def each_token(f: Callable[[Array], Any], x: Array) -> Any:
    """f(x [N,…]), which treats tokens by themselves, where they lie: for operations that XLA would gather them for."""
    layout = current()
    tokens = layout and layout.tokens(x.shape[0])
    if layout is None or tokens is None:
        return f(x)
    return jax.shard_map(f, mesh=layout.mesh, in_specs=tokens, out_specs=tokens, check_vma=False)(x)


def whole(table: Array) -> Array:
    """The table on every device: for small ones that tokens look up, which XLA would split and send the tokens after."""
    layout = current()
    return table if layout is None else jax.lax.with_sharding_constraint(table, NamedSharding(layout.mesh, PartitionSpec()))
