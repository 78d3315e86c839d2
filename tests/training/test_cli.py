"""The command line: what it takes, what it says of itself, and every mistake answered with one line."""

import dataclasses
import errno
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.training.commands import here
from tinyonn_jax import cli, runs, trained
from tinyonn_jax.config import ConfigError, MeshConfig
from tinyonn_jax.presets import PRESETS
from tinyonn_jax.stored import from_json


def test_ctrl_c_is_not_lost_in_a_callback_of_the_garbage_collector():
    code = (
        "import gc, os, signal; from tinyonn_jax import cli; signal.signal(signal.SIGINT, cli.interrupted); print('begun');"
        "gc.callbacks.append(lambda *_: os.kill(os.getpid(), signal.SIGINT)); gc.collect(); print('went on')"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (run.returncode, run.stdout, run.stderr) == (130, "begun\n", "error: interrupted\n")


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_one_of_many_processes_at_once_while_nothing_is_there_to_be_saved(signum, unused_port):
    """JAX's own ways are to wait for the others, five minutes, and to take note of SIGTERM."""
    code = (
        "import signal, time; from tinyonn_jax import cli; signal.signal(signal.SIGINT, cli.interrupted);"
        "cli.set_up(distributed=True); print('begun', flush=True);"
        "[time.sleep(0.1) for _ in range(600)]"  # the system may hand the signal to another thread, which wakes no sleeping one
    )
    alone = {"JAX_COORDINATOR_ADDRESS": f"localhost:{unused_port}", "JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"}
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, **alone}) as program:
        assert program.stdout and program.stdout.readline() == "begun\n"
        program.send_signal(signum)
        assert program.wait(timeout=20) == (130 if signum == signal.SIGINT else -signum)


def test_a_start_that_finds_nothing_to_learn_from_leaves_no_trace_in_the_next(tmp_path, monkeypatch, capsys):
    args = ("train", "--preset", "smoke", "--workdir", tmp_path)
    assert here(monkeypatch, *args, "--data.buckets", "2", "--mesh.data", "1") == 2
    assert "data.buckets" in capsys.readouterr().err
    assert cli.parse(args[0], list(map(str, args[1:]))).config == PRESETS["smoke"][1]


def test_a_start_that_is_cut_off_leaves_no_configuration_beside_the_tasks_of_another(tmp_path, monkeypatch, capsys):
    args = ("train", "--preset", "smoke", "--workdir", tmp_path, "--mesh.data", "1")
    smoke = PRESETS["smoke"][1]
    runs.begin(tmp_path, dataclasses.replace(smoke, mesh=MeshConfig(data=1)), "smoke")
    assert (tmp_path / "config.json").exists()
    write = runs.write_atomically

    def full(path, text):
        if path.name == "config.json":
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write(path, text)

    monkeypatch.setattr(runs, "write_atomically", full)
    assert here(monkeypatch, *args, "--data.smallest", "3") == 1
    assert "free some space" in capsys.readouterr().err
    assert (tmp_path / "tasks.json").exists() and not (tmp_path / "config.json").exists()


def bad_tasks(folder: Path) -> Path:
    """A folder with one good task and one whose grid has a colour of 12."""
    folder.mkdir()
    pair, test = {"input": [[1, 2]], "output": [[2, 1]]}, {"input": [[3, 4]], "output": [[4, 3]]}
    (folder / "good.json").write_text(json.dumps({"train": [pair], "test": [test]}))
    (folder / "bad.json").write_text(json.dumps({"train": [{"input": [[12]], "output": [[1]]}], "test": [test]}))
    return folder


MISTAKES = {
    "no such command": (["fly"], "train, continual, evaluate, predict, report, compare"),
    "a value that cannot be": (["train", "--workdir", "{}", "--model.dim", "0"], "model.dim must be at least 1"),
    "fields that do not fit": (["train", "--workdir", "{}", "--data.format", "context"], "model.task_embedding"),
    "devices that do not divide": (["train", "--preset", "smoke", "--workdir", "{}", "--mesh.fsdp", "3"], "mesh.expert (3 × 1)"),
    "no such tasks": (["train", "--workdir", "{}", "--data.train", "nowhere"], "data.train: 'nowhere' does not exist"),
    "no such network": (["continual", "--workdir", "{}", "--networks", "dense"], "'dense' is not KIND/RULE"),
    "nothing in stages": (["continual", "--workdir", "{}", "--preset", "demo"], "preset demo mixes its tasks"),
    "too narrow": (["continual", "--workdir", "{}", "--parameters", "1000"], "parameters 1,000 are too few"),
    "a folder without a name": (["train", "--workdir", ""], "workdir must name a folder"),
    "more devices than there are": (["train", "--preset", "smoke", "--workdir", "{}", "--mesh.data", "9"], "another --mesh.data"),
    "no such folder": (["evaluate", "--workdir", "{}"], "no such run folder"),
    "no folder": (["evaluate", "--workdir", __file__], "is a file"),
    "no folder to report on either": (["report", "--workdir", __file__], "is a file"),
    "no end of views": (["evaluate", "--workdir", "{}", "--augmentations", "1000000000000"], "eval.augmentations must be 1 to"),
    "a picture without a name": (["compare", "--workdirs", "{}", "--picture", "."], "picture must name a file"),
    "no folder to report on": (["report", "--workdir", "{}"], "no such run folder"),
}


