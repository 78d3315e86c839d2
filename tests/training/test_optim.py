"""Two groups, each with its own schedule, clipping and decay, against optax used by hand."""

import dataclasses
from typing import Any

import chex
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.models import tiny
from tinyonn_jax.config import OptimConfig
from tinyonn_jax.layers.routing import Router
from tinyonn_jax.training import optim


@flax.struct.dataclass
class Layer:
    router: Any
    w_in: Any
    bias: Any


def params(scale=1.0, seed=0):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(scale * rng.normal(size=shape), jnp.float32)  # noqa: E731
    return {"embed": draw(5, 4), "layer": Layer(Router(draw(3, 4), draw(3)), draw(3, 4, 6), draw(3)), "w_head": draw(4, 2)}


PARAMS, GRADS = params(), params(seed=1)
FLAT = OptimConfig(warmup=0.0, decay_from=1.0, clip=0.0, meta_clip=0.0)  # a constant learning rate, no clipping


def main(tree):
    return {"embed": tree["embed"], "w": tree["layer"].w_in, "b": tree["layer"].bias, "head": tree["w_head"]}


def meta(tree):
    return {"router": tree["layer"].router}


def run(cfg, grads, steps=100, given=False, **options):
    """Updates of one step after another; parameters stay where they are. `given`: norms are handed over, as a train step does."""
    tx = optim.make_optimizer(cfg, steps, **options)

    @jax.jit
    def all_steps(grads):
        state, out = tx.init(PARAMS), []
        for g in grads:
            norms = {"norms": {"main": optax.tree.norm(main(g)), "meta": optax.tree.norm(meta(g))}} if given else {}
            updates, state = tx.update(g, state, PARAMS, **norms)
            out.append(updates)
        return out

    return all_steps(grads)


@pytest.mark.parametrize("kind", ["dense", "dyntrm"])
def test_every_parameter_has_one_of_the_two_labels(kind):
    made = tiny.params(tiny.config(kind, shared_experts=1))
    found = jax.tree_util.tree_leaves_with_path(optim.labels(made))
    assert len(found) == len(jax.tree.leaves(made))
    for path, label in found:
        assert label == ("meta" if ".router." in jax.tree_util.keystr(path) else "main")
    assert any(label == "meta" for _, label in found) == (kind == "dyntrm")


def test_matrices_are_the_weights_of_the_main_group():
    made = tiny.params(tiny.config(shared_experts=1))
    chosen = {
        jax.tree_util.keystr(path) for path, is_matrix in jax.tree_util.tree_leaves_with_path(optim.matrices(made)) if is_matrix
    }
    assert chosen == {
        *(f".block.attention.{w}" for w in ("w_k", "w_v", "modules.w_q", "modules.w_o")),
        *(f".block.feedforward.{m}.{w}" for m in ("modules", "shared") for w in ("w_in", "w_out")),
    }


def test_schedule_by_hand():
    rate = optim.schedule(2.0, 100, OptimConfig(warmup=0.1, decay_from=0.5))
    np.testing.assert_allclose(
        [float(jnp.asarray(rate(s))) for s in (0, 5, 10, 30, 50, 75, 99, 100, 150)], [0, 1, 2, 2, 2, 1, 0.04, 0, 0], atol=1e-6
    )
    assert optim.schedule(2.0, 100, OptimConfig(warmup=0.0))(0) == 2.0
    assert optim.schedule(2.0, 100, OptimConfig(warmup=0.0, decay_from=1.0))(99) == 2.0


def test_adamw_decays_matrices_alone():
    updates = run(
        OptimConfig(matrices="adamw", lr=0.1, meta_lr=0.2, weight_decay=0.5, warmup=0, decay_from=1),
        [jax.tree.map(jnp.zeros_like, PARAMS)],
    )[0]
    np.testing.assert_allclose(updates["w_head"], -0.05 * PARAMS["w_head"], rtol=1e-6)
    np.testing.assert_allclose(updates["layer"].w_in, -0.05 * PARAMS["layer"].w_in, rtol=1e-6)
    for leaf in (updates["embed"], updates["layer"].bias, updates["layer"].router.proto, updates["layer"].router.gate):
        np.testing.assert_array_equal(leaf, 0)


