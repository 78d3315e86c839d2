"""Running modules on the tokens routed to them, two ways that agree to rounding.

`routed_mlp` is the fused path for the built-in expert MLPs: sorted rows, grouped matmuls, surprise read inside their backward
passes. `routed` is the general path for any function `f(params_m, x) -> y` of one module: the explicit per-module vjp, vmapped
over modules on dense-masked inputs; a module of your own gets surprise with no further work, at M times the compute.

Letters: N tokens, D model, E experts, F expert hidden, K slots, M modules. Source: seeds 1 and 3.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from tinyonn_jax.layers import grouped, parallel
from tinyonn_jax.layers import tap as taps
from tinyonn_jax.layers.base import Param, fan_in, linear
from tinyonn_jax.layers.routing import Routing, held, per_module


@flax.struct.dataclass
class Mlp:
    """Weights of one MLP, or of E stacked along a leading axis: `w_in [D,F]` (`[D,2F]` when gated), `w_out [F,D]`."""

    w_in: Any
    w_out: Any


def mlp_spec(dim: int, hidden: int, gated: bool, experts: int | None = None) -> Mlp:
    """Normal, variance 1 / fan-in."""
    lead, names = ((), ()) if experts is None else ((experts,), ("experts",))
    return Mlp(
        w_in=Param((*lead, dim, hidden * (2 if gated else 1)), (*names, "embed", "hidden"), fan_in),
        w_out=Param((*lead, hidden, dim), (*names, "hidden", "embed"), fan_in),
    )


def _activate(h: Float[Array, "*N F"], gated: bool) -> Float[Array, "*N F"]:
    """silu(h), or silu(a)·b of its halves when gated (SwiGLU; Shazeer, 2020). Only h is kept for the backward pass."""
    if not gated:
        return jax.nn.silu(h)
    a, b = jnp.split(h, 2, -1)
    return jax.nn.silu(a) * b


activate = jax.custom_vjp(_activate, nondiff_argnums=(1,))
activate.defvjp(
    lambda h, gated: (_activate(h, gated), h),
    lambda gated, h, g: jax.vjp(lambda h: _activate(h, gated), h)[1](g),
)


def mlp(params: Mlp, x: Float[Array, "*N D"], gated: bool) -> Float[Array, "*N D"]:
    """One MLP on every token: act(x·w_in)·w_out."""
    tokens = x.reshape(-1, x.shape[-1])  # flat, so that weight gradients are plain matmuls
    h = activate(linear(tokens, params.w_in.astype(x.dtype)), gated)
    return linear(h, params.w_out.astype(x.dtype)).reshape(x.shape)


def grouped_tap(tap: taps.Tap | None, plan: grouped.Plan) -> grouped.Tap | None:
    """The part of a layer's tap that its grouped matmuls fill, rows in sorted order."""
    if tap is None:
        return None
    return grouped.Tap(grouped.permute(tap.param.reshape(-1), plan.order, plan.inverse), tap.module)


def routed_mlp(
    params: Mlp, x: Float[Array, "N D"], routing: Routing, gated: bool, tap: taps.Tap | None = None
) -> Float[Array, "N D"]:
    """y_n = Σ_k weight_nk · f_{index_nk}(x_n) over a library of E expert MLPs (§3), fused."""
    axes = [("experts", "embed", "hidden"), ("experts", "hidden", "embed")]
    weights = [params.w_in.astype(x.dtype), params.w_out.astype(x.dtype)]
    return parallel.run(partial(_routed_mlp, gated), weights, axes, x, routing, tap, send=True)


def _routed_mlp(gated: bool, w: list[Array], x: Array, routing: Routing, tap: taps.Tap | None) -> Array:
    w_in, w_out = w
    plan = grouped.plan(routing.slots, routing.active, w_in.shape[0])
    row_tap = grouped_tap(tap, plan)
    h = grouped.matmul(grouped.dispatch(x, plan), w_in, plan.sizes, row_tap)
    f = grouped.matmul(activate(h, gated), w_out, plan.sizes, row_tap)
    f = grouped.permute(f, plan.inverse, plan.order).reshape(*routing.weight.shape, -1)  # [N,K,D]
    return taps.combine(f, routing.weight, tap)


Module = Callable[[Any, Array], Array]


