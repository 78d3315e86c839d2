"""The benchmark's own arithmetic, and the GPU script at a tiny size on this CPU."""

import json
import math

import gpu
import numpy as np
import pytest

from tinyonn_jax.layers.kernels import padded, ragged


def test_parity_and_attention_pass_here():
    rows = [*gpu.parity(gpu.TINY), *gpu.attending(gpu.TINY)]
    assert [row.ok for row in rows] == [True] * (len(rows) - 1) + [None]  # the last asks for cuDNN
    assert {row.row.split()[1].rstrip(",") for row in rows} >= {"loop", "ragged", "pallas", "padded", "dense"}


def test_what_is_timed_on_a_gpu_runs_here(monkeypatch):
    monkeypatch.setattr(gpu, "usable", lambda: ["loop", "padded"])
    found = [row for section in (gpu.against_cpu, gpu.training, gpu.evaluation, gpu.routed) for row in section(gpu.TINY)]
    assert not [row for row in found if row.error]
    unknown = ["step: gradients", "training: arc1, share", "evaluation: share"]  # on a CPU
    assert all(row.value or any(row.row.startswith(name) for name in unknown) for row in found)
    *_, loop, blocks, best = found
    assert best.value == min(loop.value, blocks.value)


def test_parity_finds_a_kernel_that_is_wrong(monkeypatch):
    monkeypatch.setattr(gpu, "usable", lambda: ["padded", "ragged"])
    monkeypatch.setattr(padded, "forward", lambda x, w, sizes: 2 * ragged.forward(x, w, sizes))
    assert {(row.row.split()[1], row.ok) for row in gpu.parity(gpu.TINY)} == {("padded,", False), ("ragged,", True)}


def test_what_fails_or_has_no_time_is_said(monkeypatch, tmp_path):
    def broken(sizes):
        yield gpu.attempt("one", 1.0, lambda: math.sqrt(-1))
        yield gpu.Row("two", 2.0, 1.0)
        yield gpu.Row("three", 2.0, 1.0, least=True)
        yield gpu.attempt("four", 3.0, lambda: np.float64(2.0))
        raise MemoryError("too small")

    monkeypatch.setattr(gpu, "SECTIONS", (broken, broken))
    file = tmp_path / "rows.json"
    assert not gpu.report(gpu.rows(gpu.TINY, 60), file)
    rows = json.loads(file.read_text())[:5]
    assert [(row["value"], row["ok"]) for row in rows] == [(None, False), (2.0, False), (2.0, True), (2.0, True), (None, False)]
    *late, took = gpu.rows(gpu.TINY, -1)
    assert [(row.row, row.ok) for row in late] == [("broken: no time left", None)] * 2 and took.unit == "s"


def test_rows_are_on_disk_before_the_next_one_is_measured(tmp_path):
    file = tmp_path / "rows.json"

    def rows():
        for n in range(3):
            yield gpu.Row(f"row {n}", n)
            assert len(json.loads(file.read_text())) == n + 1

    assert gpu.report(rows(), file)


def test_relative_error_is_the_worst_array():
    assert gpu.distance((np.array([3.0, 4.0]), np.ones(2)), (np.array([3.0, 4.5]), np.ones(2))) == pytest.approx(
        0.5 / math.hypot(3.0, 4.5)
    )
