"""SARS against float64 loops and finite differences, for both granularities and both signs."""

from dataclasses import replace
from functools import cache, partial
from typing import Any, Literal

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.layers.naive import make
from tinyonn_jax.layers import routing as routes
from tinyonn_jax.layers import spl, tap
from tinyonn_jax.layers.routing import Router, RouterConfig, Routing
from tinyonn_jax.learning import signals as surprise
from tinyonn_jax.learning.sars import Granularity, goodness, sars
from tinyonn_jax.learning.signals import Signals

N, D, M, G, K = 7, 4, 6, 2, 4
CFG = RouterConfig(M, K // G, groups=G, select="hard")
GRANULARITIES: tuple[Granularity, ...] = ("module", "token")
SIGNS: tuple[Literal["bayes", "reinforce"], ...] = ("bayes", "reinforce")
route = jax.jit(routes.route, static_argnums=2)

META: Any = None  # these objectives do not look at it


@flax.struct.dataclass
class Layer:
    router: Router
    modules: dict[str, jax.Array]


def example(seed=5):
    """A routing with idle slots, a padded token and an unused module, and made-up signals."""
    rng = np.random.default_rng(seed)
    router = Router(jnp.asarray(rng.normal(size=(M, D)), jnp.float32), jnp.asarray([0, 0.1, -0.1, 0.2, 9.0, 0.0], jnp.float32))
    x = jnp.asarray(rng.normal(size=(N, D)), jnp.float32)
    routing = route(router, x, CFG, np.arange(N) != 2)
    slots = lambda: jnp.where(routing.active, jnp.asarray(rng.random((N, K)), jnp.float32), 0)  # noqa: E731
    used = np.isin(np.arange(M), np.asarray(routing.index)[np.asarray(routing.active)])
    modules = lambda: jnp.asarray(np.where(used, rng.random(M), 0), jnp.float32)  # noqa: E731
    assert not used[4] and used.sum() >= 4 and not np.all(routing.active)
    return router, routing, Signals(slots(), slots(), slots(), modules(), modules())


def naive_goodness(routing, signals, granularity, neuron_cost="module"):
    """importance × (belief − cost), each over its largest magnitude among the modules of the group; loops, float64."""
    logits, index, active = (np.asarray(a) for a in (routing.logits, routing.slots, routing.active))
    (tokens, slots), modules, per = active.shape, logits.shape[1], routing.config.per_group
    good = np.zeros(logits.shape)
    for n in range(tokens):
        uses = {index[n, k]: k for k in range(slots) if active[n, k]}
        for group in range(modules // per):
            members = range(group * per, (group + 1) * per)
            importance, cost, belief = np.zeros(per), np.zeros(per), logits[n, members].astype(np.float64)
            for i, m in enumerate(members):
                if granularity == "module":
                    importance[i], cost[i] = signals.module_output[m], signals.module_param[m]
                elif m in uses:
                    importance[i], cost[i] = signals.attribution[n, uses[m]], signals.param[n, uses[m]]
                if routing.index is None and neuron_cost == "module":
                    cost[i] = signals.module_param[m]
            importance, cost, belief = (v / (np.abs(v).max() or 1.0) for v in (importance, cost, belief))
            for i, m in enumerate(members):
                anyone = any(active[i2, k] and index[i2, k] == m for i2 in range(tokens) for k in range(slots))
                if anyone if granularity == "module" else m in uses:
                    good[n, m] = importance[i] * (belief[i] - cost[i])
    return good


def naive_logits(proto, gate, x):
    unit = lambda v: v / np.linalg.norm(v, axis=1, keepdims=True)  # noqa: E731
    return unit(x) @ unit(proto).T - gate


def naive_loss(proto, gate, x, good, sign, valid):
    prior = (naive_logits(proto, gate, x) + sign * good).reshape(N, G, M // G)
    p = np.exp(prior - prior.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    return np.mean(-np.sum(p * np.log(p), -1)[valid])


@jax.jit
def both_goodness(routing, signals):
    """By module `[N,M]`, for both granularities."""
    return goodness(routing, signals, "module"), routes.per_module(goodness(routing, signals, "token"), routing)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_goodness_against_loops(granularity):
    _, routing, signals = example()
    got = both_goodness(routing, signals)[GRANULARITIES.index(granularity)]
    want = naive_goodness(routing, signals, granularity)
    valid = np.asarray(routing.valid)
    np.testing.assert_allclose(got[valid], want[valid], rtol=1e-5, atol=1e-6)
    assert np.all(want[:, 4] == 0) and np.any(want > 0) and np.any(want < 0)  # unused: exactly nothing


def test_unused_modules_get_nothing_whatever_their_logits():
    _, routing, signals = example()
    for good in both_goodness(routing, signals):
        assert not np.any(np.asarray(good)[:, 4])
    token = np.asarray(both_goodness(routing, signals)[1])
    used = np.asarray(jax.jit(routes.per_module)(jnp.ones((N, K)), routing)) > 0
    assert not np.any(token[~used]) and np.any(token[used])


def test_one_slot_a_group_is_judged_by_the_batch():
    """Normalised over the one module that a token uses, its signals are one, whatever they were: those of the modules speak."""
    _, routing, signals = example()
    one = replace(routing.config, slots=1)
    single = replace(routing, config=one, **{k: getattr(routing, k)[:, ::2] for k in ("index", "weight", "active")})
    less = lambda s: replace(s, **{k: getattr(s, k)[:, ::2] for k in ("output", "attribution", "param")})  # noqa: E731
    judged = jax.jit(goodness, static_argnums=2)
    good = judged(single, less(signals), "token")
    np.testing.assert_array_equal(good, judged(single, less(signals), "module"))
    other = replace(signals, module_param=signals.module_param[::-1])
    assert np.any(good > 0) and np.any(good < 0) and not np.allclose(good, judged(single, less(other), "token"))


@cache
def neurons(seed=2):
    """A layer of routed neurons on tokens of which one is padding, the gradients of a loss, its routing and its signals."""
    cfg = spl.Config(D, RouterConfig(M, 0, select="hard"))
    rng = np.random.default_rng(seed)
    params, x = make(spl.spec(cfg)), jnp.asarray(rng.normal(size=(N, D)), jnp.float32)
    sign = rng.choice([-1.0, 1.0], (N, M))

    def loss(params, taps):
        y, routing = spl.apply(params, x, cfg, valid=np.arange(N) != 2, tap=taps)
        return jnp.sum(sign * jnp.sin(3 * y)), routing

    empty = tap.zeros(jax.eval_shape(loss, params, None)[1])
    (grads, tapped), routing = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(params, empty)
    return grads, routing, surprise.read({"": tapped}, {"": routing})[""]


def test_neurons_cost_what_their_rows_do_or_what_each_token_does():
    _, routing, signals = neurons()
    judged = jax.jit(goodness, static_argnums=(2, 3))
    by_row, by_token = (np.asarray(judged(routing, signals, "token", c)) for c in GRANULARITIES)
    for got, cost in ((by_row, "module"), (by_token, "token")):
        want = naive_goodness(routing, signals, "token", cost)
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
        assert np.any(want > 0) and np.any(want < 0)
    assert np.abs(by_row - by_token).max() > 0.1
    assert np.any(-signals.delta.min(-1) > signals.delta.max(-1))  # the largest magnitude is one of a negative gradient


def test_the_goodness_gate_stops_the_neurons_that_are_not_good():
    grads, routing, signals = neurons()
    gated = jax.jit(lambda g: sars(goodness_gate=True).adjust(g, g, {"": routing}, {"": signals}, META))(grads)
    good = naive_goodness(routing, signals, "token")[np.asarray(routing.valid)].mean(0) > 0
    assert 0 < good.sum() < M
    np.testing.assert_array_equal(gated.modules.mu, np.where(good[:, None], grads.modules.mu, 0))
    np.testing.assert_array_equal(gated.modules.bias, np.where(good, grads.modules.bias, 0))
    assert np.all(np.any(grads.modules.mu, -1)) and np.all(grads.modules.bias)


def compiled(granularity: Granularity, sign: Literal["bayes", "reinforce"], **options):
    """Objective and gradient of one layer."""
    rule = sars(granularity, sign, **options)
    return jax.jit(
        jax.value_and_grad(lambda r, routing, found: rule.objective({"a": r}, {"a": routing}, {"a": found}, META), has_aux=True)
    )


objectives = {(g, s): compiled(g, s) for g in GRANULARITIES for s in SIGNS}


@pytest.mark.parametrize("sign", SIGNS)
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_objective_and_its_gradient_with_goodness_held_fixed(granularity, sign):
    router, routing, signals = example()
    (loss, metrics), grads = objectives[granularity, sign](router, routing, signals)
    good, valid = naive_goodness(routing, signals, granularity), np.asarray(routing.valid)
    proto, gate, x = (np.asarray(a, np.float64) for a in (router.proto, router.gate, routing.input))
    number = -1 if sign == "bayes" else 1
    assert float(loss) == pytest.approx(naive_loss(proto, gate, x, good, number, valid), rel=1e-5)
    for got, at in ((grads.proto, proto), (grads.gate, gate)):
        want = np.zeros_like(at)
        for i in np.ndindex(at.shape):
            at[i] += 1e-5
            up = naive_loss(proto, gate, x, good, number, valid)
            at[i] -= 2e-5
            want[i] = (up - naive_loss(proto, gate, x, good, number, valid)) / 2e-5
            at[i] += 1e-5
        np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-5)
        assert np.abs(want).max() > 1e-3
    assert 0 <= float(metrics["entropy_share"]) <= 1
    assert float(metrics["entropy_share"]) == pytest.approx(float(loss) / np.log(M // G), rel=1e-5)

    layer = metrics["layers"]["a"]
    shares = [(good[valid] > 0).mean(), (good[valid] < 0).mean(), (good[valid] == 0).mean()]
    np.testing.assert_allclose([layer["good_share"], layer["bad_share"], layer["idle_share"]], shares, rtol=1e-5)
    np.testing.assert_allclose(layer["goodness"], good[valid].mean(0), rtol=1e-4, atol=1e-6)


def test_padding_counts_for_nothing():
    router, routing, signals = example()
    other = routing.replace(input=routing.input.at[2].set(50.0), logits=routing.logits.at[2].set(-30.0))
    for objective in objectives.values():
        for a, b in zip(
            jax.tree.leaves(objective(router, routing, signals)), jax.tree.leaves(objective(router, other, signals)), strict=True
        ):
            np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)


def test_the_sign_turns_the_pull_around():
    """Equal logits and one good module of three: its logit's gradient has the opposite sign under bayes and reinforce."""
    cfg = RouterConfig(3, 1, select="hard", cost="bias")
    router = Router(jnp.zeros((3, 2)), jnp.array([-0.5, -0.5, -0.5]))
    routing = route(router, jnp.ones((1, 2)), cfg)  # module 0 is used
    one = jnp.ones((1, 1))
    signals = Signals(one, one, one, jnp.array([1.0, 0, 0]), jnp.array([0.5, 1e-6, 1.0]))
    pulls = [float(objectives["module", s](router, routing, signals)[1].gate[0]) for s in SIGNS]
    assert pulls[0] * pulls[1] < 0 and min(np.abs(pulls)) > 1e-3
    # Entropy falls when the likeliest becomes likelier: reinforce lowers the good module's cost, bayes raises it.
    assert pulls[SIGNS.index("reinforce")] > 0


def test_signals_and_logits_of_the_forward_pass_carry_no_gradient():
    router, routing, signals = example()

    @jax.jit
    @jax.grad
    def through(floats):
        logits, signals = floats
        return sum(
            sars(g).objective({"a": router}, {"a": routing.replace(logits=logits)}, {"a": signals}, META)[0]
            for g in GRANULARITIES
        )

    assert not any(np.any(leaf) for leaf in jax.tree.leaves(through((routing.logits, signals))))


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_the_goodness_gate_zeroes_exactly_the_modules_that_are_not_good(granularity):
    router, routing, signals = example()
    rng = np.random.default_rng(1)
    modules = {"w_in": jnp.asarray(rng.normal(size=(M, 3, 2)), jnp.float32), "bias": jnp.asarray(rng.normal(size=M), jnp.float32)}
    grads = {"first": Layer(router, modules), "rest": jnp.ones(3)}
    rule = sars(granularity, goodness_gate=True)
    gated = jax.jit(lambda g, r, s: rule.adjust(g, g, {"first": r}, {"first": s}, META))(grads, routing, signals)
    mean = naive_goodness(routing, signals, granularity)[np.asarray(routing.valid)].mean(0)
    assert 0 < (mean > 0).sum() < M
    for name, leaf in modules.items():
        want = np.asarray(leaf) * (mean > 0).reshape(-1, *(1,) * (leaf.ndim - 1))
        np.testing.assert_array_equal(gated["first"].modules[name], want)
    np.testing.assert_array_equal(gated["first"].router.proto, router.proto)
    np.testing.assert_array_equal(gated["rest"], 1)
    assert sars(granularity).adjust(grads, grads, {}, {}, META) is grads


def test_recursions_share_one_gate_and_stacked_layers_have_their_own():
    router, routing, signals = example()
    _, other, other_signals = example(4)
    pair = lambda a, b: jax.tree.map(lambda *x: jnp.stack(x), a, b)  # noqa: E731
    routings, both = pair(routing, other), pair(signals, other_signals)
    means = [naive_goodness(r, s, "token")[np.asarray(r.valid)].mean(0) for r, s in ((routing, signals), (other, other_signals))]
    rule = sars("token", goodness_gate=True)

    def kept(router, lead):
        grads = {"a": Layer(router, {"w": jnp.ones((*lead, M, 2))})}
        out = jax.jit(lambda g, r, s: rule.adjust(g, g, {"a": r}, {"a": s}, META))(grads, routings, both)
        return np.asarray(out["a"].modules["w"])[..., 0] > 0

    np.testing.assert_array_equal(kept(router, ()), np.mean(means, 0) > 0)
    np.testing.assert_array_equal(kept(pair(router, router), (2,)), np.stack(means) > 0)


@pytest.mark.parametrize("shared", [True, False], ids=["recursions", "blocks"])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_neurons_of_recursions_and_blocks_are_judged_one_by_one(granularity, shared):
    """Loss, gradient and metrics of both together are what those of each give: a router of each, or one for both."""
    rng = np.random.default_rng(3)
    pair = [neurons(seed)[1:] for seed in (2, 6)]
    routers = [Router(*(jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((M, D), (M,)))) for _ in pair]
    if shared:
        routers[1] = routers[0]
    # Imbalance is of both recursions' use together, so that it is no mean: of blocks alone.
    objective = compiled(granularity, "reinforce", balance=0.0 if shared else 0.5)
    ((one, a), (two, b)) = (objective(router, *layer) for router, layer in zip(routers, pair, strict=True))
    stack = lambda *leaves: jnp.stack(leaves)  # noqa: E731
    (loss, metrics), got = objective(routers[0] if shared else jax.tree.map(stack, *routers), *jax.tree.map(stack, *pair))
    assert float(loss) == pytest.approx((float(one[0]) + float(two[0])) / 2, rel=1e-6)
    for g, *each in zip(*map(jax.tree.leaves, (got, a, b)), strict=True):
        np.testing.assert_allclose(g, np.mean(each, 0) if shared else np.stack(each) / 2, rtol=1e-5, atol=1e-7)
    found, *layers = (m["layers"]["a"] for m in (metrics, one[1], two[1]))
    for share in ("good_share", "bad_share", "idle_share"):
        assert float(found[share]) == pytest.approx(np.mean([layer[share] for layer in layers]), rel=1e-5)
    means = np.stack([layer["goodness"] for layer in layers])
    np.testing.assert_allclose(found["goodness"], means.mean(0) if shared else means, rtol=1e-5, atol=1e-7)
    if not shared:
        for share in ("good_share", "bad_share"):
            np.testing.assert_allclose(found[f"{share}_by_block"], [layer[share] for layer in layers], rtol=1e-6)


def test_the_gate_and_the_metric_are_of_the_same_goodness():
    """Also where tokens of one block would drown those of another in rounding: each block is judged by its own."""
    pair = [neurons(seed)[1:] for seed in (2, 6)]
    scale = 10.0 ** np.random.default_rng(4).integers(-2, 2, (N, 1))
    pair[0] = pair[0][0], pair[0][1].replace(delta=scale * pair[0][1].delta)
    routing, signals = jax.tree.map(lambda *leaves: jnp.stack(leaves), *pair)
    signals = signals.replace(delta=signals.delta * jnp.asarray([1.0, 1e7])[:, None, None])
    router, rule = Router(jnp.ones((2, M, D)), jnp.zeros((2, M))), sars(goodness_gate=True)

    @jax.jit
    def both(modules):
        _, metrics = rule.objective({"a": router}, {"a": routing}, {"a": signals}, META)
        kept = rule.adjust({"a": Layer(router, modules)}, None, {"a": routing}, {"a": signals}, META)
        return metrics["layers"]["a"]["goodness"], kept["a"].modules["w"]

    goodness_of, kept = both({"w": jnp.ones((2, M))})
    np.testing.assert_array_equal(kept > 0, goodness_of > 0)
    assert 0 < np.sum(kept > 0) < kept.size


def test_balance_of_recursions_is_that_of_their_tokens_together():
    pair = [neurons(seed)[1:] for seed in (2, 6)]
    pair = [(routing.replace(load=None), jax.tree.map(jnp.zeros_like, signals)) for routing, signals in pair]
    router, objective = Router(jnp.ones((M, D)), jnp.zeros(M)), compiled("token", "reinforce", balance=1.0)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *pair)
    together = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *(routing for routing, _ in pair))
    no_surprise = jax.tree.map(lambda leaf: jnp.concatenate([leaf, leaf]), pair[0][1])
    no_surprise = no_surprise.replace(module_output=jnp.zeros(M), module_param=jnp.zeros(M))
    found, want = (objective(router, *layer)[0][1]["loss_balance"] for layer in (stacked, (together, no_surprise)))
    assert float(found) == pytest.approx(float(want), rel=1e-6) and float(want) > 1.01


def test_entropy_share_is_one_for_uniform_priors_and_near_zero_for_certain_ones():
    _, routing, signals = example()
    zero = jax.tree.map(jnp.zeros_like, signals)
    router = Router(jnp.zeros((M, D)), jnp.zeros(M))

    def share(logits):
        routed = replace(routing, logits=jnp.broadcast_to(logits, routing.logits.shape))
        return float(objectives["module", "bayes"](router, routed, zero)[0][1]["entropy_share"])

    assert share(jnp.zeros(M)) == pytest.approx(1.0, abs=1e-6)
    assert 0 <= share(jnp.array([50.0, 0, 0, 50.0, 0, 0])) < 1e-6


def test_several_layers_are_averaged():
    router, routing, signals = example()
    router2, routing2, signals2 = example(3)
    rule = sars("module", "bayes")
    alone = [float(objectives["module", "bayes"](*e)[0][0]) for e in ((router, routing, signals), (router2, routing2, signals2))]
    loss, _ = jax.jit(lambda a, b, c: rule.objective(a, b, c, META))(
        {"x": router, "y": router2}, {"x": routing, "y": routing2}, {"x": signals, "y": signals2}
    )
    assert float(loss) == pytest.approx(np.mean(alone), rel=1e-6)
    assert rule.isolate


def test_imbalance_by_hand():
    """Two tokens (and a padded one), two groups of two modules, one router for both of two recursions, or one for each."""
    cfg = RouterConfig(4, 1, groups=2, select="top_k")
    zeros, valid = jnp.zeros((2, 3, 4)), jnp.asarray([[True, True, False]] * 2)
    index = jnp.asarray([[[0, 2], [0, 3], [1, 2]], [[0, 2], [1, 3], [1, 2]]])
    active = jnp.broadcast_to(valid[..., None], index.shape)
    routing = Routing(zeros, index, active.astype(jnp.float32), active, jnp.zeros((2, 3, 1)), valid, jnp.zeros((2, 3), bool), cfg)
    odds = jnp.asarray([[3.0, 1.0], [1.0, 1.0]])  # of module 0 over 1, and of 2 over 3
    prior = jnp.broadcast_to(jnp.log(odds).reshape(4), (2, 3, 4)).at[:, 2].set(70.0)
    rule, no_surprise = sars(balance=1.0), [jnp.zeros((2, 3, 2))] * 3 + [jnp.zeros((2, 4))] * 2

    @jax.jit
    def found(routing, proto):
        router = Router(proto, jnp.zeros(proto.shape[:-1]))
        _, metrics = rule.objective({"a": router}, {"a": routing.replace(logits=prior)}, {"a": Signals(*no_surprise)}, META)
        return metrics["loss_balance"]

    # Group 0: p = (3/4, 1/4), load (1, 0) and (1/2, 1/2), in all (3/4, 1/4); group 1: all even, which is 1.
    shared, apart = jnp.zeros((4, 1)), jnp.zeros((2, 4, 1))
    assert float(found(routing, shared)) == pytest.approx(np.mean([2 * (9 + 1) / 16, 1]))
    assert float(found(routing, apart)) == pytest.approx(np.mean([2 * 3 / 4, 1, 1, 1]))
    silent = routing.replace(active=active.at[..., 1].set(False))  # group 1 serves nobody: no better than even
    assert float(found(silent, shared)) == pytest.approx(np.mean([2 * (9 + 1) / 16, 1]))


@partial(jax.jit, static_argnames=("balance", "centre", "steps"))
def loads(mean, steps=300, **options):
    """Tokens of each module after so many steps down the meta loss: 64 random tokens with a mean, 8 modules of which a token uses
    two, no surprise at all."""
    cfg = RouterConfig(8, 2)
    x = jax.random.normal(jax.random.key(0), (64, D)) + mean
    first = Router(jax.random.normal(jax.random.key(1), (8, D)), jnp.zeros(8))
    none = Signals(*(jnp.zeros((64, 2)) for _ in range(3)), *(jnp.zeros(8) for _ in range(2)))

    def loss(router):
        routing = route(jax.lax.stop_gradient(router), x, cfg)
        return sars(**options).objective({"a": router}, {"a": routing}, {"a": none}, META)[0]

    def step(router, _):
        return jax.tree.map(lambda p, g: p - 0.3 * g, router, jax.grad(loss)(router)), None

    return routes.served(route(jax.lax.scan(step, first, length=steps)[0], x, cfg))


def test_balance_keeps_modules_in_use_that_entropy_alone_gives_up():
    assert np.sum(loads(2.0) > 0) <= 4
    assert loads(2.0, balance=1.0).min() > 0.75 * 64 * 2 / 8


def test_centred_entropy_leaves_the_load_as_it_was():
    """It gives no module up; nor does it spread the load that a mean of all tokens makes uneven, which balance does."""
    first, alone, centred = loads(0.5, steps=0), loads(0.5), loads(0.5, centre=True)
    assert first.min() >= 4 and alone.min() == 0 and alone.max() == 64
    assert centred.min() >= 4 and abs(centred.max() - first.max()) <= 4
    assert loads(0.5, centre=True, balance=1.0).min() > 0.75 * 64 * 2 / 8


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_centred_the_mean_logit_of_no_module_moves(granularity):
    """The loss is the same; the gradient of a bias is its logits' mean gradient, which is gone, and a prototype's is not."""
    router, routing, signals = example()
    (loss, _), grads = compiled(granularity, "bayes", centre=True)(router, routing, signals)
    (plain, _), before = objectives[granularity, "bayes"](router, routing, signals)
    assert float(loss) == pytest.approx(float(plain), rel=1e-6)
    np.testing.assert_allclose(grads.gate, 0, atol=1e-6 * float(jnp.abs(before.gate).max()))
    assert float(jnp.abs(grads.proto).max()) > 1e-2 * float(jnp.abs(before.proto).max())
