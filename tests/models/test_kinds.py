"""What each kind of network reads of a model's fields."""

import re
from typing import get_args

import jax
import pytest

from tests.models import tiny
from tinyonn_jax.config import Config, Kind, MeshConfig, ModelConfig
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
    assert said(ModelConfig(), dispatch="all-to-all") == ["--mesh.dispatch does nothing with mesh.expert 1"]
    assert said(ModelConfig(), expert=2, capacity=4.0) == ["--mesh.capacity does nothing with mesh.dispatch replicate"]
    assert said(ModelConfig(), expert=2, dispatch="all-to-all", capacity=4.0) == []
