"""Routed neurons in the whole network: isolation, prototype streams, and prototypes that are made anew in a train step."""

import dataclasses
from functools import cache

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.models import tiny
from tinyonn_jax.config import Config, LearningConfig, MeshConfig
from tinyonn_jax.layers import base, spl, tap
from tinyonn_jax.layers.routing import RouterConfig
from tinyonn_jax.learning import sars
from tinyonn_jax.learning import signals as surprise
from tinyonn_jax.learning.conflict import meta_gradient
from tinyonn_jax.learning.rule import layers, without_routers
from tinyonn_jax.models import transformer
from tinyonn_jax.training import sharding
from tinyonn_jax.training.objective import make_loss, make_rule
from tinyonn_jax.training.optim import names
from tinyonn_jax.training.state import TrainState
from tinyonn_jax.training.step import gradients, make_train_step

BATCH = tiny.batch(8)
DEPTH = 3
ONE = MeshConfig(data=1)
ROLES = ["attention.q", "attention.k", "attention.v", "attention.o", "feedforward.first", "feedforward.second"]


def config(kind):
    return tiny.config(kind, depth=DEPTH, recursed=False)


def setup(kind, rule):
    whole = Config(model=config(kind), learning=LearningConfig(rule=rule))
    learning = make_rule(whole)
    loss, params = make_loss(whole, learning), tiny.params(whole.model)
    meta = learning.init(params, jax.eval_shape(loss, params, None, BATCH)[1].routings)
    return loss, learning, params, meta


@cache
def main_gradients(kind):
    """Of the main loss, which is the same under every rule that isolates routers."""
    loss, _, params, _ = setup(kind, "sars")
    return jax.jit(jax.grad(lambda p: loss(p, None, BATCH)[0]))(params)


@cache
def found(kind, rule, devices=ONE):
    """Gradients of both losses, routings, signals and metrics."""
    loss, learning, params, meta = setup(kind, rule)
    assert learning.isolate
    mesh, spec = sharding.make_mesh(devices), transformer.spec(config(kind), tiny.TASKS)
    placed = jax.device_put(jax.device_get(params), sharding.state_shardings(mesh, spec, spec))
    assert len(placed.head.sharding.device_set) == mesh.size
    return jax.jit(lambda p, b: gradients(loss, learning, p, meta, b))(placed, sharding.shard_batch(mesh, jax.device_get(BATCH)))


@pytest.mark.parametrize(("kind", "rule", "share"), [("dfc", "msaps", 1e-5), ("dfc_hard", "sars", 5e-5)])
def test_eight_devices_give_the_gradients_and_signals_of_one(kind, rule, share):
    """To this share of a leaf's largest gradient: SARS divides small surprises by small ones, and their rounding with them."""
    one, many = found(kind, rule), found(kind, rule, MeshConfig(data=4, fsdp=2))
    for name, routing in one[1].items():
        np.testing.assert_array_equal(routing.active, many[1][name].active)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(one[0]), jax.tree.leaves(many[0]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=share * np.abs(a).max(), err_msg=jax.tree_util.keystr(path))
    chex.assert_trees_all_close(*jax.device_get((one[2], many[2])), rtol=1e-4, atol=1e-5)
    for loss in ("main_loss", "meta_loss"):
        assert float(one[3][loss]) == pytest.approx(float(many[3][loss]), rel=1e-6)


@pytest.mark.parametrize("rule", ["sars", "msaps"])
@pytest.mark.parametrize("kind", ["dfc", "dfc_hard"])
def test_isolation_and_every_router_parameter_learns(kind, rule):
    """The main loss gives every router exactly nothing and every neuron something; the meta loss the other way round."""
    main, both = main_gradients(kind), found(kind, rule)[0]
    assert [name.removeprefix("block.") for name in layers(main)] == ROLES
    for (path, of_main), of_both in zip(jax.tree_util.tree_leaves_with_path(main), jax.tree.leaves(both), strict=True):
        words = names(path)
        if "router" in words:
            assert not np.any(of_main), words
            for layer in np.asarray(of_both):  # each of the stacked ones; of streams those that join two layers
                assert layer.any(), words
        elif rule == "sars":
            np.testing.assert_allclose(of_main, of_both, rtol=1e-5, atol=1e-6)
    loss, learning, params, meta = setup(kind, rule)
    of_meta = jax.jit(lambda p: meta_gradient(loss, learning, p, meta, BATCH))(params)
    assert not any(map(np.any, jax.tree.leaves(without_routers(of_meta))))


@pytest.mark.parametrize("rule", ["sars", "msaps"])
def test_stacked_blocks_are_measured_one_by_one(rule):
    _, routings, _, metrics = found("dfc", rule)
    for name, layer in metrics["layers"].items():
        valid, active = np.asarray(routings[name].valid), np.asarray(routings[name].active)
        share = active.sum((-2, -1)) / valid.sum(-1) / active.shape[-1]
        np.testing.assert_allclose(layer["active_share_by_block"], share, rtol=1e-5)
        assert layer["load"].shape == (DEPTH, active.shape[-1])
        for what in ("good_share", "bad_share"):
            assert float(layer[what]) == pytest.approx(float(np.mean(layer[f"{what}_by_block"])), rel=1e-5)
        assert float(layer["kl"]) == pytest.approx(float(np.sum(layer["kl_by_block"])), rel=1e-5)


