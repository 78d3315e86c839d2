"""The command line: presets and the run folder's own values as defaults, one plain line for whatever a user got wrong.

COMMAND [--preset NAME] [--workdir FOLDER] [--section.field VALUE …]
"""

import contextlib
import errno
import io
import logging
import os
import shlex
import shutil
import socket
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar, get_args

import jax
import tyro

from tinyonn_jax import host
from tinyonn_jax.arc.tasks import DataError
from tinyonn_jax.config import Config, ConfigError, EvalConfig, Kind, MeshConfig, RuleName
from tinyonn_jax.observe.files import stored_origin
from tinyonn_jax.presets import PRESETS, Preset
from tinyonn_jax.runs import stored_config
from tinyonn_jax.training.checkpoint import CheckpointError
from tinyonn_jax.training.loop import DivergedError, InterruptedRun

A = TypeVar("A")
Flat = tyro.conf.arg(name="")
Workdir = Annotated[Path, tyro.conf.arg(help="Run folder, for instance runs/a.")]
_ONE_OF_MANY = "TPU pod, Slurm, Open MPI, or JAX_COORDINATOR_ADDRESS with JAX_NUM_PROCESSES and JAX_PROCESS_ID"
Distributed = Annotated[bool, tyro.conf.arg(help=f"One process of many: {_ONE_OF_MANY}.")]
PRESET_LINES = "\n".join(f"{name}: {line}" for name, (line, _) in PRESETS.items())
From = Annotated[Preset, tyro.conf.arg(help=f"Where the defaults of all other fields come from.\n{PRESET_LINES}\n")]
_KEPT = "Keep compiled programs in the user's cache folder, so that the next start takes seconds."
Cached = Annotated[bool, tyro.conf.arg(help=_KEPT)]


@dataclass(frozen=True)
class Train:
    """Train a network on ARC tasks. The same command again goes on where it stopped."""

    workdir: Workdir
    config: Annotated[Config, Flat]
    preset: From = "demo"
    profile: int = 0
    """Steps to trace with JAX's profiler, after the first ten, into the run folder's `profile` (for TensorBoard, Perfetto)."""
    compilation_cache: Cached = True
    distributed: Distributed = False

    def __post_init__(self):
        if self.profile < 0:
            raise ConfigError(f"profile must not be negative, got {self.profile}")


NETWORKS = (
    *("dense/none", "dyntrm/none", "dyntrm/backprop", "dyntrm/sars", "dyntrm/msaps"),
    *("dfc/none", "dfc/backprop", "dfc/sars", "dfc/msaps", "dfc_hard/none", "dfc_hard/sars", "dfc_hard/msaps"),
)


@dataclass(frozen=True)
class Continual:
    """Learn tasks in stages with several networks; compare how much is left of the earlier ones. The same command goes on."""

    workdir: Annotated[Path, tyro.conf.arg(help="Folder for a run folder of each network and seed, for instance runs/continual.")]
    config: Annotated[Config, Flat]
    preset: From = "continual"
    networks: tuple[str, ...] = NETWORKS
    """Kinds and learning rules, as KIND/RULE; they take the place of model.kind and learning.rule."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of each network; they take the place of train.seed."""
    parameters: int = 100_000
    """Parameters of the blocks, the same for every network; hidden widths follow from it."""
    compilation_cache: Cached = True

    def __post_init__(self):
        for name in self.networks:
            kind, _, rule = name.partition("/")
            if kind not in get_args(Kind) or rule not in get_args(RuleName):
                raise ConfigError(
                    f"networks: {name!r} is not KIND/RULE with a kind of {', '.join(get_args(Kind))} and a rule of "
                    f"{', '.join(get_args(RuleName))}"
                )
        for name, values in (("networks", self.networks), ("seeds", self.seeds)):
            if not values or len(set(values)) < len(values):
                raise ConfigError(f"{name} must name at least one, and each once; got {' '.join(map(str, values)) or 'none'}")


@dataclass(frozen=True)
class Trained:
    """Which trained network answers, and how."""

    workdir: Workdir
    eval: Annotated[EvalConfig, Flat]
    mesh: MeshConfig
    checkpoint: str = "latest"
    """Which one: latest, best (by held-out demonstrations, data.holdout), or the number of a step."""
    compilation_cache: Cached = True


@dataclass(frozen=True)
class Evaluate(Trained):
    """Answer the test inputs, vote, and write predictions.json, submission.json and score.json."""

    distributed: Distributed = False


@dataclass(frozen=True)
class Predict(Trained):
    """Answer one task: show the grids here, and save them as a picture."""

    task: str = ""
    """Id of one of the run's tasks, or of one in a Kaggle file."""
    file: Path | None = None
    """A task file of your own, or a Kaggle file of several, unseen in training (runs with data.format context)."""


@dataclass(frozen=True)
class Report:
    """Draw the figures and write report.html again, from the run folder's files."""

    workdir: Workdir


