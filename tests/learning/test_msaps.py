"""M-SAPS part by part: directions, quantiles, clusters, protection, decay, gate regression, rebirth."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.layers.naive import hand_made
from tinyonn_jax.layers import base, spl, tap
from tinyonn_jax.layers.routing import Router, RouterConfig, drln, given
from tinyonn_jax.learning.msaps import (
    BORN,
    anchors,
    cosine,
    masked_quantile,
    mean_norm,
    msaps,
    protection,
    reborn,
    shape_layer,
    signs,
)
from tinyonn_jax.learning.rule import MetaState
from tinyonn_jax.learning.signals import Signals

N, D, M = 24, 5, 6
apply = jax.jit(spl.apply, static_argnames="cfg")
shape = jax.jit(shape_layer, static_argnames="attract")


def setup(cost="bias", seed=0, modules=M, x=None):
    """A layer of `modules` neurons on N tokens, with a surprise of its own for each: 0, 1, 2, …"""
    cfg = spl.Config(D, RouterConfig(modules, 0, cost=cost, select="hard"))
    params = base.init(jax.random.key(seed), spl.spec(cfg))
    params = params.replace(router=params.router.replace(proto=jax.random.normal(jax.random.key(seed + 1), (modules, D))))
    x = jax.random.normal(jax.random.key(seed + 2), (N, D)) if x is None else x
    routing = apply(params, x, cfg=cfg)[1]
    zero = jnp.zeros(routing.weight.shape)
    surprise = jnp.arange(float(modules))
    return params, routing, Signals(zero, zero, zero, surprise, surprise)


def state(params, accuracy=0.0, rate=0.5):
    modules = params.router.proto.shape[0]
    even = {"": jnp.full(modules, 1 / modules)}
    return MetaState({"": jnp.zeros(modules)}, jnp.float32(accuracy), even, {"": jnp.full(modules, rate)})


def objective(rule, params, routing, signals):
    return lambda router: rule.objective({"": router}, {"": routing}, {"": signals}, state(params))[0]


def test_masked_quantile_is_numpys():
    rng = np.random.default_rng(0)
    values, mask = rng.normal(size=(4, 9)), rng.random((4, 9)) < 0.6
    q = np.array([0.0, 0.3, 0.71, 1.0])
    expected = [np.quantile(v[k], level) for v, k, level in zip(values, mask, q, strict=True)]
    np.testing.assert_allclose(masked_quantile(values, mask, q), expected, rtol=1e-5)
    assert np.isinf(masked_quantile(values[0], np.zeros(9, bool), q[1]))


def test_signs_by_hand():
    surprise, active = jnp.array([5.0, 1, 3, 2, 4, 0]), jnp.array([1, 1, 1, 1, 1, 0], bool)
    assert signs(surprise, active, jnp.float32(0.25)).tolist() == [1, -1, 0, 0, 0, 0]  # quartiles of 1…5 are 2 and 4
    assert signs(surprise, active, jnp.float32(0.9)).tolist() == [1, -1, 0, -1, 1, 0]  # counted as one half: the median


def test_a_step_moves_good_prototypes_towards_their_anchors_and_bad_ones_away():
    params, routing, signals = setup()
    anchor, count = jax.jit(anchors)(routing)
    sign = shape(params.router, routing, signals)["sign"]
    assert {-1.0, 1.0} <= set(sign.tolist()) and (count > 0).all()
    gradient = jax.jit(jax.grad(objective(msaps(regress=False), params, routing, signals)))(params.router)
    near = jax.jit(cosine)
    before, after = near(params.router.proto, anchor), near(params.router.proto - 0.01 * gradient.proto, anchor)
    np.testing.assert_array_equal(np.sign(np.round(np.asarray(after) - np.asarray(before), 6)), -np.asarray(sign))
    assert not gradient.gate.any()


def test_proto_surprise_is_the_norm_of_the_prototype_gradient():
    params, routing, signals = setup()
    gradient = jax.jit(jax.grad(objective(msaps(regress=False), params, routing, signals)))(params.router)
    shaped = shape(params.router, routing, replace(signals, module_param=jnp.arange(M) * 1e-9))
    norm = jnp.linalg.norm(gradient.proto, axis=-1)
    np.testing.assert_allclose(shaped["total"], norm / norm.max(), atol=1e-5)


def test_a_layer_by_hand():
    """Of one that some tokens pad and module 2 serves none of: it has no anchor, no sign, and no say in the quantiles."""
    rng = np.random.default_rng(3)
    active = rng.random((N, M)) < 0.4
    active[:, 2], valid = False, np.arange(N) < N // 2
    active &= valid[:, None]
    index = np.broadcast_to(np.arange(M), (N, M))
    routing = hand_made(index, active, active, M, D, valid)
    router = Router(*(jnp.asarray(rng.normal(size=size), jnp.float32) for size in ((M, D), (M,))))
    surprise = np.array([0.5, 0.1, 0.0, 0.4, 0.2, 0.3])
    slots = jnp.zeros((N, M))
    found = shape(router, routing, Signals(slots, slots, slots, jnp.zeros(M), jnp.asarray(surprise, jnp.float32)))

    x, proto = np.asarray(routing.input, np.float64), np.asarray(router.proto, np.float64)
    used, rate = active.any(0), active.sum() / (valid.sum() * M)
    low, high = (np.quantile(surprise[used], q) for q in (rate, 1 - rate))
    assert 0.25 < rate < 0.5
    anchor, sign, match, total = np.zeros((M, D)), np.zeros(M), np.zeros(M), np.zeros(M)
    for m in np.flatnonzero(used):
        anchor[m] = x[active[:, m]].mean(0)
        sign[m] = float(surprise[m] > high) - float(surprise[m] < low)
        p, a = np.linalg.norm(proto[m]), np.linalg.norm(anchor[m])
        match[m] = proto[m] @ anchor[m] / (p * a)
        slope = sign[m] * (anchor[m] / (p * a) - match[m] * proto[m] / p**2)
        total[m] = surprise[m] + np.linalg.norm(slope)
    np.testing.assert_allclose(anchors(routing)[0], anchor, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(found["sign"], sign)
    np.testing.assert_allclose(found["total"], total / total.max(), rtol=1e-5, atol=1e-6)
    assert float(found["proto"]) == pytest.approx(np.sum(sign * match), rel=1e-5)
    assert {-1, 0, 1} == set(sign[used])


@partial(jax.jit, static_argnames="local")
def cluster_run(local: bool, gate: float = 0.5):
    """Four prototypes near two clusters of inputs, all good; cosine of each prototype with both centres after 60 steps."""
    centres = jnp.array([[1.0, 0, 0, 0, 0], [0, 1.0, 0, 0, 0]])
    x = jnp.repeat(centres, N // 2, 0) + 0.05 * jax.random.normal(jax.random.key(0), (N, D))
    proto = jnp.repeat(centres, 2, 0) + 0.2 * jax.random.normal(jax.random.key(1), (4, D))
    cfg = spl.Config(D, RouterConfig(4, 0, select="hard"))
    params = base.init(jax.random.key(2), spl.spec(cfg))

    def step(_, proto):
        routing = spl.apply(params.replace(router=params.router.replace(proto=proto, gate=jnp.full(4, gate))), x, cfg)[1]
        anchor = anchors(routing)[0] if local else jnp.broadcast_to(x.mean(0), (4, D))
        return proto + 0.1 * jax.grad(lambda p: jnp.sum(cosine(p, anchor)))(proto)

    proto = jax.lax.fori_loop(0, 60, step, proto)
    return cosine(proto[:, None], jnp.broadcast_to(centres, (4, 2, D)))


def test_local_anchors_separate_two_clusters_and_one_global_anchor_does_not():
    apart, together = np.asarray(cluster_run(local=True)), np.asarray(cluster_run(local=False))
    assert np.argmax(apart, -1).tolist() == [0, 0, 1, 1] and (apart.max(-1) - apart.min(-1)).min() > 0.6
    assert (together.max(-1) - together.min(-1)).max() < 0.3


def test_without_a_threshold_local_anchors_do_not_separate_either():
    """Tokens of the other cluster match a little, too, and that activates: every anchor drifts to the mean of all."""
    apart = np.asarray(cluster_run(local=True, gate=0.0))
    assert (apart.max(-1) - apart.min(-1)).max() < 0.3


def test_protected_prototypes_move_less_also_among_thousands():
    size = jnp.linspace(0, 1, 4000)
    held = protection(size, jnp.float32(0), 0.5)
    assert held[0] == 1 and float(held[-1]) == pytest.approx(np.exp(-2), rel=1e-4) and (jnp.diff(held) <= 0).all()
    assert (protection(size, jnp.float32(0.9), 0.5)[1:] < held[1:]).all()  # τ falls with accuracy
    assert len(set(protection(jnp.zeros(9), jnp.float32(0), 0.5).tolist())) == 1  # no order among equals

    params, _, _ = setup()
    params = params.replace(router=params.router.replace(gate=jnp.linspace(0, 1, M)))
    updates = jax.tree.map(jnp.ones_like, params)
    after = msaps().restrain(updates, params, {}, {}, state(params))
    moved = jnp.linalg.norm(after.router.proto, axis=-1)
    assert moved[0] == 0 and (jnp.diff(moved) > 0).all()
    assert after.modules is updates.modules
    later = msaps().restrain(updates, params, {}, {}, state(params, accuracy=0.9))
    assert (later.router.proto[1:] > after.router.proto[1:]).all()
    assert msaps(protect=False).restrain(updates, params, {}, {}, state(params)) is updates
    assert msaps(l2=0.0).adjust(updates, params, {}, {}, state(params)) is updates


def test_adaptive_decay_grows_with_the_norms_and_shrinks_them():
    params, _, _ = setup()
    rule = msaps(protect=False, l2=0.01)

    def pull(scale):
        scaled = jax.tree.map(lambda a: scale * a, params)
        return scaled, rule.adjust(jax.tree.map(jnp.zeros_like, params), scaled, {}, {}, state(params))

    for scale in (1.0, 3.0):
        scaled, after = pull(scale)
        expected = 2 * 0.01 * mean_norm(scaled)
        np.testing.assert_allclose(after.router.proto, expected * scaled.router.proto, rtol=1e-5)
        np.testing.assert_allclose(after.modules.mu, expected * scaled.modules.mu, rtol=1e-5)
        shrunk = jax.tree.map(lambda a, g: a - 0.1 * g, scaled, after)
        assert mean_norm(shrunk) < mean_norm(scaled)
    assert float(mean_norm(pull(3.0)[0]) / mean_norm(params)) == pytest.approx(3, rel=1e-5)


def test_biases_are_no_rows_and_do_not_decay_stacked_or_not():
    params, _, _ = setup()
    params = params.replace(modules=params.modules.replace(bias=jnp.full_like(params.modules.bias, 3)))
    stacked = jax.tree.map(lambda a: a[None], params)
    assert float(mean_norm(stacked)) == pytest.approx(float(mean_norm(params)))
    for one in (params, stacked):
        after = msaps(protect=False, l2=0.01).adjust(jax.tree.map(jnp.zeros_like, one), one, {}, {}, state(one))
        assert not after.modules.bias.any() and after.modules.mu.all()


@pytest.mark.parametrize("cost", ["linear", "bias"])
def test_gates_learn_to_predict_a_fixed_surprise(cost):
    params, routing, signals = setup(cost)
    if cost == "linear":  # a constant can be regressed only where the inputs have one: give them a constant channel
        routing = replace(routing, input=routing.input.at[:, 0].set(1.0))
    loss = jax.jit(jax.value_and_grad(objective(msaps(attract=False), params, routing, signals)))
    router, first = params.router, None
    for _ in range(300):
        value, gradient = loss(router)
        first = value if first is None else first
        router = router.replace(gate=router.gate - 0.5 * gradient.gate)
        assert not gradient.proto.any()
    assert loss(router)[0] < first / 10


@pytest.mark.parametrize("cost", ["linear", "bias"])
def test_the_gate_loss_is_the_mean_squared_error_of_valid_tokens(cost):
    params, routing, signals = setup(cost)
    valid, rng = np.arange(N) % 3 > 0, np.random.default_rng(0)
    gate = rng.normal(size=params.router.gate.shape).astype(np.float32)
    found = shape(params.router.replace(gate=gate), replace(routing, valid=jnp.asarray(valid)), signals)
    predicted = np.asarray(routing.input)[valid] @ gate.T if cost == "linear" else gate
    assert float(found["gate"]) == pytest.approx(np.mean((predicted - np.asarray(found["total"])) ** 2), rel=1e-5)


def test_the_dead_are_reborn_near_the_living():
    params, _, _ = setup()
    rule = msaps(renew=0.01)
    meta = replace(state(params), rule={"": jnp.array([0.5, 0.2, 0.0, 0.3, 0.009, 0.01])})
    after, new, dead = rule.renew(params, meta, jax.random.key(0))
    assert dead[""].tolist() == [False, False, True, False, True, False]
    kept = ~np.array(dead[""])
    np.testing.assert_array_equal(after.router.proto[kept], params.router.proto[kept])
    living = params.router.proto[kept]
    centroid, spread = living.mean(0), jnp.sqrt(((living - living.mean(0)) ** 2).mean())
    distance = jnp.linalg.norm(after.router.proto[~kept] - centroid, axis=-1)
    assert (distance > 0).all() and (distance < 2 * spread * D**0.5).all()
    assert new.rule[""][2] == BORN and new.rule[""][1] == pytest.approx(0.2)
    after, new, dead = rule.renew(params, replace(meta, rule={"": jnp.zeros(M)}), jax.random.key(0))  # nobody lives
    np.testing.assert_array_equal(after.router.proto, params.router.proto)
    assert not dead[""].any() and not new.rule[""].any()
    assert msaps(renew=0.0).renew is None


def test_activation_rates_follow_the_batches():
    params, routing, _ = setup()
    routing = replace(routing, valid=jnp.arange(N) < N // 2, active=routing.active & (jnp.arange(N) < N // 2)[:, None], load=None)
    new = msaps().update(replace(state(params), rule={"": jnp.linspace(0, 1, M)}), {"": routing}, {}, {})
    now = np.asarray(routing.active).sum(0) / (N // 2)
    assert 0 < now.min() < now.max() < 1
    np.testing.assert_allclose(new.rule[""], 0.99 * np.linspace(0, 1, M) + 0.01 * now, rtol=1e-5)


def test_every_part_can_be_switched_off():
    params, routing, signals = setup("linear")
    off = msaps(attract=False, regress=False, protect=False, l2=0.0, renew=0.0)
    gradient = jax.jit(jax.grad(objective(off, params, routing, signals)))(params.router)
    assert not any(leaf.any() for leaf in jax.tree.leaves(gradient))
    total = shape(params.router, routing, signals, attract=False)["total"]
    np.testing.assert_allclose(total, drln(signals.module_param), rtol=1e-6)  # no surprise of a loss that is not there
    assert jnp.abs(total - shape(params.router, routing, signals)["total"]).max() > 0.1
    grads = jax.tree.map(jnp.ones_like, params)
    after = off.adjust(grads, params, {}, {}, state(params))
    jax.tree.map(np.testing.assert_array_equal, after, grads)


def test_types_stay_where_x64_is_on():
    """Prototypes keep their type through protection and rebirth, whatever JAX's default is; so do taps."""
    shaped = jax.ShapeDtypeStruct
    with jax.enable_x64(True):
        held = jax.eval_shape(lambda gate, tau: protection(gate, tau, 0.5), shaped((4,), jnp.float32), shaped((), jnp.float32))
        assert held.dtype == jnp.float32
        for dtype in (jnp.bfloat16, jnp.float32):
            assert jax.eval_shape(reborn, shaped((4, 2), dtype), shaped((4,), bool), jax.random.key(0))[0].dtype == dtype
        slots = jax.eval_shape(lambda: tap.zeros(given(jnp.zeros((3, 1), jnp.int32), jnp.ones((3, 1), bool), 4)))
        assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(slots))
