"""The kinds of network (`--model.kind`): what attention and what feed-forward layer their blocks are made of.

    dense     multi-head attention and MLP
    dyntrm    DynSIHA+ and DynMoE: modules are latent heads and experts
    dfc       DynSIHA and MoIE: modules are neurons, softly gated; dfc_hard: on or off

Layers are called in one way, whatever they are made of: a further kind is one more function here. Letters: B batch, T positions,
D model.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp

from tinyonn_jax.config import ModelConfig
from tinyonn_jax.layers import dynmoe, dynsiha, dynsiha_plus, experts, mha, moie
from tinyonn_jax.layers.routing import RouterConfig


class Layer(NamedTuple):
    """The parameters of a layer, as `Param`s (None: it has none), and what it does with them and `x [B,T,D]`."""

    spec: Any
    apply: Callable[..., Any]


class Layers(NamedTuple):
    """Those of a block. Routings and taps go by role; a layer with one router has the role "".

    `attention.apply(params, x, where, valid, taps, cache)` returns `(y [B,T,D], routings, cache)`,
    `feedforward.apply(params, x, valid, taps)` returns `(y [B,T,D], routings)`.
    """

    attention: Layer
    feedforward: Layer


def layers(cfg: ModelConfig, isolate: bool = True) -> Layers:
    """The layers of a block of this kind. `isolate`: the main loss does not reach their routers."""
    return _KINDS[cfg.kind](cfg, isolate)


def _dense(cfg: ModelConfig, isolate: bool) -> Layers:
    heads = mha.Config(cfg.dim, cfg.heads, cfg.head_dim)

    def attend(params, x, where, valid, taps, cache):
        y, cache = mha.apply(params, x, heads, where=where, cache=cache)
        return y, {}, cache

    def feed(params, x, valid, taps):
        return experts.mlp(params, x, cfg.gated), {}

    return Layers(Layer(mha.spec(heads), attend), Layer(experts.mlp_spec(cfg.dim, cfg.hidden, cfg.gated), feed))


def _dyntrm(cfg: ModelConfig, isolate: bool) -> Layers:
    heads = dynsiha_plus.Config(
        cfg.dim, cfg.head_dim, _router(cfg, isolate, cfg.latent_heads, slots=cfg.active_heads, groups=cfg.heads)
    )
    library = dynmoe.Config(
        cfg.dim, cfg.expert_hidden, _router(cfg, isolate, cfg.experts, slots=cfg.active_experts), cfg.gated, cfg.shared_experts
    )

    def attend(params, x, where, valid, taps, cache):
        y, chosen, cache = dynsiha_plus.apply(params, x, heads, where=where, valid=valid, cache=cache, tap=taps.get(""))
        return y, {"": chosen}, cache

    def feed(params, x, valid, taps):
        y, chosen = dynmoe.apply(params, x, library, valid=valid, tap=taps.get(""))
        return y, {"": chosen}

    return Layers(Layer(dynsiha_plus.spec(heads), attend), Layer(dynmoe.spec(library), feed))


def _neurons(cfg: ModelConfig, isolate: bool) -> Layers:
    heads = dynsiha.Config(cfg.dim, cfg.heads, _router(cfg, isolate, cfg.dim))
    hidden = moie.Config(cfg.dim, cfg.hidden, _router(cfg, isolate, cfg.hidden)) if cfg.hidden else None

    def attend(params, x, where, valid, taps, cache):
        return dynsiha.apply(params, x, heads, where=where, valid=valid, cache=cache, tap=taps)

    def feed(params, x, valid, taps):
        return moie.apply(params, x, hidden, valid=valid, tap=taps) if hidden else (jnp.zeros_like(x), {})

    return Layers(Layer(dynsiha.spec(heads), attend), Layer(moie.spec(hidden) if hidden else None, feed))


_KINDS: dict[str, Callable[[ModelConfig, bool], Layers]] = {
    "dense": _dense,
    "dyntrm": _dyntrm,
    "dfc": _neurons,
    "dfc_hard": _neurons,
}


def _router(cfg: ModelConfig, isolate: bool, modules: int, slots: int = 0, groups: int = 1) -> RouterConfig:
    select = {"dfc": "relu", "dfc_hard": "hard"}.get(cfg.kind, cfg.select)
    cost = ("linear" if cfg.kind == "dfc" else "bias") if cfg.cost == "auto" else cfg.cost
    return RouterConfig(modules, slots, groups, cfg.match, cost, select, cfg.weight, isolate=isolate)  # pyright: ignore[reportArgumentType]
