"""Predictive integrity: one number in (0, 1] for how well the model is doing and how little it is disturbed.

Source: seed 2 (core metrics), seed 3 §3.2.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from tinyonn_jax.layers.base import entropy


def tau(logits: Float[Array, "*B V"], mask: Float[Array, "*B"]) -> Array:
    """Mean entropy of the output distribution over the positions where `mask` is 1, in nats."""
    return jnp.sum(entropy(logits.astype(jnp.float32)) * mask) / jnp.maximum(jnp.sum(mask), 1)


def predictive_integrity(loss: Array, tau: Array, surprise: Array, alpha: float, gamma: float) -> Array:
    """PI = exp(−α (loss / tau + γ · surprise)), in (0, 1]; loss and tau in nats, surprise a gradient norm."""
    return jnp.exp(-alpha * (loss / jnp.maximum(tau, 1e-6) + gamma * surprise))
