"""Routed experts: fused and general path against each other, and both against one copy of the weights per (token, slot)."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.layers.naive import CLOSE, by_module, copied, make, norms, summed
from tinyonn_jax.layers import experts, routing, tap
from tinyonn_jax.layers.routing import Router, RouterConfig

N, D, F, E, K = 12, 6, 5, 4, 3
RNG = np.random.default_rng(3)
X = jnp.asarray(RNG.normal(size=(N, D)), jnp.float32)
TARGET = jnp.asarray(RNG.normal(size=(N, D)), jnp.float32)
VALID = np.arange(N) != 5


def decide():
    """Twelve tokens of which one is padding; some slots are idle."""
    router = Router(jnp.asarray(RNG.normal(size=(E, D)), jnp.float32), jnp.asarray([0.0, 0.3, -0.1, 5.0]))  # expert 3: unused
    return routing.route(router, X, RouterConfig(E, K, select="threshold"), VALID)


ROUTING = decide()


def library(gated):
    return make(experts.mlp_spec(D, F, gated, E))


def run(layer, params, x, r, t):
    """A loss of the layer's output, its gradients, and the tap's; `layer(params, x, routing, tap)`."""

    def loss(params, x, weight, t):
        y = layer(params, x, r.replace(weight=weight), t)
        return jnp.sum(jnp.tanh(y) * TARGET), y

    (_, y), grads = jax.value_and_grad(loss, (0, 1, 2, 3), has_aux=True)(params, x, r.weight, t)
    return y, grads


run = jax.jit(run, static_argnums=0)


@partial(jax.jit, static_argnums=0)
def materialised(f, params, x, r):
    """The same by one weight copy per (token, slot): output, gradients of copies, of x, of the weights, g_n, and f_m(x_n)."""
    copies = copied(params, r.index)

    def loss(copies, x, weight, push):
        out = jax.vmap(jax.vmap(lambda p, x: f(p, x[None])[0], (0, None)))(copies, x)  # [N,K,D]
        y = jnp.sum(jnp.where(r.active, weight, 0)[..., None] * out, 1) + push
        return jnp.sum(jnp.tanh(y) * TARGET), (y, out)

    (_, (y, out)), grads = jax.value_and_grad(loss, (0, 1, 2, 3), has_aux=True)(copies, x, r.weight, jnp.zeros_like(x))
    return y, out, grads


def check(got, f, params, r):
    y, (d_params, d_x, d_weight, d_tap) = got
    want_y, out, (d_copies, want_x, want_weight, g) = materialised(f, params, X, r)
    np.testing.assert_allclose(y, want_y, **CLOSE)
    np.testing.assert_allclose(d_x, want_x, **CLOSE)
    np.testing.assert_allclose(np.where(r.active, d_weight, 0), want_weight, **CLOSE)
    total = summed(d_copies, r.index, E)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **CLOSE), d_params, total)
    g, weight = np.asarray(g, np.float64), np.asarray(r.weight, np.float64)
    np.testing.assert_allclose(np.sqrt(d_tap.output), weight * np.linalg.norm(g, axis=-1, keepdims=True), **CLOSE)
    np.testing.assert_allclose(np.sqrt(d_tap.attribution), np.abs(weight * np.einsum("nd,nkd->nk", g, out)), **CLOSE)
    np.testing.assert_allclose(np.sqrt(d_tap.param), norms(d_copies, 2), **CLOSE)
    np.testing.assert_allclose(np.sqrt(d_tap.module), norms(total, 1), **CLOSE)


@pytest.mark.parametrize("gated", [False, True])
def test_both_paths_equal_materialised_gradients(gated):
    params = library(gated)
    f = partial(experts.mlp, gated=gated)
    fused = run(lambda p, x, r, t: experts.routed_mlp(p, x, r, gated, t), params, X, ROUTING, tap.zeros(ROUTING))
    general = run(lambda p, x, r, t: experts.routed(f, p, x, r, t), params, X, ROUTING, tap.zeros(ROUTING))
    check(fused, f, params, ROUTING)
    check(general, f, params, ROUTING)


def test_the_tables_here_have_idle_slots_a_padded_token_and_an_unused_expert():
    used = by_module(np.ones((N, K)), ROUTING)
    assert (
        0 < ROUTING.active.sum() < ROUTING.active.size and not used[5].any() and not used[:, 3].any() and used[:, :3].any(0).all()
    )


def test_unused_and_idle_have_no_surprise():
    _, (d_params, d_x, _, d_tap) = run(
        lambda p, x, r, t: experts.routed_mlp(p, x, r, False, t), library(False), X, ROUTING, tap.zeros(ROUTING)
    )
    for values in (d_tap.output, d_tap.attribution, d_tap.param):
        np.testing.assert_array_equal(np.asarray(values)[~np.asarray(ROUTING.active)], 0)
    assert d_tap.module[3] == 0 and not np.any(d_params.w_in[3]) and not np.any(d_x[5])


@pytest.mark.parametrize("general", [False, True])
def test_taps_change_neither_output_nor_gradients(general):
    params = library(True)
    f = partial(experts.mlp, gated=True)

    def layer(p, x, r, t):
        return experts.routed(f, p, x, r, t) if general else experts.routed_mlp(p, x, r, True, t)

    y, grads = run(layer, params, X, ROUTING, tap.zeros(ROUTING))
    plain_y, plain = run(layer, params, X, ROUTING, None)
    np.testing.assert_array_equal(y, plain_y)
    jax.tree.map(np.testing.assert_array_equal, grads[:2], plain[:2])


def test_an_expert_of_your_own():
    """Any function of one module's parameters: here with a bias, a scalar and a normalisation, none of which is a linear map."""

    def f(p, x):
        h = jnp.tanh(x @ p["a"] + p["b"])
        return p["scale"] * h / jnp.sqrt(1 + jnp.mean(h**2, -1, keepdims=True)) + x * p["b"]

    rng = np.random.default_rng(5)
    params = {
        "a": jnp.asarray(rng.normal(size=(E, D, D)), jnp.float32),
        "b": jnp.asarray(rng.normal(size=(E, D)), jnp.float32),
        "scale": jnp.asarray(rng.normal(size=(E,)), jnp.float32),
    }
    check(run(lambda p, x, r, t: experts.routed(f, p, x, r, t), params, X, ROUTING, tap.zeros(ROUTING)), f, params, ROUTING)


