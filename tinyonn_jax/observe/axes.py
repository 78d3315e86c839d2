"""How every picture looks: colours, axes, curves, legends, and how a figure is saved.

Figures are matplotlib `Figure` objects (object-oriented, no pyplot state). Letters: S logged steps.
"""

import io
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, MaxNLocator, NullLocator

from tinyonn_jax.observe.files import write_atomically
from tinyonn_jax.observe.metrics import Row, column

# Okabe and Ito's colours, told apart under every common colour blindness.
BLUE, ORANGE, GREEN, PURPLE, SKY, RED = "#0072B2", "#E69F00", "#009E73", "#AA4499", "#56B4E9", "#D55E00"
INK, MUTED, FAINT = "#24292f", "#6b7280", "#d8dee4"
SERIES = (BLUE, RED, GREEN, PURPLE, ORANGE, SKY)
SHARE_COLOURS = LinearSegmentedColormap.from_list("share", ["#f7f9fb", "#a6cbe3", "#2f7fb8", "#08306b"])


def save(figure: Figure, path: str | os.PathLike[str]) -> Path:
    """Writes a figure as PNG, atomically, 160 dots to the inch."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # names in scripts that the font lacks show boxes
        figure.savefig(buffer, format="png", dpi=160, facecolor="white")
    return write_atomically(path, buffer.getvalue())


def style(ax: Axes, title: str = "") -> Axes:
    if title:
        ax.set_title(title, loc="left", fontsize=11, fontweight="bold", color=INK)
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(FAINT)
    ax.tick_params(colors=MUTED, labelsize=8.5, length=0)
    ax.grid(axis="y", color=FAINT, linewidth=0.6)
    ax.set_axisbelow(True)
    return ax


def new_figure(width: float, height: float) -> Figure:
    """An empty figure that lays itself out; sizes in inches."""
    figure = Figure(figsize=(width, height))
    figure.set_layout_engine("constrained", w_pad=0.12, h_pad=0.1)
    return figure


def literal(text: str) -> str:
    """A name that shows as it is: matplotlib sets what stands between two `$` as a formula, and leaves a label out of legends
    that begins with `_`."""
    return (" " if text.startswith("_") else "") + text.replace("$", r"\$")


def step_axis(ax: Axes) -> None:
    ax.xaxis.set_major_formatter(EngFormatter(sep=""))
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))


def percent_tick(share: float, _: Any = None) -> str:
    """How an axis says a share, with as many digits as it takes: 40%, 2.5%."""
    return f"{100 * share:.4g}%"


def empty(ax: Axes, reason: str) -> None:
    ax.set_axis_on()
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_visible(False)
    ax.set_facecolor("#f6f8fa")
    ax.text(0.5, 0.5, reason, transform=ax.transAxes, ha="center", va="center", color=MUTED, fontsize=10, style="italic")


def legend(*axes: Axes) -> None:
    """One legend for axes that share a panel, above the first of them at the right so that it never covers a curve."""
    entries = legend_entries(axes)
    if entries:
        axes[0].legend(
            entries.values(), entries.keys(), loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=7, fontsize=8, frameon=False,
            labelcolor=INK, handlelength=0.9, columnspacing=0.8, handletextpad=0.4, borderaxespad=0.2,
        )  # fmt: skip


def legend_entries(axes: Sequence[Axes]) -> dict[str, Any]:
    """What the axes' curves are called, each name once, with what it looks like."""
    return {label: handle for ax in axes for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}


def legend_below(figure: Figure) -> None:
    """One legend for all axes of a figure, below them, in as many columns as names leave room for; the figure grows with it."""
    entries = legend_entries(figure.axes)
    room = int(12 * figure.get_figwidth())  # characters
    columns = max(1, min(4, len(entries), room // (6 + max(map(len, entries), default=0))))
    figure.set_figheight(figure.get_figheight() + 0.2 * (-(-len(entries) // columns) - 1))
    look = {"ncols": columns, "frameon": False, "fontsize": 9, "labelcolor": INK}
    figure.legend(entries.values(), entries.keys(), loc="outside lower center", **look)


def smooth(values: Float[np.ndarray, "S"]) -> Float[np.ndarray, "S"]:
    """Centred running mean over a twentieth of the curve; at the ends, over what there is."""
    width = max(1, len(values) // 20) | 1
    window = np.ones(width)
    return np.convolve(values, window, "same") / np.convolve(np.ones(len(values)), window, "same")


def curve(ax: Axes, rows: Sequence[Row], path: str | tuple[str | int, ...], label: str, colour: str, **style: Any) -> bool:
    """A smoothed curve over its faint raw values, or points where only a few were logged; False where none was."""
    steps, values = column(rows, *((path,) if isinstance(path, str) else path))
    if len(values) >= 40:
        ax.plot(steps, values, color=colour, linewidth=0.7, alpha=0.25)
        ax.plot(steps, smooth(values), color=colour, linewidth=1.8, label=label, **style)
    elif len(values):
        ax.plot(steps, values, color=colour, linewidth=1.6, marker="o", markersize=3.5, label=label, **style)
    return len(values) > 0


def log_axis(ax: Axes) -> None:
    """A logarithmic axis where the drawn values are positive and span more than a factor of five."""
    drawn = np.concatenate([np.asarray(line.get_ydata(), float) for line in ax.lines] or [np.zeros(0)])
    if len(drawn) and drawn.min() > 0 and drawn.max() > 5 * drawn.min():
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if drawn.max() < 1000 * drawn.min() else (1,)))
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        ax.yaxis.set_minor_locator(NullLocator())


def twin(ax: Axes, label: str, colour: str) -> Axes:
    other = ax.twinx()
    other.spines[:].set_visible(False)
    other.tick_params(colors=colour, labelsize=8.5, length=0)
    other.set_ylabel(label, color=colour, fontsize=8.5)
    return other
