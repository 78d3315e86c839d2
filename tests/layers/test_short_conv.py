"""The short convolution against a loop over tokens and taps, and decoded in pieces."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.layers.naive import CLOSE
from tinyonn_jax.layers import base, short_conv

B, T, D, K = 2, 6, 4, 3
RNG = np.random.default_rng(0)
W, X = (jnp.asarray(RNG.normal(size=shape), jnp.float32) for shape in ((K, D), (B, T, D)))
START = jnp.zeros(B, jnp.int32)
apply = jax.jit(short_conv.apply, static_argnames="layer")


def naive(w, x):
    """In float64."""
    w, x = (np.asarray(a, np.float64) for a in (w, x))
    y = x.copy()
    for b in range(len(x)):
        for t in range(len(x[b])):
            for k in range(1, len(w) + 1):
                if t >= k:
                    y[b, t] += w[k - 1] * x[b, t - k]
    return y


@pytest.mark.parametrize("taps", [1, 3, 8])
def test_every_token_also_reads_those_before_it(taps):
    """Also where there are more taps than tokens."""
    w = jnp.asarray(RNG.normal(size=(taps, D)), jnp.float32)
    y, cache = apply(w, X, START)
    np.testing.assert_allclose(y, naive(w, X), **CLOSE)
    assert cache is None


def test_it_starts_as_the_identity_and_learns_at_once():
    w = base.init(jax.random.key(0), short_conv.spec(D, K))
    assert w.shape == (K, D)
    np.testing.assert_array_equal(apply(w, X, START)[0], X)
    gradient = jax.jit(jax.grad(lambda w: jnp.sum(short_conv.apply(w, X, START)[0] ** 2)))(w)
    assert np.all(np.abs(gradient) > 0)


def test_its_gradient_is_summed_in_the_precision_of_its_parameters():
    """A sum of 16,384 ones with partial sums in bfloat16 would end far below."""
    x = jnp.ones((16, 1024, 1), jnp.bfloat16)
    sums = jax.jit(jax.grad(lambda w: jnp.sum(short_conv.apply(w, x, jnp.zeros(16, int))[0].astype(jnp.float32))))
    np.testing.assert_array_equal(sums(jnp.zeros((2, 1)))[:, 0], [16 * 1023, 16 * 1022])


@pytest.mark.parametrize("layer", [None, 1])
def test_in_pieces_it_reads_what_went_before(layer):
    """Rows that start after one and after two tokens; slots not written yet do not matter, other layers' stay as they are."""
    start = np.array([1, 2])
    earlier = RNG.normal(size=(B, 2, D)).astype(np.float32)
    shape = (B, T + 3, D) if layer is None else (3, B, T + 3, D)
    filled = np.full(shape, 7.0, np.float32)
    filled[..., :2, :] = earlier
    cache = filled
    want = [naive(W, np.concatenate([earlier[b, : start[b]], X[b]])[None])[0, start[b] :] for b in range(B)]
    found = []
    for first, last in ((0, 1), (1, 4), (4, T)):
        y, cache = apply(W, np.asarray(X)[:, first:last], start + first, cache, layer=layer)
        found.append(y)
    np.testing.assert_allclose(np.concatenate(found, 1), want, **CLOSE)
    if layer is not None:
        np.testing.assert_array_equal(np.asarray(cache)[::2], filled[::2])


def test_a_cache_that_does_not_fit_is_refused():
    for shape in ((B, T - 1, D), (B + 1, T, D), (B, T, D + 1), (2, B, T, D)):
        with pytest.raises(ValueError, match="has no room for rows"):
            short_conv.apply(W, X, START, jnp.zeros(shape))
