"""SBL, sparse Bayesian linear: a linear layer whose every weight is a distribution, learned by one global loss.

    w_oi = mu_oi + σ_oi·ε_oi,   σ = exp(log_scale),   ε ~ N(0, 1)            y_n = act(x_n·wᵀ + bias)
    L = L_task + β·KL(q ‖ p),   q_oi = N(mu_oi, σ_oi²),   p_oi = N(0, s_o²)

The predecessor that SPL replaced, kept as a baseline. Seed 0 names its parts and writes no equation, so chosen here: weights are
drawn once a call, for all tokens (Blundell et al., 2015); the bias has no distribution, as in SPL; the prior is a neuron's own
and adapts without delay, s_o² = mean_i(mu_oi² + σ_oi²), which is where the KL is smallest (MacKay, 1994: automatic relevance
determination); every neuron runs, for sparseness is left to that prior: a neuron whose noise swamps its means costs nothing.

Letters: N tokens, I inputs, O neurons. Source: seed 0.
"""

from dataclasses import dataclass
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tinyonn_jax.layers.base import Param, normal, zeros


@dataclass(frozen=True)
class Config:
    """Inputs I, neurons O, whether neurons apply silu, and the standard deviation σ that every weight starts with."""

    inputs: int
    neurons: int
    activation: bool = True
    scale: float = 0.01


@flax.struct.dataclass
class Params:
    """Means `mu [O,I]`, logarithms of standard deviations `log_scale [O,I]`, and `bias [O]`."""

    mu: Any
    log_scale: Any
    bias: Any


def spec(cfg: Config) -> Params:
    """The parameters of an SBL, as `Param`s: mu from N(0, 0.02²) as in SPL, all scales alike, bias zero."""
    shape, axes = (cfg.neurons, cfg.inputs), (None, "embed")
    return Params(
        mu=Param(shape, axes, normal(0.02)),
        log_scale=Param(shape, axes, lambda key, shape: jnp.full(shape, jnp.log(cfg.scale), jnp.float32)),
        bias=Param((cfg.neurons,), (None,), zeros),
    )


def apply(params: Params, x: Float[Array, "N I"], cfg: Config, key: Array | None = None) -> Float[Array, "N O"]:
    """The layer on x, with weights drawn by `key`; with the mean weights when it is None."""
    w = params.mu if key is None else sample(params, key)
    u = x @ w.astype(x.dtype).T + params.bias.astype(x.dtype)
    return jax.nn.silu(u) if cfg.activation else u


def sample(params: Params, key: Array) -> Float[Array, "O I"]:
    """Weights drawn from q, reparameterised: differentiable in mu and log_scale."""
    return params.mu + jnp.exp(params.log_scale) * jax.random.normal(key, params.mu.shape, params.mu.dtype)


def prior(params: Params) -> Float[Array, " O"]:
    """Each neuron's prior standard deviation s, at which its KL is smallest."""
    return jnp.sqrt(jnp.mean(params.mu**2 + jnp.exp(2 * params.log_scale), -1))


def divergence(params: Params, s: Float[Array, " O"] | None = None) -> Float[Array, ""]:
    """KL(q ‖ p) in nats, summed over the weights: log(s/σ) + (σ² + mu²) / 2s² − ½ each.

    `s` is the prior's standard deviation, `prior(params)` when None. It carries no gradient, and needs none: at the smallest KL
    the derivative by s is zero.
    """
    s = jax.lax.stop_gradient(prior(params) if s is None else s)[:, None]
    spread = (jnp.exp(2 * params.log_scale) + params.mu**2) / s**2
    return jnp.sum(jnp.log(s) - params.log_scale + (spread - 1) / 2)
