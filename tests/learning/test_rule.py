"""Rules without surprise, names of layers, records of use, and the load balance on loads made by hand."""

from collections import OrderedDict
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import chex
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.core import FrozenDict, freeze

from tests.layers.naive import hand_made
from tinyonn_jax.layers.routing import Router, RouterConfig, route, route_all
from tinyonn_jax.learning import rule as rules
from tinyonn_jax.learning.rule import backprop, load_balance, none

META: Any = None  # these objectives do not look at it


@flax.struct.dataclass
class Layer:
    router: Router
    w: Any


class Pair(NamedTuple):
    left: Any
    right: Any


def layer(seed=0, lead=()):
    rng = np.random.default_rng(seed)
    return Layer(
        Router(jnp.asarray(rng.normal(size=(*lead, 4, 3)), jnp.float32), jnp.zeros((*lead, 4))), jnp.full(2, float(seed))
    )


PARAMS = {"embed": jnp.ones(3), "blocks": [layer(1), Pair(layer(2), {"deep": layer(3)})], "plain": {"router": jnp.ones(2)}}


def test_layers_are_found_by_dotted_path_in_every_container():
    found = rules.layers(PARAMS)
    assert {name: float(part.w[0]) for name, part in found.items()} == {
        "blocks.0": 1.0,
        "blocks.1.left": 2.0,
        "blocks.1.right.deep": 3.0,
    }
    assert set(rules.routers(PARAMS)) == set(found)
    assert set(rules.layers(layer(7))) == {""}


@pytest.mark.parametrize("name", ["blocks.0", "blocks.1.left", "blocks.1.right.deep"])
def test_replacing_one_layer_leaves_the_others(name):
    replaced = rules.replace_layer(PARAMS, name, layer(9))
    assert jax.tree.structure(replaced) == jax.tree.structure(PARAMS)
    for other, part in rules.layers(replaced).items():
        assert float(part.w[0]) == (9.0 if other == name else float(rules.layers(PARAMS)[other].w[0]))
    assert rules.replace_layer(layer(1), "", layer(9)).w[0] == 9


def use(*counts):
    """A routing in which module m is used `counts[m]` times, with weight one, one slot a token."""
    index = np.repeat(np.arange(len(counts)), counts)[:, None]
    return hand_made(index, np.ones(index.shape), np.ones(index.shape, bool), len(counts), width=3)


balance = jax.jit(lambda r: load_balance(r.weight, r))


def test_load_balance_is_one_when_even_and_m_when_all_on_one():
    assert float(balance(use(3, 3, 3, 3))) == pytest.approx(1.0)
    assert float(balance(use(12, 0, 0, 0))) == pytest.approx(4.0)
    assert float(balance(use(6, 2, 2, 2))) == pytest.approx(4 * (36 + 4 + 4 + 4) / 144)
    nobody = use(3, 3, 3, 3)
    nobody = nobody.replace(active=jnp.zeros_like(nobody.active), weight=jnp.zeros_like(nobody.weight))
    assert float(balance(nobody)) == 1  # silence is no better than even


def test_load_and_importance_are_halves():
    """Loads even, weights all on one module: half one, half M."""
    routing = use(2, 2, 2, 2)
    weight = jnp.where(routing.index == 0, 1.0, 0.0)
    assert float(jax.jit(load_balance)(weight, routing)) == pytest.approx(0.5 * (1 + 4))


def test_load_balance_of_nothing_is_finite_and_recursions_are_averaged():
    idle = use(1, 1).replace(active=jnp.zeros((2, 1), bool))
    assert np.isfinite(balance(idle))
    both = jax.tree.map(lambda *x: jnp.stack(x), use(4, 4), use(8, 0))
    assert float(balance(both)) == pytest.approx((1 + 2) / 2)


def test_a_step_down_the_load_balance_evens_the_weights():
    rng = np.random.default_rng(0)
    cfg = RouterConfig(4, 2, isolate=False)
    x = jnp.asarray(np.abs(rng.normal(size=(32, 3))), jnp.float32)
    router = Router(jnp.asarray(rng.normal(size=(4, 3)), jnp.float32), jnp.array([-2.0, 0, 0, 1.0]))  # module 0 far too cheap
    routed = jax.jit(route, static_argnums=2)
    routing = routed(router, x, cfg)
    rule = backprop(0.5)
    objective = jax.jit(jax.value_and_grad(lambda r, routing: rule.objective({"a": r}, {"a": routing}, {}, META), has_aux=True))
    (loss, metrics), grads = objective(router, routing)
    assert float(loss) == pytest.approx(0.5 * float(metrics["loss_balance"])) and float(loss) > 0.5
    twice = rule.objective({"a": router, "b": router}, {"a": routing, "b": routing}, {}, META)[0]
    assert float(twice) == pytest.approx(float(loss))  # a mean over layers
    assert grads.gate[0] < 0 < grads.gate[1]  # descending raises the price of the module that has too much
    moved = jax.tree.map(lambda p, g: p - 0.1 * g, router, grads)
    assert float(objective(moved, routed(moved, x, cfg))[0][0]) < float(loss)


