"""Caches of what earlier tokens left: a row for every slot of a sequence, `[B,S,W]`, or those of R layers or recursions,
`[R,B,S,W]`, of which a call reads and writes one, in place. Letters: B batch, T tokens of a call, S slots, W width of a row.
"""

import jax.numpy as jnp
from jaxtyping import Array, Int


def written(into: Array, new: Array, start: Int[Array, " B"], layer: Int[Array, ""] | None) -> Array:
    """The slots with `new [B,T,…]`, as rows of W, at start…start+T-1 of each sequence; of all layers, at number `layer`.

    Raises:
        ValueError: it fits no slots of these.
    """
    rows = new.reshape(*new.shape[:2], -1)
    (b, t, w), shape = rows.shape, into.shape
    if shape[-3] != b or shape[-2] < t or shape[-1] != w or len(shape) != 3 + (layer is not None):
        raise ValueError(f"a cache [B,S,W] of {list(shape)} has no room for rows [B,T,W] of {list(rows.shape)}")
    sequence, slot = jnp.arange(b)[:, None], start[:, None] + jnp.arange(t)
    at = (sequence, slot) if layer is None else (layer, sequence, slot)
    return into.at[at].set(rows.astype(into.dtype), unique_indices=True)


def of_layer(slots: Array, layer: Int[Array, ""] | None) -> Array:
    """The slots of the layer at hand, `[B,S,W]`."""
    return slots if layer is None else slots[layer]
