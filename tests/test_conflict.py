"""The conflict experiment: its data, the isolation it measures, and a short run of all of it."""

import json
import sys
from functools import partial

import conflict
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.image import imread

from tinyonn_jax import cli
from tinyonn_jax.arc.sets import load_task_sets
from tinyonn_jax.arc.tasks import Pair
from tinyonn_jax.layers import base
from tinyonn_jax.learning.rule import routers, without_routers
from tinyonn_jax.presets import PRESETS
from tinyonn_jax.training import step as training

N, INPUTS = 24, 7


@pytest.fixture
def batch():
    key = jax.random.key(5)
    return conflict.Batch(jax.random.normal(key, (N, INPUTS)), jnp.arange(N) % 10, key)


def begin(network, batch):
    """Parameters far from their small initial values, and the rule's state."""
    params = base.init(jax.random.key(0), network.spec)
    params = jax.tree.map(lambda a: a + 0.2 * jax.random.normal(jax.random.key(a.size), a.shape), params)
    return params, network.rule.init(params, network.task(params, None, batch)[1].routings)


def zero(tree):
    return all(not leaf.any() for leaf in jax.tree.leaves(tree))


def test_cells_by_hand():
    """A 1 × 2 grid: the cell in question stands in the middle of its window, everything outside is the eleventh colour."""
    pairs = [[Pair(np.array([[1]], np.int8), np.array([[4]], np.int8))],
             [Pair(np.array([[3, 7]], np.int8), np.array([[7, 9]], np.int8))]]  # fmt: skip
    made = conflict.cells(pairs, jax.random.key(0))
    assert made.y.tolist() == [4, 7, 9]
    assert made.x.shape == (3, 25 * 11 + 2) and made.x.sum(1).tolist() == [26] * 3
    assert made.x[:, -2:].tolist() == [[1, 0], [0, 1], [0, 1]]
    near = made.x[:, :-2].reshape(3, 5, 5, 11).argmax(-1)
    assert near[:, 2, 2].tolist() == [1, 3, 7] and near[1, 2, 3] == 7 and near[2, 2, 1] == 3
    assert (near == 10).sum() == 3 * 25 - 5


def test_demonstrations_keep_their_size_and_hold_no_test_pair():
    demonstrations = [pair for pairs in conflict.demonstrations() for pair in pairs]
    secret = {pair.key for task in load_task_sets(PRESETS["demo"][1].data).evaluation for pair in task.test}
    assert len(secret) > 30 and len(demonstrations) > 50
    assert all(pair.input.shape == pair.output.shape and pair.key not in secret for pair in demonstrations)


@pytest.mark.parametrize("isolate", [True, False])
def test_measured_gradients_are_those_of_the_train_step_and_isolation_is_exact(batch, isolate):
    network = conflict.routed(INPUTS, isolate)
    params, meta = jax.jit(partial(begin, network))(batch)
    task, regulariser = jax.jit(partial(conflict.gradients, network))(params, meta, batch)
    taken = jax.jit(lambda *now: training.gradients(network.loss, network.rule, *now)[0])(params, meta, batch)
    jax.tree.map(lambda a, b, c: np.testing.assert_allclose(a + b, c, rtol=1e-4, atol=1e-6), task, regulariser, taken)
    assert zero(routers(task)) == isolate
    assert zero(without_routers(regulariser))
    assert not zero(routers(regulariser)) and not zero(without_routers(task))


def test_the_measured_gradient_of_an_sbl_is_the_mean_over_draws(batch):
    network = conflict.bayesian(INPUTS, 0.01)
    params, meta = jax.jit(partial(begin, network))(batch)
    task, regulariser = jax.jit(partial(conflict.gradients, network))(params, meta, batch)
    keys = jax.random.split(batch.key, conflict.DRAWS)
    plain = jax.jit(jax.grad(lambda p, key: network.loss(p, None, batch._replace(key=key))[0]))
    each = [plain(params, key) for key in keys]
    assert jnp.abs(each[0]["first"].mu - each[1]["first"].mu).max() > 1e-3  # no two draws alike
    total = jax.tree.map(lambda *g: sum(g) / len(g), *each)
    jax.tree.map(lambda a, b, c: np.testing.assert_allclose(a + b, c, rtol=1e-3, atol=1e-5), task, regulariser, total)
    assert zero((regulariser["readout"], regulariser["first"].bias)) and not zero(regulariser["second"])


@pytest.mark.parametrize(
    "broken",
    [{"task_on_routers": 1}, {"regulariser_elsewhere": 3}, {"shared": 1}, {"task": 0}, {"regulariser": 0}],
)
def test_broken_isolation_is_noticed(broken):
    whole = {"task_on_routers": 0, "regulariser_elsewhere": 0, "shared": 0, "task": 5, "regulariser": 5}
    conflict.check_isolation(whole)
    with pytest.raises(RuntimeError, match="isolation does not hold"):
        conflict.check_isolation(whole | broken)


def test_a_network_that_promises_isolation_and_breaks_it_stops_the_run(batch, monkeypatch):
    names = ("task_on_routers", "regulariser_elsewhere", "shared", "task", "regulariser", "task_loss")
    monkeypatch.setattr(conflict, "measure", lambda *_: dict.fromkeys(names, jnp.int32(1)))
    with pytest.raises(RuntimeError, match="isolation does not hold"):
        next(conflict.train(conflict.routed(INPUTS, isolate=True), batch, 1, [0]))


def here(monkeypatch, *args) -> int:
    monkeypatch.setattr(sys, "argv", ["experiments/conflict.py", *map(str, args)])
    return cli.guard(conflict.main)


def test_a_short_run(tmp_path, monkeypatch, capsys):
    assert here(monkeypatch, "--workdir", tmp_path / "run", "--steps", 4, "--seed", 0, 7) == 0
    out = capsys.readouterr().out
    assert "SPL, isolated, seed 7: step 0/4" in out and "cosine undefined" in out
    runs = json.loads((tmp_path / "run" / "conflict.json").read_text())["runs"]
    assert list(runs) == ["SBL, one global loss", "SPL, isolated", "SPL, not isolated"]
    for label, seeds in runs.items():
        assert [[row["step"] for row in rows] for rows in seeds] == [[0, 1, 2, 3, 4]] * 2
        assert seeds[0] != seeds[1]
        for row in (row for rows in seeds for row in rows):
            assert row["task"] > 1000 and row["regulariser"] > 1000
            assert (row["cosine"] is None) == (label == "SPL, isolated") == (row["shared"] == 0)
        assert seeds[0][-1]["task_loss"] < seeds[0][0]["task_loss"] < 2.31
    assert imread(tmp_path / "run" / "conflict.png").shape[1] == 1680


@pytest.mark.parametrize(("flag", "value"), [("--steps", 0), ("--temper", 0)])
def test_bad_values_get_one_line(flag, value, tmp_path, monkeypatch, capsys):
    assert here(monkeypatch, "--workdir", tmp_path / "run", flag, value) == 2
    assert capsys.readouterr().err.startswith(f"error: {flag} must be") and not (tmp_path / "run").exists()


def test_interrupted_it_leaves_no_files(tmp_path, monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(conflict, "train", interrupt)
    assert here(monkeypatch, "--workdir", tmp_path, "--steps", 2) == 130
    assert capsys.readouterr().err == "error: interrupted\n" and not list(tmp_path.iterdir())


def test_help_teaches(monkeypatch, capsys):
    with pytest.raises(SystemExit, match="0"):
        here(monkeypatch, "--help")
    out = capsys.readouterr().out
    assert "SPL, not isolated" in out and "--temper" in out and "conflict.json" in out
