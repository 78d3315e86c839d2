"""Two optimizers kept apart: main for modules, meta for routers, each with its own schedule, clipping and decay.

A parameter's name says its group: everything under `router` is meta, everything else main; in main, leaves named `w_…`
(`[…, in, out]`) and `mu` (`[…, out, in]`) are matrices, which may use Muon (Jordan, 2024), once for every leading index.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers, muon

from tinyonn_jax.config import OptimConfig


def names(path: Any) -> list[str]:
    """The parts of a leaf's path in a tree, as words."""
    return [str(getattr(key, "name", getattr(key, "key", getattr(key, "idx", key)))) for key in path]


def labels(params: Any) -> Any:
    """ "meta" for every leaf under a `router`, "main" for all others."""
    return jax.tree_util.tree_map_with_path(lambda path, _: "meta" if "router" in names(path) else "main", params)


def matrices(params: Any) -> Any:
    """True for the main leaves named `w_…` or `mu`."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: (names(path)[-1].startswith("w_") or names(path)[-1] == "mu") and "router" not in names(path), params
    )


def schedule(peak: float, steps: int, cfg: OptimConfig) -> optax.Schedule:
    """Linear warm-up, constant, linear decay to zero at `steps`."""
    warmup, decay_from = round(cfg.warmup * steps), round(cfg.decay_from * steps)
    parts = [optax.linear_schedule(0.0, peak, max(warmup, 1)), optax.constant_schedule(peak)]
    parts.append(optax.linear_schedule(peak, 0.0, max(steps - decay_from, 1)))
    return optax.join_schedules(parts, [warmup, decay_from])


def _clip(limit: float, group: str) -> optax.GradientTransformation:
    """Clipping by global norm, by one factor: optax's division and product are a pass of their own over all gradients. So is the
    norm, where it is not given, by group."""

    def clip(updates, state, params=None, *, norms=None, **_):
        factor = jnp.minimum(1.0, limit / (optax.tree.norm(updates) if norms is None else norms[group]))
        return jax.tree.map(lambda g: factor * g, updates), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, clip) if limit else optax.identity()


def make_optimizer(cfg: OptimConfig, steps: int, frozen_routers: bool = False) -> optax.GradientTransformation:
    """`optax.multi_transform` over `labels`. `frozen_routers`: the meta group never moves (rule none)."""
    rate = schedule(cfg.lr, steps, cfg)
    if cfg.matrices == "muon":

        def dims(params):
            sides = lambda path: (-1, -2) if names(path)[-1] == "mu" else (-2, -1)  # noqa: E731
            return jax.tree_util.tree_map_with_path(
                lambda path, is_matrix: MuonDimensionNumbers(*sides(path)) if is_matrix else None, matrices(params)
            )

        main = muon(
            schedule(cfg.muon_lr, steps, cfg),
            weight_decay=cfg.weight_decay,
            adam_weight_decay=0.0,
            adam_learning_rate=rate,
            muon_weight_dimension_numbers=dims,
        )
    else:
        main = optax.adamw(rate, weight_decay=cfg.weight_decay, mask=matrices)
    meta = optax.set_to_zero() if frozen_routers else optax.adamw(schedule(cfg.meta_lr, steps, cfg), weight_decay=0.0)
    return optax.multi_transform(
        {"main": optax.chain(_clip(cfg.clip, "main"), main), "meta": optax.chain(_clip(cfg.meta_clip, "meta"), meta)}, labels
    )
