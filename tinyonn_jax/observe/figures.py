"""Pictures of a run's metrics: the two dashboards.

A panel without data says why it is empty. Letters: S logged steps, M modules of one routed layer, D model.
Source: what seeds 2, 3 and 4 watched.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from tinyonn_jax.config import ConfigError
from tinyonn_jax.observe.axes import (
    BLUE,
    FAINT,
    GREEN,
    INK,
    MUTED,
    ORANGE,
    PURPLE,
    RED,
    SERIES,
    SHARE_COLOURS,
    SKY,
    curve,
    empty,
    legend,
    log_axis,
    new_figure,
    percent_tick,
    save,
    step_axis,
    style,
    twin,
)
from tinyonn_jax.observe.files import ROUTING
from tinyonn_jax.observe.metrics import Row, column, layer_names, loads, lookup, percent
from tinyonn_jax.observe.writers import read_metrics

Routing = Mapping[str, np.ndarray]
NO_LAYERS = "no routed layers in this run"
NOT_MEASURED = "not measured by this rule"
NOTHING = "nothing logged yet"


def write_dashboards(folder: str | os.PathLike[str]) -> list[Path]:
    """Draws both dashboards from a run folder's files into its `figures/`; returns their paths.

    Raises:
        ConfigError: `routing_latest.npz` is damaged.
    """
    folder = Path(folder)
    rows, snapshot = read_metrics(folder), folder / ROUTING
    routing: dict[str, np.ndarray] = {}
    if snapshot.exists():
        try:
            with np.load(snapshot, allow_pickle=False) as arrays:
                routing = dict(arrays)
        except (OSError, ValueError, TypeError, RuntimeError, EOFError, BadZipFile) as error:
            raise ConfigError(f"{snapshot}: damaged ({error}); delete it, training writes it with its next checkpoint") from None
    return [
        save(core_metrics(rows), folder / "figures" / "core_metrics_latest.png"),
        save(expert_dashboard(rows, routing), folder / "figures" / "expert_dashboard_latest.png"),
    ]


def _colour(layer: str) -> str:
    return PURPLE if "attention" in layer else BLUE


def _curves(layers: Sequence[str]) -> list[tuple[str, str, str]]:
    """The last block's layers with what to call their curves and how to colour them: heads and experts, or roles of neurons."""
    last = _last_of_each_kind(layers)
    if len(last) <= 2:
        return [(name, _name(name), _colour(name)) for name in last]
    return [(name, name.rpartition(".")[2], SERIES[i % len(SERIES)]) for i, name in enumerate(last)]


def _of_last_block(rows: Sequence[Row], layer: str, what: str) -> tuple[str | int, ...]:
    """Where rows have a layer's number, of stacked blocks the last one's."""
    blocks = ("layers", layer, f"{what}_by_block", -1)
    return blocks if len(column(rows, *blocks)[0]) else ("layers", layer, what)


def _nothing(rows: Sequence[Row]) -> str:
    """Why a panel of routed layers has nothing to show."""
    return NOT_MEASURED if layer_names(rows) else NO_LAYERS if rows else NOTHING


def _marker(steps: np.ndarray) -> str | None:
    """A line of one point would show nothing."""
    return "o" if len(steps) == 1 else None


def _name(layer: str) -> str:
    """What a layer's modules are called: `heads`, `experts` or the role of its neurons, after the block's name if it has one."""
    kinds = {"attention": "heads", "feedforward": "experts"}
    *block, role = layer.removeprefix("block.").split(".")
    if block and block[-1] in kinds:
        return " ".join([*block[:-1], role, "neurons"])
    return " ".join(filter(None, (".".join(block), kinds.get(role, role))))


# --- core metrics -------------------------------------------------------------------------------------------------------


def _losses(ax: Axes, rows: Sequence[Row]) -> None:
    curve(ax, rows, "main_loss", "main", BLUE)
    curve(ax, rows, "valid_loss", "validation", GREEN, linestyle="--")
    log_axis(ax)
    if np.any(column(rows, "meta_loss")[1]):
        right = twin(ax, "meta", RED)
        curve(right, rows, "meta_loss", "meta (right)", RED)
        legend(ax, right)
    elif ax.lines:
        legend(ax)
    else:
        empty(ax, "no losses logged yet")


