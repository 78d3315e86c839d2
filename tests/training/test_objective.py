"""The main loss and its measures, by hand."""

import dataclasses
from functools import partial
from inspect import signature
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models import tiny
from tinyonn_jax.config import Config, ConfigError, LearningConfig, RuleName
from tinyonn_jax.learning import none
from tinyonn_jax.models import transformer
from tinyonn_jax.training import objective
from tinyonn_jax.training.objective import make_loss, make_rule, measure, token_losses
from tinyonn_jax.uses import OPTIONS_OF, under

BATCH = tiny.batch()


def test_token_losses_compare_with_the_next_token():
    logits = jnp.zeros((1, 3, 14)).at[0, 0, 5].set(3.0).at[0, 1, 2].set(np.log(3.0))
    losses, right = token_losses(logits, jnp.array([[9, 5, 7]]))
    np.testing.assert_allclose(losses[0, :2], [np.log(13 + np.exp(3)) - 3, np.log(16)], rtol=1e-6)
    np.testing.assert_array_equal(right[0, :2], [True, False])


def test_measure_by_hand():
    """Row 0: two trained tokens, one right. Row 1: one, right. Row 2 fills the batch. Certain logits but for one."""
    batch = tiny.batch(3, 6).replace(
        tokens=jnp.array([[1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6], [0] * 6]),
        loss_mask=jnp.array([[0, 1, 1, 0, 0, 0], [0, 0, 1, 0, 0, 0], [0] * 6], jnp.float32),
        length=jnp.array([6, 4, 0]),
    )
    guess = jnp.array([[9, 3, 9, 9, 9, 9], [9, 9, 4, 9, 9, 9], [9] * 6])
    logits = 50.0 * (guess[..., None] == jnp.arange(14))
    logits = logits.at[1, 2].set(jnp.where(jnp.arange(14) < 8, 0.0, -60.0).at[4].set(1e-4))  # nearly even over eight
    found = jax.jit(measure)(logits, batch)
    assert float(found["main_acc"]) == pytest.approx(2 / 3)
    assert float(found["exact"]) == pytest.approx(1 / 2)  # of the two sequences with something to predict
    assert float(found["tau"]) == pytest.approx(np.log(8) / 3, rel=1e-4)
    assert int(found["tokens"]) == 10


def test_measure_of_a_batch_with_nothing_to_predict_is_finite():
    empty = BATCH.replace(loss_mask=jnp.zeros_like(BATCH.loss_mask), length=jnp.zeros_like(BATCH.length))
    found = jax.jit(measure)(jnp.zeros((*BATCH.tokens.shape, 14)), empty)
    assert all(float(value) == 0 for value in found.values())


@pytest.mark.parametrize("deep", [0.0, 0.5])
def test_the_loss_is_the_mean_over_trained_tokens_with_earlier_recursions_weighed(deep):
    cfg = tiny.config("dense", depth=3, deep_supervision=deep)
    params = tiny.params(cfg)
    loss_fn = make_loss(Config(model=cfg), none())
    loss, aux = jax.jit(loss_fn, static_argnums=1)(params, None, BATCH)
    steps = jax.jit(partial(transformer.apply, cfg=cfg, steps=True))(params, BATCH).steps
    each = [float(tiny.cross_entropy(logits, BATCH)) for logits in steps]
    assert float(loss) == pytest.approx(each[2] + deep * (each[0] + each[1]) / 2, rel=1e-5)
    assert len(set(np.round(each, 4))) == 3
    assert aux.routings == {} and set(aux.metrics) == {"main_acc", "exact", "tau", "tokens"}


@pytest.mark.parametrize(("name", "isolated"), [("none", True), ("sars", True), ("backprop", False)])
def test_the_rule_decides_whether_the_main_loss_reaches_the_routers(name, isolated):
    cfg = tiny.config()
    config = Config(model=cfg, learning=LearningConfig(rule=name))
    rule = make_rule(config)
    assert rule.isolate == isolated
    params = tiny.params(cfg)
    grads = jax.jit(jax.grad(make_loss(config, rule), has_aux=True), static_argnums=1)(params, None, BATCH)[0]
    routers = jax.tree.leaves((grads.block.attention.router, grads.block.feedforward.router))
    if isolated:
        assert not any(np.any(leaf) for leaf in routers)
    else:  # one head a group has weight one whatever its logit: there the softmax carries nothing
        assert np.abs(grads.block.feedforward.router.proto).max() > 1e-4
    assert np.abs(grads.block.feedforward.modules.w_in).max() > 1e-3


@pytest.mark.parametrize("name", get_args(RuleName))
def test_configurations_name_their_rules(name):
    rule = make_rule(Config(learning=LearningConfig(rule=name)))
    assert rule.objective.__qualname__.startswith(f"{name}.")


@pytest.mark.parametrize("name", ["sars", "msaps", "backprop"])
def test_every_option_reaches_its_rule_as_it_is_set(name, monkeypatch):
    given, rule = {}, getattr(objective, name)

    def recorded(*args, **options):
        given.update(signature(rule).bind(*args, **options).arguments)
        return rule(*args, **options)

    monkeypatch.setattr(objective, name, recorded)
    others = {"granularity": "module", "prior_sign": "bayes", "neuron_cost": "token"}
    default, changed = LearningConfig(rule=name), {}
    for option in (option for option, owners in OPTIONS_OF.items() if name in owners):
        value = getattr(default, option)
        changed[option] = (
            others[option] if option in others else not value if isinstance(value, bool) else value + len(changed) + 1
        )
    make_rule(Config(learning=dataclasses.replace(default, **changed)))
    assert given == changed


@pytest.mark.parametrize(
    ("rule", "option"),
    [("none", {"balance": 0.1}), ("backprop", {"centre": True}), ("msaps", {"granularity": "module"}), ("sars", {"l2": 0.0})],
)
def test_options_of_another_rule_are_refused_and_left_behind(rule, option):
    """They would do nothing. `continual`, which tries many rules, gives each what is its own."""
    learning = LearningConfig(rule=rule, pi_alpha=0.2, **option)
    (name,) = option
    with pytest.raises(ConfigError, match=f"learning.{name} belongs to rule .* and does nothing under {rule}"):
        make_rule(Config(learning=learning))
    assert under(learning, rule) == LearningConfig(rule=rule, pi_alpha=0.2)
    owner = OPTIONS_OF[name][0]
    assert under(learning, owner) == LearningConfig(rule=owner, pi_alpha=0.2, **option)


def test_every_option_of_a_rule_is_known():
    general = {"rule", "pi_alpha", "pi_gamma"}
    assert {f.name for f in dataclasses.fields(LearningConfig)} - general == set(OPTIONS_OF)
