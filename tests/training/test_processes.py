"""Two processes on this machine are one run: the same losses as one process, stopped together, gone on with alone, one score."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from tinyonn_jax.config import ConfigError
from tinyonn_jax.observe.writers import read_metrics
from tinyonn_jax.training import processes, sharding
from tinyonn_jax.training.checkpoint import steps

ROOT = Path(__file__).parents[2]
ARC = (sys.executable, "experiments/arc.py")
TRAIN = (
    *("train", "--preset", "smoke", "--data.buckets", "48"),
    *("--data.tokens-per-batch", "384", "--train.steps", "100", "--train.log-every", "5", "--train.checkpoint-every", "10"),
    *("--optim.matrices", "adamw"),
)  # fmt: skip


def start(folder: Path, command: tuple[str, ...], *flags: str, **env: str) -> subprocess.Popen[str]:
    line = [*ARC, *command, "--workdir", str(folder), *flags]
    return subprocess.Popen(line, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, **env})


def losses(folder: Path) -> dict[int, float]:
    """So far; a row may be half written."""
    return {row["step"]: row["main_loss"] for row in read_metrics(folder)}


def saved(folder: Path) -> int:
    """The step of the newest checkpoint."""
    return steps(folder / "checkpoints")[-1]


def finish(program: subprocess.Popen[str], status: int) -> str:
    out, err = program.communicate(timeout=180)
    assert program.returncode == status, err
    return out


def start_one_of_two(i: int, folder: Path, command: tuple[str, ...], port: int, *flags: str) -> subprocess.Popen[str]:
    shared = {"JAX_COORDINATOR_ADDRESS": f"localhost:{port}", "JAX_NUM_PROCESSES": "2"}
    shared["JAX_CPU_COLLECTIVES_IMPLEMENTATION"] = "gloo"
    return start(folder, command, "--distributed", *flags, **shared, JAX_PROCESS_ID=str(i))


def start_two(folder: Path, command: tuple[str, ...], port: int, *flags: str) -> list[subprocess.Popen[str]]:
    return [start_one_of_two(i, folder, command, port, *flags) for i in range(2)]


def reach(folder: Path, step: int, programs: list[subprocess.Popen[str]]) -> list[subprocess.Popen[str]]:
    """The programs that train together, once they have reached a step."""
    while max(losses(folder), default=0) < step and all(p.poll() is None for p in programs):
        time.sleep(0.05)
    return programs


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run trained by one process."""
    folder = tmp_path_factory.mktemp("runs") / "one"
    finish(start(folder, TRAIN, "--train.checkpoint-every", "100"), 0)
    return folder


def lose(pair: list[subprocess.Popen[str]], which: int) -> str:
    """Kills one of two processes: the other ends within a minute and says why, in one line of ours; or aborted, in JAX's words,
    where the first is lost, which serves JAX's coordination: either may be the sooner. What the first had said."""
    pair[which].kill()
    killed = time.monotonic()
    said, _ = pair[which].communicate()
    out, err = pair[1 - which].communicate(timeout=60)
    assert time.monotonic() - killed < 60 and "Traceback" not in err
    if which == 0 and pair[1].returncode == -signal.SIGABRT:
        assert "JAX distributed service detected fatal errors" in err and "another task died" in err
    else:
        assert pair[1 - which].returncode == 1
        assert "error: this process failed, or lost another one of the run (" in err
    return said if which == 0 else out


def test_two_processes_train_as_one_and_whoever_is_left_goes_on(reference, tmp_path, unused_port):
    """Two, of which one is killed; then one; then two with half of the parameters each, of which the first is killed; then two,
    of which one is stopped; then two to the end: the losses of one."""
    folder = tmp_path / "run"
    lose(reach(folder, 25, start_two(folder, TRAIN, unused_port)), 1)  # step 10 at least is on disk: 20 waited for it

    (alone,) = reach(folder, 40, [start(folder, TRAIN)])
    alone.send_signal(signal.SIGTERM)
    assert re.search(r"going on from step [123]0", finish(alone, 128 + signal.SIGTERM))
    stopped = saved(folder)
    assert 40 <= stopped < 55

    said = lose(reach(folder, 65, start_two(folder, TRAIN, unused_port, "--mesh.fsdp", "2")), 0)
    assert f"going on from step {stopped}" in said
    assert saved(folder) > stopped

    pair = reach(folder, 75, start_two(folder, TRAIN, unused_port, "--mesh.fsdp", "1"))
    pair[1].send_signal(signal.SIGTERM)  # both save, at the same step
    first = finish(pair[0], 128 + signal.SIGTERM)
    second, noted = pair[1].communicate(timeout=180)
    assert "SIGTERM: saving when all processes know of it" in noted and pair[1].returncode == 128 + signal.SIGTERM
    said = [first, second]
    assert re.search(r"going on from step [56]0", said[0])
    lines = {line for out in said for line in out.splitlines() if "resume with" in line}
    stopped = saved(folder)
    assert len({line.split(";")[0] for line in lines}) == 1 and 75 <= stopped == max(losses(folder)) < 100

    said = [finish(program, 0) for program in start_two(folder, TRAIN, unused_port)]
    assert f"going on from step {stopped}" in said[0]
    got, want = losses(folder), losses(reference)
    assert got.keys() >= want.keys() and max(got) == 100
    np.testing.assert_allclose([got[step] for step in want], list(want.values()), rtol=0, atol=1e-6)


