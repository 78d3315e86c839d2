"""MoIE, mixture of infinite experts: a feed-forward layer of two SPLs, each routed on its own.

    y = SPL₂(SPL₁(x)),  D → F → D

The neurons that a token switches on in both layers are its expert; there are as many as there are subsets of neurons.
Letters: N tokens, D model, F hidden neurons. Source: seed 0 ("MoIE & DynSIHA").
"""

from dataclasses import dataclass, replace

import flax.struct
from jaxtyping import Array, Bool, Float

from tinyonn_jax.layers import routing, spl
from tinyonn_jax.layers.base import tokens_of, valid_of
from tinyonn_jax.layers.tap import NeuronTap, by_role


@dataclass(frozen=True)
class Config:
    """Width D, hidden neurons F, and how both layers route (`router.modules` is set by each)."""

    dim: int
    hidden: int
    router: routing.RouterConfig

    @property
    def first(self) -> spl.Config:
        """D → F, with activation."""
        return spl.Config(self.dim, replace(self.router, modules=self.hidden))

    @property
    def second(self) -> spl.Config:
        """F → D, linear neurons."""
        return spl.Config(self.hidden, replace(self.router, modules=self.dim), activation=False)


@flax.struct.dataclass
class Params:
    """The two SPLs (seed: ffn_spl1, ffn_spl2)."""

    first: spl.Params
    second: spl.Params


def spec(cfg: Config) -> Params:
    """The parameters of a MoIE layer, as `Param`s.

    Raises:
        ValueError: more slots than neurons.
    """
    return Params(spl.spec(cfg.first), spl.spec(cfg.second))


def apply(
    params: Params,
    x: Float[Array, "B T D"],
    cfg: Config,
    *,
    valid: Bool[Array, "B T"] | None = None,
    tap: dict[str, NeuronTap] | None = None,
) -> tuple[Float[Array, "B T D"], dict[str, routing.Routing]]:
    """The layer on x; routings (and taps) by role, `first` and `second`.

    Raises:
        ValueError: `x`, `valid` or `tap` does not fit, or the router selects by neither relu nor hard.
    """
    tokens, taps = tokens_of(x, cfg.dim, 3), by_role(tap, ("first", "second"))
    flat = valid_of(valid, x)
    hidden, first = spl.apply(params.first, tokens, cfg.first, valid=flat, tap=taps["first"])
    y, second = spl.apply(params.second, hidden, cfg.second, valid=flat, tap=taps["second"])
    return y.reshape(x.shape), {"first": first, "second": second}
