"""Grouped matmul: rows sorted by module times one weight per module; dropless, with its own gradient rule.

The (token, slot) pairs are sorted by module, so that module m's rows are consecutive; pairs of idle slots come last and are
never computed. `matmul` is one function with two implementations that agree to rounding: a loop over blocks of rows on CPU
(the number of blocks follows the load, so nothing is dropped and nothing is padded), `lax.ragged_dot` on GPU and TPU.

Letters: N tokens, K slots, P = N·K pairs, M modules, I inputs, O outputs of one module.
"""

from functools import partial
from typing import Literal

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

Implementation = Literal["auto", "loop", "ragged"]


@flax.struct.dataclass
class Plan:
    """The sorted order of P pairs: `order[row]` the pair at a row, `inverse[pair]` its row, `sizes[m]` the rows of module m."""

    order: Int[Array, " P"]
    inverse: Int[Array, " P"]
    sizes: Int[Array, " M"]


@flax.struct.dataclass
class Tap:
    """Zeros whose gradients are squared norms: of each row's own weight gradient `rows [P]`, of each module's `modules [M]`."""

    rows: Float[Array, " P"]
    modules: Float[Array, " M"]


def plan(index: Int[Array, "N K"], active: Bool[Array, "N K"], modules: int) -> Plan:
    """Sorts the pairs by module, stably, idle ones last. A counting sort: modules are few, so ranks are a running count."""
    key = jnp.where(active, index, modules).reshape(-1)
    hit = (key[:, None] == jnp.arange(modules + 1)).astype(jnp.int32)  # [P,M+1]
    count = jnp.cumsum(hit, 0)
    sizes = count[-1]
    start = jnp.cumsum(sizes) - sizes
    inverse = jnp.sum(hit * (start + count - 1), -1)
    order = jnp.zeros_like(inverse).at[inverse].set(jnp.arange(key.size, dtype=inverse.dtype), unique_indices=True)
    return Plan(order, inverse, sizes[:modules])


@jax.custom_vjp
def permute(x: Float[Array, "P *I"], order: Int[Array, " P"], inverse: Int[Array, " P"]) -> Float[Array, "P *I"]:
    """x[order] for a permutation; its gradient is the gather with `inverse`, not a scatter."""
    return x[order]


permute.defvjp(
    lambda x, order, inverse: (x[order], (order, inverse)),
    lambda saved, g: (permute(g, saved[1], saved[0]), None, None),
)


@jax.custom_vjp
def move(x: Float[Array, "P *I"], source: Int[Array, " Q"], place: Int[Array, " P"]) -> Float[Array, "Q *I"]:
    """x[source], zero where there is none (-1). `place` is its inverse, -1 for rows that go nowhere; the gradient moves by it."""
    rows = x[jnp.maximum(source, 0)]
    return jnp.where((source >= 0).reshape(-1, *(1,) * (x.ndim - 1)), rows, 0)


