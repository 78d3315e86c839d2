"""For CPUs: a loop over blocks of rows, as many as the load asks for, so that nothing is dropped.

Where the load is even, the first rows of every module are one batched matmul instead, which keeps all cores busy, and the loop
runs the rest: what a layer of fixed capacity would drop. Where it is not, that would multiply mostly zeros.

A block's tail may spill over the next module's rows, which it leaves as they are.
"""

import jax
import jax.numpy as jnp
from jax import lax

from tinyonn_jax.layers.kernels import blocks, module_norms, places, row_norms, take

LEAST_ROOM = 32
"""Where a batched matmul has room for fewer rows of a module than this, the loop runs them all."""


def block(pairs: int, modules: int) -> int:
    """Rows in one block: a quarter more than the mean load of a module, so that most modules are one block and few run empty."""
    return min(max(_room(pairs, modules), 16), 160)


def _room(pairs: int, modules: int) -> int:
    """Rows of every module in the batched matmul."""
    return -(-5 * pairs // (32 * modules)) * 8


def forward(x, w, sizes):
    return _times(x, w, sizes, 0)


def backward_rows(w, sizes, g):
    """dx alone."""
    return _times(g, w, sizes, 1)


def _times(x, w, sizes, axis):
    """Every row times its module's weight, summed over this axis of a weight."""
    pairs, modules = x.shape[0], w.shape[0]
    size = block(pairs, modules)

    def batched(row, place):
        return take(_flat(lax.dot_general(take(x, row), w, (((2,), (1 + axis,)), ((0,), (0,))))), place)

    y, skip = _started(batched, sizes, pairs)
    count, locate = blocks(sizes, size, skip)
    padded = jnp.pad(x, ((0, size), (0, 0)))

    def body(i, y):
        m, first, rows = locate(i)
        part = lax.dynamic_slice_in_dim(padded, first, size)
        out = lax.dot_general(part, lax.dynamic_index_in_dim(w, m, keepdims=False), (((1,), (axis,)), ((), ())))
        return _put(y, out, first, rows)

    return lax.fori_loop(0, count, body, y)[:pairs]


def backward(tapped, x, w, sizes, g):
    pairs, modules = x.shape[0], w.shape[0]
    size = block(pairs, modules)

    def batched(row, place):
        first_x, first_g = take(x, row), take(g, row)
        dx = lax.dot_general(first_g, w, (((2,), (2,)), ((0,), (0,))))
        dw = lax.dot_general(first_x, first_g, (((1,), (1,)), ((0,), (0,))), preferred_element_type=jnp.float32)
        return take(_flat(dx), place), dw

    start, skip = _started(batched, sizes, pairs)
    count, locate = blocks(sizes, size, skip)
    padded_x, padded_g = (jnp.pad(a, ((0, size), (0, 0))) for a in (x, g))

    def body(i, carry):
        dx, dw = carry
        m, first, rows = locate(i)
        part_x = lax.dynamic_slice_in_dim(padded_x, first, size)
        part_g = jnp.where(jnp.arange(size)[:, None] < rows, lax.dynamic_slice_in_dim(padded_g, first, size), 0)
        part_dx = lax.dot_general(part_g, lax.dynamic_index_in_dim(w, m, keepdims=False), (((1,), (1,)), ((), ())))
        part_dw = lax.dot_general(part_x, part_g, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)
        dw = lax.dynamic_update_index_in_dim(dw, lax.dynamic_index_in_dim(dw, m, keepdims=False) + part_dw, m, 0)
        return _put(dx, part_dx, first, rows), dw

    dx, dw = lax.fori_loop(0, count, body, start)
    return dx[:pairs], dw.astype(w.dtype), row_norms(tapped, x, g, sizes), module_norms(tapped, dw)


def _put(y, out, first, rows):
    """y with the first rows of a block's output in their place; what lies behind them is another module's."""
    size = out.shape[0]
    out = jnp.where(jnp.arange(size)[:, None] < rows, out, lax.dynamic_slice_in_dim(y, first, size))
    return lax.dynamic_update_slice_in_dim(y, out, first, 0)


def _started(batched, sizes, pairs):
    """What the loop starts from and how many rows of every module are done: a batched matmul's where the load is even.

    `batched(row, place)` is told the row at each place of every module `[M,R]` and the place of each row, of M·R, and of those
    behind them that a block may spill into; past the end: none.
    """
    room, behind = _room(pairs, sizes.shape[0]), block(pairs, sizes.shape[0])
    lane, start = jnp.arange(room), jnp.cumsum(sizes) - sizes

    def even():
        row = jnp.where(lane < sizes[:, None], start[:, None] + lane, pairs + behind)
        return batched(row, places(row, pairs + behind)), room

    nothing = jax.tree.map(jnp.zeros_like, jax.eval_shape(even)[0])
    if room < LEAST_ROOM:
        return nothing, 0
    beyond = jnp.sum(jnp.maximum(sizes - room, 0))
    return lax.cond(4 * beyond <= jnp.sum(sizes), even, lambda: (nothing, 0))


def _flat(y):
    return y.reshape(-1, y.shape[-1])
