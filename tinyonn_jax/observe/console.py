"""What a run says in the terminal: live progress, ARC grids as coloured blocks, tables.

On a terminal rich draws; piped, or on a terminal that cannot move its cursor, plain lines come out, one per logged step, without
escape codes. Processes other than 0 say nothing. Everything fits 40 columns.
"""

import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Self

from rich.color import Color
from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.measure import Measurement
from rich.progress_bar import ProgressBar
from rich.style import Style
from rich.table import Column, Table
from rich.text import Text

from tinyonn_jax.observe.answers import ARC_COLOURS, Grid
from tinyonn_jax.observe.metrics import count, duration, percent

FIELDS: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("main_loss", "loss", "{:.4f}".format),
    ("main_acc", "acc", percent),
    ("exact", "grids", percent),
    ("valid_exact", "val grids", percent),
    ("tokens_per_second", "tokens/s", count),
    ("active_share", "active", percent),
    ("dropped", "dropped", percent),
)


def _console() -> Console:
    return Console(file=sys.stdout)


def _live(console: Console) -> bool:
    return console.is_terminal and not console.is_dumb_terminal


def _fields(metrics: Mapping[str, Any]) -> list[str]:
    return [f"{label} {form(metrics[key])}" for key, label, form in FIELDS if metrics.get(key) is not None]


class Progress:
    """Progress of a run of `total` steps that (re)starts after step `start`; a context manager.

    `update` takes a row of metrics; `line` says something above the bar. `process` other than 0 is silent.
    """

    def __init__(self, total: int, start: int = 0, process: int = 0, console: Console | None = None):
        self.total, self.step, self.start, self.silent = total, start, start, process != 0
        self.console = console or _console()
        self._metrics: Mapping[str, Any] = {}
        self._first: tuple[float, int] | None = None
        self._display = Live(self, console=self.console, auto_refresh=False) if _live(self.console) and not self.silent else None

    def __enter__(self) -> Self:
        if self._display:
            self._display.start(refresh=True)
        return self

    def __exit__(self, *_: object) -> None:
        if self._display:
            self._display.stop()

    def update(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Shows a logged step. Time left follows from the pace since the first update, which is after compilation."""
        self.step, self._metrics = step, metrics
        self._first = self._first or (time.monotonic(), step)
        if self._display:
            self._display.refresh()
        else:
            self.line("  ".join([f"step {step}/{self.total}", *_fields(metrics), *self._left()]))

    def line(self, text: str) -> None:
        """One line of text, above the live display; unstyled."""
        if not self.silent:
            _say(self.console, text)

    def _left(self) -> list[str]:
        if self._first is None or self.step <= self._first[1]:
            return []
        pace = (time.monotonic() - self._first[0]) / (self.step - self._first[1])
        return [f"{duration(pace * (self.total - self.step))} left"]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = options.max_width
        place = f" {self.step}/{self.total}"
        table = Table.grid(Column(ratio=1), Column(no_wrap=True), expand=True)
        table.add_row(ProgressBar(total=max(self.total, 1), completed=self.step), place)
        yield table
        lines = [""]
        for item in [*_fields(self._metrics), *self._left()] or ["the first step compiles"]:
            if lines[-1] and len(lines[-1]) + 2 + len(item) > width:
                lines.append("")
            lines[-1] += ("  " if lines[-1] else "") + item
        for line in lines:
            yield Text(line, style="dim" if not self._metrics else "", no_wrap=True, overflow="crop")


def _say(console: Console, text: str) -> None:
    """A line as it is: on a terminal through rich, so that a live display makes way; else never wrapped."""
    if _live(console):
        console.print(text, markup=False, highlight=False)
    else:
        print(text, file=console.file, flush=True)


def _plain_grid(grid: Grid | None) -> list[str]:
    return ["no answer"] if grid is None else ["".join(map(str, row)) for row in grid]


def _block_grid(grid: Grid | None, cell: int) -> Text:
    if grid is None:
        return Text("no answer", style="italic")
    styles = [Style(bgcolor=Color.parse(colour)) for colour in ARC_COLOURS]
    return Text("\n").join(Text.assemble(*((" " * cell, styles[int(value)]) for value in row)) for row in grid)


def print_grids(grids: Sequence[tuple[str, Grid | None]], console: Console | None = None) -> None:
    """ARC grids under their titles, as many side by side as fit: coloured blocks, or digits when piped, under NO_COLOR, and on
    terminals of sixteen colours, where two of ARC's ten would look alike."""
    console = console or _console()
    coloured = _live(console) and not os.environ.get("NO_COLOR") and console.color_system in ("256", "truecolor")
    width = console.width
    cell = 2 if coloured and all(2 * len(grid[0]) <= width for _, grid in grids if grid is not None) else 1
    pictures = []
    for title, grid in grids:
        columns = max(len(title), 9 if grid is None else cell * len(grid[0]))
        columns = min(columns, width) if _live(console) else columns  # piped, nothing is cut
        pictures.append((title, columns, _block_grid(grid, cell) if coloured else Text("\n".join(_plain_grid(grid)))))
    while pictures:
        shown, used = 0, 0
        while shown < len(pictures) and (shown == 0 or used + 3 + pictures[shown][1] <= width):
            used += pictures[shown][1] + (3 if shown else 0)
            shown += 1
        row, pictures = pictures[:shown], pictures[shown:]
        line = _open_table(Column(title, width=columns, no_wrap=True) for title, columns, _ in row)
        line.add_row(*(picture for _, _, picture in row))
        _emit(console, line)
        _say(console, "")


def _open_table(columns: Iterable[Column]) -> Table:
    return Table(*columns, box=None, pad_edge=False, padding=(0, 3, 0, 0))


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]], console: Console | None = None) -> None:
    """A titled table, its first column flush left and the others right; piped, as wide as its text, without escape codes. Where
    a terminal is too narrow for it, one row after the other, a line for each column."""
    console = console or _console()
    grid = _open_table(Column(name, justify="right" if i else "left", overflow="fold") for i, name in enumerate(header))
    for row in rows:
        grid.add_row(*map(Text, row))
    if _live(console) and Measurement.get(console, console.options.update(max_width=10_000), grid).maximum > console.width:
        lines = ["\n".join(f"  {name or '–'}: {cell}" for name, cell in zip(header[1:], rest, strict=True)) for _, *rest in rows]
        console.print(Text("\n".join([title, *(f"{row[0]}\n{line}" for row, line in zip(rows, lines, strict=True))])))
        return
    print(title, file=console.file, flush=True)  # not the table's, which would break it to its own width
    _emit(console, grid)


def _emit(console: Console, grid: Table) -> None:
    if _live(console):
        console.print(grid)
        return
    plain = Console(file=console.file, width=10_000, no_color=True, force_terminal=False)
    with plain.capture() as capture:
        plain.print(grid)
    print("\n".join(line.rstrip() for line in capture.get().splitlines()), file=console.file, flush=True)