def test_two_processes_share_an_evaluation_and_the_first_writes_the_score_of_one(reference, tmp_path, unused_port):
    two = Path(shutil.copytree(reference, tmp_path / "two"))
    command = ("evaluate", "--finalists", "3")
    finish(start(reference, command), 0)
    said = [finish(program, 0) for program in start_two(two, command, unused_port)]
    assert "2 processes share" in said[0] and "pass@2" in said[0]
    assert "devices:" not in said[1] and "decoded" not in said[1] and "pass@2" not in said[1]
    assert (two / "submission.json").read_bytes() == (reference / "submission.json").read_bytes()
    alone, together = (json.loads((folder / "score.json").read_text()) for folder in (reference, two))
    assert together.pop("speed")["sequences"] == alone.pop("speed")["sequences"] == 40
    assert together == alone
    entries, others = (
        [e for t in json.loads((f / "predictions.json").read_text())["tasks"].values() for e in t] for f in (reference, two)
    )
    assert any(entry["candidates"] for entry in entries)
    for entry, other in zip(entries, others, strict=True):
        assert entry["greedy"] == other["greedy"]
        assert [(c["grid"], c["votes"]) for c in entry["candidates"]] == [(c["grid"], c["votes"]) for c in other["candidates"]]
        for key in ("logprob", "likelihood"):
            assert [c[key] for c in entry["candidates"]] == pytest.approx([c[key] for c in other["candidates"]], abs=1e-4)


def test_two_processes_that_would_not_do_the_same_are_refused_in_one_line(reference, tmp_path, unused_port):
    def refused(programs: list[subprocess.Popen[str]], why: str) -> None:
        for program in programs:
            err = program.communicate(timeout=180)[1]
            assert program.returncode == 2 and re.fullmatch(f"error: .*{why}.*\n", err), err

    (tmp_path / "file").touch()  # which the first process alone finds out
    refused(start_two(tmp_path / "file" / "run", TRAIN, unused_port), "is a file, or lies in one")
    apart = [start_one_of_two(i, tmp_path / name, TRAIN, unused_port) for i, name in enumerate("ab")]
    refused(apart, "process 1 sees another folder.*--workdir must be the same")
    commands = [("evaluate", "--augmentations", count) for count in ("4", "8")]
    refused([start_one_of_two(i, reference, c, unused_port) for i, c in enumerate(commands)], "different options: ")
    assert not any((tmp_path / "a").glob(".shared*"))


def test_what_processes_differ_in_is_named(monkeypatch):
    def beside(**others):
        """What `agree` does where another process has `others`."""
        theirs = [zlib.crc32(fact.encode()) for fact in others.values()]
        monkeypatch.setattr(processes, "gather", lambda mine, place: np.stack([mine, np.array(theirs, mine.dtype)]))
        processes.agree(options="o", tasks="t", checkpoints="60")

    beside(options="o", tasks="t", checkpoints="60")
    with pytest.raises(ConfigError, match="different tasks and checkpoints: "):
        beside(options="o", tasks="T", checkpoints="50")


def mesh_of(owners: list[int], expert: int) -> SimpleNamespace:
    """A mesh of devices that belong to these processes, `expert` of them side by side."""
    devices = np.array([SimpleNamespace(process_index=p) for p in owners]).reshape(-1, 1, expert)
    return SimpleNamespace(devices=devices, shape={"data": len(devices), "fsdp": 1, "expert": expert})


@pytest.mark.parametrize(
    ("owners", "expert", "slices"),
    [([0, 0, 1, 1], 1, {0: (0, 2), 1: (1, 2)}), ([0, 0, 1, 1], 2, {0: (0, 2), 1: (1, 2)}), ([0, 1], 2, {0: (0, 1), 1: (0, 1)})],
)
def test_a_process_feeds_the_rows_that_its_devices_hold(owners, expert, slices, monkeypatch):
    for process, expected in slices.items():
        monkeypatch.setattr(sharding.jax, "process_index", lambda p=process: p)
        assert sharding.feeding(mesh_of(owners, expert)) == expected


def test_processes_that_share_rows_in_part_are_one_clear_line():
    with pytest.raises(ConfigError, match=r"mesh\.expert"):
        sharding.feeding(mesh_of([0, 0, 0, 1, 1, 1], 2))
