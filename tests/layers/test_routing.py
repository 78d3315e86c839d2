"""Routing against tables worked by hand, NumPy in float64, and finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.layers.naive import by_module, hand_made
from tinyonn_jax.layers import base, routing
from tinyonn_jax.layers.base import init
from tinyonn_jax.layers.routing import Router, RouterConfig

X = np.array([[3, 4], [0, 2], [0, 0]], np.float32)
PROTO = np.array([[1, 0], [0, 5], [6, 8]], np.float32)
COSINE = np.array([[0.6, 0.8, 1.0], [0.0, 1.0, 0.8], [0, 0, 0]])
DOT = np.array([[3, 20, 50], [0, 10, 16], [0, 0, 0]]) / np.sqrt(2)

logits_of = jax.jit(routing.routing_logits, static_argnums=2)
select = jax.jit(routing.select, static_argnums=1)
route = jax.jit(routing.route, static_argnums=2)


@given(st.lists(st.sampled_from([-np.inf, -1.0, 0.0, 1.0, 2.0, np.inf]), min_size=4, max_size=4), st.integers(1, 4))
def test_maxima_one_after_the_other_are_the_largest(values, k):
    """As GPUs find them: the first of equals first, no module twice, not even where nothing is finite."""
    v = jnp.array([values, values[::-1]], jnp.float32)
    order = np.argsort(-np.asarray(v), 1, kind="stable")[:, :k]
    np.testing.assert_array_equal(routing._largest_by_rounds(v, k), order)
    np.testing.assert_array_equal(routing._largest(v, k), order)


@pytest.mark.parametrize(("match", "table"), [("cosine", COSINE), ("dot", DOT)])
@pytest.mark.parametrize(
    ("cost", "gate", "price"),
    [
        ("bias", [0.1, -0.2, 0.4], [0.1, -0.2, 0.4]),
        ("bias_drln", [0.1, -0.2, 0.4], [0.1 / 1.4, -0.2 / 1.4, 0.4 / 1.4]),
        ("threshold", [0.0, np.log(3), -np.log(3)], [0.5, 0.75, 0.25]),
        ("linear", [[1, 0], [0, 0.5], [-1, 1]], [[3, 2, 1], [0, 1, 2], [0, 0, 0]]),
    ],
)
def test_logits_are_match_minus_cost(match, table, cost, gate, price):
    cfg = RouterConfig(3, 1, match=match, cost=cost)
    logits = logits_of(Router(jnp.asarray(PROTO), jnp.asarray(gate, jnp.float32)), X, cfg)
    np.testing.assert_allclose(logits, table - np.array(price), rtol=1e-6, atol=1e-6)


def test_logits_are_float32_whatever_the_token():
    router = Router(jnp.asarray(PROTO), jnp.zeros(3))
    assert logits_of(router, jnp.asarray(X, jnp.bfloat16), RouterConfig(3, 1)).dtype == jnp.float32


@pytest.mark.parametrize("match", ["cosine", "dot"])
def test_zero_tokens_and_prototypes_have_finite_gradients(match):
    cfg = RouterConfig(3, 1, match=match)
    x, router = jnp.asarray(X), Router(jnp.asarray(PROTO).at[0].set(0), jnp.zeros(3))
    grads = jax.jit(jax.grad(lambda r, x: jnp.sum(jnp.sin(routing.routing_logits(r, x, cfg))), (0, 1)))(router, x)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(grads))


def test_drln_keeps_ratios_and_signs_and_the_largest_becomes_one():
    np.testing.assert_allclose(routing.drln(jnp.array([[2.0, -4.0, 1.0], [0, 0, 0]])), [[0.5, -1.0, 0.25], [0, 0, 0]])
    np.testing.assert_allclose(routing.drln(jnp.array([[2.0, -4.0], [1.0, 8.0]]), 0), [[1.0, -0.5], [0.5, 1.0]])


def test_the_largest_becomes_exactly_one_when_compiled():
    """Importance times (1 − 1) must be nothing, not noise whose sign is then counted as good or bad."""
    v = np.random.default_rng(0).normal(size=(1000, 7)).astype(np.float32)
    np.testing.assert_array_equal(np.abs(_drln(v)).max(-1), 1)
    np.testing.assert_array_equal(np.abs(jax.jit(lambda v: routing.drln(v.reshape(-1, 1)))(v)), 1)


def test_drln_at_zero_has_a_bounded_gradient():
    """The trap: divided by max|g| + 1e-9, a gate initialised to zero has a gradient of 1e9 at its first step."""
    gradient = jax.grad(lambda v: jnp.sum(routing.drln(v) * jnp.array([1.0, -2.0, 3.0])))
    np.testing.assert_array_equal(gradient(jnp.zeros(3)), [1.0, -2.0, 3.0])
    np.testing.assert_allclose(gradient(jnp.array([1.0, -4.0, 2.0])), [0.25, -0.5, 0.75])  # the maximum carries none


@given(st.lists(st.floats(-1e3, 1e3, width=32), min_size=5, max_size=5), st.sampled_from([2.0**-9, 0.3, 5.0, 1000.0]))
def test_drln_is_bounded_and_blind_to_scale(values, scale):
    v = np.array(values, np.float32)
    a = np.asarray(_drln(v))
    assert np.all(np.abs(a) <= 1) and np.all(np.isfinite(a))
    if np.abs(v).max() > 1e-30:
        np.testing.assert_allclose(_drln(v * np.float32(scale)), a, atol=1e-6)


_drln = jax.jit(routing.drln)

# Three tokens: all above zero but one, none above zero, exactly one above zero.
LOGITS = np.array([[0.5, 0.3, -0.1, 0.9], [-0.2, -0.4, -0.1, -0.3], [-1.0, 0.7, -2.0, -3.0]], np.float32)


def softmax(*v):
    e = np.exp(np.array(v))
    return list(e / e.sum())


@pytest.mark.parametrize(
    ("cfg", "index", "weight", "active", "unrouted"),
    [
        (
            RouterConfig(4, 2, select="top_k", weight="softmax"),
            [[3, 0], [2, 0], [1, 0]],
            [softmax(0.9, 0.5), softmax(-0.1, -0.2), softmax(0.7, -1.0)],
            [[1, 1], [1, 1], [1, 1]],
            [0, 0, 0],
        ),
        (
            RouterConfig(4, 2, select="top_k", weight="relu"),
            [[3, 0], [2, 0], [1, 0]],
            [[0.9, 0.5], [0, 0], [0.7, 0]],
            [[1, 1], [0, 0], [1, 0]],
            [0, 1, 0],
        ),
        (
            RouterConfig(4, 2, select="top_k", weight="hard"),
            [[3, 0], [2, 0], [1, 0]],
            [[1, 1], [1, 1], [1, 1]],
            [[1, 1], [1, 1], [1, 1]],
            [0, 0, 0],
        ),
        (
            RouterConfig(4, 0, select="relu"),  # every module is a candidate
            [[3, 0, 1, 2], [2, 0, 3, 1], [1, 0, 2, 3]],
            [[0.9, 0.5, 0.3, 0], [0, 0, 0, 0], [0.7, 0, 0, 0]],
            [[1, 1, 1, 0], [0, 0, 0, 0], [1, 0, 0, 0]],
            [0, 1, 0],
        ),
        (
            RouterConfig(4, 2, select="hard"),
            [[3, 0], [2, 0], [1, 0]],
            [[1, 1], [0, 0], [1, 0]],
            [[1, 1], [0, 0], [1, 0]],
            [0, 1, 0],
        ),
        (
            RouterConfig(4, 3, select="threshold"),
            [[3, 0, 1], [2, 0, 3], [1, 0, 2]],
            [softmax(0.9, 0.5, 0.3), [1, 0, 0], [1, 0, 0]],
            [[1, 1, 1], [1, 0, 0], [1, 0, 0]],
            [0, 1, 0],
        ),
        (
            RouterConfig(4, 3, select="threshold", fallback=2),
            [[3, 0, 1], [2, 0, 3], [1, 0, 2]],
            [softmax(0.9, 0.5, 0.3), [*softmax(-0.1, -0.2), 0], [1, 0, 0]],
            [[1, 1, 1], [1, 1, 0], [1, 0, 0]],
            [0, 1, 0],
        ),
        (
            RouterConfig(4, 2, select="threshold", fallback=0),  # those with none stay unrouted
            [[3, 0], [2, 0], [1, 0]],
            [softmax(0.9, 0.5), [0, 0], [1, 0]],
            [[1, 1], [0, 0], [1, 0]],
            [0, 1, 0],
        ),
        (
            RouterConfig(4, 1, groups=2, select="top_k", weight="softmax"),  # modules 0, 1 compete, and 2, 3
            [[0, 3], [0, 2], [1, 2]],
            [[1, 1], [1, 1], [1, 1]],
            [[1, 1], [1, 1], [1, 1]],
            [0, 0, 0],
        ),
        (
            RouterConfig(4, 0, groups=2, select="threshold"),  # fallback within each group
            [[0, 1, 3, 2], [0, 1, 2, 3], [1, 0, 2, 3]],
            [[*softmax(0.5, 0.3), 1, 0], [1, 0, 1, 0], [1, 0, 1, 0]],
            [[1, 1, 1, 0], [1, 0, 1, 0], [1, 0, 1, 0]],
            [0, 1, 1],
        ),
    ],
)
def test_select_by_hand(cfg, index, weight, active, unrouted):
    found = select(LOGITS, cfg)
    np.testing.assert_array_equal(found[0], index)
    np.testing.assert_allclose(found[1], weight, rtol=1e-6, atol=1e-7)
    np.testing.assert_array_equal(found[2], np.array(active, bool))
    np.testing.assert_array_equal(found[3], np.array(unrouted, bool))


def test_a_logit_of_exactly_zero_is_not_above_zero():
    for name in ("relu", "hard"):
        assert not np.any(select(np.zeros((1, 3), np.float32), RouterConfig(3, 2, select=name))[2])


@pytest.mark.parametrize("name", ["top_k", "relu", "hard", "threshold"])
def test_padding_is_not_routed(name):
    cfg = RouterConfig(3, 2, select=name)
    router = Router(jnp.asarray(PROTO), jnp.full(3, 2.0))  # nothing above zero: threshold would fall back
    all_tokens = route(router, X, cfg)
    padded = route(router, X, cfg, np.array([True, False, True]))
    assert not np.any(padded.active[1]) and not np.any(padded.weight[1]) and not padded.unrouted[1]
    for field in ("index", "weight", "active", "unrouted", "logits"):
        np.testing.assert_array_equal(getattr(padded, field)[::2], getattr(all_tokens, field)[::2])
    assert np.all(all_tokens.unrouted) == (name != "top_k")


def test_per_module_lays_slots_out_by_module():
    table = hand_made([[2, 0], [1, 2]], [[1, 1], [1, 1]], [[True, True], [True, False]], 3)
    values = jnp.array([[5.0, 7.0], [2.0, 9.0]])
    np.testing.assert_array_equal(routing.per_module(values, table), [[7, 0, 5], [0, 2, 0]])
    np.testing.assert_array_equal(routing.per_module(values, table), by_module(values, table))


@pytest.mark.parametrize("name", ["top_k", "hard"])
def test_slots_and_modules_are_laid_out_into_each_other(name):
    cfg = RouterConfig(6, 2, groups=2, select=name)
    rng = np.random.default_rng(0)
    proto, x, values = (rng.normal(size=shape).astype(np.float32) for shape in ((6, 4), (5, 4), (5, 6)))
    table = route(Router(proto, np.zeros(6, np.float32)), x, cfg, np.arange(5) != 3)
    assert np.any(table.active) and not np.all(table.active)
    by_slot = np.zeros((5, 4), np.float32)
    for n, k in zip(*np.nonzero(table.active), strict=True):
        by_slot[n, k] = values[n, np.asarray(table.index)[n, k]]
    per_slot, per_module = jax.jit(routing.per_slot), jax.jit(routing.per_module)
    np.testing.assert_array_equal(per_slot(values, table), by_slot)
    used = np.asarray(per_module(np.ones((5, 4), np.float32), table))
    np.testing.assert_array_equal(per_module(by_slot, table), values * used)
    assert used.sum() == np.sum(table.active)


def main_loss(router, x, cfg):
    """A main loss that reads the routing only: the weights, each times a number of its module."""
    r = routing.route(router, x, cfg)
    return jnp.sum(routing.per_module(r.weight, r) * jnp.array([[1.0, -2.0, 0.5, 3.0]]) * (1 + jnp.arange(x.shape[0]))[:, None])


def numpy_loss(proto, gate, x, cfg):
    """The same for softmax and relu weights and a bias, in float64."""
    logits = (x / np.linalg.norm(x, axis=1, keepdims=True)) @ (proto / np.linalg.norm(proto, axis=1, keepdims=True)).T - gate
    total = 0.0
    for n, row in enumerate(logits):
        best = np.argsort(-row, kind="stable")[: cfg.slots]
        weight = np.maximum(row[best], 0) if cfg.select == "relu" else np.exp(row[best]) / np.exp(row[best]).sum()
        total += (n + 1) * np.sum(weight * np.array([1.0, -2.0, 0.5, 3.0])[best])
    return total


@pytest.mark.parametrize("name", ["top_k", "relu"])
def test_isolation_is_exactly_zero_and_without_it_gradients_are_finite_differences(name):
    rng = np.random.default_rng(1)
    proto, gate, x = rng.normal(size=(4, 3)), rng.normal(size=4) * 0.1, rng.normal(size=(5, 3))
    router, tokens = Router(jnp.asarray(proto, jnp.float32), jnp.asarray(gate, jnp.float32)), jnp.asarray(x, jnp.float32)
    isolated, open_ = (RouterConfig(4, 2, select=name, isolate=i) for i in (True, False))
    gradient = jax.jit(jax.grad(main_loss, (0, 1)), static_argnums=2)
    for leaf in jax.tree.leaves(gradient(router, tokens, isolated)):
        np.testing.assert_array_equal(leaf, 0)

    by_router, by_token = gradient(router, tokens, open_)
    for got, at in ((by_router.proto, proto), (by_router.gate, gate), (by_token, x)):
        want = np.zeros_like(at)
        for i in np.ndindex(at.shape):
            at[i] += 1e-6
            up = numpy_loss(proto, gate, x, open_)
            at[i] -= 2e-6
            down = numpy_loss(proto, gate, x, open_)
            at[i] += 1e-6
            want[i] = (up - down) / 2e-6
        assert np.abs(want).max() > 0.01
        np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-4)


def test_without_isolation_hard_weights_still_carry_nothing():
    rng = np.random.default_rng(1)
    router = Router(jnp.asarray(rng.normal(size=(4, 3)), jnp.float32), jnp.zeros(4))
    x = jnp.asarray(rng.normal(size=(5, 3)), jnp.float32)
    grads = jax.jit(jax.grad(main_loss), static_argnums=2)(router, x, RouterConfig(4, 2, select="hard", isolate=False))
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(grads))


def test_fallback_zero_keeps_gradients_finite():
    router = Router(jnp.asarray(PROTO), jnp.full(3, 2.0))  # no logit is above zero
    cfg = RouterConfig(3, 2, select="threshold", fallback=0, isolate=False)
    grads = jax.jit(jax.grad(lambda r: jnp.sum(routing.route(r, jnp.asarray(X), cfg).weight)))(router)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(grads))


def test_spec_shapes_and_first_values():
    for cfg, shape in ((RouterConfig(6, 1), (6,)), (RouterConfig(6, 1, cost="linear"), (6, 50))):
        router = init(jax.random.key(0), routing.spec(50, cfg))
        assert router.proto.shape == (6, 50) and router.gate.shape == shape
        assert not np.any(router.gate) and 0.017 < float(jnp.std(router.proto)) < 0.023


@given(st.integers(0, 2**32 - 1))
def test_entropy_matches_its_definition(seed):
    logits = np.random.default_rng(seed).normal(size=(3, 5)).astype(np.float32) * 3
    p = np.exp(logits.astype(np.float64))
    p /= p.sum(-1, keepdims=True)
    h = -(p * np.log(p)).sum(-1)
    np.testing.assert_allclose(_entropy(logits), h, atol=1e-5)
    np.testing.assert_array_equal(_entropy(logits[:, None]), _entropy(logits)[:, None])
    # dH/dz_i = Σ_j (−log p_j − 1) dp_j/dz_i with the softmax's Jacobian p_j (δ_ij − p_i)
    jacobian = p[..., None] * np.eye(5) - p[..., None] * p[..., None, :]
    np.testing.assert_allclose(_entropy_slope(logits), np.einsum("rj,rji->ri", -np.log(p) - 1, jacobian), atol=1e-5)


_entropy = jax.jit(base.entropy)
_entropy_slope = jax.jit(jax.grad(lambda z: jnp.sum(base.entropy(z))))


@pytest.mark.parametrize("match", ["cosine", "dot"])
def test_logits_are_not_rounded_where_the_hardware_would(match):
    """GPUs and TPUs round the factors of a float32 matmul unless told otherwise, and a decision by a threshold would follow."""
    cfg = RouterConfig(modules=3, slots=1, match=match, cost="linear")
    text = logits_of.lower(init(jax.random.key(0), routing.spec(4, cfg)), jnp.ones((2, 4)), cfg).as_text()
    assert text.count("dot_general") == text.count("[HIGHEST, HIGHEST]") == 2


def test_numbers_that_cannot_be_are_refused():
    for numbers in ((0, 1), (4, -1), (4, 1, 0), (4, 1, 3)):
        with pytest.raises(ValueError, match="modules"):
            RouterConfig(*numbers)
    with pytest.raises(ValueError, match=r"slots \(3\) must not exceed the modules of a group \(2\)"):
        routing.spec(8, RouterConfig(4, 3, 2))
