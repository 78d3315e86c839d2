"""The main job's command line, in a process of its own and in this one."""

import sys
from pathlib import Path

import arc
import pytest

from tinyonn_jax import cli

ROOT = Path(__file__).parents[2]


def command(*args: str | Path) -> list[str]:
    return [sys.executable, "experiments/arc.py", *map(str, args)]


def here(monkeypatch: pytest.MonkeyPatch, *args: str | Path) -> int:
    """A command in this process, which has eight devices; the exit status."""
    monkeypatch.setattr(sys, "argv", ["experiments/arc.py", *map(str, args)])
    try:
        return cli.guard(arc.main)
    except SystemExit as exit:
        return int(exit.code or 0)