@pytest.mark.parametrize("general", [False, True])
def test_bfloat16_stays_bfloat16_and_near_float32(general):
    params, r = library(False), ROUTING

    def f(p, x):
        return experts.mlp(p, x, False)

    def layer(p, x, r, t):
        return experts.routed(f, p, x, r, t) if general else experts.routed_mlp(p, x, r, False, t)

    y, (d_params, d_x, _, d_tap) = run(layer, params, X.astype(jnp.bfloat16), r, tap.zeros(r))
    want_y, (want_params, want_x, _, want_tap) = run(layer, params, X, r, tap.zeros(r))
    assert y.dtype == jnp.bfloat16 and d_x.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves((d_params, d_tap))} == {jnp.dtype("float32")}
    for got, want in zip(jax.tree.leaves((y, d_x, d_params)), jax.tree.leaves((want_y, want_x, want_params)), strict=True):
        np.testing.assert_allclose(np.asarray(got, np.float32), want, atol=0.1)
    for got, want in zip(jax.tree.leaves(d_tap), jax.tree.leaves(want_tap), strict=True):
        np.testing.assert_allclose(np.sqrt(got), np.sqrt(want), rtol=0.1, atol=0.05)


@pytest.mark.parametrize("select", ["top_k", "relu"])
def test_without_isolation_the_router_learns_through_the_weights(select):
    """Fused, general, and plain autodiff through the weights of the copies agree on the router's gradient."""
    params = library(False)
    proto = jnp.asarray(RNG.normal(size=(E, D)), jnp.float32)
    cfg = RouterConfig(E, 2, select=select, isolate=False)

    def gradient(layer):
        def loss(router, t):
            r = routing.route(router, X, cfg, VALID)
            return jnp.sum(jnp.tanh(layer(params, X, r, t)) * TARGET)

        r = routing.route(Router(proto, jnp.zeros(E)), X, cfg, VALID)
        return jax.jit(jax.grad(loss))(Router(proto, jnp.zeros(E)), tap.zeros(r))

    def plain(p, x, r, t):
        every = jax.vmap(lambda p: experts.mlp(p, x, False))(p)  # [E,N,D]
        weight = jnp.sum((r.index[..., None] == jnp.arange(E)) * jnp.where(r.active, r.weight, 0)[..., None], 1)
        return jnp.einsum("end,ne->nd", every, weight)

    fused = gradient(lambda p, x, r, t: experts.routed_mlp(p, x, r, False, t))
    general = gradient(lambda p, x, r, t: experts.routed(partial(experts.mlp, gated=False), p, x, r, t))
    want = gradient(plain)
    assert np.abs(want.proto).max() > 1e-3
    for got in (fused, general):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **CLOSE), got, want)


