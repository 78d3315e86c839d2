"""DynSIHA, dynamic sparse infinite-head attention: the projections of attention are SPLs, composed anew for every token.

    q, k, v = SPL_q(x), SPL_k(x), SPL_v(x);   y = SPL_o(softmax(q·kᵀ/√C)·v)

With one head this is the seed's "infinite head": what a head attends to is up to the neurons that each token switches on.
Letters: B batch, T positions, N = B·T tokens, D model, H heads, C = D/H head size. Source: seed 0, seed 4.
"""

from dataclasses import dataclass, replace

import flax.struct
from jaxtyping import Array, Bool, Float

from tinyonn_jax.layers import attention, routing, spl
from tinyonn_jax.layers.base import tokens_of, valid_of
from tinyonn_jax.layers.tap import NeuronTap, by_role


@dataclass(frozen=True)
class Config:
    """Width D, heads H (a divisor of D), how all projections route (`router.modules` is set to D), and whether there is an output
    SPL."""

    dim: int
    heads: int
    router: routing.RouterConfig
    output: bool = True

    @property
    def projection(self) -> spl.Config:
        """D → D; linear neurons, as in attention."""
        return spl.Config(self.dim, replace(self.router, modules=self.dim), activation=False)


@flax.struct.dataclass
class Params:
    """One SPL per role (seed: attn_qkv, attn_o); `o` may be None."""

    q: spl.Params
    k: spl.Params
    v: spl.Params
    o: spl.Params | None


def spec(cfg: Config) -> Params:
    """The parameters of a DynSIHA layer, as `Param`s.

    Raises:
        ValueError: the heads do not divide the width.
    """
    if cfg.dim % cfg.heads:
        raise ValueError(f"heads must divide dim, got {cfg.heads} and {cfg.dim}")
    one = spl.spec(cfg.projection)
    return Params(one, one, one, one if cfg.output else None)


def apply(
    params: Params,
    x: Float[Array, "B T D"],
    cfg: Config,
    *,
    where: attention.Context | None = None,
    valid: Bool[Array, "B T"] | None = None,
    cache: attention.Cache | None = None,
    tap: dict[str, NeuronTap] | None = None,
) -> tuple[Float[Array, "B T D"], dict[str, routing.Routing], attention.Cache | None]:
    """The layer on x: output, routings by role, and the cache with this call's keys and values (None without a cache).

    `where` says who sees whom and where tokens stand; by default causal, in order. Taps go by role as well.

    Raises:
        ValueError: `x`, `where`, `valid`, `cache` or `tap` does not fit, or the router selects by neither relu nor hard.
    """
    tokens = tokens_of(x, cfg.dim, 3)
    b, t, d = x.shape
    where = attention.place(where, cache, b, t, d // cfg.heads)
    taps = by_role(tap, ("q", "k", "v", "o") if params.o is not None else ("q", "k", "v"))
    flat = valid_of(valid, x)
    routings: dict[str, routing.Routing] = {}

    def project(role: str, tokens: Float[Array, "N D"]) -> Float[Array, "N D"]:
        y, routings[role] = spl.apply(getattr(params, role), tokens, cfg.projection, valid=flat, tap=taps[role])
        return y

    q, k, v = (project(role, tokens).reshape(b, t, cfg.heads, -1) for role in "qkv")
    o, cache = attention.attend(q, k, v, where, cache)
    y = o.reshape(-1, d)
    if params.o is not None:
        y = project("o", y)
    return y.reshape(x.shape), routings, cache
