"""Fields that cannot hold what they are given, or cannot work together, are refused where they are made."""

import pytest

from tinyonn_jax.config import Config, ConfigError, DataConfig, EvalConfig, LearningConfig, ModelConfig, OptimConfig, TrainConfig
from tinyonn_jax.layers.routing import RouterConfig


@pytest.mark.parametrize(("make", "field"), [(ModelConfig, "kind"), (LearningConfig, "rule"), (EvalConfig, "decode")])
def test_a_choice_that_is_none_is_refused_with_those_that_are(make, field):
    with pytest.raises(ConfigError, match=rf"\.{field} must be one of .*; got 'nonsense'"):
        make(**{field: "nonsense"})


@pytest.mark.parametrize(
    ("section", "field", "value", "says"),
    [
        (TrainConfig, "steps", 2.5, "a whole number"),
        (TrainConfig, "keep", True, "a whole number"),
        (ModelConfig, "dim", "128", "a whole number"),
        (OptimConfig, "lr", float("inf"), "finite"),
        (OptimConfig, "lr", 10**400, "finite"),
        (DataConfig, "buckets", [32, 64], "a tuple"),
        (DataConfig, "train", "arc1", "a tuple"),
        (DataConfig, "holdout", 1, "true or false"),
    ],
)
def test_a_value_of_another_type_is_refused(section, field, value, says):
    with pytest.raises(ConfigError, match=rf"\.{field} must be {says}, got "):
        section(**{field: value})


def test_only_recursions_of_one_block_have_embeddings():
    with pytest.raises(ConfigError, match=r"--model\.no-recursed\).*add --model\.no-recursion-embedding"):
        ModelConfig(recursed=False, recursion_embedding=True)
    with pytest.raises(ConfigError, match=r"model\.depth 1 has only one"):
        ModelConfig(depth=1, recursion_embedding=True)


@pytest.mark.parametrize("model", [{"kind": "dfc"}, {"kind": "dfc_hard"}, {"select": "relu"}, {"weight": "relu"}])
def test_a_cost_of_a_half_leaves_no_module_that_needs_a_logit_above_zero(model):
    ModelConfig(**model)
    with pytest.raises(ConfigError, match=r"model\.cost threshold starts at a half"):
        ModelConfig(**model, cost="threshold")
    ModelConfig(cost="threshold"), ModelConfig(cost="threshold", select="threshold")  # the best are taken, or fall back


def test_deep_supervision_needs_something_deep():
    with pytest.raises(ConfigError, match=r"model\.depth 1 has none"):
        ModelConfig(depth=1, deep_supervision=0.5)


def test_a_task_that_is_not_embedded_cannot_be_blanked():
    with pytest.raises(ConfigError, match=r"eval\.blank_task"):
        Config(model=ModelConfig(task_embedding=False), eval=EvalConfig(blank_task=True))


def test_a_router_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match="select must be one of top_k, "):
        RouterConfig(8, 2, select="topk")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="groups must divide modules"):
        RouterConfig(8, 2, groups=3)


@pytest.mark.parametrize(
    ("select", "weight", "active", "graded"),
    [
        ("top_k", "softmax", 2, True),
        ("top_k", "softmax", 1, False),  # over one alone it is one
        ("top_k", "relu", 1, True),
        ("top_k", "hard", 2, False),
        ("relu", "hard", 2, True),
        ("threshold", "hard", 2, True),  # always a softmax
        ("threshold", "softmax", 1, False),
        ("hard", "softmax", 2, False),  # always one
    ],
)
def test_backprop_needs_weights_that_follow_their_logits(select, weight, active, graded):
    model, rule = ModelConfig(select=select, weight=weight, active_experts=active), LearningConfig(rule="backprop")
    if graded:
        Config(model=model, learning=rule)
    else:
        with pytest.raises(ConfigError, match=r"model\.select"):
            Config(model=model, learning=rule)
        with pytest.raises(ConfigError, match=r"take model\.kind dfc"):
            Config(model=ModelConfig(kind="dfc_hard"), learning=rule)
