"""Plain multi-head attention (Vaswani et al., 2017), the dense counterpart of the routed attention layers.

    q, k, v = x·W_q, x·W_k, x·W_v;   y = softmax(q·kᵀ/√C)·v · W_o

Letters: B batch, T positions, D model, H heads, C head size.
"""

from dataclasses import dataclass
from typing import Any

import flax.struct
from jaxtyping import Array, Float

from tinyonn_jax.layers import attention
from tinyonn_jax.layers.base import Param, fan_in, linear, tokens_of


@dataclass(frozen=True)
class Config:
    """Width D, heads H, head size C."""

    dim: int
    heads: int
    head_dim: int


@flax.struct.dataclass
class Params:
    """`w_q, w_k, w_v [D, H·C]`, `w_o [H·C, D]`."""

    w_q: Any
    w_k: Any
    w_v: Any
    w_o: Any


def spec(cfg: Config) -> Params:
    """The parameters of a layer, as `Param`s: normal, variance 1 / fan-in."""
    inner = cfg.heads * cfg.head_dim
    into = Param((cfg.dim, inner), ("embed", "heads"), fan_in)
    return Params(into, into, into, Param((inner, cfg.dim), ("heads", "embed"), fan_in))


def apply(
    params: Params,
    x: Float[Array, "B T D"],
    cfg: Config,
    *,
    where: attention.Context | None = None,
    cache: attention.Cache | None = None,
) -> tuple[Float[Array, "B T D"], attention.Cache | None]:
    """The layer on x, and the cache with this call's keys and values (None without a cache).

    `where` says who sees whom and where tokens stand; by default causal, in order.

    Raises:
        ValueError: `x`, `where` or `cache` does not fit.
    """
    tokens = tokens_of(x, cfg.dim, 3)  # flat, so that weight gradients are plain matmuls
    b, t, d = x.shape
    where = attention.place(where, cache, b, t, cfg.head_dim)
    q, k, v = (linear(tokens, w.astype(x.dtype)).reshape(b, t, cfg.heads, -1) for w in (params.w_q, params.w_k, params.w_v))
    o, cache = attention.attend(q, k, v, where, cache)
    return linear(o.reshape(b * t, -1), params.w_o.astype(x.dtype)).reshape(b, t, d), cache
