"""The gradient of weights that recursions share, summed at once, and its norms: against naive loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.layers.naive import CLOSE
from tinyonn_jax.layers import deferred

MODULES, INPUTS, OUTPUTS = 4, 5, 3
SIZES = {
    "even, nothing idle": [[18, 17, 18, 17], [17, 18, 17, 18], [70, 0, 0, 0]],
    "runs that go on over blocks": [[0, 70, 0, 0], [0, 66, 1, 3], [1, 69, 0, 0]],
    "empty modules, idle rows": [[0, 3, 0, 9], [40, 0, 0, 2], [0, 0, 0, 0]],
    "all idle": [[0, 0, 0, 0]] * 3,
    "large blocks": [[150, 0, 20, 30], [199, 0, 1, 0], [100, 0, 100, 0]],
}


@pytest.mark.parametrize("run_rows", [1, 40, 1000], ids=["runs alone", "two at a time", "all at a time"])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
def test_sums_and_norms_of_every_recursion(sizes, run_rows, monkeypatch):
    monkeypatch.setattr(deferred, "RUN_ROWS", run_rows)
    rng, pairs = np.random.default_rng(0), max(70, np.max(np.sum(sizes, 1)))
    x, g = (rng.normal(size=(3, pairs, size)) for size in (INPUTS, OUTPUTS))
    want, norms = np.zeros((MODULES, INPUTS, OUTPUTS)), np.zeros((3, MODULES))
    for r, counts in enumerate(sizes):
        rows = np.repeat(np.arange(MODULES), counts)
        for m in range(MODULES):
            (of,) = np.nonzero(rows == m)
            part = x[r, of].T @ g[r, of]
            want[m] += part
            norms[r, m] = np.sum(part**2)
    sum_at_once = jax.jit(lambda *args: deferred.weight_gradient(*args), static_argnums=3)  # traced anew for every `run_rows`
    args = jnp.asarray(x, jnp.float32), jnp.asarray(g, jnp.float32), jnp.asarray(sizes)
    got, squares = sum_at_once(*args, True)
    np.testing.assert_allclose(got, want, **CLOSE)
    np.testing.assert_allclose(squares, norms, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(sum_at_once(*args, False)[0], got)