def _accuracies(ax: Axes, rows: Sequence[Row]) -> None:
    curves = (
        ("main_acc", "token", BLUE), ("exact", "grid", RED), ("gating_acc", "gating", ORANGE),
        ("valid_acc", "token, val.", SKY), ("valid_exact", "grid, val.", GREEN),
    )  # fmt: skip
    if not any([curve(ax, rows, key, label, colour) for key, label, colour in curves]):
        return empty(ax, "no accuracies logged yet")
    ax.set_ylim(-0.02, 1.02)
    ax.yaxis.set_major_formatter(percent_tick)
    legend(ax)


def _integrity(ax: Axes, rows: Sequence[Row]) -> None:
    drawn = curve(ax, rows, "pi", "PI", GREEN)
    curve(ax, rows, "ema_acc", "accuracy (EMA)", BLUE)
    if not drawn:
        return empty(ax, NOT_MEASURED if rows else NOTHING)
    ax.set_ylim(-0.02, 1.02)
    legend(ax)


def _surprise(ax: Axes, rows: Sequence[Row]) -> None:
    curve(ax, rows, "surprise_output", "output", RED)
    curve(ax, rows, "surprise_param", "parameter", ORANGE)
    if not ax.lines:
        return empty(ax, _nothing(rows))
    log_axis(ax)
    if len(column(rows, "tau")[0]):
        right = twin(ax, "tau", BLUE)
        curve(right, rows, "tau", "tau (right)", BLUE)
        legend(ax, right)
    else:
        legend(ax)


def _activation(ax: Axes, rows: Sequence[Row]) -> None:
    layers = [name for name in layer_names(rows) if len(column(rows, "layers", name, "active_share")[0])]
    if not layers:
        return empty(ax, _nothing(rows))
    right = twin(ax, "Act% (dashed)", MUTED)
    for i, (name, label, colour) in enumerate(_curves(layers)):
        steps, shares = column(rows, *_of_last_block(rows, name, "active_share"))
        modules = loads(rows, name)[1].shape[1]
        if modules:
            ax.plot(steps, shares * modules, color=colour, linewidth=1.8, label=label, marker=_marker(steps))
        right.plot(steps, shares, color=colour, linewidth=1.2, linestyle=(5 * i, (4, 6)), marker=_marker(steps))
    ax.set_ylim(bottom=0, top=1.15 * max(ax.get_ylim()[1], 1))
    right.set_ylim(0, max(1.15 * right.get_ylim()[1], 0.01))
    right.yaxis.set_major_formatter(percent_tick)
    ax.set_ylabel("modules a token uses", color=MUTED, fontsize=8.5)
    legend(ax)


def _in_use(ax: Axes, rows: Sequence[Row]) -> None:
    layers = [name for name in layer_names(rows) if len(loads(rows, name)[0])]
    if not layers:
        return empty(ax, _nothing(rows))
    curves = _curves(layers)
    for name, label, colour in curves:
        steps, load = loads(rows, name)
        of = f", of {load.shape[1]}" if len(curves) <= 2 else ""
        ax.plot(steps, (load > 0).sum(1), color=colour, linewidth=1.8, label=label + of, marker=_marker(steps))
        ax.axhline(load.shape[1], color=MUTED if len(curves) > 2 else colour, linewidth=0.8, linestyle=":")
    ax.set_ylim(0, 1.1 * max(loads(rows, name)[1].shape[1] for name, _, _ in curves))
    ax.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    legend(ax)


def _divergence(ax: Axes, rows: Sequence[Row]) -> None:
    """The VAE view: KL of each batch's routing from its moving prior, and the ELBO proxy."""
    layers = [name for name in layer_names(rows) if len(column(rows, "layers", name, "kl")[0])]
    if not layers:
        return empty(ax, _nothing(rows))
    for name, label, colour in _curves(layers):
        curve(ax, rows, _of_last_block(rows, name, "kl"), label, colour)
    log_axis(ax)
    right = twin(ax, "ELBO proxy (dotted)", INK)
    curve(right, rows, "elbo", "ELBO", INK, linestyle=":")
    legend(ax, right)


