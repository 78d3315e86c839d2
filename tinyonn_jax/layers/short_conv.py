"""A short causal convolution: every token also reads the K tokens before it, channel by channel, whatever they hold.

    y_t = x_t + Σ_{k=1…K} w_k ∘ x_{t-k}         (nothing stands before the first token)

Neighbours need no attention to be found; that is left to find what lies further away. It starts as the identity.
Letters: B batch, T tokens, S slots, D model, K taps. Source: Canon layers (Allen-Zhu, 2025, "Physics of Language Models", 4.1).
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tinyonn_jax.layers import slots
from tinyonn_jax.layers.base import Param, zeros


def spec(dim: int, taps: int) -> Param:
    """`w [K,D]`, zero."""
    return Param((taps, dim), (None, "embed"), zeros)


def apply(
    w: Float[Array, "K D"],
    x: Float[Array, "B T D"],
    start: Int[Array, " B"],
    cache: Float[Array, "*R B S D"] | None = None,
    layer: Int[Array, ""] | None = None,
) -> tuple[Float[Array, "B T D"], Float[Array, "*R B S D"] | None]:
    """The convolution of x, and the cache with x in it (None without one): there x stands at slots start…start+T-1, and reads
    those before it. Of a cache for R layers or recursions a call is number `layer`.

    Raises:
        ValueError: the cache has no room for x.
    """
    (b, t, _), taps = x.shape, len(w)
    y = x.astype(w.dtype)  # in the precision of w, so that its gradient, a sum over all tokens, is taken in it
    if cache is None:
        past = jnp.pad(x, ((0, 0), (taps, 0), (0, 0)))  # once: a CPU takes twice as long to pad for each tap
        return (y + sum(tap * past[:, taps - k : taps - k + t] for k, tap in enumerate(w, 1))).astype(x.dtype), None
    cache = slots.written(cache, x, start, layer)
    past = slots.of_layer(cache, layer).astype(x.dtype)
    sequence, own = jnp.arange(b)[:, None], start[:, None] + jnp.arange(t)
    for k, tap in enumerate(w, 1):
        y = y + tap * jnp.where((own >= k)[..., None], past[sequence, jnp.maximum(own - k, 0)], 0)
    return y.astype(x.dtype), cache
