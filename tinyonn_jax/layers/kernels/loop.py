"""For CPUs: a loop over blocks of rows, as many as the load asks for, so that nothing is dropped.

Where the load is even, the first rows of every module are one batched matmul instead, which keeps all cores busy, and the loop
runs the rest: what a layer of fixed capacity would drop. Where it is not, that would multiply mostly zeros.

A block may reach over rows of the modules beside its own, which it leaves as they are.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from tinyonn_jax.layers.kernels import blocks, module_norms, places, row_norms, take

LEAST_ROOM = 32
"""Where a batched matmul has room for fewer rows of a module than this, the loop runs them all."""

LARGE = 384
"""Rows of the blocks that a module's rows are cut into first: to take out its weight, and to add to its gradient, costs the same
for any number of them."""


def block(pairs: int, modules: int) -> int:
    """Rows of the blocks that take the rest: a quarter more than the mean load of a module, so that most modules are one block
    and few run empty."""
    return min(max(_room(pairs, modules), 16), 128, pairs)


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

    def batched(row, place):
        return take(_flat(lax.dot_general(take(x, row), w, (((2,), (1 + axis,)), ((0,), (0,))))), place)

    y, skip = _started(batched, sizes, x.shape[0])

    def body(m, start, own, y):
        part = lax.dot_general(rows(x, start, len(own)), at(w, m), (((1,), (axis,)), ((), ())))
        return _put(y, part, start, own)

    return each_block(body, y, sizes, x.shape[0], skip)


def backward(tapped, x, w, sizes, g):
    def batched(row, place):
        first_x, first_g = take(x, row), take(g, row)
        dx = lax.dot_general(first_g, w, (((2,), (2,)), ((0,), (0,))))
        dw = lax.dot_general(first_x, first_g, (((1,), (1,)), ((0,), (0,))), preferred_element_type=jnp.float32)
        return take(_flat(dx), place), dw

    done, skip = _started(batched, sizes, x.shape[0])

    def body(m, start, own, carry):
        dx, dw = carry
        part_x, part_g = rows(x, start, len(own)), rows(g, start, len(own))
        dx = _put(dx, lax.dot_general(part_g, at(w, m), (((1,), (1,)), ((), ()))), start, own)
        return dx, add_weights(dw, m, part_x, part_g, own)

    dx, dw = each_block(body, done, sizes, x.shape[0], skip)
    return dx, dw.astype(w.dtype), row_norms(tapped, x, g, sizes), module_norms(tapped, dw)


def add_weights(dw, m, x, g, own):
    """dw with xᵀg of a block's own rows added to that of its module."""
    if x.shape[1] < g.shape[1]:  # zeros in either leave the rows of other modules out of the sum
        x = jnp.where(own, x, 0)
    else:
        g = jnp.where(own, g, 0)
    part = lax.dot_general(x, g, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)
    return lax.dynamic_update_index_in_dim(dw, at(dw, m) + part, m, 0, allow_negative_indices=False)


def each_block(body, carry, sizes, pairs, skip: int | Array = 0):
    """`body(module, start, own, carry) -> carry` for every block: its module, where to cut it out so that it ends before the last
    row, and which of its rows `[rows,1]` are the module's own. The first `skip` rows of every module are in none."""

    def run(size, full, carry):
        count, (module, first, rows) = blocks(sizes, size, pairs, skip, full)
        start = jnp.minimum(first, pairs - size)
        table, row = (module, start, first - start, first - start + rows), jnp.arange(size)[:, None]

        def one(i, carry):
            m, start, low, high = (at(part, i) for part in table)
            return body(m, start, (row >= low) & (row < high), carry)

        return lax.fori_loop(0, count, one, carry)

    if pairs >= LARGE:
        carry = run(LARGE, True, carry)
        skip = sizes - jnp.maximum(sizes - skip, 0) % LARGE
    return run(block(pairs, sizes.shape[0]), False, carry)


def at(x, i):
    """x[i], without the operations that negative indices would take."""
    return lax.dynamic_index_in_dim(x, i, keepdims=False, allow_negative_indices=False)


def rows(x, start, size):
    """x[start : start + size], likewise."""
    return lax.dynamic_slice_in_dim(x, start, size, allow_negative_indices=False)


def _put(y, out, start, own):
    """y with a block's output in its place; rows that are not its own stay as they are."""
    out = jnp.where(own, out, rows(y, start, own.size))
    return lax.dynamic_update_slice_in_dim(y, out, start, 0, allow_negative_indices=False)


def _started(batched, sizes, pairs):
    """What the loop starts from and how many rows of every module are done: a batched matmul's where the load is even.

    `batched(row, place)` is told the row at each place of every module `[M,R]` and the place of each row, of M·R; past the end:
    none.
    """
    room = _room(pairs, sizes.shape[0])
    lane, start = jnp.arange(room), jnp.cumsum(sizes) - sizes

    def first():
        row = jnp.where(lane < sizes[:, None], start[:, None] + lane, pairs)
        return batched(row, places(row, pairs))

    nothing = jax.tree.map(jnp.zeros_like, jax.eval_shape(first))
    if room < LEAST_ROOM:
        return nothing, 0
    even = 4 * jnp.sum(jnp.maximum(sizes - room, 0)) <= jnp.sum(sizes)
    # Not out of the branch, so that all calls with these sizes have one table of blocks.
    return lax.cond(even, first, lambda: nothing), jnp.where(even, room, 0)


def _flat(y):
    return y.reshape(-1, y.shape[-1])