def _gradients(ax: Axes, rows: Sequence[Row]) -> None:
    curve(ax, rows, "grad_norm_main", "main", BLUE)
    if np.any(column(rows, "grad_norm_meta")[1]):
        curve(ax, rows, "grad_norm_meta", "meta", RED)
    if not ax.lines:
        return empty(ax, NOTHING)
    log_axis(ax)
    legend(ax)


CORE_PANELS: tuple[tuple[str, Callable[[Axes, Sequence[Row]], None]], ...] = (
    ("Loss", _losses),
    ("Accuracy", _accuracies),
    ("Predictive integrity", _integrity),
    ("Surprise and tau", _surprise),
    ("Active modules", _activation),
    ("Modules in use", _in_use),
    ("Routing KL", _divergence),
    ("Gradient norms", _gradients),
)


def core_metrics(rows: Sequence[Row]) -> Figure:
    """Losses, accuracies, predictive integrity, surprise and tau, active modules per token, modules in use, KL of
    the routing from its prior with the ELBO proxy, gradient norms: 4 x 2 panels."""
    figure = new_figure(10.5, 13)
    axes = figure.subplots(4, 2)
    for ax, (title, draw) in zip(axes.flat, CORE_PANELS, strict=True):
        step_axis(style(ax, title))
        draw(ax, rows)
    for ax in axes[-1]:
        ax.set_xlabel("step", color=MUTED, fontsize=8.5)
    return figure


# --- expert dashboard ---------------------------------------------------------------------------------------------------


def _last_of_each_kind(layers: Sequence[str]) -> list[str]:
    """The last block's layers: at most one of each kind, feed-forward before attention."""
    last = {name.rpartition(".")[2]: name for name in layers}
    return sorted(last.values(), key=lambda name: "attention" in name)


def _binned(rows: Sequence[Row], layer: str, bins: int) -> tuple[Float[np.ndarray, "S"], Float[np.ndarray, "S M"]]:
    """Loads averaged over runs of neighbouring rows, so that at most `bins` columns remain."""
    steps, load = loads(rows, layer)
    runs = np.array_split(np.arange(len(steps)), min(bins, len(steps)))
    return np.array([steps[run].mean() for run in runs]), np.array([load[run].mean(0) for run in runs])


def _modules(ax: Axes, layer: str, modules: int) -> None:
    ax.set_ylim(-0.7, modules - 0.3)
    ax.yaxis.set_major_locator(MaxNLocator(min(modules, 9 if modules <= 32 else 4), integer=True))
    ax.set_ylabel(_name(layer), color=_colour(layer), fontsize=9.5)


def _choices(ax: Axes, layer: str, rows: Sequence[Row], routing: Routing) -> None:
    steps, load = _binned(rows, layer, 50)
    ids = np.broadcast_to(np.arange(load.shape[1]), load.shape)
    busiest = ids == load.argmax(1, keepdims=True)
    strength = load / max(load.max(), 1e-9)
    for chosen, colour in ((~busiest, _colour(layer)), (busiest, ORANGE)):
        at = np.broadcast_to(steps[:, None], load.shape)[chosen]
        ax.scatter(at, ids[chosen], s=1 + 55 * strength[chosen], alpha=0.2 + 0.75 * strength[chosen], color=colour, linewidth=0)
    ax.scatter([], [], s=40, color=ORANGE, linewidth=0, label="busiest at the time")
    _modules(ax, layer, load.shape[1])
    ax.grid(False)


