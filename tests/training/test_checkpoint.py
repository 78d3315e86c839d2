"""Checkpoints: what was saved comes back, damage is noticed and survived, and a full disk loses nothing."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import chex
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tinyonn_jax.config import MeshConfig
from tinyonn_jax.layers.base import Param, init, normal
from tinyonn_jax.training import checkpoint, processes, sharding
from tinyonn_jax.training.checkpoint import CheckpointError, Checkpoints, restore_params, steps
from tinyonn_jax.training.state import TrainState

PROTO = Param((3, 64), ("modules", "embed"), normal(1.0))
SPEC = {"w": Param((64, 24), ("embed", None), normal(1.0)), "router": {"proto": PROTO}}
TX = optax.multi_transform({"a": optax.adamw(1e-3), "b": optax.sgd(0.1, momentum=0.9)}, {"w": "a", "router": {"proto": "b"}})


@flax.struct.dataclass
class Meta:
    records: dict
    rule: tuple | None = None


def make(seed: int = 0) -> TrainState:
    """A state with the containers that real ones have: structs, named tuples, tuples, None and key data."""
    state = TrainState.create(init(jax.random.key(seed), SPEC), TX, Meta({"w": jnp.arange(3.0)}, (jnp.int32(7), None)), seed)  # pyright: ignore[reportArgumentType]
    return state.replace(step=jnp.int32(seed))


def on_host(state):
    return jax.tree.map(np.asarray, state)


def save(folder: Path, *numbers: int, scores: dict[int, float | None] | None = None, keep: int = 2) -> None:
    with Checkpoints(folder, keep, {"model": {"dim": 64}}) as checkpoints:
        for n in numbers:
            checkpoints.save(n, make(n), (scores or {}).get(n))


def restore(folder: Path, like=None) -> tuple[TrainState | None, list[str]]:
    said: list[str] = []
    with Checkpoints(folder, say=said.append) as checkpoints:
        return checkpoints.restore(make() if like is None else like), said


@pytest.mark.parametrize("config", [{"lr": 0.1}, {"data": {"folder": Path("x")}}], ids=["no sections", "not JSON"])
def test_what_cannot_be_stored_is_refused_before_training(tmp_path, config):
    with pytest.raises(TypeError, match="config must hold"):
        Checkpoints(tmp_path / "run", config=config)
    assert not (tmp_path / "run").exists()
    with Checkpoints(tmp_path / "run") as checkpoints, pytest.raises(TypeError, match="dataclass with params and ema"):
        checkpoints.save(1, {"params": jnp.ones(2), "ema": jnp.ones(2)})


def test_what_was_saved_comes_back(tmp_path):
    assert restore(tmp_path / "new") == (None, [])
    save(tmp_path, 3)
    state, said = restore(tmp_path)
    assert not said
    chex.assert_trees_all_equal(state, make(3))
    assert jax.tree.structure(state) == jax.tree.structure(make(3))
    assert json.loads((tmp_path / "3" / "config" / "metadata").read_text()) == {"model": {"dim": 64}}


def test_a_rule_may_keep_keys_of_random_numbers(tmp_path):
    state = make(3).replace(meta=Meta({"key": jax.random.key(5)}))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(3, state)
    found, _ = restore(tmp_path, state)
    assert found is not None and jnp.all(found.meta.records["key"] == jax.random.key(5))


def test_arrays_of_numpy_are_stored_and_what_cannot_be_is_named(tmp_path):
    with Checkpoints(tmp_path, config={"model": {"dim": 64}}) as checkpoints:
        checkpoints.save(1, on_host(make(1)))
        with pytest.raises(ValueError, match=r"\['none'\] has shape \[0, 3\]"):
            checkpoints.save(2, make(2).replace(params={"none": jnp.zeros((0, 3))}))
        gone = make(3)
        jax.jit(lambda s: jax.tree.map(lambda x: x, s), donate_argnums=0)(gone)
        with pytest.raises(ValueError, match=r"\['proto'\] was donated to a step"):
            checkpoints.save(3, gone)
    chex.assert_trees_all_equal(restore(tmp_path)[0], make(1))


def test_a_state_may_be_donated_while_it_is_written(tmp_path):
    advance = jax.jit(lambda s: jax.tree.map(lambda x: x + 1 if x.dtype == jnp.float32 else x, s), donate_argnums=0)
    state = advance(make(1))
    expected = on_host(jax.tree.map(jnp.copy, state))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state)
        for _ in range(20):
            state = advance(state)
    chex.assert_trees_all_equal(on_host(restore(tmp_path)[0]), expected)


def test_the_newest_and_the_best_are_kept(tmp_path):
    save(tmp_path, 1, 2, 3, 4, 5, scores={1: 0.1, 2: 0.9, 3: float("nan"), 4: 0.5})
    assert steps(tmp_path) == [2, 4, 5]
    assert restore_params(tmp_path, make().params, "params", "best")[1] == 2
    save(tmp_path, 6, 7, scores={7: 0.95})  # another process goes on: the scores are on disk
    assert steps(tmp_path) == [6, 7]


def test_without_scores_only_the_newest_stay(tmp_path):
    save(tmp_path, 1, 2, 3, keep=1)
    assert steps(tmp_path) == [3]
    with pytest.raises(CheckpointError, match="validation score"):
        restore_params(tmp_path, make().params, step="best")


def test_parameters_alone(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        for n in (1, 2):
            checkpoints.save(n, make(n).replace(ema=jax.tree.map(lambda x, n=n: x * 0 + n, make().params)))
    ema, step = restore_params(tmp_path, make().params)
    assert step == 2 and float(ema["w"].max()) == float(ema["w"].min()) == 2
    params, step = restore_params(tmp_path, make().params, "params", 1)
    assert step == 1
    chex.assert_trees_all_equal(params, make(1).params)
    with pytest.raises(CheckpointError, match="no checkpoint of step 9; saved steps: 1, 2"):
        restore_params(tmp_path, make().params, step=9)
    with pytest.raises(CheckpointError, match="train first"):
        restore_params(tmp_path / "none", make().params)


def test_a_file_where_checkpoints_belong_is_refused_before_training(tmp_path):
    (tmp_path / "checkpoints").touch()
    with pytest.raises(CheckpointError, match="is a file, where checkpoints belong"):
        Checkpoints(tmp_path / "checkpoints")


def remove_arrays(path: Path) -> None:
    for file in (path / "ema").rglob("*"):
        if file.is_file() and file.name != "_METADATA":
            file.unlink()


@pytest.mark.parametrize(
    ("step", "remove"), [("latest", shutil.rmtree), ("best", shutil.rmtree), (40, shutil.rmtree), (40, remove_arrays)]
)
def test_one_that_is_removed_while_it_is_read_is_one_clear_line(tmp_path, step, remove, monkeypatch):
    save(tmp_path, 20, 40)
    undamaged = checkpoint._undamaged

    def then_removed(*args):
        found = undamaged(*args)
        remove(tmp_path / "40")  # by who trains there
        return found

    monkeypatch.setattr(checkpoint, "_undamaged", then_removed)
    with pytest.raises(CheckpointError, match="removed just now; try again"):
        restore_params(tmp_path, make().params, step=step)


@pytest.mark.parametrize(
    ("before", "after"), [(MeshConfig(data=1), MeshConfig(fsdp=8)), (MeshConfig(fsdp=8), MeshConfig(data=1, fsdp=2))]
)
def test_a_checkpoint_moves_to_another_number_of_devices(tmp_path, before, after):
    made = sharding.born_sharded(make, sharding.abstract(sharding.make_mesh(before), SPEC, make))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, made)
    like = sharding.abstract(sharding.make_mesh(after), SPEC, make)
    state, _ = restore(tmp_path, like)
    assert state is not None
    chex.assert_trees_all_equal(on_host(state), on_host(made))
    assert jax.tree.map(lambda x: x.sharding, state) == jax.tree.map(lambda x: x.sharding, like)
    assert len(state.params["w"].sharding.device_set) == after.fsdp


def test_nothing_is_compiled_to_write_small_arrays_that_several_devices_hold(tmp_path, caplog):
    shardings = sharding.state_shardings(sharding.make_mesh(MeshConfig(data=4, fsdp=2)), SPEC, make())
    state = jax.device_put(on_host(make()), shardings)
    jax.clear_caches()
    with Checkpoints(tmp_path) as checkpoints, jax.log_compiles(), caplog.at_level("WARNING"):
        checkpoints.save(1, state)
    assert steps(tmp_path) == [1] and "Compiling" not in caplog.text


def empty(path: Path) -> None:
    shutil.rmtree(path)
    path.mkdir()


def truncate_array(path: Path) -> None:
    largest = max((file for file in path.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])


def truncate_metrics(path: Path) -> None:
    (path / "metrics" / "metrics").write_bytes(b"")


def truncate_top(path: Path) -> None:
    (path / "_CHECKPOINT_METADATA").write_bytes(b"")


def flip_bit(path: Path) -> None:
    file = max((path / "params").rglob("*"), key=lambda file: file.stat().st_size if file.is_file() else 0)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))


def remove_file(path: Path) -> None:
    next((path / "training").rglob("manifest.ocdbt")).unlink()


@pytest.mark.parametrize("damage", [empty, truncate_array, truncate_metrics, truncate_top, flip_bit, remove_file])
def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before(tmp_path, damage, capfd):
    save(tmp_path, 20, 40)
    damage(tmp_path / "40")
    said: list[str] = []
    ema, step = restore_params(tmp_path, make().params, say=said.append)  # reading changes nothing
    assert step == 20 and len(said) == 1
    chex.assert_trees_all_equal(ema, make(20).ema)
    state, lines = restore(tmp_path)
    assert lines == said and "/40 cannot be read" in said[0] and "falling back to step 20" in said[0]
    chex.assert_trees_all_equal(state, make(20))
    save(tmp_path, 40)  # the same step again
    chex.assert_trees_all_equal(restore(tmp_path)[0], make(40))
    assert (tmp_path / "40.broken").is_dir()
    assert capfd.readouterr() == ("", "")


def test_a_damaged_older_checkpoint_is_passed_over(tmp_path):
    save(tmp_path, 20, 40)
    empty(tmp_path / "20")
    state, (said,) = restore(tmp_path)
    assert said.endswith("/20 cannot be read (it is empty or incomplete); passed over")
    chex.assert_trees_all_equal(state, make(40))


def test_no_readable_checkpoint_is_an_error_not_a_fresh_start(tmp_path):
    save(tmp_path, 20)
    empty(tmp_path / "20")
    with pytest.raises(CheckpointError, match="move the folder away") as error:
        Checkpoints(tmp_path)
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)
    assert steps(tmp_path) == [20]


def test_what_a_kill_leaves_of_a_save_is_cleared_away(tmp_path):
    save(tmp_path, 20)
    shutil.copytree(tmp_path / "20", tmp_path / "40.orbax-checkpoint-tmp")
    state, said = restore(tmp_path)
    assert int(state.step) == 20 and not said
    assert sorted(os.listdir(tmp_path)) == ["20"]


@pytest.mark.parametrize("readable", [True, False])
def test_of_several_processes_the_first_alone_clears_away(tmp_path, monkeypatch, readable):
    """The others neither look nor touch, for what each finds depends on how fast it is: they meet it, and hear the outcome."""
    save(tmp_path, 20, 40)
    empty(tmp_path / "40")
    shutil.copytree(tmp_path / "20", tmp_path / "60.orbax-checkpoint-tmp")
    before, met = sorted(tmp_path.rglob("*")), []
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(processes, "meet", met.append)
    heard = np.frombuffer((b"" if readable else "none can be read – at all".encode()).ljust(100), np.uint8)
    monkeypatch.setattr(processes.multihost_utils, "broadcast_one_to_all", lambda _: heard)
    with contextlib.nullcontext() if readable else pytest.raises(CheckpointError, match=r"^none can be read – at all$"):
        checkpoint._tidy(tmp_path, print)
    assert met == ["first"] and sorted(tmp_path.rglob("*")) == before


def test_saving_a_step_that_is_there_changes_nothing(tmp_path):
    save(tmp_path, 20)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(20, make(21))
    assert int(restore(tmp_path)[0].step) == 20


def test_another_kind_of_state_is_one_clear_line(tmp_path):
    save(tmp_path, 20)
    other = make().replace(params={"w": jnp.zeros((2, 2)), "router": {"proto": jnp.zeros((3, 64))}})
    with pytest.raises(CheckpointError, match=r"another network, .*params/w: \(64, 24\) there, \(2, 2\) here") as error:
        restore(tmp_path, other)
    assert "\n" not in str(error.value)


def test_a_part_that_newer_versions_may_have_and_this_state_has_not_is_not_missed(tmp_path):
    save(tmp_path, 20)
    like = make()
    like = like.replace(params={**like.params, "new": None}, ema={**like.ema, "new": {"a": None}})
    state, _ = restore(tmp_path, like)
    assert state.params["new"] is None and state.ema["new"] == {"a": None}
    np.testing.assert_array_equal(state.params["w"], make(20).params["w"])


FULL_DISK = """
import logging, resource, signal, sys
logging.getLogger("absl").setLevel("CRITICAL")
from pathlib import Path
from tests.training.test_checkpoint import CheckpointError, Checkpoints, make, save
folder = Path(sys.argv[1])
save(folder, 20)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))  # every larger write fails, as on a full disk
try:
    save(folder, 40)
except CheckpointError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("reason", "kind"), [("UNKNOWN: Gloo AllGather failed: Connection reset by peer", RuntimeError), ("no room", CheckpointError)]
)
def test_a_process_that_is_lost_in_a_save_is_not_taken_for_a_full_disk(tmp_path, monkeypatch, reason, kind):
    def fail(*_, **__):
        raise ValueError(reason)

    with Checkpoints(tmp_path) as checkpoints:
        monkeypatch.setattr(checkpoints._manager, "save", fail)
        monkeypatch.setattr(jax, "process_count", lambda: 2)
        with pytest.raises(kind, match=reason) as error:
            checkpoints.save(20, make())
        assert ("Free some space" in str(error.value)) == (kind is CheckpointError)
        monkeypatch.undo()


def test_a_full_disk_loses_nothing(tmp_path):
    done = subprocess.run([sys.executable, "-c", FULL_DISK, str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    for words in ("step 40 could not be written", "File too large", "step 20 is intact", "Free some space"):
        assert words in line
    chex.assert_trees_all_equal(restore(tmp_path)[0], make(20))
    save(tmp_path, 40)
    assert int(restore(tmp_path)[0].step) == 40
