"""Train on ARC-AGI, mixed or task after task, evaluate, predict, report, compare: `python experiments/arc.py COMMAND --help`."""

import signal
import time

STARTED = time.time()
if __name__ == "__main__":  # the imports take seconds: until they are done, Ctrl-C ends this without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import re  # noqa: E402
import shlex  # noqa: E402
import sys  # noqa: E402
import zlib  # noqa: E402
from dataclasses import replace  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

from tinyonn_jax import cli, runs, trained  # noqa: E402
from tinyonn_jax.arc import submission  # noqa: E402
from tinyonn_jax.config import Config, ConfigError  # noqa: E402
from tinyonn_jax.observe.answers import answers, questions  # noqa: E402
from tinyonn_jax.observe.console import print_grids, table  # noqa: E402
from tinyonn_jax.observe.metrics import how_scored, percent  # noqa: E402
from tinyonn_jax.training import assemble  # noqa: E402
from tinyonn_jax.uses import under  # noqa: E402

# What draws is imported where it is needed: matplotlib takes a second, which training need not wait for.


def train(args: cli.Train) -> None:
    cli.set_up(args.compilation_cache, args.distributed)
    runs.train(runs.begin(args.workdir, args.config, args.preset, cli.again()), STARTED, args.profile)


def learn_continually(args: cli.Continual) -> None:
    from tinyonn_jax.observe import continual

    cli.set_up(args.compilation_cache)
    if not args.config.data.sequence:
        raise ConfigError(f"data.sequence must not be 0 for continual; preset {args.preset} mixes its tasks")
    configs: dict[tuple[str, int], Config] = {}
    for network in args.networks:
        kind, _, rule = network.partition("/")
        model = assemble.narrowed(replace(args.config.model, kind=kind), args.parameters)
        learning = under(args.config.learning, rule)  # pyright: ignore[reportArgumentType]
        for seed in args.seeds:
            configs[network, seed] = replace(
                args.config, model=model, learning=learning, train=replace(args.config.train, seed=seed)
            )
    folders: dict[str, list[Path]] = {}
    for (network, seed), config in configs.items():  # all of them can be, so train
        folder = args.workdir / f"{network.replace('/', '-')}-{seed}"
        print(f"{network}, seed {seed}, in {folder}")
        runs.train(runs.begin(folder, config, args.preset, cli.again()))
        folders.setdefault(network, []).append(folder)
    results = continual.summarize(folders)
    table(f"{args.config.data.sequence} stages, mean over seeds {', '.join(map(str, args.seeds))}", *continual.lines(results))
    for path in continual.write(args.workdir, results):
        print(path)


def _open(args: cli.Trained) -> tuple[runs.Run, Any]:
    run = runs.open_run(args.workdir)
    checkpoint = int(args.checkpoint) if args.checkpoint.isdecimal() else args.checkpoint
    if checkpoint not in ("latest", "best") and isinstance(checkpoint, str):
        raise ConfigError(f"checkpoint must be latest, best or a step, got {checkpoint}")
    return replace(run, config=replace(run.config, eval=args.eval, mesh=args.mesh)), checkpoint


def evaluate(args: cli.Evaluate) -> None:
    cli.set_up(args.compilation_cache, args.distributed)
    score = trained.evaluate(*_open(args))
    if score is None:
        return
    header = ["", "outputs", "task mean", "tasks"]
    names = ("outputs", "task_mean", "tasks")
    lines = [[name, *(percent(score[name][key]) for key in names)] for name in ("pass@1", "pass@2")]
    counts = score["counts"]
    if not counts["outputs"]:
        print(f"no test output is known; the answers are in {args.workdir / 'submission.json'}")
        return
    title = f"{counts['outputs']} test outputs of {counts['tasks']} tasks, checkpoint of step {score['checkpoint']}"
    table(f"{title}, {how_scored(score)}", header, lines)
    if score.get("greedy_per_recursion"):
        print("greedy answers right after each recursion:", ", ".join(map(percent, score["greedy_per_recursion"])))
    print(f"next: python experiments/arc.py report --workdir {shlex.quote(str(args.workdir))}")


def predict(args: cli.Predict) -> None:
    from tinyonn_jax.observe import axes, grids

    cli.set_up(args.compilation_cache)
    run, checkpoint = _open(args)
    if not args.task and args.file is None:
        raise ConfigError("predict needs --task ID or --file FILE")
    task = trained.find_task(run, args.task) if args.file is None else trained.read_task(run, args.file, args.task)
    network = trained.load(run, checkpoint, print)
    predictions = network.ranked(network.answer((task,)), (task,))
    for line in predictions.too_long:
        print(line)
    entries = submission.entries(predictions)[task.id]
    shown = [(pair.input.tolist(), pair.output.tolist()) for pair in task.train if pair.output is not None]
    for i, (question, answer) in enumerate(shown, 1):
        print_grids([(f"input {i}", question), (f"output {i}", answer)])
    for question, entry in zip(questions(entries), entries, strict=True):
        known = [] if entry["truth"] is None else [("truth", entry["truth"])]
        print_grids([(question, entry["input"]), *known, *answers(entry)])
    name = re.sub(r"[^\w.-]", "_", task.id, flags=re.ASCII)[:100]  # an id may be anything
    name += "" if name == task.id else f"-{zlib.crc32(task.id.encode()):08x}"
    print(axes.save(grids.task_figure(task.id, entries, shown), args.workdir / "figures" / f"task_{name}.png"))


def write_report(args: cli.Report) -> None:
    from tinyonn_jax.observe import report

    print(report.write_report(args.workdir))


def compare(args: cli.Compare) -> None:
    from tinyonn_jax.observe import compare

    print(compare.compare(args.workdirs, args.picture))


COMMANDS = {
    "train": train,
    "continual": learn_continually,
    "evaluate": evaluate,
    "predict": predict,
    "report": write_report,
    "compare": compare,
}


def main() -> None:
    program, (command, *args) = "python experiments/arc.py", sys.argv[1:] or ["--help"]
    if command in ("-h", "--help"):
        print(cli.usage(program))
    elif command not in COMMANDS:
        raise ConfigError(f"no command {command!r}; there are {', '.join(COMMANDS)}")
    else:
        COMMANDS[command](cli.parse(command, args))


if __name__ == "__main__":
    signal.signal(signal.SIGINT, cli.interrupted)
    cli.leave(cli.guard(main))
