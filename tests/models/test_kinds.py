"""What each kind of network reads of a model's fields."""

import re
from typing import get_args

import jax
import pytest

from tests.models import tiny
from tinyonn_jax.config import Kind, ModelConfig
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
        assert idle(changed, cfg) == ([] if kind in FIELDS_OF[name] else [name])
