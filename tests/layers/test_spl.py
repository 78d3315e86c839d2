"""SPL against a loop over tokens and neurons in numpy float64, its taps against materialised gradients, and isolation."""

from dataclasses import replace
from functools import partial
from itertools import permutations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.layers.naive import make
from tinyonn_jax.layers import dynsiha, moie, spl, tap
from tinyonn_jax.layers.routing import (
    Router,
    RouterConfig,
    Stream,
    data_init,
    drln,
    effective,
    load,
    per_module,
    route_all,
    served,
)
from tinyonn_jax.learning import signals as surprise

N, INPUTS, NEURONS = 11, 6, 7


def config(match="cosine", cost="bias", select="relu", activation=True, isolate=True):
    return spl.Config(INPUTS, RouterConfig(NEURONS, 0, match=match, cost=cost, select=select, isolate=isolate), activation)


def layer(cfg, seed=0):
    return make(spl.spec(cfg), seed)


X = jax.device_put(np.random.default_rng(9).normal(size=(N, INPUTS)).astype(np.float32))
apply = jax.jit(spl.apply, static_argnames="cfg")


def by_hand(params, x, cfg):
    """The seed's equations, one token and one neuron at a time."""
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    y = np.zeros((len(x), NEURONS))
    for n, token in enumerate(np.asarray(x, np.float64)):
        for o in range(NEURONS):
            proto, gate = p.router.proto[o], p.router.gate[o]
            norms = np.linalg.norm(token) * np.linalg.norm(proto) if cfg.router.match == "cosine" else np.sqrt(INPUTS)
            value = token @ proto / norms
            match cfg.router.cost:
                case "linear":
                    price = token @ gate
                case "bias":
                    price = gate
                case _:
                    price = gate / (np.max(np.abs(p.router.gate)) + 1)
            u = token @ p.modules.mu[o] + p.modules.bias[o]
            f = u / (1 + np.exp(-u)) if cfg.activation else u
            logit = value - price
            y[n, o] = f * (max(logit, 0) if cfg.router.select == "relu" else logit > 0)
    return y


@pytest.mark.parametrize("activation", [True, False])
@pytest.mark.parametrize("select", ["relu", "hard"])
@pytest.mark.parametrize("cost", ["bias", "bias_drln", "linear"])
@pytest.mark.parametrize("match", ["cosine", "dot"])
def test_the_seeds_equations(match, cost, select, activation):
    cfg = config(match, cost, select, activation)
    params = layer(cfg)
    y, routing = apply(params, X, cfg)
    np.testing.assert_allclose(y, by_hand(params, X, cfg), atol=2e-6)
    assert 0.1 < np.mean(routing.active) < 0.9
    np.testing.assert_array_equal(np.asarray(y) == 0, ~np.asarray(routing.active))


@pytest.mark.parametrize("select", ["relu", "hard"])
def test_taps_are_the_gradients_of_every_token(select):
    cfg = config(select=select)
    params = layer(cfg)

    def loss(params, tap, x):
        y, routing = spl.apply(params, x, cfg, tap=tap)
        return jnp.sum(jnp.sin(3 * y)), routing

    routing = loss(params, None, X)[1]
    (grads, tapped), _ = jax.grad(loss, (0, 1), has_aux=True)(params, tap.zeros(routing), X)
    plain = jax.grad(lambda p: loss(p, None, X)[0])(params)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b), grads, plain)
    each = jax.vmap(lambda x: jax.grad(lambda p: loss(p, None, x[None])[0])(params).modules)(X)  # a gradient for every token
    signals = surprise.read({"a": tapped}, {"a": routing})["a"]
    np.testing.assert_allclose(signals.output, jnp.abs(each.bias), atol=1e-6)  # δ, of which the bias gradient is the sum
    np.testing.assert_allclose(signals.param, jnp.linalg.norm(each.mu, axis=-1), atol=1e-6)
    np.testing.assert_allclose(signals.module_output, jnp.linalg.norm(each.bias, axis=0), rtol=1e-5)
    np.testing.assert_allclose(signals.module_param, jnp.linalg.norm(grads.modules.mu, axis=-1), rtol=1e-6)
    found = surprise.summary(routing, signals, routing.logits[0])
    assert "gating_acc" not in found  # a token uses many neurons and prefers none of them
    np.testing.assert_allclose(found["surprise_param"], jnp.sum(signals.param) / jnp.sum(routing.active), rtol=1e-5)