def routed(f: Module, params: Any, x: Float[Array, "N D"], routing: Routing, tap: taps.Tap | None = None) -> Float[Array, "N D"]:
    """The same sum for any module function `f(params_m, x [N,D]) -> [N,D]` that treats tokens independently.

    `params` has a leading module axis M on every leaf. What `f` closes over must be constant: a traced value, such as a key that
    a scan hands out, goes in as one of `params`. A module sees its own tokens only, in some batch of some size: what it gives for
    a token must not depend on its place there, as dropout drawn for the whole batch does. The backward rule is the explicit
    per-module vjp. Per-token parameter norms come from one vjp per token and module, taken 64 tokens at a time: exact, and slow
    for large modules.

    Raises:
        ValueError: the routing is that of neurons (`routing.route_all`), `params` or `x` does not fit it, or f gives something
            else than a row for every token.
    """
    if routing.index is None:
        raise ValueError("modules are routed by `route`; a routing by `route_all` is that of neurons (layers.spl)")
    tokens, modules = routing.logits.shape[-2:]
    if x.ndim != 2 or len(x) != tokens:
        raise ValueError(f"x must have a row for each token of the routing, [{tokens}, D], not {list(x.shape)}")
    if odd := [list(leaf.shape) for leaf in jax.tree.leaves(params) if leaf.shape[:1] != (modules,)]:
        raise ValueError(f"every leaf of params must have a leading axis of {modules} modules; one has shape {odd[0]}")
    return _routed(f, params, x, routing.weight, routing, tap)


def _own(f: Module, params_m: Any, x: Float[Array, "N D"], hit_m: Bool[Array, " N"]) -> Float[Array, "N D"]:
    """One module on its own tokens, and zero for those of others, in whose place it sees one of its own: it may have no value or
    no derivative at theirs, or at zero."""
    hit = hit_m[:, None]
    y = f(params_m, jnp.where(hit, x, jax.lax.stop_gradient(x[jnp.argmax(hit_m)])))
    if y.ndim != 2 or len(y) != len(x):
        raise ValueError(f"a module gives a row for every token: f(params_m, x {list(x.shape)}) gave {list(y.shape)}")
    return jnp.where(hit, y, 0)


def _hits(routing: Routing) -> Bool[Array, "N M"]:
    return jnp.any(held(routing), -2).reshape(routing.logits.shape)


def _sum_routed(f, params, x, weight, routing):
    y = jax.vmap(partial(_own, f), (0, None, 1))(params, x, _hits(routing))  # [M,N,D]
    return jnp.einsum("mnd,nm->nd", y, per_module(weight, routing)).astype(x.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _routed(f, params, x, weight, routing, tap):
    return _sum_routed(f, params, x, weight, routing)


def _routed_fwd(f, params, x, weight, routing, tap):
    return _sum_routed(f, params, x, weight, routing), (params, x, weight, routing, tap)


def _routed_bwd(f, saved, g):
    params, x, weight, routing, tap = saved
    w = per_module(weight, routing)

    def one_module(params_m, w_m, hit_m):  # the explicit vjp of one module, on every token, cotangent masked by its weight
        y, vjp = jax.vjp(lambda p, x: _own(f, p, x, hit_m), params_m, x)
        d_params, d_x = vjp((g * w_m[:, None]).astype(y.dtype))
        used = jnp.any(hit_m)  # if not, not even zero times a derivative is to be trusted
        return y, jax.tree.map(lambda d: d if d.dtype == jax.dtypes.float0 else jnp.where(used, d, 0), d_params), d_x

    y, d_params, d_x = jax.vmap(one_module, (0, 1, 1))(params, w, _hits(routing))
    inner = jnp.einsum("mnd,nd->nm", y, g, preferred_element_type=jnp.float32)
    d_weight = jnp.take_along_axis(inner, routing.slots, -1) * routing.active
    if tap is None:
        return d_params, d_x.sum(0), d_weight, None, None

    def one_token(x_n, g_n, w_n):  # [M] squared norms of the gradient this token alone causes
        def one(params_m, w_nm):
            y, vjp = jax.vjp(lambda p: f(p, x_n[None]), params_m)
            return _squared(vjp((g_n * w_nm)[None].astype(y.dtype))[0])

        return jax.vmap(one)(params, w_n)

    per_token = jax.lax.map(lambda args: one_token(*args), (x, g, w), batch_size=64)  # [N,M]
    norm = jnp.sum(jnp.square(g.astype(jnp.float32)), -1, keepdims=True)
    d_tap = taps.Tap(
        output=jnp.square(weight) * norm,
        attribution=jnp.square(weight * d_weight),
        param=jnp.where(routing.active, jnp.take_along_axis(per_token, routing.slots, -1), 0),
        module=jax.vmap(lambda d, _: _squared(d))(d_params, tap.module),  # there may be no parameters
    )
    return d_params, d_x.sum(0), d_weight, None, d_tap


def _squared(tree: Any) -> Array:
    """Of all leaves; those of integers have no gradient."""
    leaves = (leaf for leaf in jax.tree.leaves(tree) if leaf.dtype != jax.dtypes.float0)
    return sum((jnp.sum(jnp.square(leaf.astype(jnp.float32))) for leaf in leaves), jnp.float32(0))


_routed.defvjp(_routed_fwd, _routed_bwd)
