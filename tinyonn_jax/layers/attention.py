"""The attention maths: who sees whom, grouped heads, rotary positions, the key/value cache.

Letters: B batch, T queries, S keys, D model, G key/value groups, Q query heads (a multiple of G), C head size.
"""

from dataclasses import replace
from functools import partial
from typing import Literal

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from tinyonn_jax.layers import slots
from tinyonn_jax.layers.base import rotary, rotation


@flax.struct.dataclass
class Cache:
    """Keys (rotated) and values of the tokens seen so far, `[B,S,G·C]` each; those of R layers or recursions `[R,B,S,G·C]`. One
    axis for G·C, for TPUs fill up the last two of an array."""

    keys: Array
    values: Array


@flax.struct.dataclass
class Context:
    """Where the T tokens of a call stand, made once by `context` for all layers.

    `turn` rotary cosines and sines `[B,T,1,C/2]`; `start [B]` slot of the first token in the cache, if there is one; `prefix
    [B]` slots that every token sees (0: purely causal); `layer` which of its layers or recursions a cache that holds those of
    many is read and extended for, in place.
    """

    turn: tuple[Array, Array]
    start: Int[Array, " B"]
    prefix: Int[Array, " B"]
    layer: Int[Array, ""] | None = None


def context(
    positions: Int[Array, "B T A"],
    head_dim: int,
    start: Int[Array, " B"] | None = None,
    prefix: Int[Array, " B"] | None = None,
    base: float = 100.0,
) -> Context:
    """The context of tokens at `positions`, from the start and purely causal unless told.

    Raises:
        ValueError: heads of an odd size.
    """
    zero = jnp.zeros(positions.shape[0], jnp.int32)
    return Context(rotation(positions, head_dim, base), zero if start is None else start, zero if prefix is None else prefix)


def in_order(batch: int, length: int, head_dim: int) -> Context:
    """Text-like: positions 0…T-1, every token sees itself and those before it."""
    return context(jnp.broadcast_to(jnp.arange(length)[:, None], (batch, length, 1)), head_dim)