@pytest.mark.parametrize(("args", "says"), MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistake_is_one_line_and_exit_2(args, says, tmp_path, monkeypatch, capsys):
    assert here(monkeypatch, *(arg.format(tmp_path / "new") for arg in args)) == 2
    out, err = capsys.readouterr()
    assert says in err and err.startswith("error: ") and err.count("\n") == 1 and "Traceback" not in out + err
    assert not (tmp_path / "new" / "config.json").exists()  # which would stand in the way of the corrected command


def test_a_config_of_something_else_where_one_stands_is_not_read(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.json").write_text('{"name": "another project"}')
    assert here(monkeypatch, "train", "--help") == 0
    assert here(monkeypatch, "evaluate", "--workdir", "runs/none") == 2
    assert "no such run folder" in capsys.readouterr().err


def test_processes_that_cannot_be_joined_are_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("JAX_NUM_PROCESSES", "two")
    assert here(monkeypatch, "train", "--preset", "smoke", "--workdir", tmp_path / "new", "--distributed") == 2
    err = capsys.readouterr().err
    assert "--distributed: " in err and "JAX_COORDINATOR_ADDRESS" in err and err.count("\n") == 1


def test_devices_that_are_not_here_are_one_line():
    """As with a recipe for GPUs on a computer that has none."""
    code = "import sys; from tinyonn_jax import cli; sys.exit(cli.guard(cli.set_up))"
    environment = os.environ | {"JAX_PLATFORMS": "cuda"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    line = done.stderr.splitlines()[-1]
    assert done.returncode == 2 and line.startswith("error: no device can be used: "), done.stderr
    assert line.endswith("; unset JAX_PLATFORMS=cuda to take what is here")
    assert "Traceback" not in done.stderr


def test_out_of_memory_is_one_line_with_what_to_lower(capsys):
    assert cli.guard(lambda: np.empty(2**55)) == 1  # pyright: ignore[reportArgumentType]
    err = capsys.readouterr().err
    assert "out of memory (Unable to allocate" in err and "--min-probability" in err and err.count("\n") == 1


def test_a_port_that_is_taken_is_one_line(tmp_path, monkeypatch, capsys):
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        for name, value in (("COORDINATOR_ADDRESS", f"localhost:{port}"), ("NUM_PROCESSES", "2"), ("PROCESS_ID", "0")):
            monkeypatch.setenv(f"JAX_{name}", value)
        assert here(monkeypatch, "train", "--preset", "smoke", "--workdir", tmp_path / "new", "--distributed") == 2
    assert f"port {port} of JAX_COORDINATOR_ADDRESS is taken" in capsys.readouterr().err


def test_a_port_that_a_run_has_just_left_is_free():
    with socket.create_server(("localhost", 0)) as server:
        address = server.getsockname()
        with socket.create_connection(address) as client:
            server.accept()[0].close()  # whoever closes first keeps the port for a minute (TIME_WAIT)
            client.recv(1)
    cli._require_free(f"localhost:{address[1]}")


def test_invalid_tasks_stop_the_start_or_are_skipped(tmp_path, monkeypatch, capsys):
    tasks, folder = bad_tasks(tmp_path / "tasks"), tmp_path / "run"
    args = ("--preset", "smoke", "--workdir", str(folder), "--data.train", str(tasks), "--data.eval", str(tasks))
    assert here(monkeypatch, "train", *args) == 2
    err = capsys.readouterr().err
    assert "bad.json" in err and "12 is no colour" in err and "--data.skip-invalid" in err and err.count("\n") == 1
    assert not folder.exists()  # nothing was begun that would stand in the way of the corrected command
    for flag in ("--skip-invalid", "--data.skip-invalid"):
        parsed = cli.parse("train", [*args, flag])
        assert runs.load_task_sets(parsed.config.data).skipped == 1


def test_a_file_of_ones_own_for_a_run_that_takes_it(tmp_path):
    tasks = bad_tasks(tmp_path / "tasks")
    where = ("--data.train", str(tasks / "good"), "--data.eval", str(tasks / "good"))
    (tasks / "good").mkdir()
    shutil.copy(tasks / "good.json", tasks / "good" / "good.json")
    context = ("--data.format", "context", "--model.no-task-embedding")
    parsed = cli.parse("train", ["--workdir", str(tmp_path / "run"), *where, *context])
    run = runs.begin(tmp_path / "run", parsed.config, "demo")
    assert trained.read_task(run, tasks / "good.json").id == "good"
    several = tasks / "several_challenges.json"
    good, bad = (json.loads((tasks / name).read_text()) for name in ("good.json", "bad.json"))
    unsolved = "solved in the file beside it, but for no test input"  # too long for a message to show
    several.write_text(json.dumps({"a": good, "b": good, "c": bad, unsolved: good}))
    answer = good["test"][0]["output"]
    (tasks / "several_solutions.json").write_text(json.dumps({"a": [answer], "b": [answer], "c": [answer], unsolved: []}))
    assert trained.read_task(run, several, "b").id == "b"
    for name, says in (
        ("", "has 2 tasks, like a, b: name one with --task"),
        ("c", "^[^;]*several_challenges.json: task c, train pair 1 input, .*: 12 is no colour"),
        (unsolved, "several_solutions.json: task solved in the .*: must be a list of 1 grids"),
        ("d", "^task d is not in [^;]*$"),
    ):
        with pytest.raises(ConfigError, match=says):
            trained.read_task(run, several, name)
    several.write_text(json.dumps({"a": good}))
    (tasks / "several_solutions.json").unlink()
    assert trained.read_task(run, several).id == "a"
    several.write_text(json.dumps({"a": good, "c": bad}))
    with pytest.raises(ConfigError, match="has 1 task, like a: name one with --task"):
        trained.read_task(run, several)
    several.write_text(json.dumps({"c": bad}))
    for name, says in (("", "task c, train"), ("c", "task c, train"), ("d", "^task d is not in .*several_challenges.json")):
        with pytest.raises(ConfigError, match=says):
            trained.read_task(run, several, name)
    with pytest.raises(ValueError, match="12 is no colour"):
        trained.read_task(run, tasks / "bad.json")
    with pytest.raises(ConfigError, match="holds one task, good: leave out --task other"):
        trained.read_task(run, tasks / "good.json", "other")


def test_help_lists_commands_presets_and_every_field(monkeypatch, capsys):
    assert here(monkeypatch, "--help") == 0
    out = capsys.readouterr().out
    assert all(name in out for name in (*cli.COMMANDS, *PRESETS))
    monkeypatch.setenv("COLUMNS", "120")
    assert here(monkeypatch, "train", "--help") == 0
    out = " ".join(word for word in capsys.readouterr().out.split() if word != "│")
    assert all(line in out for line, _ in PRESETS.values())
    flags = ("--model.kind {dense,dyntrm,dfc,dfc_hard}", "--learning.rule", "--mesh.fsdp", "--data.train", "--optim.muon-lr")
    assert all(flag in out for flag in flags)


def test_defaults_come_from_the_preset_then_the_folder(tmp_path):
    run = tmp_path / "run"
    begun = cli.parse("train", ["--workdir", str(run), "--preset", "smoke", "--model.experts", "3"])
    runs.begin(run, begun.config, "smoke")
    assert cli.parse("train", ["--workdir", "new"]).config == PRESETS["demo"][1]
    parsed = cli.parse("train", ["--workdir", "new", "--preset", "laptop", "--model.experts", "16"]).config
    assert parsed.model.experts == 16 and parsed.train == PRESETS["laptop"][1].train
    assert cli.parse("evaluate", ["--workdir", str(run)]).eval.augmentations == 4  # smoke's
    assert cli.parse("evaluate", ["--workdir", str(run), "--augmentations", "16"]).eval.augmentations == 16
    stored = from_json((run / "config.json").read_text())
    assert stored.model.experts == 3
    assert cli.parse("train", ["--workdir", str(run)]).config == stored
    (run / "run.json").unlink()  # then the preset is not known, and not needed
    assert cli.parse("train", ["--workdir", str(run)]).config == stored
    assert cli.parse("continual", ["--workdir", str(run)]).config == PRESETS["continual"][1]  # of no run
    with pytest.raises(ConfigError):
        cli.parse("train", ["--workdir", "new", "--train.steps", "0"])


COMPILE = """
import sys, jax
from tinyonn_jax import cli
cli.set_up(sys.argv[1] == "yes")
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.jit(lambda x: x @ x)(jax.numpy.ones((9, 9)))
"""


@pytest.mark.parametrize("wanted", ["yes", "no"])
def test_compiled_programs_are_kept_in_the_users_cache_folder(wanted, tmp_path):
    env = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    env |= {"XDG_CACHE_HOME": str(tmp_path), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", COMPILE, wanted], env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    kept = tmp_path / "tinyonn_jax" / "xla"
    assert (kept.is_dir() and any(kept.iterdir())) == (wanted == "yes")