@pytest.mark.parametrize("select", ["relu", "hard"])
def test_sums_over_tokens_leave_out_padding(select):
    cfg = config(select=select)
    params = layer(cfg)
    gate = jnp.abs(params.router.gate).at[0].set(9.0)  # the first neuron is too dear for anybody
    params = replace(params, router=replace(params.router, gate=gate))
    valid = jnp.arange(N) % 3 != 0
    routing = spl.apply(params, X.at[1].set(0.0), cfg, valid=valid)[1]  # token 1 matches nothing
    np.testing.assert_array_equal(served(routing), jnp.sum(routing.active, 0))
    np.testing.assert_allclose(load(routing).weight, jnp.sum(routing.weight, 0), rtol=1e-6)
    np.testing.assert_array_equal(routing.unrouted, valid & ~jnp.any(routing.active, -1))
    assert float(served(routing)[0]) == 0 < jnp.sum(served(routing)) and bool(routing.unrouted[1])


def test_per_token_cost_is_importance_renamed():
    """The trap: over one token's neurons |δ|·‖x‖ normalises to |δ|, so that importance and cost cannot differ."""
    cfg = config(select="hard")
    params = layer(cfg)
    routing = spl.apply(params, X, cfg)[1]
    tapped = jax.grad(lambda t: jnp.sum(spl.apply(params, X, cfg, tap=t)[0] ** 3))(tap.zeros(routing))
    s = surprise.read({"a": tapped}, {"a": routing})["a"]
    np.testing.assert_allclose(drln(s.param), drln(s.output), atol=1e-6)
    assert float(jnp.max(jnp.abs(drln(jnp.broadcast_to(s.module_param, s.output.shape)) - drln(s.output)))) > 0.1


@pytest.mark.parametrize("select", ["relu", "hard"])
@pytest.mark.parametrize("isolate", [True, False])
def test_isolation(select, isolate):
    """The main loss moves no router when isolated, and under hard gating never, for a step has no gradient."""
    cfg = config(select=select, cost="linear", isolate=isolate)
    grads = jax.grad(lambda p: jnp.sum(jnp.sin(spl.apply(p, X, cfg)[0])))(layer(cfg))
    assert all(np.any(g) for g in jax.tree.leaves(grads.modules))
    taught = not isolate and select == "relu"
    assert all(np.any(g) == taught for g in jax.tree.leaves(grads.router))


def test_nothing_of_tokens_times_neurons_times_inputs_is_formed():
    cfg = config()
    params = layer(cfg)
    routing = spl.apply(params, X, cfg)[1]
    step = jax.grad(lambda p, t: jnp.sum(spl.apply(p, X, cfg, tap=t)[0] ** 2), (0, 1))
    text = jax.jit(step).lower(params, tap.zeros(routing)).as_text()
    assert f"{N}x{NEURONS}x" in text  # the pattern below would be found
    assert not any(f"<{'x'.join(map(str, shape))}x" in text for shape in permutations((N, NEURONS, INPUTS)))


def test_invalid_tokens_give_zero_and_only_relu_and_hard_select_neurons():
    cfg = config()
    valid = jnp.arange(N) % 2 == 0
    y, routing = spl.apply(layer(cfg), X, cfg, valid=valid)
    assert not y[1::2].any() and not routing.active[1::2].any() and y[::2].any()
    assert per_module(jnp.ones((N, NEURONS)), routing).sum() == routing.active.sum()
    with pytest.raises(ValueError, match="relu or hard"):
        route_all(Router(X[:NEURONS], jnp.zeros(NEURONS)), X, RouterConfig(NEURONS, 2))


def test_prototypes_from_data():
    cfg = config()
    params = layer(cfg)
    routing = spl.apply(params, X, cfg, valid=jnp.arange(N) < 4)[1]
    proto = data_init(params.router, routing, jax.random.key(0)).proto
    assert all(any(np.array_equal(p, x) for x in X[:4]) for p in proto)
    assert len(np.unique(proto, axis=0)) == min(4, NEURONS)  # each of them, before any comes again