def place(where: Context | None, cache: "Cache | None", batch: int, length: int, head_dim: int) -> Context:
    """`where`, or in order.

    Raises:
        ValueError: there is a cache, and nothing says where in it the tokens stand; or `where` is that of other tokens or heads.
    """
    if where is None and cache is not None:
        raise ValueError("with a cache, `where` must say at which slots the tokens start: attention.context(positions, …, start)")
    if where is None:
        return in_order(batch, length, head_dim)
    turn, start, prefix = (list(a.shape) for a in (where.turn[0], where.start, where.prefix))
    if turn[1:] != [length, 1, head_dim // 2] or not {turn[0], *start, *prefix} <= {1, batch}:
        raise ValueError(
            f"`where` is made for other tokens: turn {turn}, start {start} and prefix {prefix} are not [B,T,1,C/2], [B] and [B] "
            f"of {[batch, length, 1, head_dim // 2]}"
        )
    return where


def mask(where: Context, keys: int) -> Bool[Array, "B 1 T S"]:
    """Token t sees slot s when s is not after t's own slot, or lies in the prefix."""
    own = where.start[:, None] + jnp.arange(where.turn[0].shape[1])  # [B,T]
    slot = jnp.arange(keys)
    return ((slot <= own[..., None]) | (slot < where.prefix[:, None, None]))[:, None]


def attend(
    q: Float[Array, "B T Q C"],
    k: Float[Array, "B T G C"],
    v: Float[Array, "B T G C"],
    where: Context,
    cache: Cache | None = None,
) -> tuple[Float[Array, "B T Q C"], Cache | None]:
    """Softmax attention of queries over rotated keys; query head i reads group i // (Q / G).

    With a cache the T keys and values are written at slots start…start+T-1 first, and attention runs over the whole cache.
    They must fit: nothing notices start + T > S, where the last of them are lost, as `start` is not known when this is traced.

    Raises:
        ValueError: a cache of another shape.
    """
    q, k = rotary(q, where.turn), rotary(k, where.turn)
    if cache is None:  # the keys are those of the queries themselves
        where = replace(where, start=jnp.zeros_like(where.start))
    else:
        written = (slots.written(a, new, where.start, where.layer) for a, new in ((cache.keys, k), (cache.values, v)))
        cache, head = Cache(*written), k.shape[2:]
        here = (slots.of_layer(a, where.layer) for a in (cache.keys, cache.values))
        k, v = (a.reshape(*a.shape[:2], *head).astype(q.dtype) for a in here)
    fused = partial(_fused, fresh=cache is None) if cudnn_takes(q) else _masked
    args = q, k, v, mask(where, k.shape[1]), where.prefix
    return jax.lax.platform_dependent(*args, cuda=fused, default=_heads_first), cache


def _masked(q, k, v, seen, prefix, implementation=None):
    return jax.nn.dot_product_attention(q, k, v, mask=seen, implementation=implementation)


# --- NVIDIA GPUs: cuDNN's flash attention ---------------------------------------------------------------------------------


def cudnn_takes(q: Float[Array, "B T Q C"]) -> bool:
    """Whether there is a GPU with cuDNN's flash attention, and it takes such queries."""
    device = jax.devices()[0]
    if device.platform != "gpu" or "cuda" not in device.client.platform_version or float(device.compute_capability) < 8:
        return False
    return q.dtype in (jnp.bfloat16, jnp.float16) and q.shape[-1] % 8 == 0 and q.shape[-1] <= 128


def _fused(q, k, v, seen, prefix, fresh: bool):
    """`fresh`: the keys are those of the queries. A single query has nothing of size T × S, and goes the plain way."""
    if fresh:
        return prefix_causal(q, k, v, prefix, "cudnn")
    return _masked(q, k, v, seen, prefix, "cudnn" if q.shape[1] > 1 else None)


def prefix_causal(
    q: Float[Array, "B T Q C"],
    k: Float[Array, "B T G C"],
    v: Float[Array, "B T G C"],
    prefix: Int[Array, " B"],
    implementation: Literal["cudnn", "xla"],
) -> Float[Array, "B T Q C"]:
    """Attention of tokens among themselves with nothing of size T × T, for kernels that know causal masks and lengths: the prefix
    sees all of itself, and what comes later sees what is not after it."""
    batch, t = q.shape[:2]
    length = jnp.broadcast_to(jnp.clip(prefix, 1, t), batch)  # a first token by itself sees the same either way
    inside = (jnp.arange(t) < length[:, None])[..., None, None]
    attention = partial(jax.nn.dot_product_attention, implementation=implementation)
    q_in, k_in, v_in = (_learning_inside(a, inside) for a in (q, k, v))
    within = attention(q_in, k_in, v_in, query_seq_lengths=length, key_value_seq_lengths=length)
    return jnp.where(inside, within, attention(q, k, v, is_causal=True))


@jax.custom_vjp
def _learning_inside(x, inside):
    """x, whose gradient is zero outside, whatever the kernel leaves there."""
    return x


_learning_inside.defvjp(lambda x, inside: (x, inside), lambda inside, g: (jnp.where(inside, g, 0), None))


# --- elsewhere: heads before positions, so that sums are plain batched matmuls; nothing of size T × S is kept for the backward
# pass, which computes the weights again from the sums of the forward pass (Dao et al., 2022) -----------------------------------


def _fold(x: Float[Array, "B T Q C"], groups: int) -> Float[Array, "B G QT/G C"]:
    """The heads of a group, one after the other."""
    b, t, heads, c = x.shape
    return x.reshape(b, t, groups, heads // groups, c).transpose(0, 2, 3, 1, 4).reshape(b, groups, -1, c)


def _unfold(x: Float[Array, "B G QT/G C"], t: int) -> Float[Array, "B T Q C"]:
    b, groups, rows, c = x.shape
    return x.reshape(b, groups, rows // t, t, c).transpose(0, 3, 1, 2, 4).reshape(b, t, -1, c)


def _scores(q, k, seen):
    """Float32 logits `[B,G,QT/G,S]`, hidden slots at the lowest float; q is scaled already."""
    b, groups, rows, _ = q.shape
    t, s = seen.shape[-2:]
    logits = jnp.einsum("bgqc,bgsc->bgqs", q, k, preferred_element_type=jnp.float32)
    hidden = jnp.where(seen, 0, jnp.finfo(jnp.float32).min)
    return (logits.reshape(b, groups, rows // t, t, s) + hidden[:, :, None]).reshape(logits.shape)


@jax.custom_vjp
def _heads_first(q, k, v, seen, prefix):
    return _heads_first_fwd(q, k, v, seen, prefix)[0]


def _heads_first_fwd(q, k, v, seen, prefix):
    groups, t = k.shape[2], q.shape[1]
    q, k, v = _fold(q * q.shape[-1] ** -0.5, groups), _fold(k, groups), _fold(v, groups)
    logits = _scores(q, k, seen)
    top = jnp.max(logits, -1, keepdims=True)
    weights = jnp.exp(logits - top)
    total = jnp.sum(weights, -1, keepdims=True)
    o = jnp.einsum("bgqs,bgsc->bgqc", weights.astype(v.dtype), v, preferred_element_type=jnp.float32) / total
    return _unfold(o.astype(v.dtype), t), (q, k, v, seen, o, top + jnp.log(total))


def _heads_first_bwd(saved, g):
    q, k, v, seen, o, log_total = saved
    groups, t, dtype = k.shape[1], g.shape[1], g.dtype
    g = _fold(g, groups)
    weights = jnp.exp(_scores(q, k, seen) - log_total)
    d_v = _sum_queries(weights.astype(dtype), g)
    d_weights = jnp.einsum("bgqc,bgsc->bgqs", g, v, preferred_element_type=jnp.float32)
    d_logits = (weights * (d_weights - jnp.sum(g * o, -1, keepdims=True))).astype(dtype)
    d_q = jnp.einsum("bgqs,bgsc->bgqc", d_logits, k) * q.shape[-1] ** -0.5
    return _unfold(d_q, t), _sum_queries(d_logits, q), d_v, None, None


def _sum_queries(weights, x):
    """`[B,S,G,C]`. The transposed operand is the small one: a third less time than to transpose the weights."""
    return jnp.einsum("bgcq,bgqs->bgcs", x.swapaxes(2, 3), weights).transpose(0, 3, 1, 2)


_heads_first.defvjp(_heads_first_fwd, _heads_first_bwd)
