"""For anything that XLA runs: rows gathered into blocks of one module each, and one batched matmul with a weight per block.

The number of blocks is that of the worst load, so some are empty; blocks are a small share of a module's mean load. Letters: N
blocks, B rows of each.
"""

import jax.numpy as jnp
from jax.ops import segment_sum

from tinyonn_jax.layers.kernels import blocks, module_norms, places, power_of_two, row_norms, take


def _layout(sizes, pairs):
    """The module of each block `[N]`, the row at each place of it `[N,B]` (P: none), the place of each row `[P]` (N·B: none)."""
    modules = sizes.shape[0]
    block = power_of_two(pairs // modules // 8, 16, 512)
    _, (module, first, rows) = blocks(sizes, block, pairs)
    inside = jnp.arange(block)
    row = jnp.where(inside < rows[:, None], first[:, None] + inside, pairs)
    place = places(row, pairs)
    return module, row, place


def forward(x, w, sizes):
    module, row, place = _layout(sizes, x.shape[0])
    return take(jnp.matmul(take(x, row), w[module]).reshape(row.size, -1), place)


def backward(tapped, x, w, sizes, g):
    module, row, place = _layout(sizes, x.shape[0])
    part_x, part_g = take(x, row), take(g, row)
    dx = take(jnp.matmul(part_g, w[module].swapaxes(1, 2)).reshape(row.size, -1), place)
    each = jnp.matmul(part_x.swapaxes(1, 2), part_g, preferred_element_type=jnp.float32)
    dw = segment_sum(each, module, w.shape[0], indices_are_sorted=True)
    return dx, dw.astype(w.dtype), row_norms(tapped, x, g, sizes), module_norms(tapped, dw)