move.defvjp(
    lambda x, source, place: (move(x, source, place), (source, place)),
    lambda saved, g: (move(g, saved[1], saved[0]), None, None),
)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _spread(slots: int, x: Array, p: Plan) -> Array:
    return x[p.order // slots]


_spread.defvjp(
    lambda slots, x, p: (x[p.order // slots], p.inverse),
    lambda slots, inverse, g: (g[inverse].reshape(-1, slots, g.shape[-1]).sum(1), None),
)


def dispatch(x: Float[Array, "N I"], p: Plan) -> Float[Array, "P I"]:
    """Every token's row once for each of its slots, in sorted order; the gradient gathers the slots back and sums them."""
    return _spread(p.order.size // x.shape[0], x, p)


def matmul(
    x: Float[Array, "P I"],
    w: Float[Array, "M I O"],
    sizes: Int[Array, " M"],
    tap: Tap | None = None,
    implementation: Implementation = "auto",
) -> Float[Array, "P O"]:
    """Row p times the weight of its module; rows past sum(sizes) give zero.

    The gradient of `tap`, if given, is for each row the squared norm of the weight gradient that this row alone causes,
    ‖x_p‖²·‖dL/dy_p‖² (exact: it is an outer product), and for each module ‖dL/dw_m‖², both float32.
    """
    return _matmul(implementation, x, w, sizes, tap)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _matmul(implementation, x, w, sizes, tap):
    return _choose(implementation, _loop_forward, _ragged_forward, x, w, sizes)


def _matmul_fwd(implementation, x, w, sizes, tap):
    return _matmul(implementation, x, w, sizes, tap), (x, w, sizes, tap)


def _matmul_bwd(implementation, saved, g):
    x, w, sizes, tap = saved
    if tap is None:
        dx, dw, _ = _choose(implementation, partial(_loop_backward, False), partial(_ragged_backward, False), x, w, sizes, g)
        return dx, dw, None, None
    dx, dw, rows = _choose(implementation, partial(_loop_backward, True), partial(_ragged_backward, True), x, w, sizes, g)
    return dx, dw, None, Tap(rows, jnp.sum(jnp.square(dw.astype(jnp.float32)), (1, 2)))


_matmul.defvjp(_matmul_fwd, _matmul_bwd)


def _choose(implementation: Implementation, loop, ragged, *args):
    match implementation:
        case "loop":
            return loop(*args)
        case "ragged":
            return ragged(*args)
        case _:
            return lax.platform_dependent(*args, cpu=loop, default=ragged)


# --- CPU: a loop over blocks of rows --------------------------------------------------------------------------------


def _block(pairs: int, modules: int) -> int:
    """Rows in one block: about the mean load of a module, so that few blocks run part empty, between 16 and 128."""
    size = 16
    while size < 128 and size * modules < pairs:
        size *= 2
    return size


def _blocks(sizes: Array, block: int):
    """How many blocks there are, and a function from a block's number to (module, first row, rows of it that count).

    A block's tail may spill over the next module's rows: blocks run in order, so the owner overwrites it.
    """
    ends = jnp.cumsum(sizes)
    last = jnp.cumsum(-(-sizes // block))

    def locate(i):
        m = jnp.searchsorted(last, i, side="right", method="compare_all")
        remaining = (last[m] - i) * block  # from this block's first row to the end of the module's last block
        first = ends[m] - sizes[m] + (-(-sizes[m] // block)) * block - remaining
        return m, first, jnp.minimum(ends[m] - first, block)

    return last[-1], locate


def _loop_forward(x, w, sizes):
    block = _block(x.shape[0], w.shape[0])
    count, locate = _blocks(sizes, block)
    padded = jnp.pad(x, ((0, block), (0, 0)))

    def body(i, y):
        m, first, rows = locate(i)
        part = lax.dynamic_slice_in_dim(padded, first, block)
        out = part @ lax.dynamic_index_in_dim(w, m, keepdims=False)
        out = jnp.where(jnp.arange(block)[:, None] < rows, out, 0)
        return lax.dynamic_update_slice_in_dim(y, out, first, 0)

    y = jnp.zeros((x.shape[0] + block, w.shape[2]), x.dtype)
    return lax.fori_loop(0, count, body, y)[: x.shape[0]]


def _loop_backward(tapped, x, w, sizes, g):
    block = _block(x.shape[0], w.shape[0])
    count, locate = _blocks(sizes, block)
    padded_x, padded_g = (jnp.pad(a, ((0, block), (0, 0))) for a in (x, g))

    def body(i, carry):
        dx, dw, norms = carry
        m, first, rows = locate(i)
        counts = jnp.arange(block)[:, None] < rows
        part_x = lax.dynamic_slice_in_dim(padded_x, first, block)
        part_g = jnp.where(counts, lax.dynamic_slice_in_dim(padded_g, first, block), 0)
        part_dx = lax.dot_general(part_g, lax.dynamic_index_in_dim(w, m, keepdims=False), (((1,), (1,)), ((), ())))
        part_dw = lax.dot_general(part_x, part_g, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)
        dx = lax.dynamic_update_slice_in_dim(dx, part_dx, first, 0)
        dw = lax.dynamic_update_index_in_dim(dw, lax.dynamic_index_in_dim(dw, m, keepdims=False) + part_dw, m, 0)
        if tapped:
            norms = lax.dynamic_update_slice_in_dim(norms, _outer_norm(part_x, part_g), first, 0)
        return dx, dw, norms

    rows = x.shape[0]
    start = jnp.zeros_like(padded_x), jnp.zeros(w.shape, jnp.float32), jnp.zeros((rows + block if tapped else 0,), jnp.float32)
    dx, dw, norms = lax.fori_loop(0, count, body, start)
    return dx[:rows], dw.astype(w.dtype), norms[:rows]


def _outer_norm(x, g):
    """‖x gᵀ‖² of each row, float32."""
    return jnp.sum(jnp.square(x.astype(jnp.float32)), -1) * jnp.sum(jnp.square(g.astype(jnp.float32)), -1)


# --- GPU and TPU: the backend's own grouped matmul -------------------------------------------------------------------


def _ragged_forward(x, w, sizes):
    y = lax.ragged_dot(x, w, sizes)
    return jnp.where((jnp.arange(x.shape[0]) < jnp.sum(sizes))[:, None], y, 0)


def _ragged_backward(tapped, x, w, sizes, g):
    g = jnp.where((jnp.arange(x.shape[0]) < jnp.sum(sizes))[:, None], g, 0)
    dx = _ragged_forward(g, w.swapaxes(1, 2), sizes)
    contract_rows = lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[])
    dw = lax.ragged_dot_general(x, g, sizes, contract_rows, preferred_element_type=jnp.float32)
    return dx, dw.astype(w.dtype), _outer_norm(x, g) if tapped else jnp.zeros((0,), jnp.float32)
