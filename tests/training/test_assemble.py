"""What a configuration is turned into: counts of parameters, validation, snapshots of routing, one compilation."""

import dataclasses
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tinyonn_jax.arc import generate
from tinyonn_jax.arc.augment import Augmentation
from tinyonn_jax.arc.batches import Dataset, Query, batch_at, build_dataset, prompts, validation_batches
from tinyonn_jax.arc.evaluate import evaluate
from tinyonn_jax.arc.forced import exact
from tinyonn_jax.arc.sets import TaskSets, load_task_sets
from tinyonn_jax.config import Config, ConfigError, EvalConfig, MeshConfig
from tinyonn_jax.layers import base, dynmoe
from tinyonn_jax.layers.routing import Router, Stream
from tinyonn_jax.learning.rule import routers
from tinyonn_jax.models import transformer
from tinyonn_jax.presets import PRESETS
from tinyonn_jax.training import assemble, sharding


def smoke(kind: str) -> Config:
    config = PRESETS["smoke"][1]
    data = dataclasses.replace(config.data, buckets=(48,), holdout=True)
    return dataclasses.replace(config, data=data, model=dataclasses.replace(config.model, kind=kind))


@pytest.fixture(scope="module")
def data() -> tuple[TaskSets, Dataset]:
    config = smoke("dense")
    sets = load_task_sets(config.data)
    return sets, build_dataset(sets, config.data)


def test_parameters_are_counted_by_hand():
    counts = assemble.count_parameters(transformer.spec(smoke("dense").model, 6))
    d, hidden, heads = 32, 48, 2 * 16
    assert counts["groups"]["block.attention"] == 4 * d * heads
    assert counts["groups"]["block.feedforward"] == 3 * d * hidden  # gated
    assert counts["embeddings"] == (14 + 6 + 8) * d and counts["routers"] == 0
    assert counts["total"] == (14 + 6 + 8) * d + 4 * d * heads + 3 * d * hidden + 3 * d + 14 * d


def test_routers_are_counted_once():
    counts = assemble.count_parameters(transformer.spec(smoke("dyntrm").model, 6))
    assert counts["routers"] == 2 * 4 * (32 + 1)  # four latent heads and four experts, each a prototype and a gate
    assert counts["total"] == sum(counts["groups"].values())


def test_validation_agrees_with_the_evaluation_and_with_a_loop(data):
    sets, dataset = data
    config = smoke("dense")
    mesh = sharding.make_mesh(MeshConfig(data=2))
    program = assemble.assemble(config, mesh, len(sets.tasks), batch_at(dataset, 0, 0))
    state = program.initial()
    found = assemble.make_validation(program)(state, validation_batches(dataset, multiple=2))
    params = jax.device_put(jax.device_get(state.ema))
    apply = jax.jit(lambda batch: transformer.apply(params, batch, config.model).logits)
    losses, right, whole = [], [], []
    for batch in validation_batches(dataset):
        logits = np.asarray(apply(batch), np.float64)
        whole += np.asarray(exact(logits, batch))[batch.length > 0].tolist()
        for b, t in zip(*np.nonzero(batch.loss_mask), strict=True):
            row, target = logits[b, t], batch.tokens[b, t + 1]
            losses.append(np.log(np.exp(row).sum()) - row[target])
            right.append(row.argmax() == target)
    assert found["valid_exact"] == pytest.approx(np.mean(whole))
    assert found["valid_loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert found["valid_acc"] == pytest.approx(np.mean(right))


@pytest.mark.parametrize(("kind", "recursed"), [("dyntrm", True), ("dfc", True), ("dfc", False)])
def test_prototypes_from_the_first_batch(data, kind, recursed):
    """Each is the input that some token brings to its router (there, with the prototypes of the blocks before as they were)."""
    sets, dataset = data
    config = smoke(kind)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, data_init=True, recursed=recursed, prc=False))
    batch = batch_at(dataset, 0, 0)
    program = assemble.assemble(config, sharding.make_mesh(MeshConfig(data=1)), len(sets.tasks), batch)
    params = base.init(jax.random.key(0), program.spec)
    routings = jax.jit(lambda p, b: transformer.apply(p, b, config.model).routings)(params, batch)
    for name, router in routers(program.initial().params).items():
        proto, x, valid = map(np.asarray, (router.proto, routings[name].input, routings[name].valid))
        for block in range(len(proto)) if proto.ndim == 3 else [...]:  # of stacked blocks each from its own
            nearest = np.abs(proto[block][:, None] - x[block][valid[block]]).max(-1).min(-1)
            assert nearest.max() < 1e-5


@pytest.fixture(scope="module")
def routed(data):
    """The program of a DynTRM on one device, compiled once, and a batch for it."""
    sets, dataset = data
    batch = batch_at(dataset, 0, 0)
    return assemble.assemble(smoke("dyntrm"), sharding.make_mesh(MeshConfig(data=1)), len(sets.tasks), batch), batch


def test_a_snapshot_shares_out_what_was_used(routed):
    program, batch = routed
    state, metrics = program.step(program.initial(), program.put(batch))
    found = assemble.routing_snapshot(state, metrics)
    for name in ("block.attention", "block.feedforward"):
        np.testing.assert_allclose(found[f"{name}.usage"], metrics["layers"][name]["load"], rtol=1e-5)  # one step so far
        np.testing.assert_array_equal(found[f"{name}.goodness"], metrics["layers"][name]["goodness"])
        assert found[f"{name}.proto"].shape == (4, 32)
    # The state keeps its shardings and types, so that the second step does not compile anew.
    program.step(state, program.put(batch))
    assert program.step._cache_size() == 1  # pyright: ignore[reportFunctionMemberAccess]