@dataclass(frozen=True)
class Compare:
    """Curves and scores of several runs side by side."""

    workdirs: Annotated[tuple[Path, ...], tyro.conf.arg(help="Run folders.")]
    picture: Path = Path("runs/compare.png")
    """Where the curves are drawn, as a PNG."""

    def __post_init__(self):
        if not self.workdirs:
            raise ConfigError("workdirs must name at least one run folder")
        if not self.picture.name or self.picture.is_dir():
            raise ConfigError(f"picture must name a file, got {str(self.picture)!r}; for instance runs/compare.png")


COMMANDS: dict[str, type] = {
    "train": Train,
    "continual": Continual,
    "evaluate": Evaluate,
    "predict": Predict,
    "report": Report,
    "compare": Compare,
}


def parse(command: str, args: Sequence[str]) -> Any:
    """The arguments of a command. Where `--workdir` holds a run, what is not named is as that run has it: for `train` all, for
    `evaluate` and `predict` the fields of `eval` (the mesh is that of the devices at hand). `continual` keeps nothing.

    So a repeated `train` may name less than the first one did; a value or another preset that it does name and that differs is
    for `runs.begin` to refuse. A new run takes the values of `--preset`.

    Raises:
        ConfigError: a value that cannot be.
        SystemExit: help was asked for (0), or the arguments could not be parsed (2).
    """
    args = ["--data.skip-invalid" if arg == "--skip-invalid" else arg for arg in args]
    kind = COMMANDS[command]
    missing: Any = tyro.MISSING
    defaults: dict[str, Any] = {}
    named = _value(args, "workdir")
    if named == "":
        raise ConfigError("workdir must name a folder, got an empty name")
    workdir = Path(named or "")
    stored = stored_config(workdir) if named and kind not in (Report, Compare, Continual) else None
    if kind in (Train, Continual):
        began, named = stored_origin(workdir) if stored else None, _value(args, "preset")
        preset = named or began or kind.__dataclass_fields__["preset"].default
        known = preset if preset in PRESETS else "demo"  # tyro says what is wrong with any other
        defaults = {"preset": known, "config": stored if stored and named in (None, began) else PRESETS[known][1]}
    elif kind in (Evaluate, Predict):
        defaults = {"eval": (stored or Config()).eval, "mesh": MeshConfig()}
        args = [f"--{arg.removeprefix('--eval.')}" if arg.startswith("--eval.") else arg for arg in args]  # train's names, too
    required = {name: missing for name in ("workdir", "workdirs") if name in kind.__dataclass_fields__}
    return _parse(kind, args, kind(**required, **defaults), f"python experiments/arc.py {command}")


def _parse(kind: type[A], args: Sequence[str], default: A, program: str) -> A:
    """tyro's reading of the arguments; an error of ours inside it comes out as itself, without tyro's frame."""
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            return tyro.cli(kind, args=args, default=default, prog=program)
    except SystemExit as exit:
        cause: BaseException | None = exit
        while cause is not None and not isinstance(cause, ConfigError):
            cause = cause.__cause__ or cause.__context__
        if cause is not None:
            raise ConfigError(str(cause)) from None
        sys.stderr.write(errors.getvalue())
        raise


def _value(args: Sequence[str], name: str) -> str | None:
    """The value of `--name` before the arguments are parsed."""
    found = None
    for i, arg in enumerate(args):
        if arg == f"--{name}" and i + 1 < len(args):
            found = args[i + 1]
        elif arg.startswith(f"--{name}="):
            found = arg.partition("=")[2]
    return found  # the last one counts, as for tyro


def usage(program: str) -> str:
    """What the program is for, its commands and the presets."""
    commands = "\n".join(f"  {name:<10}{kind.__doc__}" for name, kind in COMMANDS.items())
    presets = "\n".join(f"  {name:<10}{line}" for name, (line, _) in PRESETS.items())
    return (
        f"usage: {program} COMMAND [OPTIONS]\n\ncommands:\n{commands}\n\npresets (train --preset NAME):\n{presets}\n\n"
        f"{program} COMMAND --help explains every option."
    )


def set_up(compilation_cache: bool = True, distributed: bool = False) -> None:
    """What concerns the whole process: memory, the compilation cache, other processes, what Orbax prints besides raising it.

    Raises:
        ConfigError: the other processes cannot be found.
    """
    host.tune(alone=not distributed)
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    sys.excepthook, sys.unraisablehook = _report, _report_unraisable
    if not compilation_cache:
        jax.config.update("jax_enable_compilation_cache", False)
    elif "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        home = os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
        if not home.startswith("~"):  # a user may have no home
            jax.config.update("jax_compilation_cache_dir", os.path.join(home, "tinyonn_jax", "xla"))
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    if distributed:
        _find_others()
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:
        wanted, reason = os.environ.get("JAX_PLATFORMS"), str(error).partition("\n")[0] or "JAX is not installed for it"
        asked = f"; unset JAX_PLATFORMS={wanted} to take what is here" if wanted else ""
        raise ConfigError(f"no device can be used: {reason}{asked}") from None