@pytest.mark.parametrize("select", ["relu", "hard"])
def test_neurons_are_balanced_and_missed_as_slots_are(select):
    """Whether modules have slots of their own or slots are sorted by logit: the same loss, the same tokens without a module."""
    cfg = RouterConfig(4, 0, groups=2, select=select, isolate=False)
    router = Router(jnp.array([[1.0, 0], [0, 1], [1, 1], [1, -1]]), jnp.full(4, 0.5))
    x, rule = jnp.array([[2.0, 0.1], [-1, 1], [1, -2], [-1, -1]]), backprop(1.0)
    slots, neurons = (jax.jit(partial(f, cfg=cfg))(router, x) for f in (route, route_all))
    np.testing.assert_array_equal(neurons.unrouted, [False, True, True, True])
    np.testing.assert_array_equal(slots.unrouted, neurons.unrouted)
    objective = jax.jit(jax.value_and_grad(lambda r, routing: rule.objective({"a": r}, {"a": routing}, {}, META)[0]))
    chex.assert_trees_all_close(objective(router, slots), objective(router, neurons), rtol=1e-6)


def test_rules_without_an_objective_of_their_own():
    for rule in (none(), backprop()):
        loss, metrics = rule.objective({}, {}, {}, META)
        assert float(loss) == 0 and metrics == {}
        assert rule.adjust(PARAMS, PARAMS, {}, {}, META) is PARAMS
    assert none().isolate and not backprop().isolate


def test_state_starts_at_zero_and_counts_the_slots_served():
    params = {"a": layer(), "b": layer(lead=(2,))}
    a = use(3, 0, 1, 2)
    b = jax.tree.map(lambda *x: jnp.stack(x), use(3, 0, 1, 2), use(0, 6, 0, 0))
    routings = {"a": jax.tree.map(lambda *x: jnp.stack(x), a, a), "b": b}  # a: one router for two recursions; b: stacked
    meta = rules.initial(params, routings)
    assert meta.records["a"].shape == (4,) and meta.records["b"].shape == (2, 4)
    update = jax.jit(lambda meta, accuracy: rules.record(meta, routings, {}, {"main_acc": accuracy}))
    meta = update(update(meta, 1.0), 0.5)
    np.testing.assert_array_equal(meta.records["a"], 2 * 2 * np.array([3, 0, 1, 2]))
    np.testing.assert_array_equal(meta.records["b"], 2 * np.array([[3, 0, 1, 2], [0, 6, 0, 0]]))
    assert float(meta.accuracy) == pytest.approx(0.99 * 0.01 + 0.01 * 0.5)


def test_names_that_do_not_match_are_refused():
    with pytest.raises(ValueError, match=r"\['b'\].*\['a'\]"):
        rules.initial({"a": layer()}, {"b": use(1, 1)})


def test_blocks_of_blocks_are_refused():
    twice = jax.tree.map(lambda leaf: leaf[None, None], layer())
    with pytest.raises(ValueError, match=r"'a'.*one leading axis.*\[1, 1, "):
        rules.initial({"a": twice}, {"a": use(1, 1)})


@jax.tree_util.register_dataclass
@dataclass
class Own:
    router: Router
    w: Any


def test_layers_are_replaced_in_containers_of_your_own():
    params = {0: layer(1), 1: OrderedDict(b=layer(2), a=Own(layer(3).router, jnp.ones(2)))}
    for name in ("0", "1.b"):
        replaced = rules.replace_layer(params, name, layer(9))
        assert jax.tree.structure(replaced) == jax.tree.structure(params) and rules.layers(replaced)[name].w[0] == 9
    replaced = rules.replace_part(params, "1.a", "w", jnp.zeros(2))
    assert not np.any(replaced[1]["a"].w) and np.all(params[1]["a"].w == 1)
    frozen = rules.replace_layer(freeze({"a": layer(1), "b": {"c": layer(2)}}), "b.c", layer(9))
    assert isinstance(frozen, FrozenDict) and frozen["b"]["c"].w[0] == 9 and set(rules.layers(frozen)) == {"a", "b.c"}
    with pytest.raises(ValueError, match="dot"):
        rules.layers({"block.a": layer(1)})
    with pytest.raises(ValueError, match=r"\(set: layers are found in dicts"):
        rules.initial({"a"}, {"a": use(1, 1)})
    with pytest.raises(ValueError, match=r"modules.*'w'"):
        rules.part(layer(1), "modules")


def test_none_holds_routers_whatever_the_optimizer_does():
    params = {"a": layer(1)}
    tx = optax.adamw(0.1, weight_decay=0.1)
    updates = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)[0]
    assert np.any(updates["a"].router.proto)
    held = none().restrain(updates, params, {}, {}, META)["a"]
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(held.router)) and np.all(held.w == updates["a"].w)
