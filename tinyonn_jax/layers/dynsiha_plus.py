"""DynSIHA+: every token composes its attention from a library of latent heads.

    logits = match(x, proto) − cost;  for each of G groups, k of its P = H/G latent heads are selected
    q of a selected head = x·w_q[h];  keys and values per group;  y_n = Σ_slots weight · (attention of the slot)·w_o[h]

The selected queries form ordinary grouped attention, `[B,T,G·k,C]` against `[B,T,G,C]`, whose cost grows with G·k, not with H; so
does that of w_q and w_o where H > 4·G·k. Fewer heads all run on all tokens, as one matmul, which is faster (`linear`).
With P = 1, k = 1 and hard weight this is multi-head attention, exactly; with G = 1 it is the seed's top-k over all heads.

Letters: B batch, T positions, N = B·T tokens, D model, H latent heads, G groups, K = G·k slots, C head size.
Source: seed 1 §2.1.
"""

from dataclasses import dataclass
from typing import Any

import flax.struct
from jaxtyping import Array, Bool, Float

from tinyonn_jax.layers import attention, linear, routing
from tinyonn_jax.layers import tap as taps
from tinyonn_jax.layers.base import Param, fan_in, tokens_of, valid_of


@dataclass(frozen=True)
class Config:
    """Width D, head size C, and the router: its modules are the H latent heads, its groups the G key/value groups."""

    dim: int
    head_dim: int
    router: routing.RouterConfig


@flax.struct.dataclass
class Heads:
    """The library of latent heads: `w_q [H,D,C]`, `w_o [H,C,D]`."""

    w_q: Any
    w_o: Any


@flax.struct.dataclass
class Params:
    """Router (seed: proto_attn, gate_attn), latent heads, and per group `w_k, w_v [D,G·C]`, which every token uses."""

    router: routing.Router
    modules: Heads
    w_k: Any
    w_v: Any


def spec(cfg: Config) -> Params:
    """The parameters of a DynSIHA+ layer, as `Param`s. w_o is scaled for a sum over G heads, as in multi-head attention.

    Raises:
        ValueError: more slots in a group than it has heads.
    """
    heads, groups = cfg.router.modules, cfg.router.groups
    shared = Param((cfg.dim, groups * cfg.head_dim), ("embed", "heads"), fan_in)

    def out(key, shape):
        return fan_in(key, shape) * groups**-0.5

    return Params(
        router=routing.spec(cfg.dim, cfg.router),
        modules=Heads(
            w_q=Param((heads, cfg.dim, cfg.head_dim), ("experts", "embed", None), fan_in),
            w_o=Param((heads, cfg.head_dim, cfg.dim), ("experts", None, "embed"), out),
        ),
        w_k=shared,
        w_v=shared,
    )


def apply(
    params: Params,
    x: Float[Array, "B T D"],
    cfg: Config,
    *,
    where: attention.Context | None = None,
    valid: Bool[Array, "B T"] | None = None,
    cache: attention.Cache | None = None,
    tap: taps.Tap | None = None,
) -> tuple[Float[Array, "B T D"], routing.Routing, attention.Cache | None]:
    """The layer on x: output, routing, and the cache with this call's keys and values (None without a cache).

    `where` says who sees whom and where tokens stand; by default causal, in order. Tokens where `valid` is false are not routed;
    those after them see their keys all the same, so padding belongs at the end.

    Raises:
        ValueError: `x`, `where`, `valid` or `cache` does not fit.
    """
    tokens = tokens_of(x, cfg.dim, 3)
    b, t, _ = x.shape
    where = attention.place(where, cache, b, t, cfg.head_dim)
    chosen = routing.route(params.router, tokens, cfg.router, valid_of(valid, x))

    q = linear.project(tokens, params.modules.w_q.astype(x.dtype), chosen, tap).reshape(b, t, -1, cfg.head_dim)
    k, v = ((tokens @ w.astype(x.dtype)).reshape(b, t, -1, cfg.head_dim) for w in (params.w_k, params.w_v))
    o, cache = attention.attend(q, k, v, where, cache)
    heads = o.reshape(*chosen.weight.shape, cfg.head_dim)
    y = linear.merge(heads, params.modules.w_o.astype(x.dtype), chosen, tap)
    return y.reshape(x.shape), chosen, cache
