"""Weights that all recursions share, whose gradient is summed at once, after the last of them.

A loop over recursions makes a gradient as large as the weights at each of them, and adds it up. Where a call has far fewer rows
than the library has weights, the rows are kept instead: a `Port` is zeros handed to the call, whose gradient is the rows that met
the weights and what came back to them; its own backward rule multiplies those of all recursions.

    dw_m = Σ_r X_rmᵀ·G_rm        ‖X_rmᵀ·G_rm‖² = Σ_ij (x_i·x_j)(g_i·g_j) over the rows i, j of module m in recursion r

So the surprise of a module in one recursion needs no gradient of its own either. For the block loop of CPUs on one device.

Letters: R recursions, P rows of one call, M modules, I inputs, O outputs of one module, B rows of a block.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from tinyonn_jax.layers.kernels import blocks, loop, row_norms

RUN_ROWS = 32
"""For norms, so many rows of a module are multiplied with each other, or those of one recursion where they are more."""


@flax.struct.dataclass
class Port:
    """Zeros whose gradient is a call's rows `x`, sorted by module, what came back to them, `g`, and the rows of each module
    (as floats, as gradients are)."""

    x: Float[Array, "*R P I"]
    g: Float[Array, "*R P O"]
    sizes: Float[Array, "*R M"]


@flax.struct.dataclass
class Weight:
    """Weights that one call multiplies by, and its port: in `grouped.matmul` in place of an array `[M,I,O]`."""

    w: Float[Array, "M I O"]
    port: Port

    @property
    def shape(self) -> tuple[int, ...]:
        """(M, I, O)."""
        return self.w.shape

    def astype(self, dtype: Any) -> "Weight":
        """The same in another type."""
        return replace(self, w=self.w.astype(dtype))


def ports(modules: Any, recursions: int, pairs: int, dtype: Any, norms: Float[Array, "R M"] | None) -> tuple[Any, list]:
    """`modules`, weights `[M,I,O]` of a routed layer, cut from the gradient where a port takes it, and the ports of all
    recursions, for calls of `pairs` rows of type `dtype`; None where weights are the fewer numbers. The gradient of `norms` is
    ‖dw_m‖² in each recursion.
    """
    leaves, tree = jax.tree.flatten(modules)
    fewer = lambda w: pairs * (w.shape[1] + w.shape[2]) < w.size  # noqa: E731  rows of a call than weights, in numbers
    made = [_port((recursions, pairs, jnp.dtype(dtype)), w, norms) if fewer(w) else None for w in leaves]
    cut = [w if port is None else lax.stop_gradient(w) for w, port in zip(leaves, made, strict=True)]
    return tree.unflatten(cut), made


def attach(modules: Any, ports: list[Port | None]) -> Any:
    """The modules of one call, with its ports."""
    leaves, tree = jax.tree.flatten(modules)
    return tree.unflatten([w if port is None else Weight(w, port) for w, port in zip(leaves, ports, strict=True)])


def matmul(
    x: Float[Array, "P I"], weight: Weight, sizes: Int[Array, " M"], rows_tap: Float[Array, " P"] | None
) -> Float[Array, "P O"]:
    """`grouped.matmul` whose weight gradient goes through the port; the gradient of `rows_tap` is that of `grouped.Tap.rows`."""
    return _matmul(x, weight.w, weight.port, sizes, rows_tap)


@jax.custom_vjp
def _matmul(x, w, port, sizes, rows_tap):
    return loop.forward(x, w, sizes)


def _matmul_fwd(x, w, port, sizes, rows_tap):
    return loop.forward(x, w, sizes), (x, w, sizes, rows_tap)


def _matmul_bwd(saved, g):
    x, w, sizes, rows_tap = saved
    rows = None if rows_tap is None else row_norms(True, x, g, sizes)
    return loop.backward_rows(w, sizes, g), None, Port(x, g, sizes.astype(jnp.float32)), None, rows


_matmul.defvjp(_matmul_fwd, _matmul_bwd)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _port(shape, w, norms):
    recursions, pairs, dtype = shape
    rows = lambda size: jnp.zeros((recursions, pairs, size), dtype)  # noqa: E731
    return Port(rows(w.shape[1]), rows(w.shape[2]), jnp.zeros((recursions, w.shape[0]), jnp.float32))


def _port_bwd(shape, norms, d):
    dw, squares = weight_gradient(d.x, d.g, d.sizes.astype(jnp.int32), norms is not None)
    return dw, None if norms is None else squares


_port.defvjp(lambda shape, w, norms: (_port(shape, w, norms), norms), _port_bwd)


def weight_gradient(
    x: Float[Array, "R P I"], g: Float[Array, "R P O"], sizes: Int[Array, "R M"], normed: bool
) -> tuple[Float[Array, "M I O"], Float[Array, "R M"]]:
    """Σ_r X_rmᵀ·G_rm of every module, and, `normed`, the squared norm of every recursion's own part; float32.

    Rows of all recursions are sorted by module, then by recursion, and multiplied block by block.
    """
    (recursions, pairs, _), modules = x.shape, sizes.shape[1]
    origin, run = _sorted(sizes, pairs)
    total = recursions * pairs
    x, g = (a.reshape(-1, a.shape[-1])[origin] for a in (x, g))

    def body(m, start, own, dw):
        return loop.add_weights(dw, m, loop.rows(x, start, len(own)), loop.rows(g, start, len(own)), own)

    dw = loop.each_block(body, jnp.zeros((modules, x.shape[1], g.shape[1]), jnp.float32), jnp.sum(sizes, 0), total)
    return dw, _norms(x, g, run, sizes) if normed else jnp.zeros((recursions, modules), jnp.float32)


def _norms(x: Array, g: Array, run: Int[Array, " RP"], sizes: Int[Array, "R M"]) -> Float[Array, "R M"]:
    """‖X_rmᵀ·G_rm‖² from rows in order of their runs.

    Products of rows of two runs are made in vain, so a block is cut from one run, or from as many of a module as come to
    `RUN_ROWS` rows on average.
    """
    (recursions, modules), total = sizes.shape, run.size
    joined = min(max(RUN_ROWS * modules * recursions // total, 1), recursions)
    groups = -(-recursions // joined)
    group = jnp.pad(sizes, ((0, groups * joined - recursions), (0, 0))).reshape(groups, joined, modules).sum(1)
    size = loop.block(total, modules * groups)
    x, g = (jnp.pad(a, ((0, size), (0, 0))) for a in (x, g))
    run = jnp.pad(run, (0, size), constant_values=modules * recursions)
    count, table = blocks(group.T.reshape(-1), size, total)

    def rows_at(at):
        return loop.rows(x, at, size), loop.rows(g, at, size), loop.rows(run, at, size)

    def body(i, squares):
        _, first, rows = (loop.at(part, i) for part in table)
        own, last = rows_at(first), loop.at(run, first + rows - 1)

        def ahead(state):  # the run of the block's last row may go on in those that follow
            at, inner = state
            x, g, others = rows_at(at)
            return at + size, inner + 2 * _inner(own, (x, g, jnp.where(others == last, last, -1)))

        _, inner = lax.while_loop(lambda state: loop.at(run, state[0]) == last, ahead, (first + rows, _inner(own, own)))
        inner = jnp.where(jnp.arange(size) < rows, inner, 0)
        return lax.dynamic_update_slice_in_dim(squares, inner, first, 0, allow_negative_indices=False)

    squares = lax.fori_loop(0, count, body, jnp.zeros(run.size, jnp.float32))
    norms = jax.ops.segment_sum(squares, run, modules * recursions, indices_are_sorted=True)
    return jnp.maximum(norms.reshape(modules, recursions).T, 0)  # rounding may leave less than nothing


def _sorted(sizes: Int[Array, "R M"], pairs: int) -> tuple[Int[Array, " RP"], Int[Array, " RP"]]:
    """Rows of all recursions, each sorted by module, in one order by module, then recursion: where each comes from, and its run
    m·R + r; M·R for the idle ones, which come last."""
    recursions = sizes.shape[0]
    counts = sizes.T.reshape(-1)
    ends = jnp.cumsum(counts)
    place = jnp.arange(recursions * pairs)
    run = jnp.searchsorted(ends, place, side="right")
    known = jnp.minimum(run, counts.size - 1)
    start = (jnp.cumsum(sizes, 1) - sizes).T.reshape(-1)  # of the run in its recursion
    within = start[known] + place - (ends - counts)[known]
    return (known % recursions) * pairs + jnp.minimum(within, pairs - 1), run


def _inner(a: tuple[Array, Array, Array], b: tuple[Array, Array, Array]) -> Float[Array, " B"]:
    """For each row i of block a: Σ_j (x_i·x_j)(g_i·g_j) over the rows j of block b in the same run."""
    (x, g, run), (other_x, other_g, other_run) = a, b
    dot = partial(lax.dot_general, dimension_numbers=(((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
    return jnp.sum(jnp.where(run[:, None] == other_run, dot(x, other_x) * dot(g, other_g), 0), 1)
