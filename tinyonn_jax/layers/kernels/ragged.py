"""For TPUs: the backend's own grouped matmul, in tiles that fit.

Left to itself the TPU's compiler takes, for powers of two of rows and the widths of well-known models, tiles of 4,096 rows, which
exceed the memory of a core, and fails (libtpu 0.0.42, 0.0.50); rows that eight does not divide it multiplies by every module.
"""

from functools import partial

import jax.numpy as jnp
from jax import lax
from jax.custom_batching import sequential_vmap
from jax.experimental.xla_metadata import set_xla_metadata

from tinyonn_jax.layers.kernels import module_norms, row_norms

_CONTRACT_ROWS = lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[])
TILE = 128
"""Rows of a tile, and what its other sides are multiples of: the core multiplies so many by so many at once."""

VMEM = 6 << 20
"""Bytes that the weights in a tile may take, with what awaits them; all tiles of a call then fit into 16 MiB."""


def _tiling(inputs, outputs, each):
    """The tiles of a matmul with weights `[inputs, outputs]` that take `each` bytes an element, told to the TPU's compiler."""
    k = _part(inputs, 2048)
    return set_xla_metadata(ragged_dot_tiling=f"{TILE},{k},{_part(outputs, VMEM // each // k // TILE * TILE)}")


def _part(size, most):
    """The side of a tile: `size` in as few and as equal parts as `most` allows."""
    parts = -(-size // most)
    return size if parts == 1 else -(-size // parts // TILE) * TILE


def _whole(x):
    """x with as many rows of zeros as fill the last tile."""
    return jnp.pad(x, ((0, -x.shape[0] % TILE), (0, 0)))


def _dot(x, w, sizes):
    with _tiling(*w.shape[1:], each=2 * w.dtype.itemsize):  # this tile, and the next one on its way
        return lax.ragged_dot(_whole(x), w, sizes)[: x.shape[0]]


def _dot_rows(x, g, sizes, **how):
    with _tiling(x.shape[1], g.shape[1], each=3 * 4):  # float32: a sum, and two results on their way
        return lax.ragged_dot_general(_whole(x), _whole(g), sizes, **how)


def _owned(x, sizes):
    """x, zero past the last module's rows."""
    return jnp.where((jnp.arange(x.shape[0]) < jnp.sum(sizes))[:, None], x, 0)


def forward(x, w, sizes, dot=_dot):
    return _owned(sequential_vmap(dot)(x, w, sizes), sizes)  # JAX batches it over one axis only


def backward(tapped, x, w, sizes, g, dot=_dot, dot_general=_dot_rows):
    g = _owned(g, sizes)
    dx = forward(g, w.swapaxes(1, 2), sizes, dot)
    dot_general = partial(dot_general, ragged_dot_dimension_numbers=_CONTRACT_ROWS, preferred_element_type=jnp.float32)
    dw = sequential_vmap(dot_general)(x, g, sizes)
    return dx, dw.astype(w.dtype), row_norms(tapped, x, g, sizes), module_norms(tapped, dw)
