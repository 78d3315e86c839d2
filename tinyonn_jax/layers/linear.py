"""One linear map per module, on the tokens routed to it: `project` into the slots, `merge` out of them.

    project:  y_nk = x_n · w[index_nk]            merge:  y_n = Σ_k weight_nk · x_nk · w[index_nk]

Two ways that agree to rounding. Where a token uses a fair share of the modules (M ≤ 4·K), all modules run on all tokens, as one
plain matmul, and the slots are picked out of it; else pairs are sorted by module and only what is used is computed (`grouped`).

Letters: N tokens, K slots, M modules, I inputs, O outputs of one module.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tinyonn_jax.layers import grouped
from tinyonn_jax.layers import tap as taps
from tinyonn_jax.layers.experts import grouped_tap
from tinyonn_jax.layers.routing import Routing


def project(x: Float[Array, "N I"], w: Float[Array, "M I O"], routing: Routing, tap: taps.Tap | None) -> Float[Array, "N K O"]:
    """Every slot's map of its token; idle slots give zero. Of the tap, `param` and `module` are filled."""
    slots, modules = routing.index.shape[1], w.shape[0]
    if modules <= 4 * slots:
        return _dense_project(x, w, routing.index, routing.active, tap)
    plan = grouped.plan(routing.index, routing.active, modules)
    rows = grouped.matmul(grouped.dispatch(x, plan), w, plan.sizes, grouped_tap(tap, plan))
    return grouped.permute(rows, plan.inverse, plan.order).reshape(-1, slots, w.shape[2])


def merge(x: Float[Array, "N K I"], w: Float[Array, "M I O"], routing: Routing, tap: taps.Tap | None) -> Float[Array, "N O"]:
    """The weighted sum of every slot's map of its own vector. All of the tap is filled."""
    _, slots, size = x.shape
    if w.shape[0] <= 4 * slots:
        return _dense_merge(x, w, routing.weight, routing.index, routing.active, tap)
    plan = grouped.plan(routing.index, routing.active, w.shape[0])
    rows = grouped.permute(x.reshape(-1, size), plan.order, plan.inverse)
    rows = grouped.matmul(rows, w, plan.sizes, grouped_tap(tap, plan))
    outputs = grouped.permute(rows, plan.inverse, plan.order).reshape(-1, slots, w.shape[2])
    return taps.combine(outputs, routing.weight, tap)


# --- all modules on all tokens ------------------------------------------------------------------------------------------


def _pick(y: Float[Array, "N M O"], index: Int[Array, "N K"], active: Array) -> Float[Array, "N K O"]:
    return jnp.where(active[..., None], jax.vmap(lambda rows, at: rows[at])(y, index), 0)


def _spread(y: Float[Array, "N K O"], index: Int[Array, "N K"], active: Array, modules: int) -> Float[Array, "N M O"]:
    """The slots back in their modules' places, zero elsewhere: a gather, as a module is in one slot of a token at most."""
    hit = (index[:, :, None] == jnp.arange(modules)) & active[:, :, None]  # [N,K,M]
    return _pick(y, jnp.argmax(hit, 1), jnp.any(hit, 1))


def _square(x: Array) -> Array:
    return jnp.sum(jnp.square(x.astype(jnp.float32)), -1)


@jax.custom_vjp
def _dense_project(x, w, index, active, tap):
    return _dense_project_fwd(x, w, index, active, tap)[0]


def _dense_project_fwd(x, w, index, active, tap):
    modules, inputs, _ = w.shape
    y = x @ w.swapaxes(0, 1).reshape(inputs, -1)
    return _pick(y.reshape(x.shape[0], modules, -1), index, active), (x, w, index, active, tap)


def _dense_project_bwd(saved, g):
    x, w, index, active, tap = saved
    modules, inputs, outputs = w.shape
    spread = _spread(g, index, active, modules).reshape(x.shape[0], -1)  # [N,M·O]
    d_x = spread @ w.swapaxes(1, 2).reshape(-1, inputs)
    d_w = jnp.matmul(x.T, spread, preferred_element_type=jnp.float32).reshape(inputs, modules, outputs).swapaxes(0, 1)
    if tap is None:
        return d_x, d_w.astype(w.dtype), None, None, None
    zero = jnp.zeros_like(tap.output)
    param = jnp.where(active, _square(x)[:, None] * _square(g), 0)
    return d_x, d_w.astype(w.dtype), None, None, taps.Tap(zero, zero, param, jnp.sum(jnp.square(d_w), (1, 2)))


_dense_project.defvjp(_dense_project_fwd, _dense_project_bwd)


@jax.custom_vjp
def _dense_merge(x, w, weight, index, active, tap):
    return _dense_merge_fwd(x, w, weight, index, active, tap)[0]


def _weighed(x, weight, index, active, modules):
    return _spread(x * weight[..., None].astype(x.dtype), index, active, modules).reshape(x.shape[0], -1)  # [N,M·I]


def _dense_merge_fwd(x, w, weight, index, active, tap):
    y = _weighed(x, weight, index, active, w.shape[0]) @ w.reshape(-1, w.shape[2])
    return y, (x, w, weight, index, active, tap)


def _dense_merge_bwd(saved, g):
    x, w, weight, index, active, tap = saved
    modules = w.shape[0]
    rows = _weighed(x, weight, index, active, modules)
    d_w = jnp.matmul(rows.T, g, preferred_element_type=jnp.float32).reshape(w.shape)
    d_rows = _pick((g @ w.reshape(-1, w.shape[2]).T).reshape(x.shape[0], modules, -1), index, active)  # dL/d(weight · x)
    d_x = d_rows * weight[..., None].astype(g.dtype)
    d_weight = jnp.sum((d_rows * x).astype(jnp.float32), -1)
    if tap is None:
        return d_x, d_w.astype(w.dtype), d_weight, None, None, None
    output = jnp.square(weight) * _square(g)[:, None]
    param = jnp.where(active, output * _square(x), 0)
    module = jnp.sum(jnp.square(d_w), (1, 2))
    return d_x, d_w.astype(w.dtype), d_weight, None, None, taps.Tap(output, jnp.square(weight * d_weight), param, module)


_dense_merge.defvjp(_dense_merge_fwd, _dense_merge_bwd)