def _find_others() -> None:
    """Makes this process one of many, as the cluster or the environment says; after ten seconds it says whom it waits for.

    Raises:
        ConfigError: nothing says it, or the port is taken.
    """
    count, index = (os.environ.get(name) for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID"))
    address = os.environ.get("JAX_COORDINATOR_ADDRESS")
    if address and not address.rpartition(":")[2].isdecimal():
        raise ConfigError(f"--distributed: JAX_COORDINATOR_ADDRESS must be HOST:PORT, got {address}")
    if address and index == "0":
        _require_free(address)
    this = f" (this is number {index} of {count}, from 0)" if count and index else ""
    who = f"the other processes of this run{f' at {address}' if address else ''}{this}"
    waiting = threading.Timer(10, partial(print, f"waiting for {who}, for five minutes at most", file=sys.stderr, flush=True))
    waiting.daemon = True
    waiting.start()
    # The training loop saves all at SIGTERM; JAX's own service for that would keep it from ending a process at any other time.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            num_processes=int(count) if count else None,
            process_id=int(index) if index else None,
            initialization_timeout=300,  # seconds
            heartbeat_timeout_seconds=30,  # after which a process that hangs, waiting for one that was killed, is ended
        )
    except ValueError as error:
        raise ConfigError(f"--distributed: {str(error).rstrip('.')}; it needs one of: {_ONE_OF_MANY}") from None
    finally:
        waiting.cancel()


def _require_free(address: str) -> None:
    """Raises ConfigError if something listens at the port of `address`: the first process serves it, and would crash."""
    port = address.rpartition(":")[2]
    try:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a run that just ended still has connections there
            probe.bind(("", int(port)))
    except OverflowError:  # for JAX to say
        pass
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            remedy = "wait for the run that has it, or choose another in every process"
            raise ConfigError(f"--distributed: port {port} of JAX_COORDINATOR_ADDRESS is taken; {remedy}") from None


def again() -> str:
    """The command that started this process, to be typed again."""
    python = "python" if shutil.which("python") == sys.executable else sys.executable
    return shlex.join([python, *sys.argv])


_ROOM = (
    "lower --data.tokens-per-batch, set --model.remat, or make the model smaller; for evaluate lower --batch, or with "
    "--decode search raise --min-probability"
)


def guard(main: Callable[[], None]) -> int:
    """Runs `main` and returns the exit status: 0; 2 for what the user can mend, 1 for a run that failed, 128 + n for signal n."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # where a terminal or a pipe cannot hold × or –
    try:
        main()
    except (ConfigError, DataError, CheckpointError) as error:
        return _fail(str(error), 2)
    except DivergedError as error:
        return _fail(str(error), 1)
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).partition("\n")[0]
        if "RESOURCE_EXHAUSTED" in reason:
            return _fail(f"{reason}; {_ROOM}", 1)
        if jax.process_count() == 1:
            raise
        return _fail(
            f"this process failed, or lost another one of the run ({reason}); start the same command again, in as many processes "
            "as are left",
            1,
        )
    except MemoryError as error:
        return _fail(f"out of memory ({error}); {_ROOM}", 1)
    except BrokenPipeError:  # whoever read the output, say `head`, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        what = f"{error.filename or 'a file that is written'}: {error.strerror or error}"
        if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ENAMETOOLONG):
            return _fail(f"{what}; check the path and its permissions", 2)
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        return _fail(f"{what}; free some space and run the same command again" if full else what, 1)
    except InterruptedRun as stop:
        print(f"{stop}; resume with: {again()}", flush=True)
        return 128 + stop.signum
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    return 0


def _report(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    """As usual, but for writes that come too late to be awaited, after one of them failed: the first one's error was raised."""
    if str(error) != "Event loop is closed":
        sys.__excepthook__(kind, error, trace)


def _report_unraisable(what: Any) -> None:
    """The same for what a destructor raises."""
    if str(what.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(what)


def leave(status: int) -> NoReturn:
    """Ends the process. After a failure at once: the reason is said, and background writers would only repeat it at length. After
    a signal too, for a compilation that is still under way would crash; but processes of one run take leave of each other."""
    if status in (1, 2) or (status and not jax.distributed.is_initialized()):
        sys.stdout.flush()
        os._exit(status)
    sys.exit(status)


def interrupted(*_: Any) -> NoReturn:
    """Ctrl-C while nothing is there to be saved: ends at once, with 130. KeyboardInterrupt, Python's way, is lost where it
    comes up in a callback, say the garbage collector's, to which JAX gives one; and would wait for other processes of the run."""
    with contextlib.suppress(RuntimeError):  # in the middle of a print
        sys.stdout.flush()
    os.write(2, b"error: interrupted\n")
    os._exit(130)


def _fail(line: str, status: int) -> int:
    print(f"error: {line}", file=sys.stderr, flush=True)
    return status
