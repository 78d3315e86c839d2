"""Grids as pictures: a task with its answers. `entries`: see `observe.answers`."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from tinyonn_jax.observe.answers import ARC_COLOURS, MARK, Entry, Grid, answers, judge, questions, solved
from tinyonn_jax.observe.axes import FAINT, INK, MUTED, literal

Cell = tuple[str, Grid | None, bool | None, str]  # title, grid, right or wrong, and why


def _draw_grids(axes: Sequence[Axes], cells: Sequence[Cell]) -> None:
    """A line of titled grids at one scale, each with its verdict below."""
    height, width = np.max([np.asarray(grid).shape for _, grid, _, _ in cells if grid is not None], axis=0)
    for ax, (title, grid, right, why) in zip(axes, cells, strict=False):
        colour = {True: "#1a7f37", False: "#cf222e", None: MUTED}[right]
        h, w = (height, width) if grid is None else np.asarray(grid).shape
        ax.set_axis_on()
        ax.spines[:].set_visible(False)
        ax.set(xticks=[], yticks=[], aspect="equal")
        ax.set_title(title, fontsize=8.5, color=INK, pad=3)
        ax.set_xlabel(MARK[right] + why, fontsize=8.5, color=colour, labelpad=2)
        frame = Rectangle((-0.5, -0.5), w, h, fill=False, edgecolor=FAINT, linestyle=":", clip_on=False)
        if grid is not None:
            ax.imshow(np.asarray(grid), cmap=ListedColormap(ARC_COLOURS), vmin=0, vmax=9, interpolation="nearest")
            line = 0.8 if max(height, width) <= 15 else 0.35
            ax.vlines(np.arange(1, w) - 0.5, -0.5, h - 0.5, color="#555555", linewidth=line)
            ax.hlines(np.arange(1, h) - 0.5, -0.5, w - 0.5, color="#555555", linewidth=line)
            frame.set(edgecolor="#555555" if right is None else colour, linestyle="-", linewidth=0.8 if right is None else 1.8)
        ax.add_patch(frame)
        ax.set_xlim((w - width) / 2 - 0.6, (w + width) / 2 - 0.4)
        ax.set_ylim((h + height) / 2 - 0.4, (h - height) / 2 - 0.6)


def _cells(question: str, entry: Entry) -> list[Cell]:
    truth = entry.get("truth")
    cells: list[Cell] = [(question, entry["input"], None, ""), ("truth", truth, None, "" if truth is not None else "unknown")]
    return cells + [(name, grid, *judge(grid, truth)) for name, grid in answers(entry)]


def task_figure(task_id: str, entries: Sequence[Entry], demonstrations: Sequence[Sequence[Grid]] = ()) -> Figure:
    """One task: its demonstration pairs on top, then for each test input the truth and the answers, each with a tick or a cross.

    `demonstrations` are pairs of input and output.
    """
    lines = [
        [(f"{name} {i}", pair[k], None, "") for i, pair in enumerate(demonstrations, 1)]
        for k, name in enumerate(("input", "output"))
    ]
    lines = [line for line in lines if line] + list(map(_cells, questions(entries), entries))
    columns = max(map(len, lines))
    figure = Figure(figsize=(1.75 * columns, 1.95 * len(lines) + 0.45), layout="constrained")
    verdict = {True: "✓ solved", False: "✗ not solved", None: ""}[solved(entries)]
    figure.suptitle(f"{literal(task_id)} {verdict}", x=0.01, ha="left", fontsize=12, fontweight="bold", color=INK)
    axes = figure.subplots(len(lines), columns, squeeze=False)
    for ax in axes.flat:
        ax.set_axis_off()
    for line, cells in zip(axes, lines, strict=True):
        _draw_grids(list(line), cells)
    return figure
