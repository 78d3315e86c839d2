"""FLOPs of a training step by formula: six for every weight that a token uses, routers' included, and for every value of a head
over every pair of tokens that see each other twelve; for each recursion or block. Left out: optimizers, norms, softmax, short
convolutions, prototype residual connections, the outputs after earlier recursions (deep supervision).

Source: the count of PaLM (arXiv 2204.02311, appendix B), for what a token uses of a library.
"""

from dataclasses import replace
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from tinyonn_jax.arc.tokens import VOCAB
from tinyonn_jax.config import ModelConfig
from tinyonn_jax.layers.linear import all_modules


class Flops(NamedTuple):
    """Those of grouped matmuls (`routed`), and all others."""

    routed: float
    other: float


def step_flops(cfg: ModelConfig, tokens: float, pairs: float) -> Flops:
    """What a step on so many tokens computes if `pairs` pairs of tokens see each other; a third more with remat."""
    passes = cfg.depth * (8 if cfg.remat else 6)
    routed, other = _weights(cfg)
    heads = cfg.heads * (cfg.active_heads if cfg.kind == "dyntrm" else 1)
    attention = 2 * heads * cfg.head_dim * pairs
    return Flops(passes * routed * tokens, passes * (other * tokens + attention) + 6 * cfg.dim * VOCAB * tokens)


def useful_flops(cfg: ModelConfig, length: Int[np.ndarray, "B"], prefix: Int[np.ndarray, "B"]) -> float:
    """What the result of a step needs: nothing twice for remat, no padding, and attention over what tokens see, not all slots."""
    length, prefix = np.asarray(length, np.float64), np.asarray(prefix, np.float64)
    pairs = np.sum(length * (length + 1) + prefix * (prefix - 1)) / 2  # causal, and the rest of the prefix's square
    return sum(step_flops(replace(cfg, remat=False), float(length.sum()), float(pairs)))


def _weights(cfg: ModelConfig) -> tuple[int, int]:
    """How many weights of a block a token uses: in grouped matmuls, and others."""
    d, inner, mats = cfg.dim, cfg.heads * cfg.head_dim, 3 if cfg.gated else 2
    match cfg.kind:
        case "dense":
            return 0, 4 * d * inner + mats * d * cfg.hidden
        case "dyntrm":
            slots, expert = cfg.heads * cfg.active_heads, mats * d * cfg.expert_hidden
            heads = 2 * d * cfg.head_dim * slots  # queries and outputs
            routers = d * (cfg.latent_heads + cfg.experts) * (2 if cfg.cost == "linear" else 1)  # prototypes, and gates
            other = 2 * d * inner + cfg.shared_experts * expert + routers  # keys, values
            if all_modules(cfg.latent_heads, slots):  # one plain matmul
                return cfg.active_experts * expert, other + heads
            return cfg.active_experts * expert + heads, other
        case _:
            regressed = cfg.cost == "linear" or (cfg.cost == "auto" and cfg.kind == "dfc")
            return 0, (4 * d * d + 2 * d * cfg.hidden) * (3 if regressed else 2)  # mu, prototypes, gates
