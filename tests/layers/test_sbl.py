"""SBL: its KL against hand and Monte Carlo, its gradients against finite differences, its prior, its limits."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tinyonn_jax.layers import base, sbl

N, CFG = 5, sbl.Config(inputs=4, neurons=3)
X = jax.random.normal(jax.random.key(9), (N, CFG.inputs))


@pytest.fixture
def params():
    """Parameters far from their small initial values, scales of their own for all weights."""
    rng = np.random.default_rng(0)
    return sbl.Params(*map(jnp.asarray, (rng.normal(size=(3, 4)), rng.normal(-0.5, 0.4, (3, 4)), rng.normal(size=3))))


@pytest.fixture
def double():
    with jax.enable_x64(True):
        yield


def test_kl_by_hand():
    """q = N(1, 0.5²), p = N(0, 2²): log 4 + (0.25 + 1) / 8 − 1/2, and twice of it for two such weights."""
    one = np.log(4) + 1.25 / 8 - 0.5
    for weights in (1, 2):
        shape = (1, weights)
        params = sbl.Params(jnp.ones(shape), jnp.full(shape, jnp.log(0.5)), jnp.zeros(1))
        np.testing.assert_allclose(sbl.divergence(params, jnp.array([2.0])), weights * one, rtol=1e-6)


def test_kl_by_monte_carlo(double, params):
    """The mean of log q − log p over a million draws, within four standard errors."""
    mu, scale = np.asarray(params.mu), np.exp(np.asarray(params.log_scale))
    s = np.sqrt((mu**2 + scale**2).mean(1, keepdims=True))
    total, variance = 0.0, 0.0
    for m, σ, prior in np.broadcast(mu, scale, s):  # one weight at a time
        w = m + σ * np.random.default_rng(1).normal(size=100_000)
        log_ratio = (np.log(prior / σ) - (w - m) ** 2 / (2 * σ**2)) + w**2 / (2 * prior**2)
        total, variance = total + log_ratio.mean(), variance + log_ratio.std() / np.sqrt(log_ratio.size)
    assert variance < 0.03 * total
    np.testing.assert_allclose(sbl.divergence(params), total, atol=4 * variance)


def test_prior_is_where_the_kl_is_smallest(double, params):
    s = sbl.prior(params)
    smallest = sbl.divergence(params, s)
    np.testing.assert_allclose(sbl.divergence(params), smallest, rtol=1e-12)
    for neuron in range(CFG.neurons):
        for factor in (0.99, 1.01):
            assert sbl.divergence(params, s.at[neuron].multiply(factor)) > smallest


def test_prior_adapts_to_each_neuron(params):
    flat = sbl.Params(jnp.array([[3.0, 4.0], [0.0, 0.0]]), jnp.log(jnp.array([[1e-9, 1e-9], [2.0, 2.0]])), jnp.zeros(2))
    np.testing.assert_allclose(sbl.prior(flat), [np.sqrt(12.5), 2.0], rtol=1e-6)
    larger = params.replace(mu=params.mu.at[0].multiply(7), log_scale=params.log_scale.at[0].add(jnp.log(7.0)))
    np.testing.assert_allclose(sbl.prior(larger) / sbl.prior(params), [7, 1, 1], rtol=1e-6)
    np.testing.assert_allclose(sbl.divergence(larger), sbl.divergence(params), rtol=1e-6)  # no scale is preferred


def test_the_prior_needs_no_gradient(double, params):
    """Where the KL is smallest in s, following s or holding it gives the same gradient; elsewhere it would not."""

    def held(params, factor):
        return sbl.divergence(params, factor * sbl.prior(params))

    def followed(params, factor):
        s, scale = factor * sbl.prior(params)[:, None], jnp.exp(params.log_scale)
        return jnp.sum(jnp.log(s / scale) + (scale**2 + params.mu**2) / (2 * s**2) - 0.5)

    hold, follow = jax.jit(jax.grad(held)), jax.jit(jax.grad(followed))
    np.testing.assert_allclose(hold(params, 1.0).mu, params.mu / sbl.prior(params)[:, None] ** 2, rtol=1e-12)
    np.testing.assert_allclose(hold(params, 1.0).mu, follow(params, 1.0).mu, rtol=1e-10)
    np.testing.assert_allclose(hold(params, 1.0).log_scale, follow(params, 1.0).log_scale, rtol=1e-10)
    assert jnp.abs(hold(params, 1.5).mu - follow(params, 1.5).mu).max() > 0.05


def test_a_neuron_of_noise_alone_costs_nothing(params):
    noise = params.replace(mu=jnp.zeros((3, 4)), log_scale=jnp.full((3, 4), -1.3))
    np.testing.assert_allclose(sbl.divergence(noise), 0, atol=1e-5)
    assert sbl.divergence(params) > 1


@pytest.mark.parametrize("activation", [True, False])
def test_gradients_of_a_draw_are_finite_differences(double, params, activation):
    params, x = jax.tree.map(jnp.asarray, (params, np.asarray(X, np.float64)))
    cfg, key, step = replace(CFG, activation=activation), jax.random.key(3), 1e-6

    @jax.jit
    def loss(params):
        return jnp.sum(jnp.sin(sbl.apply(params, x, cfg, key))) + 0.1 * sbl.divergence(params, jnp.ones(3))

    gradients = jax.grad(loss)(params)
    for name in ("mu", "log_scale", "bias"):
        value, gradient = getattr(params, name), getattr(gradients, name)
        for at in np.ndindex(value.shape):
            up, down = (loss(params.replace(**{name: value.at[at].add(d)})) for d in (step, -step))
            np.testing.assert_allclose(gradient[at], (up - down) / (2 * step), rtol=1e-5, atol=1e-8)


def test_draws_have_the_mean_and_scale_of_their_weight(params):
    """Over 20,000 draws: means within five standard errors, scales within 4 %; no two weights share their noise."""
    draws = jax.vmap(lambda key: sbl.sample(params, key))(jax.random.split(jax.random.key(0), 20_000))
    scale = jnp.exp(params.log_scale)
    assert jnp.abs((draws.mean(0) - params.mu) / scale).max() < 5 / np.sqrt(20_000)
    np.testing.assert_allclose(draws.std(0), scale, rtol=0.04)
    correlation = np.corrcoef(draws.reshape(-1, 12).T) - np.eye(12)
    assert np.abs(correlation).max() < 0.04


@pytest.mark.parametrize("activation", [True, False])
def test_without_noise_it_is_a_plain_linear_layer(params, activation):
    cfg, x = replace(CFG, activation=activation), np.asarray(X, np.float64)
    u = x @ np.asarray(params.mu).T + np.asarray(params.bias)
    plain = u / (1 + np.exp(-u)) if activation else u
    sure = params.replace(log_scale=jnp.full((3, 4), -jnp.inf))
    for y in (sbl.apply(params, X, cfg), sbl.apply(sure, X, cfg, jax.random.key(0))):
        np.testing.assert_allclose(y, plain, rtol=1e-5, atol=1e-6)
    noisy = sbl.apply(params, X, cfg, jax.random.key(0))
    assert jnp.abs(noisy - plain).max() > 0.1
    np.testing.assert_array_equal(noisy, sbl.apply(params, X, cfg, jax.random.key(0)))


def test_initial_parameters():
    params = base.init(jax.random.key(0), sbl.spec(sbl.Config(100, 50, scale=0.03)))
    np.testing.assert_allclose(jnp.exp(params.log_scale), np.full((50, 100), 0.03), rtol=1e-6)
    assert abs(float(params.mu.std()) / 0.02 - 1) < 0.05 and not params.bias.any()