def _heat(ax: Axes, layer: str, rows: Sequence[Row], routing: Routing) -> None:
    steps, load = _binned(rows, layer, 120)
    middle = (steps[1:] + steps[:-1]) / 2
    edges = np.r_[steps[0] - (len(steps) == 1) / 2, middle, steps[-1] + (len(steps) == 1) / 2]
    lines = np.arange(load.shape[1] + 1) - 0.5
    mesh = ax.pcolormesh(edges, lines, load.T, cmap=SHARE_COLOURS, vmin=0, vmax=load.max() or 1)
    _modules(ax, layer, load.shape[1])
    ax.set_ylim(-0.5, load.shape[1] - 0.5)
    ax.grid(False)
    bar = ax.figure.colorbar(mesh, ax=ax, pad=0.015, aspect=14, format=FuncFormatter(percent_tick))
    bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]
    bar.ax.tick_params(labelsize=7.5, colors=MUTED, length=0)


def _snapshot(routing: Routing, layer: str, what: str) -> np.ndarray | None:
    return routing.get(f"{layer}.{what}")


def _measured(rows: Sequence[Row], routing: Routing, layer: str) -> bool:
    """Whether the rule reports goodness, which may be zero for every module; a snapshot has zeros where it does not, too."""
    logged = any(lookup(row, "layers", layer, "goodness") is not None for row in rows)
    return logged or bool(np.any(_snapshot(routing, layer, "goodness")))


def _verdicts(routing: Routing, layer: str, modules: int) -> list[tuple[np.ndarray, str, str, str]]:
    """Masks over modules in the last step saved, each with label, colour and marker: good or bad, used where goodness is zero or
    unknown, inactive."""
    goodness, load = _snapshot(routing, layer, "goodness"), _snapshot(routing, layer, "load")
    goodness = np.zeros(modules) if goodness is None else np.nan_to_num(goodness)
    used = np.ones(modules, bool) if load is None else np.nan_to_num(load) > 0
    verdicts = [
        (goodness > 0, "good", GREEN, "o"),
        (goodness < 0, "bad", RED, "D"),
        ((goodness == 0) & used, "used", SKY, "o"),
        ((goodness == 0) & ~used, "inactive", MUTED, "X"),
    ]
    return [verdict for verdict in verdicts if verdict[0].any()]


def _lifetime(ax: Axes, layer: str, rows: Sequence[Row], routing: Routing) -> None:
    usage = _snapshot(routing, layer, "usage")
    if usage is None:
        return empty(ax, "no routing snapshot yet")
    ids = np.arange(len(usage))
    for mask, label, colour, _ in _verdicts(routing, layer, len(usage)):
        ax.bar(ids[mask], usage[mask], width=0.78, color=colour, label=label)
    ax.scatter(ids[usage == 0], usage[usage == 0], marker="X", s=30, color=MUTED, linewidth=0, clip_on=False, zorder=3)
    mean = float(usage.mean())
    ax.axhline(mean, color=INK, linewidth=0.9, linestyle=(0, (4, 3)))
    ax.text(1.01, mean, f"mean\n{percent(mean)}", transform=ax.get_yaxis_transform(), fontsize=7.5, color=INK, va="center")
    ax.set_xlim(-0.7, len(usage) - 0.3)
    ax.xaxis.set_major_locator(MaxNLocator(min(len(usage), 9), integer=True))
    ax.yaxis.set_major_formatter(percent_tick)
    ax.set_ylabel(_name(layer), color=_colour(layer), fontsize=9.5)


def _plane(points: Float[np.ndarray, "M D"]) -> tuple[Float[np.ndarray, "M 2"], Float[np.ndarray, "2"]]:
    """Points on their two principal axes, and the shares of variance along these."""
    centred = np.nan_to_num(points) - np.nan_to_num(points).mean(0)
    left, size, _ = np.linalg.svd(centred.astype(float), full_matrices=False)
    flat = np.pad(left * size, ((0, 0), (0, 2)))[:, :2]
    return flat, np.pad(size**2, (0, 2))[:2] / max(float((size**2).sum()), 1e-12)


