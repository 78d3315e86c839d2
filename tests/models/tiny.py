"""Networks and batches small enough to compute by hand-written loops."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tests.layers.naive import make
from tinyonn_jax.arc.batches import Batch
from tinyonn_jax.config import ModelConfig
from tinyonn_jax.models import transformer

TASKS = 3


def config(kind="dyntrm", **changes) -> ModelConfig:
    """Width 8 (12 where neurons are routed), two groups of two latent heads, three experts of which a token uses two, two
    recursions."""
    sizes = {
        "dim": 12 if kind.startswith("dfc") else 8,
        "heads": 2,
        "head_dim": 6,
        "latent_heads": 4,
        "hidden": 7,
        "experts": 3,
        "active_experts": 2,
        "expert_hidden": 5,
        "depth": 2,
    }
    return ModelConfig(**{"kind": kind, **sizes, **changes})


def batch(rows: int = 3, length: int = 6, seed: int = 0) -> Any:
    """Random sequences: the first fills its row, the next are shorter, the last one only fills the batch."""
    rng = np.random.default_rng(seed)
    lengths = np.array([length, *rng.integers(4, length, rows - 2), 0], np.int32)
    prefix = np.minimum(rng.integers(2, 4, rows), lengths).astype(np.int32)
    t = np.arange(length)
    arrays = Batch(
        tokens=rng.integers(0, 14, (rows, length)).astype(np.int32),
        positions=rng.integers(0, 5, (rows, length, 3)).astype(np.int32),
        prefix=prefix,
        length=lengths,
        loss_mask=((t >= prefix[:, None] - 1) & (t < lengths[:, None] - 1)).astype(np.float32),
        task=rng.integers(0, TASKS, rows).astype(np.int32),
        dihedral=rng.integers(0, 8, rows).astype(np.int32),
    )
    return jax.device_put(arrays)


def params(cfg: ModelConfig, seed: int = 0) -> Any:
    """Random parameters, large enough that gradients are of size one."""
    return make(transformer.spec(cfg, TASKS), seed)


apply = jax.jit(transformer.apply, static_argnames=("cfg", "isolate", "steps", "stop"))


def cross_entropy(logits, batch):
    """Mean loss of the next token where the mask says so, written out."""
    log_p = logits - jnp.log(jnp.sum(jnp.exp(logits), -1, keepdims=True))
    target = jnp.concatenate([batch.tokens[:, 1:], batch.tokens[:, :1]], 1)
    picked = jnp.sum(jnp.where(target[..., None] == jnp.arange(14), log_p, 0), -1)
    return -jnp.sum(picked * batch.loss_mask) / jnp.sum(batch.loss_mask)
