"""What continual learning left behind: accuracies after every stage as matrices, their measures as a table, over seeds.

Letters: S stages. A matrix `[S+1, S]` holds the accuracy on stage j after learning stage i, before any learning in row 0.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from scipy.special import stdtrit

from tinyonn_jax.arc.continual import MEASURES, measures
from tinyonn_jax.config import ConfigError
from tinyonn_jax.observe.axes import INK, MUTED, SHARE_COLOURS, new_figure, percent_tick, save
from tinyonn_jax.observe.files import write_atomically
from tinyonn_jax.observe.metrics import lookup, percent
from tinyonn_jax.observe.writers import plain, read_metrics

ACCURACIES = {"stage_acc": "of output tokens", "stage_exact": "of whole grids"}
"""What is measured, by its name in metrics.jsonl."""


def matrix(folder: Path, what: str = "stage_acc") -> Float[np.ndarray, "S+1 S"]:
    """The accuracies of a finished run.

    Raises:
        ConfigError: the run did not learn in stages, or is not finished.
    """
    found = [row for row in (lookup(each, what) for each in read_metrics(folder)) if row is not None]
    if not found or len(found) != len(found[0]) + 1:
        raise ConfigError(f"{folder}: {len(found)} rows of {what}; finish it with: python experiments/arc.py continual")
    return np.array(found, float)


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The mean, and half the width of its 95 % interval by Student's t over seeds (NaN for a single one)."""
    n = len(values)
    half = float(stdtrit(n - 1, 0.975) * np.std(values, ddof=1) / np.sqrt(n)) if n > 1 else float("nan")
    return float(np.mean(values)), half


def summarize(folders: Mapping[str, Sequence[Path]]) -> dict[str, Any]:
    """For each network, over the runs of its seeds: per accuracy its matrices, and of each measure mean and half-width."""
    results: dict[str, Any] = {}
    for network, runs in folders.items():
        results[network] = {"runs": [run.name for run in runs]}
        for what in ACCURACIES:
            matrices = [matrix(run, what) for run in runs]
            found = [measures(each) for each in matrices]
            results[network][what] = {"matrices": [each.round(6).tolist() for each in matrices]} | {
                name: dict(zip(("mean", "half_width"), interval([each[name] for each in found]), strict=True))
                for name in MEASURES
            }
    return results


def lines(results: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """A header and one line for each network: the measures by tokens, and the average accuracy by whole grids."""

    def said(measure: Mapping[str, float]) -> str:
        half = measure["half_width"]
        return f"{100 * measure['mean']:.1f}" + (f" ± {100 * half:.1f}" if np.isfinite(half) else "")

    header = ["network", *(name.replace("_", " ") for name in MEASURES), "whole grids"]
    rows = [
        [network, *(said(found["stage_acc"][name]) for name in MEASURES), said(found["stage_exact"]["average_accuracy"])]
        for network, found in results.items()
    ]
    return header, rows


def figure(results: Mapping[str, Any]) -> Figure:
    """One panel a network: accuracy on every stage (across) after every stage (down), averaged over seeds."""
    columns = min(4, len(results))
    height = -(-len(results) // columns)
    picture = new_figure(10.5, 0.9 + 2.7 * height)
    axes = np.ravel(picture.subplots(height, columns, squeeze=False, sharex=True, sharey=True))
    for ax in axes[len(results) :]:
        ax.set_axis_off()
    means = {network: np.mean(found["stage_acc"]["matrices"], 0) for network, found in results.items()}
    low = min((mean.min() for mean in means.values()), default=0.0)
    image = None
    for ax, (network, mean) in zip(axes, means.items(), strict=False):
        stages = mean.shape[1]
        image = ax.imshow(
            mean, cmap=SHARE_COLOURS, vmin=low, vmax=1, extent=(0.5, stages + 0.5, stages + 0.5, -0.5), aspect="auto"
        )
        ax.plot([0.5, stages + 0.5], [0.5, stages + 0.5], color="white", linewidth=1)
        end, forgot = (results[network]["stage_acc"][name]["mean"] for name in ("average_accuracy", "forgetting"))
        ax.set_title(
            f"{network}\nat the end {percent(end)}, forgot {percent(forgot)}",
            loc="left", fontsize=9, color=INK,
        )  # fmt: skip
        ax.tick_params(colors=MUTED, labelsize=8, length=0)
        ax.spines[:].set_visible(False)
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_major_locator(MaxNLocator(6, integer=True))
    picture.supxlabel("tested on stage", fontsize=9, color=MUTED)
    picture.supylabel("after learning stage (0: before any)", fontsize=9, color=MUTED)
    if image is not None:
        bar = picture.colorbar(image, ax=list(axes), shrink=0.6, aspect=30, format=FuncFormatter(percent_tick))
        bar.set_label("output tokens right", fontsize=9, color=MUTED)
        bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]
        bar.ax.tick_params(labelsize=8, colors=MUTED, length=0)
    return picture


def write(folder: Path, results: Mapping[str, Any]) -> list[Path]:
    """Writes `continual.json` and `continual.png`; returns their paths."""
    text = json.dumps(plain(results), indent=1, allow_nan=False)
    return [write_atomically(folder / "continual.json", text + "\n"), save(figure(results), folder / "continual.png")]
