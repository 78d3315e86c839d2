"""The routing seen as a variational autoencoder (seed 0): diagnostics that nothing learns from.

    reconstruction = main loss        posterior q = mean routing distribution of the batch        prior p = its moving average
    KL(q ‖ p) for each router         ELBO proxy = −(main loss + Σ KL)

Letters: N tokens, M modules; a leading axis of recursions or layers.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from tinyonn_jax.layers.routing import Routing, load, pooled

TINY = 1e-12


def posterior(routing: Routing, prior: Float[Array, "*L M"]) -> Float[Array, "*L M"]:
    """Each module's share of the weight that a batch gave out, over all recursions; all zero if it gave none."""
    weight = pooled(load(routing).weight, prior)
    return weight / jnp.maximum(jnp.sum(weight, -1, keepdims=True), TINY)


def divergence(q: Float[Array, "*L M"], p: Float[Array, "*L M"]) -> Float[Array, "*L"]:
    """KL(q ‖ p) in nats, of every layer; modules that q leaves out add nothing."""
    return jnp.sum(q * (jnp.log(jnp.maximum(q, TINY)) - jnp.log(jnp.maximum(p, TINY))), -1)


def follow(prior: Float[Array, "*L M"], routing: Routing, decay: float) -> Float[Array, "*L M"]:
    """The prior after a batch: it keeps the share `decay` of itself, and takes the rest from the batch's posterior, if any."""
    q = posterior(routing, prior)
    moved = (decay * prior + (1 - decay) * q).astype(prior.dtype)  # of parameters in float64 q is, too
    return jnp.where(jnp.sum(q, -1, keepdims=True) > 0, moved, prior)
