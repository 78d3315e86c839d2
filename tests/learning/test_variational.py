"""The VAE view of routing: distributions and divergences worked by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from tests.layers.naive import hand_made
from tinyonn_jax.learning import rule as rules
from tinyonn_jax.learning.variational import divergence, follow, posterior

EVEN = jnp.full(4, 0.25)


def given(index, weight, active=None):
    index = np.asarray(index)[..., None]
    weight = np.asarray(weight, float)[..., None]
    return hand_made(index, weight, weight > 0 if active is None else np.asarray(active)[..., None], modules=4)


def test_posterior_is_each_modules_share_of_the_weight_that_active_slots_gave():
    routing = given([0, 0, 1, 3], [1.0, 2.0, 1.0, 9.0], [True, True, True, False])
    np.testing.assert_allclose(posterior(routing, EVEN), [0.75, 0.25, 0, 0], rtol=1e-6)


def test_recursions_are_pooled_and_layers_kept_apart():
    routing = given([[0, 0], [1, 2]], [[1.0, 1.0], [1.0, 1.0]])
    np.testing.assert_allclose(posterior(routing, EVEN), [0.5, 0.25, 0.25, 0], rtol=1e-6)
    np.testing.assert_allclose(posterior(routing, jnp.stack([EVEN, EVEN])), [[1, 0, 0, 0], [0, 0.5, 0.5, 0]], rtol=1e-6)


def test_an_idle_batch_has_no_posterior_and_no_divergence():
    q = posterior(given([0, 1], [0.0, 0.0]), EVEN)
    assert not np.any(q) and float(divergence(q, EVEN)) == 0


@pytest.mark.parametrize(
    ("q", "p", "nats"),
    [
        ([0.25] * 4, [0.25] * 4, 0.0),
        ([1.0, 0, 0, 0], [0.25] * 4, np.log(4)),
        ([0.5, 0.5, 0, 0], [0.75, 0.25, 0, 0], 0.5 * np.log(0.5 / 0.75) + 0.5 * np.log(0.5 / 0.25)),
    ],
)
def test_divergence_by_hand(q, p, nats):
    assert float(divergence(jnp.array(q), jnp.array(p))) == pytest.approx(nats, abs=1e-6)
    np.testing.assert_allclose(divergence(jnp.array([q, p]), jnp.array([p, p])), [nats, 0], atol=1e-6)  # of every layer


def test_the_prior_follows_and_is_kept_in_the_state():
    routing = given([0, 0], [1.0, 1.0])
    np.testing.assert_allclose(follow(EVEN, routing, 0.9), [0.325, 0.225, 0.225, 0.225], rtol=1e-6)
    meta = rules.MetaState({"a": jnp.zeros(4)}, jnp.float32(0), {"a": EVEN})
    meta = rules.record(meta, {"a": routing}, {}, {}, decay=0.9)
    np.testing.assert_allclose(meta.prior["a"], [0.325, 0.225, 0.225, 0.225], rtol=1e-6)


def test_a_prior_keeps_its_mass_through_batches_that_use_nothing():
    silent = given([0, 1], [0.0, 0.0])
    np.testing.assert_array_equal(follow(EVEN, silent, 0.9), EVEN)


def test_a_layer_that_used_nothing_keeps_its_prior_whatever_the_others_did():
    routing = given([[0, 0], [1, 2]], [[1.0, 1.0], [0.0, 0.0]])
    priors = follow(jnp.stack([EVEN, EVEN]), routing, 0.9)
    np.testing.assert_allclose(priors, [[0.325, 0.225, 0.225, 0.225], EVEN], rtol=1e-6)
