"""The loop: what it logs and saves and when, and that neither a signal, nor a kill, nor NaN costs a run anything."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import chex
import jax
import numpy as np
import pytest

from tests.training import toy
from tinyonn_jax.config import TrainConfig
from tinyonn_jax.training.checkpoint import Checkpoints, restore_params, steps
from tinyonn_jax.training.loop import DivergedError, InterruptedRun, run

CLOCK = ("seconds", "tokens_per_second", "flops_per_second")


def rows(folder: Path) -> list[dict]:
    """metrics.jsonl without the two values that depend on the clock."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in CLOCK} for line in lines]


def params(folder: Path) -> dict:
    return {which: restore_params(folder / "checkpoints", toy.initial().params, which)[0] for which in ("params", "ema")}


def start(folder: Path, *settings: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "tests.training.toy", str(folder), *settings]
    return subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def wait_for(condition, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.002)


def test_rows_come_at_the_first_the_due_and_the_last_step(tmp_path):
    toy.train(tmp_path, TrainConfig(steps=23, log_every=10, checkpoint_every=8, validate_every=6, keep=2))
    found = rows(tmp_path)
    assert [row["step"] for row in found] == [1, 6, 10, 12, 18, 20, 23]
    assert [row["step"] for row in found if "valid_exact" in row] == [6, 12, 18, 23]
    assert all(row["tokens"] == 8 and row["skipped"] == 0 for row in found)
    assert steps(tmp_path / "checkpoints") == [18, 23]  # the newest two; the last is the best as well
    # The numbers are those of the step they stand beside.
    state = toy.initial()
    for n in range(1, 24):
        state, metrics = toy.step(state, toy.batch_at(n - 1))
        for row in found:
            if row["step"] == n:
                assert row["main_loss"] == pytest.approx(float(metrics["main_loss"]), rel=1e-6)
    chex.assert_trees_all_equal(params(tmp_path), {"params": state.params, "ema": state.ema})


class Recorder:
    """Stands for checkpoints, writer and display, and notes the order of things."""

    def __init__(self):
        self.events: list[tuple[str, int]] = []

    def save(self, step, state, score=None):
        self.events.append(("save", step))

    def wait(self):
        pass

    def write(self, step, metrics):
        self.events.append(("row", step))

    def update(self, step, metrics):
        pass

    def line(self, text):
        pass


def test_a_step_is_looked_at_after_the_next_is_dispatched_and_before_it_is_saved():
    recorder = Recorder()

    def step(state, x):
        recorder.events.append(("dispatch", int(state.step) + 1))
        return toy.step(state, x)

    cfg = TrainConfig(steps=5, log_every=1, checkpoint_every=3)
    run(step, toy.initial(), toy.batch_at, cfg, recorder, recorder, recorder, max_skipped=3)  # pyright: ignore[reportArgumentType]
    assert recorder.events == [
        ("dispatch", 1),
        ("dispatch", 2),
        ("row", 1),
        ("dispatch", 3),
        ("row", 2),
        ("row", 3),
        ("save", 3),
        ("dispatch", 4),
        ("dispatch", 5),
        ("row", 4),
        ("row", 5),
        ("save", 5),
    ]


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    toy.train(whole, TrainConfig(steps=20, log_every=4, checkpoint_every=5, validate_every=10))
    for until in (5, 11):  # as if stopped there
        with Checkpoints(parts / "checkpoints") as checkpoints:
            state = checkpoints.restore(toy.initial()) or toy.initial()
            recorder = Recorder()
            cfg = TrainConfig(steps=until, log_every=4, checkpoint_every=5)
            run(toy.step, state, toy.batch_at, cfg, checkpoints, recorder, recorder, max_skipped=3)
    toy.train(parts, TrainConfig(steps=20, log_every=4, checkpoint_every=5, validate_every=10))
    chex.assert_trees_all_equal(params(whole), params(parts))
    assert rows(parts) == [row for row in rows(whole) if row["step"] > 11]


