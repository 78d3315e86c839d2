"""Writing what a run measures: one JSON object per logged step in `metrics.jsonl`, the same scalars for TensorBoard.

A run that was killed and resumed leaves the same `metrics.jsonl` as one that was not: rows after the step resumed from, and a
last line torn by the kill, are dropped before anything is appended. A row is on disk when `write` returns.
"""

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np
from tensorboardX import SummaryWriter

from tinyonn_jax.config import ConfigError
from tinyonn_jax.observe.files import METRICS, write_atomically


def plain(value: Any) -> Any:
    """Arrays and their scalars as JSON numbers and lists, float32 in its shortest exact form, non-finite numbers as None."""
    if isinstance(value, Mapping):
        return {str(key): plain(v) for key, v in value.items()}
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, float):  # np.float64 too
        return float(value) if math.isfinite(value) else None
    array = np.asarray(value)
    if array.ndim:
        return [plain(v) for v in array]
    return plain(float(str(array)) if array.dtype.kind not in "biu" else array.item())


def _scalars(metrics: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for name, value in metrics.items():
        if isinstance(value, Mapping):
            yield from _scalars(value, f"{prefix}{name}/")
        elif isinstance(value, int | float):
            yield prefix + name, value


def _rows(text: str, source: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each line with its object; a last line that a kill tore off is passed over."""
    lines = text.splitlines()
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line, parse_constant=lambda _: None)  # NaN and Infinity, by another program
            _ = row["step"] + 1
        except (ValueError, RecursionError, KeyError, TypeError):
            if number < len(lines):
                raise ConfigError(f"{source}: line {number} is not a row of metrics; delete that line") from None
            return
        yield line, row


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


def read_metrics(folder: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The rows of a run folder's `metrics.jsonl`, oldest first; none when there is no such file. A torn last line is left out.

    Raises:
        ConfigError: a line before the last is not a JSON object with a step.
    """
    path = Path(folder) / METRICS
    return [row for _, row in _rows(_text(path), path)]


class MetricsWriter:
    """Appends rows to `folder/metrics.jsonl` and scalars to `folder/tensorboard/`; use as a context manager, or `close`.

    `resume_step` is the step of the checkpoint that the run continues from (0: from the start; every row is dropped).

    Raises:
        ConfigError: `metrics.jsonl` holds something else.
    """

    def __init__(self, folder: str | os.PathLike[str], resume_step: int = 0):
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / METRICS
        before = _text(path)
        kept = "".join(f"{line}\n" for line, row in _rows(before, path) if resume_step and row["step"] <= resume_step)
        if kept != before:
            write_atomically(path, kept)
        self._file = path.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=resume_step + 1)

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """One row: numbers, arrays, strings, nested dicts of them. NaN and infinity become null; TensorBoard gets the scalars."""
        row = plain({"step": step} | dict(metrics))
        self._file.write(json.dumps(row, allow_nan=False) + "\n")
        self._file.flush()
        for tag, value in _scalars(row):
            if tag != "step":
                self._board.add_scalar(tag, value, step)
        self._board.flush()

    def close(self) -> None:
        self._file.close()
        self._board.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
