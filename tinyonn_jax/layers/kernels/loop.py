"""For CPUs: a loop over blocks of rows, as many as the load asks for, so that nothing is dropped and nothing is padded.

A block's tail may spill over the next module's rows: blocks run in order, so the owner overwrites it.
"""

import jax.numpy as jnp
from jax import lax

from tinyonn_jax.layers.kernels import blocks, module_norms, row_norms


def block(pairs: int, modules: int) -> int:
    """Rows in one block: a quarter more than the mean load of a module, so that most modules are one block and few run empty."""
    return min(max(-(-5 * pairs // (32 * modules)) * 8, 16), 160)


def forward(x, w, sizes):
    return _times(x, w, sizes, 0)


def backward_rows(w, sizes, g):
    """dx alone."""
    return _times(g, w, sizes, 1)


def _times(x, w, sizes, axis):
    """Every row times its module's weight, summed over this axis of a weight."""
    size = block(x.shape[0], w.shape[0])
    count, locate = blocks(sizes, size)
    padded = jnp.pad(x, ((0, size), (0, 0)))

    def body(i, y):
        m, first, rows = locate(i)
        part = lax.dynamic_slice_in_dim(padded, first, size)
        out = lax.dot_general(part, lax.dynamic_index_in_dim(w, m, keepdims=False), (((1,), (axis,)), ((), ())))
        out = jnp.where(jnp.arange(size)[:, None] < rows, out, 0)
        return lax.dynamic_update_slice_in_dim(y, out, first, 0)

    y = jnp.zeros((x.shape[0] + size, w.shape[2 - axis]), x.dtype)
    return lax.fori_loop(0, count, body, y)[: x.shape[0]]


def backward(tapped, x, w, sizes, g):
    size = block(x.shape[0], w.shape[0])
    count, locate = blocks(sizes, size)
    padded_x, padded_g = (jnp.pad(a, ((0, size), (0, 0))) for a in (x, g))

    def body(i, carry):
        dx, dw, per_row = carry
        m, first, rows = locate(i)
        counts = jnp.arange(size)[:, None] < rows
        part_x = lax.dynamic_slice_in_dim(padded_x, first, size)
        part_g = jnp.where(counts, lax.dynamic_slice_in_dim(padded_g, first, size), 0)
        part_dx = lax.dot_general(part_g, lax.dynamic_index_in_dim(w, m, keepdims=False), (((1,), (1,)), ((), ())))
        part_dw = lax.dot_general(part_x, part_g, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)
        dx = lax.dynamic_update_slice_in_dim(dx, part_dx, first, 0)
        dw = lax.dynamic_update_index_in_dim(dw, lax.dynamic_index_in_dim(dw, m, keepdims=False) + part_dw, m, 0)
        if tapped:
            per_row = lax.dynamic_update_slice_in_dim(per_row, row_norms(tapped, part_x, part_g), first, 0)
        return dx, dw, per_row

    rows = x.shape[0]
    start = jnp.zeros_like(padded_x), jnp.zeros(w.shape, jnp.float32), jnp.zeros((rows + size if tapped else 0,), jnp.float32)
    dx, dw, per_row = lax.fori_loop(0, count, body, start)
    return dx[:rows], dw.astype(w.dtype), per_row[:rows], module_norms(tapped, dw)
