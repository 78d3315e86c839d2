"""What each kind of network reads of a model's fields."""

import re
from typing import get_args

import jax
import pytest

from tests.models import tiny
from tinyonn_jax.config import (
    Config,
    DataConfig,
    EvalConfig,
    Kind,
    LearningConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
)
from tinyonn_jax.models import transformer
from tinyonn_jax.uses import FIELDS_OF, idle

OTHER = {
    **{"latent_heads": 6, "active_heads": 2, "experts": 4, "active_experts": 1, "expert_hidden": 6, "shared_experts": 1},
    **{"select": "relu", "weight": "hard", "match": "dot", "cost": "bias_drln", "hidden": 6, "gated": False, "prc": False},
}


def program(cfg: ModelConfig) -> str:
    """The shapes of its parameters and the operations on them."""
    params = jax.eval_shape(lambda: tiny.params(cfg))
    operations = jax.make_jaxpr(lambda params: transformer.apply(params, tiny.batch(), cfg).logits)(params)
    return re.sub("0x[0-9a-f]+", "", f"{params} {operations}")


@pytest.mark.parametrize("kind", get_args(Kind))
def test_a_field_changes_the_network_just_where_it_is_said_to(kind):
    cfg = tiny.config(kind, recursed=False)
    plain = program(cfg)
    assert program(cfg) == plain
    for name in FIELDS_OF.keys() - {"data_init"}:  # that one sets first values of prototypes, and nothing after
        changed = tiny.config(kind, recursed=False, **{name: OTHER[name]})
        assert (program(changed) != plain) == (kind in FIELDS_OF[name]), name
        where = f"--model.{name.replace('_', '-')} does nothing in a network of kind {kind}"
        assert idle(Config(model=changed), Config(model=cfg)) == ([] if kind in FIELDS_OF[name] else [where])


def test_fields_that_another_field_leaves_nothing_to_do():
    def said(model: ModelConfig, **mesh) -> list[str]:
        return idle(Config(model=model, mesh=MeshConfig(**mesh)), Config())

    assert said(ModelConfig(weight="hard", select="relu")) == ["--model.weight does nothing with model.select relu"]
    assert said(ModelConfig(weight="hard")) == []
    assert said(ModelConfig(kind="dfc", prc=False)) == ["--model.prc does nothing in a network of one block"]
    assert said(ModelConfig(kind="dfc_hard", prc=False, recursed=False)) == []
    assert said(ModelConfig(inject=False, depth=1)) == ["--model.inject does nothing with model.depth 1"]
    assert said(ModelConfig(kind="dense"), grouped="padded") == ["--mesh.grouped does nothing in a network of kind dense"]
    assert said(ModelConfig(), grouped="padded") == []

    def told(**changes) -> list[str]:
        return idle(Config(**changes), Config())

    none = LearningConfig(rule="none")
    assert told(learning=none, optim=OptimConfig(meta_lr=1.0)) == ["--optim.meta-lr does nothing with learning.rule none"]
    assert told(learning=LearningConfig(rule="msaps"), optim=OptimConfig(meta_lr=1.0, muon_lr=1.0)) == []
    msaps = told(model=ModelConfig(kind="dense"), learning=LearningConfig(rule="msaps"))
    assert msaps == ["--learning.rule does nothing in a network of kind dense"]
    assert told(model=ModelConfig(kind="dense"), learning=none) == []
    dense = told(model=ModelConfig(kind="dense"), learning=LearningConfig(balance=1.0), optim=OptimConfig(meta_lr=1.0))
    assert dense == [f"--{name} does nothing in a network of kind dense" for name in ("learning.balance", "optim.meta-lr")]
    backprop = LearningConfig(rule="backprop")
    (line,) = told(learning=backprop)
    assert "teaches no router of heads" in line and "--model.active-heads" in line
    assert idle(Config(learning=backprop), Config(learning=backprop)) == []
    assert told(learning=backprop, model=ModelConfig(active_heads=2)) == []
    assert told(learning=backprop, model=ModelConfig(weight="relu")) == []
    (line,) = told(learning=backprop, model=ModelConfig(active_heads=2, active_experts=1))
    assert "teaches no router of experts" in line
    cost = LearningConfig(neuron_cost="token")
    assert told(learning=cost) == ["--learning.neuron-cost does nothing in a network of kind dyntrm"]
    assert told(model=ModelConfig(kind="dfc"), learning=cost) == []
    by_module = told(model=ModelConfig(kind="dfc"), learning=LearningConfig(neuron_cost="token", granularity="module"))
    assert by_module == ["--learning.neuron-cost does nothing with learning.granularity module"]
    free = told(learning=LearningConfig(rule="msaps", protect=False, temperature=0.1))
    assert free == ["--learning.temperature does nothing with learning.protect false"]
    assert told(eval=EvalConfig(min_probability=0.5)) == ["--eval.min-probability does nothing with eval.decode greedy"]
    assert told(eval=EvalConfig(min_probability=0.5, decode="search")) == []
    adamw = told(optim=OptimConfig(matrices="adamw", muon_lr=1.0))
    assert adamw == ["--optim.muon-lr does nothing with optim.matrices adamw"]
    plain = told(data=DataConfig(augment=False, permute_zero=True))
    assert plain == ["--data.permute-zero does nothing with data.augment false"]
    assert told(train=TrainConfig(validate_every=9)) == ["--train.validate-every does nothing without data.holdout"]
    assert told(train=TrainConfig(validate_every=9), data=DataConfig(holdout=True)) == []
    assert said(ModelConfig(), dispatch="all-to-all") == ["--mesh.dispatch does nothing with mesh.expert 1"]
    assert said(ModelConfig(), expert=2, capacity=4.0) == ["--mesh.capacity does nothing with mesh.dispatch replicate"]
    assert said(ModelConfig(), expert=2, dispatch="all-to-all", capacity=4.0) == []
