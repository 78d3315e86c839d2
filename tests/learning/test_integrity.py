"""tau and PI by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from tinyonn_jax.learning import integrity


def test_tau_is_the_mean_entropy_of_counted_positions():
    logits = jnp.log(jnp.array([[[0.5, 0.5, 1e-30], [1.0, 1e-30, 1e-30], [1 / 3, 1 / 3, 1 / 3]]]))
    assert float(integrity.tau(logits, jnp.array([[1.0, 1.0, 0.0]]))) == pytest.approx(np.log(2) / 2, rel=1e-5)
    assert float(integrity.tau(logits, jnp.array([[0.0, 0.0, 1.0]]))) == pytest.approx(np.log(3), rel=1e-5)
    assert float(integrity.tau(logits, jnp.zeros((1, 3)))) == 0  # nothing counted: no division by zero


def test_tau_does_not_look_at_impossible_tokens():
    assert float(integrity.tau(jnp.array([[0.0, 0.0, -1e30]]), jnp.ones(1))) == pytest.approx(np.log(2), rel=1e-5)


def test_predictive_integrity_by_hand():
    pi = integrity.predictive_integrity(jnp.float32(0.6), jnp.float32(0.3), jnp.float32(0.5), alpha=0.1, gamma=2.0)
    assert float(pi) == pytest.approx(np.exp(-0.1 * (2.0 + 1.0)), rel=1e-6)


def test_predictive_integrity_is_one_at_best_and_falls():
    pi = lambda loss, tau, surprise: float(integrity.predictive_integrity(loss, jnp.float32(tau), surprise, 0.1, 1.0))  # noqa: E731
    assert pi(0.0, 1.0, 0.0) == 1.0
    assert pi(1.0, 1.0, 0.0) > pi(2.0, 1.0, 0.0) > pi(2.0, 1.0, 1.0) > 0
    assert 0 <= pi(1.0, 0.0, 0.0) < 1  # a certain model that is wrong
