"""A run as a user meets it: trained, killed, resumed, moved to other devices, evaluated, asked, reported."""

import json
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests.training.commands import ROOT, command, here
from tinyonn_jax import runs, trained
from tinyonn_jax.stored import from_json
from tinyonn_jax.training import checkpoint
from tinyonn_jax.training.checkpoint import steps

# One bucket, so that one program is compiled; DynTRM with SARS and Muon, so that all parts of a state are there.
SMALL = (
    *("--preset", "smoke", "--data.buckets", "48", "--data.holdout", "--model.experts", "3", "--optim.ema", "0.9"),
    *("--train.steps", "60", "--train.checkpoint-every", "10", "--train.validate-every", "20"),
)
CLOCK = ("seconds", "tokens_per_second", "flops_per_second")


def run(*args: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*args), cwd=ROOT, capture_output=True, text=True, timeout=300)


def rows(folder: Path) -> list[dict]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in CLOCK} for line in lines]


def leaves(folder: Path) -> dict[str, np.ndarray]:
    """Every array of the newest checkpoint."""
    import orbax.checkpoint as ocp

    found: dict[str, np.ndarray] = {}
    with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as reader:
        for item in ("params", "ema", "training"):
            tree = reader.restore((folder / "checkpoints" / str(steps(folder / "checkpoints")[-1]) / item).absolute())
            paths = ocp.tree.to_flat_dict(tree, sep="/")
            found |= {f"{item}/{name}": np.asarray(x) for name, x in paths.items() if hasattr(x, "shape")}
    return found


