"""One linear map per module, on the tokens routed to it: `project` into the slots, `merge` out of them.

    project:  y_nk = x_n · w[index_nk]            merge:  y_n = Σ_k weight_nk · x_nk · w[index_nk]

Two ways that agree to rounding. Where a token uses a fair share of the modules (M ≤ 4·K), all modules run on all tokens, as one
plain matmul, and the slots are picked out of it; else pairs are sorted by module and only what is used is computed (`grouped`).

Letters: N tokens, K slots, M modules, I inputs, O outputs of one module.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from tinyonn_jax.layers import grouped, parallel
from tinyonn_jax.layers import tap as taps
from tinyonn_jax.layers.base import contract_rows
from tinyonn_jax.layers.experts import grouped_tap
from tinyonn_jax.layers.kernels import module_norms, squares
from tinyonn_jax.layers.routing import Routing, held


def project(x: Float[Array, "N I"], w: Float[Array, "M I O"], routing: Routing, tap: taps.Tap | None) -> Float[Array, "N K O"]:
    """Every slot's map of its token; idle slots give zero. Of the tap, `param` and `module` are filled."""
    run = _all_project if all_modules(w.shape[0], routing.weight.shape[1]) else _sorted_project
    return parallel.run(run, [w], [("experts", "embed", None)], x, routing, tap)


def merge(x: Float[Array, "N K I"], w: Float[Array, "M I O"], routing: Routing, tap: taps.Tap | None) -> Float[Array, "N O"]:
    """The weighted sum of every slot's map of its own vector. All of the tap is filled."""
    run = _all_merge if all_modules(w.shape[0], routing.weight.shape[1]) else _sorted_merge
    return parallel.run(run, [w], [("experts", None, "embed")], x, routing, tap)


def all_modules(modules: int, slots: int) -> bool:
    """Whether all modules run on all tokens."""
    return modules <= 4 * slots


# --- sorted pairs -------------------------------------------------------------------------------------------------------


def _sorted_project(weights, x, routing, tap):
    (w,) = weights
    plan = grouped.plan(routing.slots, routing.active, w.shape[0])
    rows = grouped.matmul(grouped.dispatch(x, plan), w, plan.sizes, grouped_tap(tap, plan))
    return grouped.permute(rows, plan.inverse, plan.order).reshape(*routing.weight.shape, -1)


def _sorted_merge(weights, x, routing, tap):
    (w,) = weights
    plan = grouped.plan(routing.slots, routing.active, w.shape[0])
    rows = grouped.permute(x.reshape(-1, x.shape[-1]), plan.order, plan.inverse)
    rows = grouped.matmul(rows, w, plan.sizes, grouped_tap(tap, plan))
    outputs = grouped.permute(rows, plan.inverse, plan.order).reshape(*routing.weight.shape, -1)
    return taps.combine(outputs, routing.weight, tap)


# --- all modules on all tokens ------------------------------------------------------------------------------------------


def _all_project(weights, x, routing, tap) -> Array:
    return _dense_project(x, *weights, held(routing), tap)


def _all_merge(weights, x, routing, tap) -> Array:
    return _dense_merge(x, *weights, routing.weight, held(routing), tap)


def _pick(y: Float[Array, "N M O"], hit: Bool[Array, "N G k P"]) -> Float[Array, "N K O"]:
    n, groups, _, per_group = hit.shape
    y = y.reshape(n, groups, 1, per_group, -1)
    return jnp.sum(jnp.where(hit[..., None], y, 0), 3).reshape(n, -1, y.shape[-1])


def _spread(y: Float[Array, "N K O"], hit: Bool[Array, "N G k P"]) -> Float[Array, "N M O"]:
    """The slots back in their modules' places, zero elsewhere."""
    n, groups, slots, _ = hit.shape
    y = y.reshape(n, groups, slots, 1, -1)
    return jnp.sum(jnp.where(hit[..., None], y, 0), 2).reshape(n, -1, y.shape[-1])


def _active(hit: Bool[Array, "N G k P"]) -> Bool[Array, "N K"]:
    return jnp.any(hit, -1).reshape(hit.shape[0], -1)


@jax.custom_vjp
def _dense_project(x, w, hit, tap):
    return _dense_project_fwd(x, w, hit, tap)[0]


def _dense_project_fwd(x, w, hit, tap):
    modules, inputs, _ = w.shape
    y = x @ w.swapaxes(0, 1).reshape(inputs, -1)
    return _pick(y.reshape(x.shape[0], modules, -1), hit), (x, w, hit, tap)


def _dense_project_bwd(saved, g):
    x, w, hit, tap = saved
    modules, inputs, outputs = w.shape
    spread = _spread(g, hit).reshape(x.shape[0], -1)  # [N,M·O]
    d_x = spread @ w.swapaxes(1, 2).reshape(-1, inputs)
    d_w = contract_rows(x, spread).reshape(inputs, modules, outputs).swapaxes(0, 1)
    if tap is None:
        return d_x, d_w.astype(w.dtype), None, None
    zero = jnp.zeros_like(tap.output)
    param = jnp.where(_active(hit), squares(x)[:, None] * squares(g), 0)
    return d_x, d_w.astype(w.dtype), None, taps.Tap(zero, zero, param, module_norms(True, d_w))


_dense_project.defvjp(_dense_project_fwd, _dense_project_bwd)


@jax.custom_vjp
def _dense_merge(x, w, weight, hit, tap):
    return _dense_merge_fwd(x, w, weight, hit, tap)[0]


def _weighed(x, weight, hit):
    return _spread(x * weight[..., None].astype(x.dtype), hit).reshape(x.shape[0], -1)  # [N,M·I]


def _dense_merge_fwd(x, w, weight, hit, tap):
    return _weighed(x, weight, hit) @ w.reshape(-1, w.shape[2]), (x, w, weight, hit, tap)


def _dense_merge_bwd(saved, g):
    x, w, weight, hit, tap = saved
    d_w = contract_rows(_weighed(x, weight, hit), g).reshape(w.shape)
    d_rows = _pick((g @ w.reshape(-1, w.shape[2]).T).reshape(x.shape[0], w.shape[0], -1), hit)  # dL/d(weight · x)
    d_x = d_rows * weight[..., None].astype(g.dtype)
    d_weight = jnp.sum((d_rows * x).astype(jnp.float32), -1).astype(weight.dtype)
    if tap is None:
        return d_x, d_w.astype(w.dtype), d_weight, None, None
    weight = weight.astype(jnp.float32)
    output = jnp.square(weight) * squares(g)[:, None]
    # Not output · squares(x): XLA would take the squares of all recursions in one kernel, far from what they are made of.
    param = jnp.where(_active(hit), squares(x * jnp.sqrt(output)[..., None]), 0)
    attribution = jnp.square(weight * d_weight.astype(jnp.float32))
    return d_x, d_w.astype(w.dtype), d_weight, None, taps.Tap(output, attribution, param, module_norms(True, d_w))


_dense_merge.defvjp(_dense_merge_fwd, _dense_merge_bwd)
