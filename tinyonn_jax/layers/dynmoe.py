"""DynMoE: every token composes its feed-forward function from a few experts of a library.

    logits = match(x, proto) − cost;  y_n = Σ_k weight_nk · f_{index_nk}(x_n)

Letters: B batch, T positions, N = B·T tokens, D model, E experts, F expert hidden, K slots. Source: seed 1 §2.2, seed 2 §2.
"""

from dataclasses import dataclass

import flax.struct
from jaxtyping import Array, Bool, Float

from tinyonn_jax.layers import experts, parallel, routing
from tinyonn_jax.layers.base import tokens_of, valid_of
from tinyonn_jax.layers.tap import Tap


@dataclass(frozen=True)
class Config:
    """Width D, expert hidden F, the router (its modules are the experts), and how many experts every token shares besides."""

    dim: int
    hidden: int
    router: routing.RouterConfig
    gated: bool = False
    shared: int = 0

    def __post_init__(self):
        if min(self.dim, self.hidden) < 1 or self.shared < 0:
            raise ValueError(f"dim and hidden must be at least 1, shared at least 0; got {self}")


@flax.struct.dataclass
class Params:
    """Router (seed: proto_ffn, gate_ffn), the E stacked experts, and the shared expert of width shared·F, if any."""

    router: routing.Router
    modules: experts.Mlp
    shared: experts.Mlp | None


def spec(cfg: Config) -> Params:
    """The parameters of a DynMoE layer, as `Param`s.

    Raises:
        ValueError: more slots than modules.
    """
    return Params(
        router=routing.spec(cfg.dim, cfg.router),
        modules=experts.mlp_spec(cfg.dim, cfg.hidden, cfg.gated, cfg.router.modules),
        shared=experts.mlp_spec(cfg.dim, cfg.hidden * cfg.shared, cfg.gated) if cfg.shared else None,
    )


def apply(
    params: Params,
    x: Float[Array, "B T D"],
    cfg: Config,
    *,
    valid: Bool[Array, "B T"] | None = None,
    tap: Tap | None = None,
) -> tuple[Float[Array, "B T D"], routing.Routing]:
    """The layer on x; tokens where `valid` is false, which may hold anything finite, are not routed and give zero (or the shared
    experts' output).

    Raises:
        ValueError: `x` or `valid` does not fit.
    """
    tokens = tokens_of(x, cfg.dim, 3)
    chosen = routing.route(params.router, tokens, cfg.router, valid_of(valid, x))
    chosen = parallel.fit(chosen)
    y = experts.routed_mlp(params.modules, tokens, chosen, cfg.gated, tap)
    if params.shared is not None:
        y = y + experts.mlp(params.shared, tokens, cfg.gated)
    return y.reshape(x.shape), chosen
