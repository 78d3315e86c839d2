"""FLOPs by formula, counted by hand."""

import numpy as np

from tests.models import tiny
from tinyonn_jax.config import ModelConfig
from tinyonn_jax.models.flops import step_flops, useful_flops


def test_a_step_by_hand():
    """Ten tokens of width 8 that see 7 each: heads 2·8·6·2, keys and values the same, two experts of 3·8·5, routers; depth 2."""
    flops = step_flops(tiny.config(), tokens=10, pairs=70)
    assert flops.routed == 10 * 2 * 6 * (2 * 3 * 8 * 5)
    assert flops.other == 10 * (2 * 6 * (2 * 8 * 6 * 2 + 2 * 8 * 6 * 2 + 8 * (4 + 3) + 2 * 7 * 2 * 6) + 6 * 8 * 14)
    assert step_flops(tiny.config(cost="linear"), 10, 70).other == flops.other + 10 * 2 * 6 * 8 * (4 + 3)  # gates
    assert step_flops(tiny.config(remat=True), 10, 70).routed == flops.routed * 4 / 3


def test_what_is_useful_by_hand():
    """Two sequences of 4 tokens, prefix 2, one recursion: the second half of the mask is causal; remat adds nothing useful."""
    for remat in (False, True):
        model = ModelConfig(
            dim=10,
            heads=2,
            head_dim=6,
            latent_heads=4,
            experts=4,
            active_experts=2,
            expert_hidden=3,
            depth=1,
            gated=False,
            remat=remat,
        )
        weights = 2 * 10 * 6 + 2 * 10 * 6 + 2 * 10 * 12 + 2 * 2 * 10 * 3  # q, o of a head in two groups; k, v; two experts
        routers = 10 * (4 + 4)
        seen = 2 + 2 + 3 + 4
        want = 2 * (6 * 4 * (weights + routers) + 12 * 2 * 6 * seen + 6 * 4 * 10 * 14)
        assert useful_flops(model, np.array([4, 4]), np.array([2, 2])) == want


def test_other_kinds_by_hand():
    """One token that sees itself: attention, MLP or four and two SPLs of mu and prototypes (and gates, where they regress)."""
    sizes = {"dim": 12, "heads": 2, "head_dim": 6, "hidden": 5, "depth": 3}
    seen, head = 12 * 2 * 6, 6 * 12 * 14
    one = np.array([1])
    found = {kind: useful_flops(ModelConfig(kind=kind, **sizes), one, one * 0) for kind in ("dense", "dfc", "dfc_hard")}
    assert found["dense"] == 3 * (6 * (4 * 12 * 12 + 3 * 12 * 5) + seen) + head
    neurons = 4 * 12 * 12 + 2 * 12 * 5
    assert found["dfc"] == 3 * (6 * 3 * neurons + seen) + head
    assert found["dfc_hard"] == 3 * (6 * 2 * neurons + seen) + head
