"""Reading metrics: columns out of the rows of metrics.jsonl, and numbers as a person writes them.

A row is one logged step; any key of it may be missing or null. Layers are nested: row["layers"]["block.feedforward"]["load"].
Letters: S logged steps that hold the value, M modules of one routed layer.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from jaxtyping import Float

from tinyonn_jax.config import EvalConfig

Row = Mapping[str, Any]


def lookup(row: Row, *path: str | int) -> Any:
    """The value at nested keys, or places in a list, or None where any of them is missing."""
    value: Any = row
    for key in path:
        if isinstance(value, Mapping):
            value = value.get(key)
        else:
            value = value[key] if isinstance(value, list) and value and isinstance(key, int) else None
    return value


def column(rows: Sequence[Row], *path: str | int) -> tuple[Float[np.ndarray, "S"], Float[np.ndarray, "S"]]:
    """Steps and values of one scalar metric, over the rows that have it."""
    found = [(row["step"], v) for row in rows if isinstance(v := lookup(row, *path), int | float) and np.isfinite(v)]
    steps, values = zip(*found, strict=True) if found else ((), ())
    return np.asarray(steps, float), np.asarray(values, float)


def loads(rows: Sequence[Row], layer: str) -> tuple[Float[np.ndarray, "S"], Float[np.ndarray, "S M"]]:
    """Steps and each module's share of its layer's activations, of stacked blocks the last one's; modules that joined later count
    0 before."""
    found = [(row["step"], v) for row in rows if isinstance(v := lookup(row, "layers", layer, "load"), list) and v]
    found = [(step, v[-1] if isinstance(v[-1], list) else v) for step, v in found]
    table = np.zeros((len(found), max((len(load) for _, load in found), default=0)))
    for i, (_, load) in enumerate(found):
        table[i, : len(load)] = [0.0 if share is None else share for share in load]
    return np.asarray([step for step, _ in found], float), table


def layer_names(rows: Sequence[Row]) -> list[str]:
    """Routed layers in the order they were logged; empty for a network without routers."""
    return list(dict.fromkeys(name for row in rows for name in (lookup(row, "layers") or {})))


def latest(rows: Sequence[Row]) -> dict[str, float]:
    """The newest finite value of every scalar metric at the top level."""
    names = dict.fromkeys(key for row in rows for key in row)
    return {name: float(values[-1]) for name in names if len(values := column(rows, name)[1])}


def training_seconds(rows: Sequence[Row]) -> float:
    """Seconds of training so far, over all starts of the run; 0 before the first row."""
    _, seconds = column(rows, "seconds")
    return float(seconds[-1]) if len(seconds) else 0.0


def how_scored(score: Mapping[str, Any]) -> str:
    """What a score in score.json was made by: its views, and what else of the configuration bears on it and is not as by default,
    as in `16 views, finalists 16`."""
    views, usual = score["augmentations"], asdict(EvalConfig())
    options = {k: v for k, v in score.get("eval", {}).items() if k not in ("augmentations", "batch") and v != usual.get(k)}
    said = [name.replace("_", " ") + ("" if value is True else f" {value}") for name, value in options.items()]
    return ", ".join([f"{views} view{'s' * (views != 1)}", *said])


def percent(share: float | None) -> str:
    """A share in [0, 1] with one decimal: 0.611 is `61.1 %`."""
    return "–" if share is None or not np.isfinite(share) else f"{100 * share:.1f} %"


def count(number: float) -> str:
    """A count with three digits and a letter: 12345 is `12.3 k`."""
    for letter in ("", " k", " M", " G"):
        if abs(number) < 999.5:
            return f"{number:.3g}{letter}"
        number /= 1000
    return f"{number:.3g} T"


def duration(seconds: float) -> str:
    """Seconds as h:mm:ss, or m:ss under an hour."""
    minutes, rest = divmod(max(round(seconds), 0), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