def test_a_snapshot_of_stacked_blocks_is_of_the_last():
    proto, use, good = (np.arange(2.0 * n).reshape(2, *shape) for n, shape in ((12, (4, 3)), (4, (4,)), (4, (4,))))
    state = mock.Mock(params={"a": dynmoe.Params(Router(jnp.asarray(proto), jnp.asarray(use)), None, None)})
    state.meta.records = {"a": jnp.asarray(use)}
    found = assemble.routing_snapshot(state, {"layers": {"a": {"goodness": jnp.asarray(good), "load": jnp.asarray(use)}}})
    np.testing.assert_array_equal(found["a.proto"], proto[1])
    np.testing.assert_array_equal(found["a.goodness"], good[1])
    np.testing.assert_array_equal(found["a.load"], use[1])
    np.testing.assert_allclose(found["a.usage"], use[1] / use[1].sum(), rtol=1e-6)


def test_a_snapshot_has_the_prototypes_that_tokens_are_matched_with():
    """With residual connections those are refined from the block before."""
    rng = np.random.default_rng(0)
    proto, *stream = (jnp.asarray(rng.normal(size=shape)) for shape in ((2, 4, 3), (1, 3, 3), (1, 3), (1, 3)))
    router = Router(proto, jnp.zeros((2, 4)), Stream(*stream))
    state = mock.Mock(params={"a": dynmoe.Params(router, None, None)})
    state.meta.records = {"a": jnp.ones((2, 4))}
    found = assemble.routing_snapshot(state, {"layers": {"a": {}}})
    refined = proto[1] + base.layer_norm(proto[0] @ stream[0][0], stream[1][0], stream[2][0])
    np.testing.assert_allclose(found["a.proto"], refined, rtol=1e-5)


@pytest.mark.parametrize("kind", ["dense", "dyntrm", "dfc", "dfc_hard"])
def test_widths_are_chosen_for_equal_numbers_of_parameters(kind):
    model = assemble.narrowed(dataclasses.replace(PRESETS["continual"][1].model, kind=kind), 100_000)
    groups = assemble.count_parameters(transformer.spec(model, 1))["groups"]
    blocks = sum(number for name, number in groups.items() if name.startswith("block"))
    assert blocks == pytest.approx(100_000, rel=0.01)


@pytest.mark.parametrize("kind", ["dfc", "dfc_hard"])
def test_widths_where_prototypes_of_one_block_refine_those_of_the_next(kind):
    """There the count grows with the square of the width."""
    stacked = dataclasses.replace(PRESETS["continual"][1].model, kind=kind, recursed=False)
    model = assemble.narrowed(stacked, 400_000)
    groups = assemble.count_parameters(transformer.spec(model, 1))["groups"]
    assert sum(number for name, number in groups.items() if name.startswith("block")) == pytest.approx(400_000, rel=0.01)


def test_too_few_parameters_are_refused():
    with pytest.raises(ConfigError, match="a block of kind dfc has"):
        assemble.narrowed(dataclasses.replace(PRESETS["continual"][1].model, kind="dfc"), 1000)


def test_decoding_over_devices_is_decoding_on_one(data):
    """A batch that does not divide by the devices grows until it does, and so does what is read into it at once."""
    sets, _ = data
    config = smoke("dyntrm")
    params = base.init(jax.random.key(0), transformer.spec(config.model, len(sets.tasks)))
    params = params.replace(head=params.head * 50)  # far from ties
    queries = [Query(task, 0, row, Augmentation(d)) for row, task in enumerate(sets.evaluation) for d in (0, 3, 5, 6)]
    found = []
    for mesh in (MeshConfig(data=1), MeshConfig(data=4, fsdp=2)):
        decoder = assemble.make_decoder(config, sharding.make_mesh(mesh))
        tokens, logprob = np.zeros((len(queries), 6), np.int32), np.zeros(len(queries))
        for numbers, answers in generate.greedy(
            decoder, params, lambda numbers: prompts([queries[i] for i in numbers], 24), len(queries), 6, 10
        ):
            tokens[numbers], logprob[numbers] = answers.tokens, answers.logprob
        found.append((tokens, logprob))
    np.testing.assert_array_equal(found[0][0], found[1][0])
    np.testing.assert_allclose(found[0][1], found[1][1], rtol=1e-4)
    assert len(queries) > 16 and len(np.unique(found[0][0], axis=0)) > 8

    cfg = EvalConfig(augmentations=2, batch=10, decode="search", min_probability=0.3)  # three prompts at once would not divide
    assert evaluate(decoder, params, sets.evaluation, sets.task_ids, config.data, cfg, cap=2).sequences > 20


def test_reported_rates_are_those_of_the_updates(routed):
    """A skipped step is no update: the optimizers' schedules stand still, and so does what is reported."""
    program, batch = routed
    initial, rates = program.initial(), []
    for step, skipped in ((1, 0), (3, 2), (3, 0)):
        state = jax.tree.map(jnp.copy, initial)
        counts = jax.device_put((jnp.int32(step), jnp.int32(skipped)), (state.step.sharding, state.skipped_total.sharding))
        state = dataclasses.replace(state, step=counts[0], skipped_total=counts[1])
        metrics = program.step(state, program.put(batch))[1]
        rates.append((float(metrics["lr_main"]), float(metrics["lr_meta"])))
    assert rates[0] == rates[1] < rates[2]
