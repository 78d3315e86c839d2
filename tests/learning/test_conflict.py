"""Where two gradients meet, on gradients made by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from tinyonn_jax.learning.conflict import meet


@pytest.mark.parametrize(
    ("task", "regulariser", "cosine", "counts"),
    [
        ([3.0, 4.0], [4.0, -3.0], 0.0, (2, 2, 2)),
        ([1.0, 2.0], [-2.0, -4.0], -1.0, (2, 2, 2)),
        ([1.0, 1.0, 0.0], [1.0, 0.0, 9.0], 1.0, (1, 2, 2)),  # only the first is shared, and the others count for nothing
        ([1.0, 2.0, 2.0], [2.0, 1.0, -2.0], 0.0, (3, 3, 3)),
        ([1.0, 2.0, 2.0, 7.0], [2.0, 1.0, 2.0, 0.0], 8 / 9, (3, 4, 3)),
        ([1e-25, 2e-25], [1e-30, 2e-30], 1.0, (2, 2, 2)),  # squares that float32 cannot hold
        ([1.0, 0.0], [0.0, 1.0], np.nan, (0, 1, 1)),
        ([0.0, 0.0], [1.0, 2.0], np.nan, (0, 0, 2)),
    ],
)
def test_by_hand(task, regulariser, cosine, counts):
    met = meet(jnp.array(task), jnp.array(regulariser))
    np.testing.assert_allclose(met.cosine, cosine, atol=1e-6)
    assert (int(met.shared), int(met.task), int(met.regulariser)) == counts


def test_trees_are_met_leaf_by_leaf():
    """Over all leaves at once: −1·2 of one and 2·2 of the other, 2 / (√5 · √8)."""
    task = {"a": jnp.array([[1.0, 0.0]]), "b": jnp.array([2.0, 3.0])}
    regulariser = {"a": jnp.array([[-2.0, 5.0]]), "b": jnp.array([2.0, 0.0])}
    met = meet(task, regulariser)
    np.testing.assert_allclose(met.cosine, 2 / np.sqrt(5 * 8), rtol=1e-6)
    assert int(met.shared) == 2


def test_nothing_at_all_is_undefined():
    met = meet({}, {})
    assert np.isnan(met.cosine) and int(met.shared) == 0
