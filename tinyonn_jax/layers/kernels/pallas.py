"""For GPUs: kernels of our own in Pallas (Triton); on CPU they are interpreted, for tests.

One program makes one tile of the result: of y and dx, a block of one module's rows by some columns; of dw, some inputs by some
outputs, summed over the module's rows in order, so that results repeat bit for bit. The norms of modules come out of the same
tiles; those of rows would be summed again in every tile of a row, and are left to XLA. Rows past the last module are one more
module, whose rows are zero. float32 is multiplied in full (no TF32).
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import sequential_vmap
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from tinyonn_jax.layers.kernels import blocks, padded, power_of_two, row_norms


class _Tile(NamedTuple):
    """Rows, columns, and how much is summed over at a time."""

    rows: int
    columns: int
    inner: int


LARGE_SHARED = ("8.0", "9.0", "10.0")
"""Compute capabilities with the 144 KiB of shared memory that three stages of wide tiles take."""


def _tile(rows: int, columns: int, inner: int, dtype) -> _Tile:
    """At most 128 × 256, 64 at a time; half as wide on GPUs with little shared memory, and half as wide and deep for float32."""
    half = dtype.itemsize == 2
    wide = half and getattr(jax.devices()[0], "compute_capability", None) in LARGE_SHARED
    return _Tile(
        power_of_two(rows, 16, 128), power_of_two(columns, 16, 256 if wide else 128), power_of_two(inner, 16, 64 if half else 32)
    )


def _at(first, length: int, limit):
    """A range of indices, and which of them lie below the limit."""
    return pl.ds(first, length), first + jnp.arange(length) < limit


def _load(ref, index, inside):
    """The tile at an index (module, if there is one, rows, columns), zero outside."""
    a, b = inside
    return triton.load(ref.at[index], mask=a[:, None] & b[None], other=0)


def _dot(a, b, **transposed):
    return triton.dot(a, b, precision=lax.Precision.HIGHEST if a.dtype == jnp.float32 else None, **transposed)


def _call(kernel, grid: tuple[int, ...], out, *args):
    call = partial(pl.pallas_call, kernel, grid=grid, out_shape=out)
    params = triton.CompilerParams(num_warps=8, num_stages=3)
    run = partial(lax.platform_dependent, cpu=call(interpret=True), default=call(compiler_params=params))
    return sequential_vmap(run)(*args)  # JAX does not batch kernels whose every index is computed


# --- y and dx: a row of blocks times the weight of its module ------------------------------------------------------------


def _rows_kernel(tile: _Tile, modules: int, transposed: bool, module_ref, first_ref, rows_ref, a_ref, w_ref, out_ref):
    """out = a · w, or a · wᵀ."""
    column, block = pl.program_id(0), pl.program_id(1)
    module, first, rows = module_ref[block], first_ref[block], rows_ref[block]
    inputs, outputs = a_ref.shape[1], out_ref.shape[1]
    at_rows, owned = pl.ds(first, tile.rows), jnp.arange(tile.rows) < rows
    at_columns, below = _at(column * tile.columns, tile.columns, outputs)

    @pl.when(rows > 0)
    def _():
        def body(k, total):
            at, inside = _at(k * tile.inner, tile.inner, inputs)
            a = _load(a_ref, (at_rows, at), (owned, inside))
            if transposed:
                w = _load(w_ref, (module, at_columns, at), (below, inside))
            else:
                w = _load(w_ref, (module, at, at_columns), (inside, below))
            return total + _dot(a, w, trans_b=transposed)

        start = jnp.zeros((tile.rows, tile.columns), jnp.float32)
        steps = jnp.where(module < modules, jnp.int32(pl.cdiv(inputs, tile.inner)), jnp.int32(0))
        total = lax.fori_loop(jnp.int32(0), steps, body, start)
        triton.store(out_ref.at[at_rows, at_columns], total.astype(out_ref.dtype), mask=owned[:, None] & below[None])


def _times(a, w, sizes, transposed: bool):
    """a · w by modules, or a · wᵀ."""
    pairs, modules, columns = a.shape[0], w.shape[0], w.shape[1 if transposed else 2]
    tile = _tile(-(-pairs // modules), columns, a.shape[1], a.dtype)
    everything = jnp.append(sizes, pairs - jnp.sum(sizes)).astype(jnp.int32)
    table = [part.astype(jnp.int32) for part in blocks(everything, tile.rows, pairs)[1]]
    grid = pl.cdiv(columns, tile.columns), table[0].size  # columns change fastest: blocks of rows are read once
    out = jax.ShapeDtypeStruct((pairs, columns), a.dtype)
    return _call(partial(_rows_kernel, tile, modules, transposed), grid, out, *table, a, w)


# --- dw: rows of x and g, summed over a module ------------------------------------------------------------------------------


def _weights_kernel(tile: _Tile, tapped: bool, first_ref, size_ref, x_ref, g_ref, dw_ref, *norm_ref):
    i, j, module = (pl.program_id(axis) for axis in range(3))
    first, size = first_ref[module], size_ref[module]
    at_inputs, left = _at(i * tile.rows, tile.rows, x_ref.shape[1])
    at_outputs, right = _at(j * tile.columns, tile.columns, g_ref.shape[1])

    def body(k, total):
        at, owned = _at(first + k * tile.inner, tile.inner, first + size)
        x = _load(x_ref, (at, at_inputs), (owned, left))
        return total + _dot(x, _load(g_ref, (at, at_outputs), (owned, right)), trans_a=True)

    start = jnp.zeros((tile.rows, tile.columns), jnp.float32)
    total = lax.fori_loop(jnp.int32(0), (size + tile.inner - 1) // tile.inner, body, start)
    triton.store(dw_ref.at[module, at_inputs, at_outputs], total.astype(dw_ref.dtype), mask=left[:, None] & right[None])
    if tapped:
        norm_ref[0][i, j, module] = jnp.sum(jnp.square(total))


def _weights(tapped, x, w, sizes, g):
    """dw, and, tapped, the squared norm of every module's."""
    modules, inputs, outputs = w.shape
    tile = _tile(inputs, outputs, -(-x.shape[0] // modules), x.dtype)
    grid = pl.cdiv(inputs, tile.rows), pl.cdiv(outputs, tile.columns), modules
    out = (jax.ShapeDtypeStruct(w.shape, w.dtype), jax.ShapeDtypeStruct(grid, jnp.float32))[: 2 if tapped else 1]
    starts = (jnp.cumsum(sizes) - sizes).astype(jnp.int32)
    dw, *norm = _call(partial(_weights_kernel, tile, tapped), grid, out, starts, sizes.astype(jnp.int32), x, g)
    return dw, jnp.sum(norm[0], (0, 1)) if tapped else jnp.zeros(0)


@jax.custom_jvp
def forward(x, w, sizes):
    return _times(x, w, sizes, transposed=False)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def backward(tapped, x, w, sizes, g):
    dw, modules = _weights(tapped, x, w, sizes, g)
    return _times(g, w, sizes, transposed=True), dw, row_norms(tapped, x, g, sizes), modules


# JAX does not differentiate kernels: the derivative of a gradient is that of the same sums in plain operations.
forward.defjvp(lambda args, tangents: jax.jvp(padded.forward, args, tangents))
backward.defjvp(lambda tapped, args, tangents: jax.jvp(partial(padded.backward, tapped), args, tangents))