def test_gated_is_silu_of_one_half_times_the_other():
    h = np.array([[1.0, -2.0, 3.0, 0.5]], np.float32)
    want = [[1 / (1 + np.exp(-1)) * 3.0, -2 / (1 + np.exp(2)) * 0.5]]
    np.testing.assert_allclose(experts.activate(jnp.asarray(h), True), want, rtol=1e-6)


def test_tokens_of_others_cannot_hurt_a_module():
    """A module that overflows on tokens it does not serve: no NaN in the sum or in any gradient."""

    def f(p, x):
        return jnp.exp(x @ p["a"])

    params = {"a": jnp.stack([0.1 * jnp.eye(2), 50 * jnp.eye(2)]), "steps": jnp.arange(2)}
    index = jnp.zeros((2, 1), jnp.int32)
    r = routing.given(index, index == 0, 2)
    x = jnp.asarray([[1.0, 1.0], [3.0, 3.0]])
    loss = lambda a, x, t: jnp.sum(experts.routed(f, params | {"a": a}, x, r, t))  # noqa: E731
    y = jax.jit(lambda x: experts.routed(f, params, x, r))(x)
    np.testing.assert_allclose(y, np.exp(0.1 * x), **CLOSE)
    d_a, d_x, d_tap = jax.jit(jax.grad(loss, (0, 1, 2)))(params["a"], x, tap.zeros(r))
    np.testing.assert_allclose(d_x, 0.1 * np.exp(0.1 * x), **CLOSE)
    assert np.any(d_a[0]) and not np.any(d_a[1]) and d_tap.module[1] == 0
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((d_a, d_tap)))


def test_modules_without_a_derivative_at_zero():
    """A norm without an epsilon; the third module serves nobody."""
    params = jnp.stack([jnp.eye(2), 2 * jnp.eye(2), 3 * jnp.eye(2)])
    index = jnp.asarray([[0], [1], [1]])
    r = routing.given(index, index >= 0, 3)
    x = jnp.asarray([[1.0, 1.0], [3.0, 3.0], [0.5, 0.0]])
    f = lambda w, x: x / jnp.linalg.norm(x, axis=-1, keepdims=True) @ w  # noqa: E731
    grads = jax.jit(jax.grad(lambda *a: jnp.sum(experts.routed(f, *a[:2], r, a[2])), (0, 1, 2)))(params, x, tap.zeros(r))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads)) and not np.any(grads[0][2])


def test_modules_without_parameters_have_no_surprise_of_their_own():
    r = routing.given(jnp.asarray([[0], [1]]), jnp.ones((2, 1), bool), 2)
    f = lambda _, x: jnp.sin(x)  # noqa: E731
    d_tap = jax.device_get(jax.jit(jax.grad(lambda t: jnp.sum(experts.routed(f, None, jnp.ones((2, 3)), r, t))))(tap.zeros(r)))
    np.testing.assert_allclose(d_tap.output[:, 0], 3)
    assert not np.any(d_tap.param) and not np.any(d_tap.module)


def test_neurons_are_refused():
    cfg = RouterConfig(E, 0, select="relu")
    neurons = jax.eval_shape(lambda: routing.route_all(Router(jnp.ones((E, D)), jnp.zeros(E)), X, cfg))
    with pytest.raises(ValueError, match="route_all"):
        experts.routed(lambda p, x: x * p, jnp.ones(E), X, neurons)


def test_parameters_and_tokens_of_another_number_are_refused():
    with pytest.raises(ValueError, match=rf"leading axis of {E} modules; one has shape \[{E + 1}, 2\]"):
        experts.routed(lambda p, x: x * p[0], jnp.ones((E + 1, 2)), X, ROUTING)
    with pytest.raises(ValueError, match="a row for each token"):
        experts.routed(lambda p, x: x * p, jnp.ones(E), X[None], ROUTING)
    with pytest.raises(ValueError, match="router of 4 modules, the config one of 8"):
        routing.route(Router(jnp.ones((4, D)), jnp.zeros(4)), X, RouterConfig(8, 2))


@pytest.mark.parametrize("f", [lambda p, x: x[:, 0] * p, lambda p, x: x[None] * p, lambda p, x: x[:1] * p])
def test_a_module_gives_a_row_for_every_token(f):
    with pytest.raises(ValueError, match="a row for every token"):
        experts.routed(f, jnp.ones(E), X, ROUTING)