def test_a_finished_run_is_left_as_it_is(tmp_path):
    cfg = TrainConfig(steps=5, log_every=1, checkpoint_every=5)
    toy.train(tmp_path, cfg)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    assert int(toy.train(tmp_path, cfg).step) == 5
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_too_many_steps_that_are_not_finite_end_the_run(tmp_path):
    cfg = TrainConfig(steps=50, log_every=1, checkpoint_every=5)
    with pytest.raises(DivergedError, match=r"step 15: 4 steps in a row .*optim.max_skipped.* lower optim.lr") as error:
        toy.train(tmp_path, cfg, poison=12, max_skipped=4)
    assert "\n" not in str(error.value)
    assert steps(tmp_path / "checkpoints") == [5, 10]
    assert [row["skipped"] for row in rows(tmp_path)] == [0] * 11 + [1, 2, 3]
    assert rows(tmp_path)[-1]["main_loss"] is None
    chex.assert_tree_all_finite(params(tmp_path))


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_exits(tmp_path, signum, code):
    settings = ("steps=400", "log_every=1", "checkpoint_every=1000")
    program = start(tmp_path, *settings, "pause=0.02")
    wait_for(lambda: (tmp_path / "metrics.jsonl").exists() and len(rows(tmp_path)) >= 3)
    program.send_signal(signum)
    out, err = program.communicate(timeout=30)
    assert program.returncode == code, err
    assert f"{signum.name}: saving after this step" in out
    (saved,) = steps(tmp_path / "checkpoints")
    assert f"after step {saved}, which is saved" in out
    assert 3 <= saved < 400 and len(rows(tmp_path)) == saved


def test_a_signal_during_the_last_validation_is_heard(tmp_path, monkeypatch):
    def validate(state):
        if int(state.step) == 5:
            signal.raise_signal(signal.SIGTERM)
        return {"valid_exact": 0.0}

    monkeypatch.setattr(toy, "validate", validate)
    with pytest.raises(InterruptedRun, match="SIGTERM after step 5"):
        toy.train(tmp_path, TrainConfig(steps=5, log_every=1, checkpoint_every=5, validate_every=2))
    assert steps(tmp_path / "checkpoints")[-1] == 5


def test_a_second_signal_ends_at_once(tmp_path):
    program = start(tmp_path, "steps=400", "log_every=1", "checkpoint_every=1000", "pause=3")
    wait_for((tmp_path / "metrics.jsonl").exists)
    for _ in range(2):
        time.sleep(0.5)
        program.send_signal(signal.SIGINT)
    program.communicate(timeout=30)
    assert program.returncode == -signal.SIGINT
    assert steps(tmp_path / "checkpoints") == []


def test_killed_three_times_it_ends_bit_for_bit_the_same(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    settings = ("steps=120", "log_every=7", "checkpoint_every=4", "validate_every=30")
    reference = start(whole, *settings)
    pieces = random.Random(0)

    def tmp_dirs() -> list[str]:
        found = os.listdir(killed / "checkpoints") if (killed / "checkpoints").is_dir() else []
        return [name for name in found if "tmp" in name]

    def saved() -> int:
        return max(steps(killed / "checkpoints"), default=0)

    reached = [0]
    for kind in ("anywhere", "while saving", "anywhere"):
        program = start(killed, *settings, "pause=0.01")
        goal = reached[-1] + pieces.randint(8, 24)
        wait_for(lambda goal=goal: saved() >= goal)
        if kind == "while saving":
            wait_for(tmp_dirs)
        else:
            time.sleep(pieces.uniform(0, 0.1))
        program.kill()
        program.communicate()
        if kind == "while saving":
            assert tmp_dirs()
        reached.append(saved())
    assert reached[-1] < 120
    for program in (start(killed, *settings), reference):
        _, err = program.communicate(timeout=60)
        assert program.returncode == 0, err
    assert rows(whole) == rows(killed)
    assert steps(whole / "checkpoints") == steps(killed / "checkpoints")
    for a, b in zip(jax.tree.leaves(params(whole)), jax.tree.leaves(params(killed)), strict=True):
        np.testing.assert_array_equal(a, b)
