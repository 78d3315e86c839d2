import json
import os

import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from tinyonn_jax.config import ConfigError
from tinyonn_jax.observe import writers
from tinyonn_jax.observe.files import write_atomically
from tinyonn_jax.observe.writers import MetricsWriter, read_metrics


def events(folder):
    """Every event of every TensorBoard file, oldest file first, read by the record format: length, crc, bytes, crc."""
    for path in sorted((folder / "tensorboard").iterdir()):
        data, at = path.read_bytes(), 0
        while at < len(data):
            size = int.from_bytes(data[at : at + 8], "little")
            event = event_pb2.Event()
            event.ParseFromString(data[at + 12 : at + 12 + size])
            yield event
            at += size + 16


def test_rows_are_plain_json_on_disk_as_soon_as_written(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        layers = {"attention": {"usage_entropy": 0.9, "load": [np.float32(0.3)]}}
        arrays = {"a": np.float32(0.1), "b": jnp.asarray([0.1, jnp.nan]), "c": jnp.bfloat16(0.5), "i": jnp.int32(4)}
        writer.write(20, arrays | {"inf": float("inf"), "nan": np.float64("nan"), "none": None, "layers": layers})
        row = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=pytest.fail)
    assert row == {
        "step": 20, "a": 0.1, "b": [0.1, None], "c": 0.5, "i": 4, "inf": None,
        "nan": None, "none": None, "layers": {"attention": {"usage_entropy": 0.9, "load": [0.3]}},
    }  # fmt: skip
    assert next(iter(row)) == "step"


def test_float32_survives_bit_for_bit(tmp_path):
    values = np.random.default_rng(0).standard_normal(50).astype(np.float32)
    with MetricsWriter(tmp_path) as writer:
        writer.write(1, {"v": values})
    assert np.asarray(read_metrics(tmp_path)[0]["v"], np.float32).tobytes() == values.tobytes()


def test_tensorboard_holds_nested_scalars_and_no_lists(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.write(20, {"main_loss": 1.5, "bad": float("nan"), "layers": {"attention": {"usage_entropy": 0.25, "load": [1.0]}}})
    found = {value.tag: (event.step, value.simple_value) for event in events(tmp_path) for value in event.summary.value}
    assert found == {"main_loss": (20, 1.5), "layers/attention/usage_entropy": (20, 0.25)}


@pytest.mark.parametrize("tail", ["", '{"step": 60, "main_l', "\x00\x00", '{"step": 60}\n'])
def test_killed_and_resumed_equals_uninterrupted(tmp_path, tail):
    def write(folder, steps, resume=0):
        with MetricsWriter(folder, resume) as writer:
            for step in steps:
                writer.write(step, {"main_loss": step / 7})

    write(tmp_path / "whole", range(10, 101, 10))
    write(tmp_path / "killed", range(10, 51, 10))
    with (tmp_path / "killed" / "metrics.jsonl").open("a") as file:
        file.write(tail)
    write(tmp_path / "killed", range(40, 101, 10), resume=30)
    assert (tmp_path / "killed" / "metrics.jsonl").read_bytes() == (tmp_path / "whole" / "metrics.jsonl").read_bytes()
    assert not [name for name in os.listdir(tmp_path / "killed") if name.endswith(".tmp")]


def test_tensorboard_is_told_to_forget_steps_after_the_checkpoint(tmp_path):
    with MetricsWriter(tmp_path, resume_step=30) as writer:
        writer.write(40, {"main_loss": 1.0})
    starts = [event.step for event in events(tmp_path) if event.HasField("session_log")]
    assert starts == [31]


def test_reading_leaves_out_a_torn_last_line_and_keeps_a_whole_one(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert read_metrics(tmp_path) == []
    path.write_text('{"step": 1}\n{"step": 2}')
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2]
    path.write_bytes(b'{"step": 1}\n{"step": 2, "x": "\xc3')
    assert [row["step"] for row in read_metrics(tmp_path)] == [1]


@pytest.mark.parametrize("line", ["{", "[1]", '{"loss": 1}', "3"])
def test_a_damaged_line_in_the_middle_is_named(tmp_path, line):
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": 1}}\n{line}\n{{"step": 2}}\n')
    with pytest.raises(ConfigError, match=r"metrics\.jsonl: line 2 is not a row"):
        read_metrics(tmp_path)


def test_a_failed_replacement_leaves_the_old_file_and_no_rubbish(tmp_path, monkeypatch):
    path = write_atomically(tmp_path / "deep" / "file", "old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writers.os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        write_atomically(path, b"new")
    assert path.read_text() == "old" and os.listdir(path.parent) == ["file"]
