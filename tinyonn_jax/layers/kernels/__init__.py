"""The grouped matmul's kernels: one module each, named as it is chosen, with the same two functions that agree to rounding.

    forward(x, w, sizes) -> y                                  y_p = x_p · w[m], the rows of module m following each other
    backward(tapped, x, w, sizes, g) -> dx, dw, rows, modules  tapped: with ‖x_p g_pᵀ‖² of every row, ‖dw_m‖² of every module

Rows past sum(sizes) may hold anything finite, count for nothing and come out as zero. Sums are float32 whatever the type of x.
Here is what the kernels share: rows cut into blocks of one module each.

Letters: P rows, M modules, I inputs, O outputs of one module.
"""

import importlib
from typing import Any, Literal

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

Kernel = Literal["loop", "ragged", "pallas", "padded", "dense", "tokamax"]
Choice = Literal["auto", Kernel]
TITLES: dict[Kernel, str] = {
    "loop": "block loop",
    "ragged": "lax.ragged_dot",
    "pallas": "Pallas kernel (Triton)",
    "padded": "padded blocks",
    "dense": "every module on every row",
    "tokamax": "tokamax.ragged_dot",
}


def load(kernel: Kernel) -> Any:
    """The module of a kernel, imported when it is first asked for.

    Raises:
        ImportError: it needs an optional package that is not installed.
    """
    return importlib.import_module(f"{__name__}.{kernel}")


def blocks(
    sizes: Int[Array, " M"], block: int, pairs: int, skip: int | Int[Array, "*M"] = 0, full: bool = False
) -> tuple[Int[Array, ""], tuple[Int[Array, " B"], Int[Array, " B"], Int[Array, " B"]]]:
    """How many blocks of at most `block` rows P = `pairs` rows make, and of each its module, its first row and its number of
    rows. There is room for as many as there may be, B = ⌊P / block⌋ + M; past the last one the number of rows is 0 or less. The
    first `skip` rows of every module are in none, and with `full` those at its end that fill no block either.
    """
    ends, rest = jnp.cumsum(sizes), jnp.maximum(sizes - skip, 0)
    own = lax.div(rest if full else rest + (block - 1), jnp.asarray(block, rest.dtype))
    last, i = jnp.cumsum(own), jnp.arange(pairs // block + sizes.shape[0])
    m = jnp.minimum(jnp.searchsorted(last, i, side="right", method="compare_all"), sizes.shape[0] - 1)
    first = (ends - rest + (own - last) * block)[m] + i * block
    return last[-1], (m, first, jnp.minimum(ends[m] - first, block))


def take(x: Float[Array, "P I"], index: Int[Array, "*N"]) -> Float[Array, "*N I"]:
    """x[index], zeros for what is past the end."""
    return x.at[index].get(mode="fill", fill_value=0)


def places(row: Int[Array, "*N"], pairs: int) -> Int[Array, " P"]:
    """Where in `row` each of P rows stands; past its end: nowhere."""
    return jnp.full(pairs, row.size).at[row.reshape(-1)].set(jnp.arange(row.size), mode="drop", unique_indices=True)


def power_of_two(x: int, least: int, most: int) -> int:
    """The smallest power of two that is at least x, between `least` and `most` (powers of two themselves)."""
    return min(max(1 << max(x - 1, 0).bit_length(), least), most)


def squares(x: Float[Array, "*N D"]) -> Float[Array, "*N"]:
    """Squared norms along the last axis, float32."""
    return jnp.sum(jnp.square(x.astype(jnp.float32)), -1)


def row_norms(tapped: bool, x: Float[Array, "P I"], g: Float[Array, "P O"], sizes: Int[Array, " M"]) -> Float[Array, " P"]:
    """‖x gᵀ‖² of every row, which is an outer product; 0 for rows past sum(sizes); nothing unless tapped."""
    return jnp.where(jnp.arange(x.shape[0]) < jnp.sum(sizes), squares(x) * squares(g), 0) if tapped else jnp.zeros(0)


def module_norms(tapped: bool, dw: Float[Array, "*M I O"]) -> Array:
    """‖dw‖² of every module; nothing unless tapped."""
    return jnp.sum(jnp.square(dw.astype(jnp.float32)), (-2, -1)) if tapped else jnp.zeros(0)
