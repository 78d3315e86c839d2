import math

import pytest

from tinyonn_jax.observe.metrics import column, count, duration, how_scored, latest, layer_names, loads, percent, training_seconds

ROWS = [
    {"step": 10, "loss": 2.0, "layers": {"feedforward": {"load": [1.0, 0.0], "active_share": 0.5}}},
    {"step": 20, "loss": None, "layers": {"attention": {"active_share": 0.25}}},
    {"step": 30, "loss": math.nan},
    {"step": 40, "loss": 1.0, "layers": {"feedforward": {"load": [0.5, None, 0.5]}}},
]


def test_column_skips_missing_null_and_nan():
    steps, values = column(ROWS, "loss")
    assert steps.tolist() == [10, 40] and values.tolist() == [2, 1]
    assert column(ROWS, "layers", "feedforward", "active_share")[1].tolist() == [0.5]
    assert column(ROWS, "layers", "feedforward", "active_share", "deeper")[1].shape == (0,)


def test_loads_pad_modules_that_joined_later():
    steps, table = loads(ROWS, "feedforward")
    assert steps.tolist() == [10, 40]
    assert table.tolist() == [[1, 0, 0], [0.5, 0, 0.5]]
    assert loads([], "feedforward")[1].shape == (0, 0)
    stacked = [{"step": 1, "layers": {"a": {"load": [[1.0, 0.0], [0.25, 0.75]]}}}]
    assert loads(stacked, "a")[1].tolist() == [[0.25, 0.75]]  # the last block


def test_layer_names_and_latest():
    assert layer_names(ROWS) == ["feedforward", "attention"]
    assert latest(ROWS) == {"step": 40, "loss": 1}


def test_training_seconds_are_those_of_the_last_row_that_has_any():
    assert training_seconds([{"step": 1, "seconds": 10.0}, {"step": 2, "seconds": 25.5}, {"step": 3}]) == 25.5
    assert training_seconds([]) == 0


@pytest.mark.parametrize(
    ("said", "wanted"),
    [
        (percent(0.6111), "61.1 %"), (percent(None), "–"), (percent(math.nan), "–"), (percent(0.0), "0.0 %"),
        (count(0), "0"), (count(999), "999"), (count(999.7), "1 k"), (count(12345), "12.3 k"), (count(211_328), "211 k"),
        (count(7e9), "7 G"), (count(3.2e12), "3.2 T"),
        (duration(0), "0:00"), (duration(59.6), "1:00"), (duration(3725), "1:02:05"), (duration(-3), "0:00"),
    ],
)  # fmt: skip
def test_numbers_as_a_person_writes_them(said, wanted):
    assert said == wanted


def test_how_a_score_was_made():
    assert how_scored({"augmentations": 1}) == "1 view"
    asked = {"augmentations": 300, "batch": 8, "decode": "search", "min_probability": 0.1, "finalists": 16, "blank_task": True}
    assert how_scored({"augmentations": 300, "eval": asked}) == "300 views, decode search, finalists 16, blank task"
