"""Signals and summaries on routings made by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.layers.naive import by_module, hand_made
from tinyonn_jax.layers.routing import RouterConfig, Routing
from tinyonn_jax.layers.tap import NeuronTap, Tap
from tinyonn_jax.learning import signals

# Four tokens, two slots, three modules; the last token is padding, one slot is idle.
ROUTING = hand_made(
    [[0, 1], [1, 0], [1, 2], [0, 2]],
    [[0.7, 0.3], [0.6, 0.4], [1.0, 0.0], [0.5, 0.5]],
    [[True, True], [True, True], [True, False], [False, False]],
    3,
    valid=np.array([True, True, True, False]),
)


def tapped(param):
    squares = jnp.asarray(np.where(ROUTING.active, np.square(param), 0), jnp.float32)
    return Tap(output=4 * squares, attribution=9 * squares, param=squares, module=jnp.array([4.0, 25.0, 0.0]))


PARAM = np.array([[1.0, 2.0], [3.0, 4.0], [5.0, 0.0], [0.0, 0.0]])
summary = jax.jit(signals.summary)
SIGNALS = signals.read({"a": tapped(PARAM)}, {"a": ROUTING})["a"]


def test_read_takes_roots_and_sums_squares_over_the_tokens_of_a_module():
    np.testing.assert_allclose(SIGNALS.param, PARAM)
    np.testing.assert_allclose(SIGNALS.output, 2 * PARAM)
    np.testing.assert_allclose(SIGNALS.attribution, 3 * PARAM)
    np.testing.assert_allclose(SIGNALS.module_param, [2, 5, 0])
    # Module 0 serves token 0 (slot 0) and 1 (slot 1): outputs 2 and 8; module 1: 4, 6, 10; module 2 nobody.
    np.testing.assert_allclose(SIGNALS.module_output, [np.sqrt(4 + 64), np.sqrt(16 + 36 + 100), 0], rtol=1e-6)


def test_summary_by_hand():
    found = summary(ROUTING, SIGNALS, jnp.zeros(3))
    load = np.array([2, 3, 0]) / 5
    np.testing.assert_allclose(found["load"], load, rtol=1e-6)
    expected = {
        "active_share": 5 / 9,  # five slots in use, three valid tokens, three modules
        "usage_entropy": -np.sum(load[:2] * np.log(load[:2])) / np.log(3),
        "max_load": 3 / 5 * 3,
        "dead_modules": 1,
        "unrouted": 0,
        "gating_acc": 1.0,  # tokens 0 and 1 have a choice, and their first slot is the less surprising
        "surprise_output": np.sum(2 * PARAM) / 5,
        "surprise_param": np.sum(PARAM) / 5,
    }
    for name, value in expected.items():
        assert float(found[name]) == pytest.approx(value, rel=1e-5), name


def test_gating_accuracy_counts_each_group_and_is_nan_without_a_choice():
    # Two groups of two modules, two slots each: per token and group, is the first slot the least surprising?
    routing = hand_made([[0, 1, 2, 3], [1, 0, 3, 2]], np.full((2, 4), 0.5), np.ones((2, 4), bool), 4, groups=2)
    param = jnp.array([[1.0, 2.0, 4.0, 3.0], [2.0, 1.0, 1.0, 9.0]])
    taps = Tap(param**2, param**2, param**2, jnp.zeros(4))
    read = signals.read({"a": taps}, {"a": routing})["a"]
    assert float(summary(routing, read, jnp.zeros(4))["gating_acc"]) == 0.5
    alone = routing.replace(active=jnp.array([[True, False, True, False]] * 2))
    assert np.isnan(summary(alone, read, jnp.zeros(4))["gating_acc"])


def test_who_has_no_surprise_or_did_not_run_is_not_right():
    routing = hand_made([[0, 1], [0, 1], [0, 1]], np.full((3, 2), 0.5), np.ones((3, 2), bool), 2)

    def found(param, dropped):
        tap = Tap(param**2, param**2, param**2, jnp.zeros(2))
        lost = routing.replace(dropped=jnp.array(dropped))
        return summary(lost, signals.read({"a": tap}, {"a": lost})["a"], jnp.zeros(2))

    none = [[False, False]] * 3
    # Token 0 is right, token 1 wrong; token 2 feels nothing, as a prompt does after the last attention.
    assert float(found(jnp.array([[1.0, 2.0], [2.0, 1.0], [0.0, 0.0]]), none)["gating_acc"]) == 0.5
    # Token 0 lost its first module, so has no choice left, and what is left counts as it is.
    lost = found(jnp.array([[0.0, 2.0], [2.0, 1.0], [0.0, 0.0]]), [[True, False], *none[1:]])
    assert float(lost["gating_acc"]) == 0 and float(lost["dropped"]) == pytest.approx(1 / 6)
    assert float(lost["surprise_param"]) == pytest.approx(5 / 5)


def test_the_preferred_of_those_that_ran_is_judged():
    routing = hand_made([[0, 1, 2]] * 2, np.full((2, 3), 0.3), np.ones((2, 3), bool), 3)
    lost = routing.replace(dropped=jnp.array([[True, False, False], [False, True, False]]))
    param = jnp.array([[9.0, 1.0, 2.0], [2.0, 0.0, 1.0]])  # of those that ran, token 0 prefers the calmer, token 1 the other
    taps = Tap(param**2, param**2, param**2, jnp.zeros(3))
    assert float(summary(lost, signals.read({"a": taps}, {"a": lost})["a"], jnp.zeros(3))["gating_acc"]) == 0.5


def test_modules_of_stacked_blocks_are_told_apart():
    # Block 0 uses modules 0 and 1 of its four, block 1 its own 2 and 3.
    blocks = [hand_made([[m], [m + 1]], np.ones((2, 1)), np.ones((2, 1), bool), 4) for m in (0, 2)]
    both = jax.tree.map(lambda *x: jnp.stack(x), *blocks)
    tap = Tap(*[jnp.ones((2, 2, 1))] * 3, jnp.ones((2, 4)))
    found = summary(both, signals.read({"a": tap}, {"a": both})["a"], jnp.zeros((2, 4)))
    assert (int(found["dead_modules"]), float(found["usage_entropy"]), float(found["max_load"])) == (4, 0.5, 2)
    np.testing.assert_allclose(found["load"], [[0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5]])
    np.testing.assert_allclose(found["active_share_by_block"], [0.25, 0.25])


def test_recursions_lead_and_are_pooled_in_the_summary():
    lead = lambda tree: jax.tree.map(lambda x: jnp.stack([x, x]), tree)  # noqa: E731
    both = lead(ROUTING).replace(active=jnp.stack([ROUTING.active, jnp.zeros_like(ROUTING.active)]))
    taps = lead(tapped(PARAM))
    taps = taps.replace(
        module=taps.module.at[1].set(0), **{k: getattr(taps, k).at[1].set(0) for k in ("output", "attribution", "param")}
    )
    read = signals.read({"a": taps}, {"a": both})["a"]
    assert read.module_param.shape == (2, 3)
    np.testing.assert_allclose(
        read.module_output, by_module(4 * np.square(np.stack([PARAM, 0 * PARAM])), both).sum(1) ** 0.5, rtol=1e-6
    )
    found = summary(both, read, jnp.zeros(3))
    assert float(found["active_share"]) == pytest.approx(5 / 18)
    np.testing.assert_allclose(found["load"], [0.4, 0.6, 0], rtol=1e-6)


def test_surprise_of_neurons_is_that_of_magnitudes():
    delta = jnp.asarray([[[1.0, -2, 0], [0, -3, 4]], [[0, 0, -5], [6, 0, 0]]])  # two blocks, two tokens, three neurons
    active, token = delta != 0, jnp.asarray([[1.0, 10], [100, 1000]])
    config = RouterConfig(3, 0, select="hard")
    routing = Routing(
        delta, None, active.astype(float), active, jnp.zeros((2, 2, 1)), jnp.ones((2, 2), bool), jnp.zeros((2, 2), bool), config
    )
    tap = NeuronTap(delta, token, jnp.sum(delta**2, 1), jnp.ones((2, 3)))
    read = signals.read({"a": tap}, {"a": routing})["a"]
    np.testing.assert_array_equal(read.output, np.abs(delta))
    np.testing.assert_array_equal(read.param, np.abs(delta) * token[..., None])
    for blocks in (routing, jax.tree.map(lambda leaf: leaf[0], routing)):
        one = blocks.logits.ndim == 2
        found = summary(
            blocks, jax.tree.map(lambda leaf: leaf[0], read) if one else read, jnp.zeros(read.module_param.shape[one:])
        )
        assert float(found["surprise_output"]) == pytest.approx((3 + 7) / 4 if one else (3 + 7 + 5 + 6) / 6)
        assert float(found["surprise_param"]) == pytest.approx((3 + 70) / 4 if one else (3 + 70 + 500 + 6000) / 6)


def test_an_empty_batch_has_finite_shares():
    nobody = ROUTING.replace(active=jnp.zeros_like(ROUTING.active), valid=jnp.zeros_like(ROUTING.valid))
    zero = jax.tree.map(jnp.zeros_like, SIGNALS)
    found = summary(nobody, zero, jnp.zeros(3))
    assert all(np.all(np.isfinite(value)) for name, value in found.items() if name != "gating_acc")


def test_taps_fit_the_shapes_of_routings_with_a_leading_axis():
    shapes = jax.eval_shape(lambda: jax.tree.map(lambda x: jnp.stack([x] * 5), ROUTING))
    made = signals.make_taps({"a": shapes})["a"]
    assert made.output.shape == made.param.shape == made.attribution.shape == (5, 4, 2) and made.module.shape == (5, 3)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(made))


def test_average_passes_over_what_is_not_a_number():
    one, none, four = jnp.float32(1), jnp.float32(np.nan), jnp.int32(4)
    layers = [{"a": one, "b": none}, {"a": none, "load": jnp.ones(3)}, {"a": four}]
    means = signals.averages(layers)
    assert means.keys() == {"a", "b"} and float(means["a"]) == 2.5 and np.isnan(means["b"]) and not signals.averages([{}])
