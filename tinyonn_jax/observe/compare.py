"""Runs side by side: a table of what they are and how they score, and their curves."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter
from rich.console import Console

from tinyonn_jax.observe import console as terminal
from tinyonn_jax.observe.axes import (
    MUTED,
    SERIES,
    curve,
    empty,
    legend_below,
    literal,
    log_axis,
    new_figure,
    percent_tick,
    save,
    step_axis,
    style,
)
from tinyonn_jax.observe.files import PARAMETERS, SCORE, damaged, read_config, read_json, require_run
from tinyonn_jax.observe.metrics import Row, count, duration, how_scored, latest, percent, training_seconds
from tinyonn_jax.observe.writers import read_metrics

DASHES = ("-", "--", ":", "-.")


def _apart(folders: Sequence[str | os.PathLike[str]]) -> list[str]:
    """What tells the folders apart: their paths from the deepest folder that holds all of them."""
    paths = [Path(folder).absolute() for folder in folders]
    above = os.path.commonpath([path.parent for path in paths])
    return [str(path.relative_to(above)) for path in paths]


def compare_figure(runs: Mapping[str, Sequence[Row]]) -> Figure:
    """Loss, share of exact sequences and tokens per second of several runs, over steps."""
    figure = new_figure(10.5, 3.9)
    panels = (("main_loss", "Loss"), ("exact", "Whole grids right"), ("tokens_per_second", "Tokens per second"))
    for ax, (key, title) in zip(figure.subplots(1, 3), panels, strict=True):
        step_axis(style(ax, title))
        ax.set_xlabel("step", color=MUTED, fontsize=8.5)
        drawn = [curve(ax, rows, key, literal(name), SERIES[i % len(SERIES)], linestyle=DASHES[i // len(SERIES) % len(DASHES)])
                 for i, (name, rows) in enumerate(runs.items())]  # fmt: skip
        if not any(drawn):
            empty(ax, "not logged")
        elif key == "main_loss":
            log_axis(ax)
        elif key == "exact":
            ax.set_ylim(-0.02, 1.02)
            ax.yaxis.set_major_formatter(percent_tick)
        else:
            ax.set_ylim(bottom=0)
            ax.yaxis.set_major_formatter(EngFormatter(sep=""))
    legend_below(figure)
    return figure


def comparison(folders: Sequence[str | os.PathLike[str]]) -> tuple[list[str], list[list[str]]]:
    """Header and one line a run: what it is, its size, time and newest metrics, its scores. A dash is for what is not there."""
    header = ["run", "kind", "rule", "parameters", "steps", "time", "loss", "val. grids", "tokens/s"]
    header += ["pass@1", "pass@2", "interval", "by"]
    table = []
    for folder in map(Path, folders):
        rows, config = read_metrics(folder), read_config(folder)
        score, parameters = (read_json(folder / name) for name in (SCORE, PARAMETERS))
        values = latest(rows)
        with damaged(folder / SCORE):
            share = {name: percent(score[name]["outputs"]) if score else "–" for name in ("pass@1", "pass@2")}
            interval = (score or {}).get("intervals", {}).get("pass@2", {}).get("outputs")
            between = f"[{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]" if interval else "–"
            by = how_scored(score) if score else "–"
        with damaged(folder / PARAMETERS):
            size = count(parameters["total"]) if parameters else "–"
        table.append([
            str(folder),
            config.model.kind if config else "–",
            "–" if config is None or config.model.kind == "dense" else config.learning.rule,
            size,
            str(rows[-1]["step"]) if rows else "–",
            duration(training_seconds(rows)) if "seconds" in values else "–",
            f"{values['main_loss']:.4f}" if "main_loss" in values else "–",
            percent(values.get("valid_exact")),
            count(values["tokens_per_second"]) if "tokens_per_second" in values else "–",
            share["pass@1"],
            share["pass@2"],
            between,
            by,
        ])  # fmt: skip
    return header, table


def compare(folders: Sequence[str | os.PathLike[str]], picture: str | os.PathLike[str], console: Console | None = None) -> Path:
    """Prints the scores of several runs side by side and draws their curves into the PNG `picture`; returns its path.

    Raises:
        ConfigError: one of the folders does not exist, or one of its files is damaged.
    """
    for folder in folders:
        require_run(Path(folder))
    terminal.table("Scores are shares of test outputs", *comparison(folders), console=console)
    runs = dict(zip(_apart(folders), map(read_metrics, folders), strict=True))
    return save(compare_figure(runs), picture)