def same(a: Path, b: Path) -> None:
    """Two runs ended bit for bit alike."""
    assert rows(a) == rows(b)
    one, other = leaves(a), leaves(b)
    assert one.keys() == other.keys() and len(one) > 40
    for name in one:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run trained without interruption, and what it printed."""
    folder = tmp_path_factory.mktemp("runs") / "first"
    done = run("train", *SMALL, "--workdir", folder)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


@pytest.fixture
def copy(first: tuple[Path, str], tmp_path: Path) -> Path:
    """A run folder to do with as one likes."""
    return Path(shutil.copytree(first[0], tmp_path / "copy"))


def test_train_says_what_it_does_and_leaves_what_it_should(first):
    folder, out = first
    assert "leakage audit: 0 by task id and 0 by identical pair" in out
    assert "devices: 1 ×" in out
    assert f"evaluate --workdir {folder}" in out.splitlines()[-1]
    config = from_json((folder / "config.json").read_text())
    assert config.model.experts == 3 and config.data.buckets == (48,)
    parameters = json.loads((folder / "parameters.json").read_text())
    assert parameters["total"] == sum(parameters["groups"].values())
    assert f"parameters: {parameters['total']:,}" in out and f"{parameters['embeddings']:,} in embeddings" in out
    assert [row["step"] for row in rows(folder)] == [1, *range(10, 61, 10)]
    assert [row["step"] for row in rows(folder) if "valid_exact" in row] == [20, 40, 60]
    needed = "main_loss main_acc exact meta_loss tau pi active_share skipped tokens lr_main lr_meta grad_norm_main layers"
    assert set(needed.split()) <= rows(folder)[-1].keys()
    assert set(rows(folder)[-1]["layers"]) == {"block.attention", "block.feedforward"}
    with np.load(folder / "routing_latest.npz", allow_pickle=False) as routing:
        assert routing["block.feedforward.proto"].shape == (3, 32)
        assert routing["block.feedforward.usage"].sum() == pytest.approx(1)
    assert list((folder / "tensorboard").iterdir())
    assert json.loads((folder / "run.json").read_text())["preset"] == "smoke"


@pytest.mark.parametrize(("calls", "traced"), [(15, 2), (11, 1), (10, 0)])
def test_profile_traces_as_many_steps_as_it_is_asked_for_or_as_there_are(tmp_path, calls, traced):
    said, state = [], 0
    with runs._traced(lambda state, batch: (state + 1, {}), 2, tmp_path, said.append) as step:
        for call in range(1, calls + 1):
            state, _ = step(state, None)
            assert len(said) == (call >= 12)
    assert state == calls and len(list(tmp_path.rglob("*.trace.json.gz"))) == min(traced, 1)
    assert (f"traced {traced} steps" if traced else "nothing traced") in said[0] and len(said) == 1


def test_a_folder_that_another_process_trains_into_is_refused(copy, monkeypatch, capsys):
    hold = "import fcntl, sys, time; f = open(sys.argv[1]); fcntl.flock(f, fcntl.LOCK_EX); print(flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", hold, copy / ".lock"], stdout=subprocess.PIPE) as other:
        assert other.stdout and other.stdout.readline()
        assert here(monkeypatch, "train", "--workdir", copy, "--mesh.data", "1") == 2
        assert "another process trains into it" in capsys.readouterr().err
        other.kill()
    assert here(monkeypatch, "train", "--workdir", copy, "--mesh.data", "1") == 0  # whoever is killed lets go of it


@pytest.mark.parametrize("shortened", [False, True])
def test_the_same_command_again_finds_the_run_complete(copy, shortened, monkeypatch, capsys):
    before = {path: path.read_bytes() for path in copy.iterdir() if path.is_file() and path.name != "config.json"}  # has the mesh
    args = SMALL[:2] if shortened else SMALL
    assert here(monkeypatch, "train", *args, "--workdir", copy, "--mesh.data", "1") == 0
    assert "is complete: 60 of 60 steps" in capsys.readouterr().out
    assert before == {path: path.read_bytes() for path in before}


def test_a_command_that_differs_is_refused_with_the_fields(copy, monkeypatch, capsys):
    assert here(monkeypatch, "train", *SMALL, "--workdir", copy, "--model.experts", "4", "--optim.lr", "0.1") == 2
    out, err = capsys.readouterr()
    (line,) = err.splitlines()
    assert "model.experts: 3 -> 4; optim.lr: 0.003 -> 0.1" in line and str(copy) in line and not out
    assert here(monkeypatch, "train", "--preset", "demo", "--workdir", copy) == 2
    line = capsys.readouterr().err
    assert "model.dim: 32 -> 128" in line and "preset smoke, not demo" in line


def test_a_run_that_another_process_began_meanwhile_keeps_its_configuration(copy, monkeypatch, capsys):
    """Its first checkpoint comes while this command still reads the tasks."""
    (copy / "checkpoints").rename(copy / "later")
    read = runs.load_task_sets

    def slow(data):
        (copy / "later").rename(copy / "checkpoints")
        return read(data)

    monkeypatch.setattr(runs, "load_task_sets", slow)
    before = {name: (copy / name).read_bytes() for name in ("config.json", "run.json", "tasks.json")}
    assert here(monkeypatch, "train", *SMALL, "--workdir", copy, "--model.experts", "4", "--mesh.data", "1") == 2
    assert "model.experts: 3 -> 4; what a run began with stays" in capsys.readouterr().err
    assert before == {name: (copy / name).read_bytes() for name in before}


def test_a_run_begun_anew_keeps_no_results_and_says_which_fields_do_nothing(copy, monkeypatch, capsys):
    shutil.rmtree(copy / "checkpoints")
    (copy / "score.json").write_text("{}")
    dense = ("--model.kind", "dense", "--learning.rule", "none", "--data.buckets", "48", "--train.steps", "2", "--mesh.data", "1")
    assert here(monkeypatch, "train", "--preset", "smoke", "--workdir", copy, *dense) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if "does nothing" in line]
    assert said == ["--model.experts does nothing in a network of kind dense"]  # three of them, as the run before began with
    assert not (copy / "score.json").exists() and not (copy / "routing_latest.npz").exists()
    assert [row["step"] for row in rows(copy)] == [1, 2]


def start(folder: Path) -> subprocess.Popen[str]:
    line = command("train", *SMALL, "--workdir", folder)
    return subprocess.Popen(line, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def saved(folder: Path) -> list[int]:
    return steps(folder / "checkpoints")


def wait_until(condition, program: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 200
    while not condition():
        assert program.poll() is None and time.monotonic() < end, program.communicate()
        time.sleep(0.002)


def test_killed_and_stopped_it_ends_bit_for_bit_the_same(first, tmp_path):
    folder, moments = tmp_path / "killed", random.Random(1)
    for goal, signum in ((10, signal.SIGKILL), (30, signal.SIGTERM)):
        program = start(folder)
        wait_until(lambda goal=goal: (saved(folder) or [0])[-1] >= goal, program)
        time.sleep(moments.uniform(0, 0.05))
        program.send_signal(signum)
        out, err = program.communicate(timeout=60)
        if program.returncode == 0:
            continue  # it was quicker than the signal
        assert program.returncode == (143 if signum == signal.SIGTERM else -signal.SIGKILL), err
        if signum == signal.SIGTERM:
            stopped, resume = out.splitlines()[-1].split("; resume with: ")
            assert f"after step {saved(folder)[-1]}, which is saved" in stopped
            assert shlex.split(resume)[1:] == ["experiments/arc.py", "train", *SMALL, "--workdir", str(folder)]
    _, err = start(folder).communicate(timeout=200)
    assert saved(folder)[-1] == 60, err
    same(first[0], folder)
    seconds = [json.loads(line)["seconds"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert seconds == sorted(seconds)  # of all its starts


def test_a_truncated_newest_checkpoint_costs_only_time(first, copy):
    for file in (copy / "checkpoints" / "60").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    done = run("train", *SMALL, "--workdir", copy)
    assert done.returncode == 0, done.stderr
    assert "60 cannot be read" in done.stdout and "falling back to step 50" in done.stdout and not done.stderr
    same(first[0], copy)


def test_stages_are_summed_up_and_resume_bit_for_bit(tmp_path):
    """With M-SAPS and prototype streams, whose state holds the most."""
    small = (
        *("continual", "--preset", "smoke", "--data.sequence", "2", "--data.buckets", "48", "--model.no-recursed"),
        *("--train.steps", "20", "--train.checkpoint-every", "5", "--networks", "dfc/msaps", "--seeds", "1"),
        *("--parameters", "60000", "--optim.matrices", "adamw"),
    )
    done = run(*small, "--workdir", tmp_path / "a")
    assert done.returncode == 0, done.stderr
    assert "dfc/msaps" in done.stdout and "forgetting" in done.stdout
    network = tmp_path / "a" / "dfc-msaps-1"
    assert [row["step"] for row in rows(network) if "stage_acc" in row] == [0, 10, 20]
    results = json.loads((tmp_path / "a" / "continual.json").read_text())
    assert np.shape(results["dfc/msaps"]["stage_acc"]["matrices"]) == (1, 3, 2)
    assert (tmp_path / "a" / "continual.png").stat().st_size > 10_000

    other = Path(shutil.copytree(tmp_path / "a", tmp_path / "b")) / network.name
    shutil.rmtree(other / "checkpoints" / "20")
    done = run(*small, "--workdir", tmp_path / "b")
    assert done.returncode == 0 and "going on from step 15" in done.stdout, done.stderr
    same(network, other)


def test_another_number_of_devices_goes_on(first, copy, monkeypatch, capsys):
    shutil.rmtree(copy / "checkpoints" / "60")
    assert here(monkeypatch, "train", "--workdir", copy, "--mesh.data", "2", "--mesh.fsdp", "4") == 0
    said = capsys.readouterr().out
    assert "devices: 8 ×" in said and "grouped matmul: block loop (cpu)" in said
    for one, eight in zip(rows(first[0]), rows(copy), strict=True):
        assert one["main_loss"] == pytest.approx(eight["main_loss"], abs=1e-5)
    one, eight = leaves(first[0]), leaves(copy)
    for name in (name for name in one if name.startswith("ema")):
        np.testing.assert_allclose(one[name], eight[name], atol=5e-3, err_msg=name)


def test_evaluate_predict_and_report_need_the_folder_alone(copy, tmp_path, monkeypatch, capsys):
    done = run("evaluate", "--workdir", copy, "--augmentations", "2")
    assert done.returncode == 0, done.stderr
    score = json.loads((copy / "score.json").read_text())
    assert score["checkpoint"] == 60 and score["augmentations"] == 2
    speed = score["speed"]
    assert speed["sequences_per_second"] == pytest.approx(speed["sequences"] / speed["seconds"]) and 10 < speed["sequences"] <= 20
    assert re.search(r"decoded (\d+) of \1 sequences", done.stdout)
    assert all(0 <= score[name][key] <= 1 for name in ("pass@1", "pass@2") for key in ("outputs", "task_mean", "tasks"))
    submission = json.loads((copy / "submission.json").read_text())
    predictions = json.loads((copy / "predictions.json").read_text())["tasks"]
    assert submission.keys() == predictions.keys() and len(predictions) == score["counts"]["tasks"] == 6
    assert "pass@2" in done.stdout

    name = next(iter(predictions))
    capsys.readouterr()
    assert here(monkeypatch, "predict", "--workdir", copy, "--task", name, "--augmentations", "2", "--mesh.data", "1") == 0
    out = capsys.readouterr().out
    assert "test input" in out and "attempt 1" in out
    assert (copy / "figures" / f"task_{name}.png").read_bytes().startswith(b"\x89PNG")

    assert here(monkeypatch, "report", "--workdir", copy) == 0
    assert f"{score['pass@2']['outputs']:.1%}".replace("%", " %") in (copy / "report.html").read_text()
    assert here(monkeypatch, "compare", "--workdirs", copy, copy, "--picture", tmp_path / "compare.png") == 0
    assert (tmp_path / "compare.png").read_bytes().startswith(b"\x89PNG")


def test_of_a_single_view_a_finalist_is_as_likely_as_it_was_decoded(copy, monkeypatch, capsys):
    assert here(monkeypatch, "evaluate", "--workdir", copy, "--augmentations", "1", "--finalists", "2", "--mesh.data", "1") == 0
    entries = [e for answers in json.loads((copy / "predictions.json").read_text())["tasks"].values() for e in answers]
    found = [candidate for entry in entries for candidate in entry["candidates"]]
    assert found and [c["likelihood"] for c in found] == pytest.approx([c["logprob"] for c in found], abs=1e-4)
    assert f"scored {len(found)} of {len(found)} sequences" in capsys.readouterr().out
    assert json.loads((copy / "score.json").read_text())["eval"]["finalists"] == 2


def test_answers_are_kept_when_what_follows_fails_and_views_that_were_not_learned_are_not_asked(copy, monkeypatch, capsys):
    config = json.loads((copy / "config.json").read_text())
    config["data"]["augment"] = False
    (copy / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(checkpoint, "_same_config", lambda *_: None)  # it stands for that of another run
    monkeypatch.setattr(trained.Trained, "per_recursion", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        here(monkeypatch, "evaluate", "--workdir", copy, "--finalists", "2")
    assert "one view instead of 4" in capsys.readouterr().out
    score = json.loads((copy / "score.json").read_text())
    assert score["eval"]["augmentations"] == score["augmentations"] == 1 and score["eval"]["finalists"] == 2
    assert (copy / "submission.json").exists() and (copy / "predictions.json").exists()


@pytest.mark.parametrize("change", [{"depth": None}, {"rope_base": 7.0}], ids=str)
def test_a_configuration_that_the_run_was_not_trained_with_is_refused(copy, change, monkeypatch, capsys):
    """Edited, or lost and so taken for the default, where no shape tells: another network would be evaluated, and trained on."""
    config = json.loads((copy / "config.json").read_text())
    config["model"] = {name: value for name, value in (config["model"] | change).items() if value is not None}
    (copy / "config.json").write_text(json.dumps(config))
    (name,) = change
    for args in (["evaluate"], ["train", "--mesh.data", "1"]):
        assert here(monkeypatch, *args, "--workdir", copy) == 2
        err = capsys.readouterr().err
        assert "was trained with another configuration" in err and f"config.json: model.{name}: " in err and err.count("\n") == 1


def test_mistakes_about_a_run_that_is_there(copy, monkeypatch, capsys):
    (copy / "own.json").write_text("{}")
    for args, says in (
        (["evaluate", "--checkpoint", "7"], "no checkpoint of step 7; saved steps:"),
        (["evaluate", "--checkpoint", "newest"], "latest, best or a step"),
        (["predict", "--task", "nothing"], "is not in"),
        (["predict", "--file", copy / "own.json"], "--data.format context"),
        (["predict"], "--task ID"),
    ):
        assert here(monkeypatch, *args, "--workdir", copy) == 2
        _, err = capsys.readouterr()
        assert says in err and err.count("\n") == 1
    shutil.rmtree(copy / "checkpoints")
    assert here(monkeypatch, "evaluate", "--workdir", copy) == 2
    assert "no checkpoint yet; train first" in capsys.readouterr().err
    for damaged in ('{"model": {"dim": 1', '{"model": {"dim": ' + "1" * 5000 + "}}", "[" * 100_000):
        (copy / "config.json").write_text(damaged)
        assert here(monkeypatch, "train", "--workdir", copy) == 2
        assert f"{copy / 'config.json'}: not JSON" in capsys.readouterr().err


def test_mesh_and_evaluation_named_later_are_kept(copy, monkeypatch, capsys):
    assert here(monkeypatch, "train", "--workdir", copy, "--mesh.data", "1", "--eval.augmentations", "3") == 0
    stored = from_json((copy / "config.json").read_text())
    assert stored.mesh.data == 1 and stored.eval.augmentations == 3
    assert here(monkeypatch, "evaluate", "--workdir", copy, "--eval.blank-task") == 0  # a name of train
    score = json.loads((copy / "score.json").read_text())
    assert score["eval"]["augmentations"] == 3 and score["eval"]["blank_task"]


def test_what_differs_from_a_run_names_how_it_began(copy, monkeypatch, capsys):
    assert here(monkeypatch, "train", "--workdir", copy, "--model.dim", "64") == 2
    assert f"it began as: {json.loads((copy / 'run.json').read_text())['command']})" in capsys.readouterr().err