def test_groups_have_rates_of_their_own():
    """The first step of Adam is the sign of the gradient times the rate."""
    updates = run(OptimConfig(matrices="adamw", lr=0.1, meta_lr=0.02, weight_decay=0.0, warmup=0, decay_from=1), [GRADS])[0]
    np.testing.assert_allclose(updates["embed"], -0.1 * np.sign(GRADS["embed"]), rtol=1e-4)
    np.testing.assert_allclose(updates["layer"].router.proto, -0.02 * np.sign(GRADS["layer"].router.proto), rtol=1e-4)


@pytest.mark.parametrize("given", [False, True])
def test_groups_are_clipped_apart(given):
    """Two steps, the first far above its limit: what Adam then remembers is the clipped gradient of its own group."""
    grads = [params(20.0, 1), params(0.01, 2)]
    updates = run(
        OptimConfig(matrices="adamw", lr=0.1, meta_lr=0.02, weight_decay=0.0, clip=1.0, meta_clip=0.5, warmup=0, decay_from=1),
        grads,
        given=given,
    )[1]
    for rate, limit, of in ((0.1, 1.0, main), (0.02, 0.5, meta)):
        adam = optax.adam(rate)
        state, update = adam.init(of(PARAMS)), jax.jit(adam.update)
        want = None
        for g in map(of, grads):
            share = min(1, limit / np.sqrt(sum(np.sum(np.square(np.asarray(leaf))) for leaf in jax.tree.leaves(g))))
            want, state = update(jax.tree.map(lambda leaf, share=share: np.asarray(leaf) * np.float32(share), g), state)
        chex.assert_trees_all_close(of(updates), want, rtol=1e-4)


def test_muon_moves_main_matrices_and_nothing_else():
    cfg = dataclasses.replace(FLAT, weight_decay=0.0)
    muon, adamw = (run(dataclasses.replace(cfg, matrices=m), [GRADS])[0] for m in ("muon", "adamw"))
    chex.assert_trees_all_equal(muon["layer"].router, adamw["layer"].router)
    nadam = optax.nadam(cfg.lr)  # optax's Muon gives what is not a matrix to Adam with Nesterov momentum
    for rest in (lambda t: t["embed"], lambda t: t["layer"].bias):
        want = nadam.update(rest(GRADS), nadam.init(rest(PARAMS)))[0]
        chex.assert_trees_all_close(rest(muon), want, rtol=1e-5)
    for other in (lambda t: t["w_head"], lambda t: t["layer"].w_in):
        assert np.abs(np.asarray(other(muon)) - np.asarray(other(adamw))).max() > 1e-3
    # An orthogonalised update has singular values near one another; Newton-Schulz leaves them between about 0.7 and 1.2.
    for matrix in (muon["w_head"], *muon["layer"].w_in):
        values = np.linalg.svd(matrix, compute_uv=False)
        assert values.max() / values.min() < 2
    values = np.linalg.svd(GRADS["layer"].w_in[0], compute_uv=False)
    assert values.max() / values.min() > 2


def test_muon_orthogonalises_every_expert_by_itself():
    alone = jax.tree.map(lambda g: g, GRADS)
    alone["layer"] = alone["layer"].replace(w_in=alone["layer"].w_in.at[1:].multiply(1000.0))
    first, second = (run(FLAT, [g])[0]["layer"].w_in for g in (GRADS, alone))
    np.testing.assert_allclose(first[0], second[0], rtol=1e-5, atol=1e-8)


def test_neurons_move_as_the_transposed_weights_would():
    """`mu [L,O,I]` has outputs first, `w_… [L,I,O]` last, and the size of Muon's update depends on which is which."""
    tx, weights = optim.make_optimizer(FLAT, 100), {"w_in": GRADS["layer"].w_in}
    neurons = {"mu": weights["w_in"].swapaxes(1, 2)}
    of_weights, of_neurons = (tx.update(tree, tx.init(tree), tree)[0] for tree in (weights, neurons))
    np.testing.assert_allclose(of_neurons["mu"].swapaxes(1, 2), of_weights["w_in"], rtol=1e-4, atol=1e-6)


def test_frozen_routers_do_not_move_and_the_rest_does():
    updates = run(FLAT, [GRADS, GRADS], frozen_routers=True)[1]
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(updates["layer"].router))
    assert all(np.all(np.abs(leaf) > 0) for leaf in (updates["embed"], updates["w_head"], updates["layer"].w_in))