def _together(points: Float[np.ndarray, "M 2"], named: Sequence[int], share: float = 0.1) -> list[list[int]]:
    """Some of the points by neighbourhood, so that one label can stand for all that would cover each other: each joins the first
    group whose first member is nearer than `share` of the extent of all."""
    near, groups = share * np.ptp(points, 0).max(), []
    for m in named:
        home = next((group for group in groups if np.hypot(*(points[group[0]] - points[m])) <= near), None)
        if home is None:
            groups.append([m])
        else:
            home.append(m)
    return groups


def _prototypes(ax: Axes, layer: str, rows: Sequence[Row], routing: Routing) -> None:
    points = _snapshot(routing, layer, "proto")
    if points is None:
        return empty(ax, "no routing snapshot yet")
    flat, explained = _plane(points)
    named = np.zeros(len(points), bool)  # those in use
    for mask, label, colour, marker in _verdicts(routing, layer, len(points)):
        ax.scatter(*flat[mask].T, s=46, color=colour, marker=marker, edgecolor="white", linewidth=0.7, label=label, zorder=3)
        named |= mask & (label != "inactive")
    if len(points) <= 16:
        for members in _together(flat, np.flatnonzero(named).tolist()):
            label = ", ".join(map(str, members)) if len(members) <= 3 else f"{len(members)} of them"
            ax.annotate(label, tuple(flat[members[0]]), (2, 5), textcoords="offset points", rotation=40, fontsize=7.5, color=INK)
    ax.grid(axis="both", color=FAINT, linewidth=0.6)
    ax.margins(0.12)
    ax.set_aspect("equal", adjustable="datalim")  # distances mean something only on one scale
    ax.set_ylabel(_name(layer), color=_colour(layer), fontsize=9.5)
    ax.tick_params(labelbottom=False, labelleft=False)
    ax.set_xlabel(f"{percent(explained[0])} and {percent(explained[1])} of variance", fontsize=8, color=MUTED)


EXPERT_PANELS: tuple[tuple[str, Callable[[Axes, str, Sequence[Row], Routing], None]], ...] = (
    ("Router choices", _choices),
    ("Lifetime shares", _lifetime),
    ("Share of activations", _heat),
    ("Prototypes", _prototypes),
)


def expert_dashboard(rows: Sequence[Row], routing: Routing | None = None) -> Figure:
    """Router choices over time, each module's share of all activations, choices as a heat map, prototypes in two dimensions:
    2 x 2 panels.

    `routing` is what `routing_latest.npz` holds. Each panel shows the last block's experts and, beside or below them, its heads.
    """
    routing = routing or {}
    saved = [key.removesuffix(".proto") for key in routing if key.endswith(".proto")]
    layers = _last_of_each_kind(layer_names(rows) or saved)
    figure = new_figure(10.5, max(8.4, 3.4 * len(layers)) if layers else 3.5)
    measured = any(_measured(rows, routing, layer) for layer in layers)
    panels = figure.add_gridspec(2, 2)
    for k, (title, draw) in enumerate(EXPERT_PANELS):
        panel = figure.add_subfigure(panels[k // 2, k % 2])
        over_time, cells = draw in (_choices, _heat), max(len(layers), 1)
        shape = (cells, 1)
        if draw is _prototypes:
            shape = (1, cells) if cells <= 2 else (-(-cells // 2), 2)
        axes: list[Axes] = list(np.ravel(panel.subplots(*shape, sharex=over_time)))
        for ax in axes:
            style(ax)
        style(axes[0], title)
        if not layers:
            empty(axes[0], NO_LAYERS if rows else NOTHING)
        for ax in axes[max(len(layers), 1) :]:
            ax.set_axis_off()
        for ax, layer in zip(axes, layers, strict=False):
            if over_time and not len(loads(rows, layer)[0]):
                empty(ax, "no loads logged yet")
                continue
            if over_time:
                step_axis(ax)
            draw(ax, layer, rows, routing)
        legend(*((axes[: shape[1]][::-1] + axes[shape[1] :]) if draw is _prototypes else axes))
        if draw is _prototypes and layers and not measured:
            axes[0].text(
                0.02, 0.02, f"goodness: {NOT_MEASURED}", transform=axes[0].transAxes, fontsize=8, color=MUTED, style="italic"
            )
    return figure
