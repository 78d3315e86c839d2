"""One linear map per module, on the tokens routed to it: `project` into the slots, `merge` out of them.

    project:  y_nk = x_n · w[index_nk]            merge:  y_n = Σ_k weight_nk · x_nk · w[index_nk]

Two ways that agree to rounding. Where a token uses a fair share of the modules (M ≤ 4·K), all modules run on all tokens, as one
plain matmul, and the slots are picked out of it; else pairs are sorted by module and only what is used is computed (`grouped`).

Letters: N tokens, K slots, M modules, I inputs, O outputs of one module.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from tinyonn_jax.layers import grouped, parallel
from tinyonn_jax.layers import tap as taps
from tinyonn_jax.layers.experts import grouped_tap
from tinyonn_jax.layers.routing import Routing


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
    return _dense_project(routing.config.groups, x, *weights, routing.slots, routing.active, tap)


def _all_merge(weights, x, routing, tap) -> Array:
    return _dense_merge(routing.config.groups, x, *weights, routing.weight, routing.slots, routing.active, tap)


def _hit(index: Int[Array, "N K"], active: Array, groups: int, modules: int) -> Bool[Array, "N G k P"]:
    """Which slot of a group holds which of the group's modules: slots and modules are ordered by group."""
    per_group = modules // groups
    within = index - jnp.repeat(jnp.arange(groups), index.shape[1] // groups) * per_group
    hit = (within[..., None] == jnp.arange(per_group)) & active[..., None]
    return hit.reshape(index.shape[0], groups, -1, per_group)


def _pick(y: Float[Array, "N M O"], hit: Bool[Array, "N G k P"]) -> Float[Array, "N K O"]:
    n, groups, _, per_group = hit.shape
    y = y.reshape(n, groups, 1, per_group, -1)
    return jnp.sum(jnp.where(hit[..., None], y, 0), 3).reshape(n, -1, y.shape[-1])


def _spread(y: Float[Array, "N K O"], hit: Bool[Array, "N G k P"]) -> Float[Array, "N M O"]:
    """The slots back in their modules' places, zero elsewhere."""
    n, groups, slots, _ = hit.shape
    y = y.reshape(n, groups, slots, 1, -1)
    return jnp.sum(jnp.where(hit[..., None], y, 0), 2).reshape(n, -1, y.shape[-1])


def _square(x: Array) -> Array:
    return jnp.sum(jnp.square(x.astype(jnp.float32)), -1)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _dense_project(groups, x, w, index, active, tap):
    return _dense_project_fwd(groups, x, w, index, active, tap)[0]


def _dense_project_fwd(groups, x, w, index, active, tap):
    modules, inputs, _ = w.shape
    y = x @ w.swapaxes(0, 1).reshape(inputs, -1)
    return _pick(y.reshape(x.shape[0], modules, -1), _hit(index, active, groups, modules)), (x, w, index, active, tap)


def _dense_project_bwd(groups, saved, g):
    x, w, index, active, tap = saved
    modules, inputs, outputs = w.shape
    spread = _spread(g, _hit(index, active, groups, modules)).reshape(x.shape[0], -1)  # [N,M·O]
    d_x = spread @ w.swapaxes(1, 2).reshape(-1, inputs)
    d_w = jnp.matmul(x.T, spread, preferred_element_type=jnp.float32).reshape(inputs, modules, outputs).swapaxes(0, 1)
    if tap is None:
        return d_x, d_w.astype(w.dtype), None, None, None
    zero = jnp.zeros_like(tap.output)
    param = jnp.where(active, _square(x)[:, None] * _square(g), 0)
    return d_x, d_w.astype(w.dtype), None, None, taps.Tap(zero, zero, param, jnp.sum(jnp.square(d_w), (1, 2)))


_dense_project.defvjp(_dense_project_fwd, _dense_project_bwd)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _dense_merge(groups, x, w, weight, index, active, tap):
    return _dense_merge_fwd(groups, x, w, weight, index, active, tap)[0]


def _weighed(x, weight, hit):
    return _spread(x * weight[..., None].astype(x.dtype), hit).reshape(x.shape[0], -1)  # [N,M·I]


def _dense_merge_fwd(groups, x, w, weight, index, active, tap):
    y = _weighed(x, weight, _hit(index, active, groups, w.shape[0])) @ w.reshape(-1, w.shape[2])
    return y, (x, w, weight, index, active, tap)


def _dense_merge_bwd(groups, saved, g):
    x, w, weight, index, active, tap = saved
    modules = w.shape[0]
    hit = _hit(index, active, groups, modules)
    rows = _weighed(x, weight, hit)
    d_w = jnp.matmul(rows.T, g, preferred_element_type=jnp.float32).reshape(w.shape)
    d_rows = _pick((g @ w.reshape(-1, w.shape[2]).T).reshape(x.shape[0], modules, -1), hit)  # dL/d(weight · x)
    d_x = d_rows * weight[..., None].astype(g.dtype)
    d_weight = jnp.sum((d_rows * x).astype(jnp.float32), -1)
    if tap is None:
        return d_x, d_w.astype(w.dtype), d_weight, None, None, None
    output = jnp.square(weight) * _square(g)[:, None]
    param = jnp.where(active, output * _square(x), 0)
    module = jnp.sum(jnp.square(d_w), (1, 2))
    return d_x, d_w.astype(w.dtype), d_weight, None, None, taps.Tap(output, jnp.square(weight * d_weight), param, module)


_dense_merge.defvjp(_dense_merge_fwd, _dense_merge_bwd)