def test_prototypes_from_data_differ_where_tokens_are_alike():
    cfg, many = config(), 50
    differ = jax.random.normal(jax.random.key(1), (NEURONS, INPUTS))
    x = jnp.concatenate([jnp.broadcast_to(differ[:1], (many, INPUTS)), differ])
    params = layer(cfg)
    proto = data_init(params.router, spl.apply(params, x, cfg)[1], jax.random.key(0)).proto
    assert len(np.unique(proto, axis=0)) == NEURONS


def test_prototype_streams_by_hand():
    """Each layer's prototypes are refined from the refined ones before; the first layer's are its own."""
    rng = np.random.default_rng(0)
    proto, w = rng.normal(size=(3, NEURONS, INPUTS)), rng.normal(size=(2, INPUTS, INPUTS))
    scale, bias = rng.normal(size=(2, INPUTS)), rng.normal(size=(2, INPUTS))
    made = effective(Router(jnp.asarray(proto), jnp.zeros((3, NEURONS)), Stream(*map(jnp.asarray, (w, scale, bias)))))
    expected = [proto[0]]
    for step in range(2):
        h = expected[-1] @ w[step]
        h = (h - h.mean(-1, keepdims=True)) / h.std(-1, keepdims=True)
        expected.append(proto[step + 1] + h * scale[step] + bias[step])
    np.testing.assert_allclose(made.proto, expected, atol=1e-4)
    assert made.stream is None and effective(made) is made


def test_moie_is_two_spls():
    cfg = moie.Config(INPUTS, 9, config().router)
    params = make(moie.spec(cfg))
    y, routings = moie.apply(params, X[None], cfg)
    hidden, _ = spl.apply(params.first, X, cfg.first)
    expected, _ = spl.apply(params.second, hidden, cfg.second)
    np.testing.assert_array_equal(y[0], expected)
    assert set(routings) == {"first", "second"}
    assert routings["first"].logits.shape == (N, 9) and routings["second"].logits.shape == (N, INPUTS)
    with pytest.raises(ValueError, match=r"by role, first, second; got ff\.first"):  # nothing would be measured
        moie.apply(params, X[None], cfg, tap={"ff.first": tap.zeros(routings["first"])})


@pytest.mark.parametrize("output", [True, False])
@pytest.mark.parametrize("heads", [1, 2])
def test_dynsiha_is_attention_of_spl_projections_and_causal(heads, output):
    d, t = 12, 5
    cfg = dynsiha.Config(d, heads, replace(config().router, modules=d), output)
    params = make(dynsiha.spec(cfg))
    x = np.random.default_rng(1).normal(size=(1, t, d)).astype(np.float32)
    apply = jax.jit(lambda x: dynsiha.apply(params, x, cfg))
    y, routings, cache = apply(x)
    assert y.shape == x.shape and cache is None
    assert routings.keys() == {"q", "k", "v", *(["o"] if output else [])}
    reach = jax.jacobian(lambda x: apply(x)[0][0].sum(-1))(x)[:, 0]  # [T,T,D]
    np.testing.assert_array_equal(np.abs(reach).sum(-1) > 0, np.tri(t, dtype=bool))


PROTO = np.random.default_rng(4).normal(size=(6, INPUTS)).astype(np.float32)
PROTO[1], PROTO[::3] = 0, X[0]  # equals, too
ROUTER = Router(PROTO, np.zeros(6, np.float32))


@pytest.mark.parametrize(("slots", "groups"), [(2, 1), (1, 2), (2, 2)])
@pytest.mark.parametrize("select", ["relu", "hard"])
def test_a_limit_lets_the_best_of_each_group_pass(select, slots, groups):
    free, limited = (jax.jit(partial(route_all, cfg=RouterConfig(6, k, groups, select=select)))(ROUTER, X) for k in (0, slots))
    logits, want = np.asarray(limited.logits), np.zeros((N, 6), bool)
    for n in range(N):
        for group in np.split(np.arange(6), groups):
            for o in sorted(group, key=lambda o: -logits[n, o])[:slots]:
                want[n, o] = logits[n, o] > 0
    np.testing.assert_array_equal(limited.active, want)
    np.testing.assert_array_equal(limited.weight, np.where(want, free.weight, 0))
    assert 0 < want.sum() < np.sum(free.active)
