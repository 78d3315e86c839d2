import io
import re

import pytest
from rich.cells import cell_len
from rich.console import Console

from tests.observe import synthetic
from tinyonn_jax.observe import console as terminal
from tinyonn_jax.observe.console import Progress, print_grids

ROW = {
    "main_loss": 0.1234,
    "main_acc": 0.912,
    "exact": 0.4,
    "valid_exact": None,
    "tokens_per_second": 16_234.0,
    "active_share": 0.25,
}
ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def piped(**kwargs):
    return Console(file=io.StringIO(), force_terminal=False, **kwargs)


def tty(width=40, colours="truecolor"):
    return Console(file=io.StringIO(), force_terminal=True, width=width, height=24, color_system=colours, _environ={})


def output(console):
    return console.file.getvalue()


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now[0])
    return now


def test_piped_progress_is_one_plain_line_a_row(clock):
    console = piped(width=20)
    with Progress(2200, console=console) as progress:
        progress.line("data: [bold]30[/bold] tasks " + "x" * 100)
        progress.update(20, ROW)
        clock[0] += 10
        progress.update(120, ROW)
    text = output(console)
    assert "\x1b" not in text and "\r" not in text
    assert text.splitlines() == [
        "data: [bold]30[/bold] tasks " + "x" * 100,
        "step 20/2200  loss 0.1234  acc 91.2 %  grids 40.0 %  tokens/s 16.2 k  active 25.0 %",
        "step 120/2200  loss 0.1234  acc 91.2 %  grids 40.0 %  tokens/s 16.2 k  active 25.0 %  3:28 left",
    ]  # 100 steps took 10 s, 2080 remain: 208 s


def test_other_processes_say_nothing():
    for console in (piped(), tty()):
        with Progress(100, process=1, console=console) as progress:
            progress.line("hello")
            progress.update(10, ROW)
        assert output(console) == ""


@pytest.mark.parametrize("width", [40, 100])
def test_live_progress_fits_the_terminal(width, clock):
    console = tty(width)
    with Progress(2200, console=console) as progress:
        progress.line("a note that is a good deal longer than forty columns")
        for row in synthetic.rows(every=550):
            clock[0] += 60
            progress.update(row["step"], row)
    text = output(console)
    assert "\x1b[" in text
    for said in ("2200/2200", "loss 0.0", "acc 9", "val grids ", "tokens/s 16", "active 25.0 %", "0:00 left"):
        assert said in text, "nothing is cropped"
    lines = re.split(r"[\r\n]+", ESCAPE.sub("", re.sub(r"\x1b\[\d*[AF]", "\n", text)))
    assert max(cell_len(line) for line in lines) <= width
    assert "\x1b[?25h" in text.split("2200/2200")[-1], "the cursor is shown again"


def test_a_dumb_terminal_gets_plain_lines():
    console = Console(file=io.StringIO(), force_terminal=True, _environ={"TERM": "dumb"})
    with Progress(10, console=console) as progress:
        progress.update(5, ROW)
    assert "\x1b" not in output(console) and output(console).startswith("step 5/10  loss")


def test_an_error_inside_leaves_the_terminal_usable():
    console = tty()
    with pytest.raises(ZeroDivisionError), Progress(10, console=console):
        _ = 1 / 0
    assert output(console).rstrip("\n").endswith("\x1b[?25h")


GRIDS = [("input", [[0, 1, 2], [3, 4, 5]]), ("attempt 1", [[9, 9]]), ("attempt 2", None)]


def test_grids_are_digits_when_piped():
    console = piped()
    print_grids(GRIDS, console)
    assert output(console) == "input   attempt 1   attempt 2\n012     99          no answer\n345\n\n"
    console = piped(width=20)
    print_grids([("input", [[7] * 30])], console)
    assert output(console).split() == ["input", "7" * 30]


def test_grids_are_coloured_blocks_on_a_terminal_and_digits_under_no_color(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    console = tty(60)
    print_grids(GRIDS, console)
    assert "\x1b[48;2;0;116;217m  \x1b[0m" in output(console), "blue is colour 1"
    monkeypatch.setenv("NO_COLOR", "1")
    console = tty(60)
    print_grids(GRIDS, console)
    assert "48;2" not in output(console) and "012" in output(console)


def test_grids_are_digits_where_two_colours_would_look_alike(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    for colours, alike in (("standard", True), ("256", False)):
        console = tty(60, colours)
        print_grids([("all", [list(range(10))])], console)
        assert ("0123456789" in output(console)) == alike
    assert len(set(re.findall(r"\[(48;[\d;]+)m", output(console)))) == 10


@pytest.mark.parametrize("side", [3, 18, 30])
def test_grids_fit_a_narrow_terminal(side, monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    console = tty(40)
    print_grids([(name, [[i % 10 for i in range(side)]] * 2) for name in ("input", "truth", "attempt 1")], console)
    text = output(console)
    assert max(cell_len(line) for line in ESCAPE.sub("", text).splitlines()) <= 40
    assert text.count("\x1b[48;2;0;116;217m") == 3 * 2 * (side // 10 + (side % 10 > 1)), "no cell is lost"


def test_table_is_aligned_and_plain_when_piped():
    console = piped(width=30)
    terminal.table("Scores", ["run", "pass@2"], [["runs/[a]", "61.1 %"], ["runs/a-rather-long-name", "3 %"]], console)
    assert output(console).splitlines() == [
        "Scores",
        "run                       pass@2",
        "runs/[a]                  61.1 %",
        "runs/a-rather-long-name      3 %",
    ]


def test_table_folds_on_a_narrow_terminal():
    console = tty(24)
    terminal.table("Scores", ["run", "pass@2"], [["runs/a-rather-long-name", "61.1 %"]], console)
    assert max(cell_len(line) for line in ESCAPE.sub("", output(console)).splitlines()) <= 24
