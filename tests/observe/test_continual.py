"""The table and the picture of continual learning, from matrices made by hand."""

import json

import numpy as np
import pytest
from matplotlib.text import Text

from tinyonn_jax.config import ConfigError
from tinyonn_jax.observe import continual

KEPT = [[0.0, 0.0], [0.5, 0.1], [0.5, 0.9]]
LOST = [[0.0, 0.0], [0.7, 0.3], [0.1, 0.5]]


def write_run(folder, matrix):
    folder.mkdir(parents=True)
    rows = [{"step": 10 * i, "stage_acc": row, "stage_exact": [0.0, 0.5]} for i, row in enumerate(matrix)]
    rows.insert(1, {"step": 1, "main_loss": 2.0})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def results(tmp_path):
    runs = {"dense/none": [KEPT, LOST], "dfc/msaps": [KEPT]}
    return continual.summarize(
        {name: [write_run(tmp_path / f"{name}-{i}", m) for i, m in enumerate(matrices)] for name, matrices in runs.items()}
    )


def test_a_network_is_averaged_over_its_seeds(results):
    found = results["dense/none"]["stage_acc"]
    assert found["matrices"] == [KEPT, LOST]
    assert found["average_accuracy"]["mean"] == pytest.approx((0.7 + 0.3) / 2)
    assert found["forgetting"]["mean"] == pytest.approx((0.0 + 0.6) / 2)
    assert found["forward_transfer"]["mean"] == pytest.approx((0.1 + 0.3) / 2)


def test_intervals_are_students():
    mean, half = continual.interval([1.0, 2.0, 3.0])
    assert mean == 2 and half == pytest.approx(4.302653 / np.sqrt(3))  # t of two degrees of freedom, deviation 1
    assert np.isnan(continual.interval([1.0])[1])


def test_the_table_gives_intervals_where_there_are_several_seeds(results):
    header, (dense, dfc) = continual.lines(results)
    assert header[0] == "network" and header[-1] == "whole grids" and "forgetting" in header
    assert dense[:2] == ["dense/none", "50.0 ± 254.1"]
    assert dfc == ["dfc/msaps", "70.0", "70.0", "0.0", "0.0", "10.0", "25.0"]


def test_the_picture_has_a_panel_for_each_network(results):
    figure = continual.figure(results)
    said = [text.get_text() for text in figure.findobj(Text)]
    assert any(text.startswith("dense/none") and "forgot 30.0 %" in text for text in said)
    image = figure.axes[1].images[0].get_array()
    np.testing.assert_array_equal(image, KEPT)


def test_what_is_written_is_json_and_a_picture(results, tmp_path):
    table, picture = continual.write(tmp_path, results)
    read = json.loads(table.read_text(), parse_constant=pytest.fail)
    assert read["dfc/msaps"]["stage_acc"]["forgetting"] == {"mean": 0.0, "half_width": None}
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_an_unfinished_run_is_named(tmp_path):
    with pytest.raises(ConfigError, match="2 rows of stage_acc; finish it with"):
        continual.summarize({"dense/none": [write_run(tmp_path / "a", KEPT[:2])]})
    with pytest.raises(ConfigError, match="0 rows"):
        continual.matrix(tmp_path)