def test_streams_join_layers_of_one_role_only():
    """The prototypes of one role have no say in the routing of any other before activations meet: q does not see k's stream."""
    _, _, params, _ = setup("dfc_hard", "sars")
    attention = params.block.attention
    moved = attention.k.replace(router=attention.k.router.replace(proto=attention.k.router.proto.at[0].add(1.0)))
    refined = transformer.refined(params.block).attention
    other = transformer.refined(params.block.replace(attention=attention.replace(k=moved))).attention
    np.testing.assert_array_equal(refined.q.router.proto, other.q.router.proto)
    assert all(jnp.any(a != b) for a, b in zip(refined.k.router.proto, other.k.router.proto, strict=True))


@pytest.mark.parametrize("changes", [{"prc": False}, {"recursed": True}], ids=str)
def test_no_streams_without_a_stack(changes):
    spec = transformer.spec(tiny.config("dfc", **{"recursed": False, **changes}), 1)
    assert all(layer.router.stream is None for layer in layers(spec).values())


@pytest.mark.parametrize("granularity", ["module", "token"])
def test_few_neurons_are_stuck_after_50_steps_of_normalised_gates(granularity):
    """The trap of a gate divided by its own tiny size: its gradient at zero is bounded, and a step does not decide neurons."""
    n, size, neurons = 128, 16, 64
    cfg = spl.Config(size, RouterConfig(neurons, 0, cost="bias_drln", select="hard"))
    params = base.init(jax.random.key(0), spl.spec(cfg))
    x, target = jax.random.normal(jax.random.key(1), (2, n, max(size, neurons)))
    x = x[:, :size]
    rule, tx = sars(granularity), optax.adam(3e-3)

    def loss(params, tap):
        y, routing = spl.apply(params, x, cfg, tap=tap)
        return jnp.mean((y - target) ** 2), routing

    def decided(params):
        """Neurons that are on for all tokens or for none."""
        on = spl.apply(params, x, cfg)[1].active.mean(0)
        return int(jnp.sum((on == 0) | (on == 1)))

    @jax.jit
    def step(params, opt):
        routing = loss(params, None)[1]
        tapped = jax.grad(loss, 1, has_aux=True)(params, tap.zeros(routing))[0]
        signals = surprise.read({"": tapped}, {"": routing})
        grads = jax.grad(lambda r: rule.objective({"": r}, {"": routing}, signals, None)[0])(params.router)
        updates, opt = tx.update(grads, opt)
        return params.replace(router=optax.apply_updates(params.router, updates)), opt, jnp.abs(grads.gate).max()

    opt = tx.init(params.router)
    for i in range(50):
        params, opt, largest = step(params, opt)
        if i == 0:
            assert decided(params) == 0 and 0 < largest < 1
    assert decided(params) < neurons / 10


def test_a_step_renews_dead_prototypes_with_their_moments_and_average():
    loss, learning, params, meta = setup("dfc", "msaps")
    tx = optax.adam(1e-2)
    state = TrainState.create(params, tx, meta)
    dirty = jax.tree.map(lambda a: a + 1.0 if a.dtype == jnp.float32 else a, (state.opt_state, state.ema))
    name = "block.feedforward.first"
    rates = {**meta.rule, name: meta.rule[name].at[1, 3].set(0.0)}  # a rate of zero, and no token for a while
    meta = dataclasses.replace(meta, rule=rates)
    state = state.replace(meta=meta, opt_state=dirty[0], ema=dirty[1])
    gate = layers(params)[name].router.gate.at[1, 3].set(0.0)
    proto = layers(params)[name].router.proto
    block = params.block
    first = block.feedforward.first
    far = first.replace(router=first.router.replace(gate=gate, proto=proto.at[1, 3].set(proto[1, 2])))
    params = params.replace(block=block.replace(feedforward=block.feedforward.replace(first=far)))
    state = state.replace(params=jax.tree.map(jnp.copy, params))
    rule = learning._replace(update=lambda meta, *_: meta)  # this neuron stays dead whatever the batch does
    new, _ = make_train_step(loss, rule, tx, ema=0.9)(state, BATCH)
    adam = new.opt_state[0]
    made = layers(new.params)[name].router.proto[1]
    for tree in (adam.mu, adam.nu):
        rows = layers(tree)[name].router.proto
        assert not rows[1, 3].any() and rows[1, 2].any() and rows[0, 3].any()
    np.testing.assert_array_equal(layers(new.ema)[name].router.proto[1, 3], made[3])
    assert jnp.any(layers(new.ema)[name].router.proto[1, 2] != made[2])
    assert new.meta.rule[name][1, 3] == 0.5
    assert float(jnp.linalg.norm(made[3] - made.mean(0))) < 3 * float(jnp.std(made)) * made.shape[1] ** 0.5
