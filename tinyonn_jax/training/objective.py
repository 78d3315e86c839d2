"""The main loss of a network on batches of sequences, and what is measured beside it.

Letters: B batch, T positions, V vocabulary, R recursions.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tinyonn_jax.arc.forced import exact
from tinyonn_jax.config import Config, ConfigError
from tinyonn_jax.learning import LearningRule, backprop, integrity, msaps, none, sars
from tinyonn_jax.models import transformer
from tinyonn_jax.training.step import Aux, LossFn
from tinyonn_jax.uses import OPTIONS_OF, foreign


def make_rule(config: Config) -> LearningRule:
    """The learning rule that a configuration names.

    Raises:
        ConfigError: options are set that do nothing under it.
    """
    cfg = config.learning
    for name in foreign(cfg, cfg.rule):
        owners = " and ".join(OPTIONS_OF[name])
        raise ConfigError(f"learning.{name} belongs to rule {owners} and does nothing under {cfg.rule}: leave it out")
    match cfg.rule:
        case "none":
            return none()
        case "backprop":
            return backprop(cfg.balance)
        case "sars":
            return sars(
                cfg.granularity,
                cfg.prior_sign,
                goodness_gate=cfg.goodness_gate,
                neuron_cost=cfg.neuron_cost,
                balance=cfg.balance,
                centre=cfg.centre,
            )
        case "msaps":
            return msaps(
                attract=cfg.attract,
                regress=cfg.regress,
                protect=cfg.protect,
                temperature=cfg.temperature,
                l2=cfg.l2,
                renew=cfg.renew,
            )


def token_losses(logits: Float[Array, "*R B T V"], tokens: Int[Array, "B T"]) -> tuple[Float[Array, "*R B T"], Array]:
    """Cross-entropy of the next token, in nats, and whether the likeliest one is right; the last position counts for nothing."""
    targets = jnp.roll(tokens, -1, -1)
    hot = targets[..., None] == jnp.arange(logits.shape[-1])
    loss = -jnp.sum(jnp.where(hot, jax.nn.log_softmax(logits, -1), 0), -1)
    return loss, jnp.argmax(logits, -1) == targets


def measure(logits: Float[Array, "B T V"], batch: Any) -> dict[str, Array]:
    """`main_acc` share of trained tokens that are right; `exact` share of sequences with all right; `tau`; `tokens` real ones."""
    _, right = token_losses(logits, batch.tokens)
    real = jnp.max(batch.loss_mask, -1) > 0
    return {
        "main_acc": jnp.sum(right * batch.loss_mask) / jnp.maximum(jnp.sum(batch.loss_mask), 1),
        "exact": jnp.sum(exact(logits, batch) & real) / jnp.maximum(jnp.sum(real), 1),
        "tau": integrity.tau(logits, batch.loss_mask),
        "tokens": jnp.sum(batch.length),
    }


def make_loss(config: Config, rule: LearningRule) -> LossFn:
    """Mean cross-entropy over trained tokens. With deep supervision s, each earlier recursion adds s / (R - 1) of its loss."""
    cfg = config.model

    def loss_fn(params: Any, taps: Any, batch: Any) -> tuple[Array, Aux]:
        deep = cfg.deep_supervision > 0
        out = transformer.apply(params, batch, cfg, taps, isolate=rule.isolate, steps=deep)
        loss, _ = token_losses(out.steps if out.steps is not None else out.logits, batch.tokens)
        mean = jnp.sum(loss * batch.loss_mask, (-2, -1)) / jnp.maximum(jnp.sum(batch.loss_mask), 1)
        if deep:
            mean = mean[-1] + cfg.deep_supervision * jnp.mean(mean[:-1])
        return mean, Aux(out.routings, measure(out.logits, batch))

    return loss_fn
