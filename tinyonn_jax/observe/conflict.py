"""The picture of gradient conflict: how task and regulariser meet over training, for several networks and seeds.

Letters: S recorded steps. Source: seed 0 ("Gradient Signal Conflict").
"""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tinyonn_jax.observe.axes import INK, MUTED, SERIES, legend_below, log_axis, new_figure, percent_tick, step_axis, style
from tinyonn_jax.observe.metrics import Row, column

PANELS = (
    ("cosine", "Cosine of the two gradients"),
    ("shared_share", "Weights that both reach"),
    ("task_loss", "Task loss"),
)


def conflict_figure(networks: Mapping[str, Sequence[Sequence[Row]]]) -> Figure:
    """Cosine, share of weights that both losses reach, and task loss, over steps.

    `networks`: by name, the rows of each seed's run, with keys `step`, `cosine` (None: undefined), `shared_share`, `task_loss`.
    Lines are means over seeds, bands reach from the lowest to the highest seed.
    """
    figure = new_figure(10.5, 4.1)
    for ax, (key, title) in zip(figure.subplots(1, 3), PANELS, strict=True):
        step_axis(style(ax, title))
        ax.set_xlabel("step", color=MUTED, fontsize=8.5)
        undefined = [
            name for i, (name, runs) in enumerate(networks.items()) if not _band(ax, runs, key, name, SERIES[i % len(SERIES)])
        ]
        if key == "cosine":
            ax.set_ylim(-1.05, 1.05)
            ax.axhline(0, color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
            note = "\n".join(f"{name}: undefined" for name in undefined)
            ax.text(0.98, 0.97, note, transform=ax.transAxes, fontsize=8.5, color=INK, ha="right", va="top", style="italic")
        elif key == "shared_share":
            ax.set_ylim(-0.03, 1.03)
            ax.yaxis.set_major_formatter(percent_tick)
        else:
            log_axis(ax)
    legend_below(figure)
    return figure


def _band(ax: Axes, runs: Sequence[Sequence[Row]], key: str, name: str, colour: str) -> bool:
    """Mean over runs as a line, lowest to highest as a band, over the steps that every run has; False where there are none."""
    found = [dict(zip(*column(rows, key), strict=True)) for rows in runs]
    steps = sorted(set.intersection(*map(set, found))) if found else []
    if not steps:
        return False
    values = np.array([[run[step] for step in steps] for run in found])  # [seeds,S]
    ax.fill_between(steps, values.min(0), values.max(0), color=colour, alpha=0.18, linewidth=0)
    ax.plot(steps, values.mean(0), color=colour, linewidth=1.8, label=name)
    return True
