import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.image import imread
from matplotlib.text import Text

from tests.observe import synthetic
from tinyonn_jax.observe import axes, figures
from tinyonn_jax.observe.compare import _apart, compare_figure
from tinyonn_jax.observe.figures import NO_LAYERS, NOT_MEASURED, core_metrics, expert_dashboard, write_dashboards
from tinyonn_jax.observe.grids import task_figure


def texts(figure):
    return [text.get_text() for text in figure.findobj(Text)]


def panel(figure, title):
    return next(ax for ax in figure.axes if ax.get_title(loc="left") == title)


def drawn(ax):
    """Every labelled curve of a panel, as (steps, values)."""
    return {line.get_label(): line.get_xydata() for line in ax.lines if not str(line.get_label()).startswith("_")}


def test_dashboards_are_png_files_of_readme_size(run):
    for path in write_dashboards(run):
        height, width = imread(path).shape[:2]
        assert path.parent == run / "figures" and width == 1680 and height >= 500
        assert imread(path).std() > 0.05
    assert sorted(p.name for p in (run / "figures").iterdir()) == ["core_metrics_latest.png", "expert_dashboard_latest.png"]


def test_core_metrics_draw_what_was_logged():
    figure = core_metrics(synthetic.rows(steps=200, every=20, validate=100))
    curves = drawn(panel(figure, "Accuracy"))
    logged = synthetic.rows(steps=200, every=20, validate=100)
    np.testing.assert_allclose(curves["token"][:, 1], [row["main_acc"] for row in logged])
    np.testing.assert_allclose(curves["grid, val."], [(r["step"], r["valid_exact"]) for r in logged if "valid_exact" in r])
    assert 100 not in drawn(panel(figure, "Loss"))["main"][:, 0], "the skipped step has no loss"
    assert len(drawn(panel(figure, "Loss"))["main"]) == 9


def test_active_and_alive_modules_by_hand():
    layers = [
        {"feedforward": {"load": [0.5, 0.25, 0.25, 0.0], "active_share": 0.5}},
        {"feedforward": {"load": [1.0, 0.0, 0.0, 0.0], "active_share": 0.25}},
    ]
    figure = core_metrics([{"step": 10 * (i + 1), "layers": layer} for i, layer in enumerate(layers)])
    assert drawn(panel(figure, "Active modules"))["experts"].tolist() == [[10, 2], [20, 1]]
    assert drawn(panel(figure, "Modules in use"))["experts, of 4"].tolist() == [[10, 3], [20, 1]]


def test_panels_without_data_say_so():
    dense = synthetic.rows(steps=400, routed=False)
    assert texts(core_metrics(dense)).count(NO_LAYERS) == 4
    assert texts(core_metrics(dense)).count(NOT_MEASURED) == 1
    assert texts(expert_dashboard(dense)).count(NO_LAYERS) == 4
    unknown = [{"step": 10, "layers": {"block.attention": {"load": None, "active_share": None}}}]
    assert texts(core_metrics(unknown)).count(NOT_MEASURED) == 5 and NO_LAYERS not in texts(core_metrics(unknown))
    assert texts(core_metrics([])).count("nothing logged yet") == 6
    assert texts(expert_dashboard([])).count("nothing logged yet") == 4
    assert texts(expert_dashboard(synthetic.rows(steps=400))).count("no routing snapshot yet") == 4
    assert texts(expert_dashboard([], synthetic.routing())).count("no loads logged yet") == 4
    routed = texts(core_metrics(synthetic.rows(steps=400))) + texts(
        expert_dashboard(synthetic.rows(steps=400), synthetic.routing())
    )
    assert not {NO_LAYERS, NOT_MEASURED, f"goodness: {NOT_MEASURED}", "no routing snapshot yet"} & set(routed)


def test_goodness_that_no_rule_measured_is_not_called_bad():
    routing = {key: value * (not key.endswith("goodness")) for key, value in synthetic.routing().items()}
    said = texts(expert_dashboard(synthetic.rows(steps=400), routing))
    assert f"goodness: {NOT_MEASURED}" in said and "used" in said and "bad" not in said


def test_neurons_by_verdict_and_their_shares():
    name, load = "block.attention.q", [[0.5, 0.25, 0.25, 0.0], [0.25, 0.5, 0.25, 0.0]]
    rows = [{"step": 10 * (i + 1), "layers": {name: {"load": use, "goodness": [0] * 4}}} for i, use in enumerate(load)]
    routing = {f"{name}.proto": np.eye(4), f"{name}.load": np.array(load[1]), f"{name}.goodness": np.zeros(4)}
    assert f"goodness: {NOT_MEASURED}" not in texts(expert_dashboard(rows, routing))
    routing[f"{name}.goodness"] = np.array([1.0, -1, 0, 0])
    found = [(mask.tolist().index(True), label, colour) for mask, label, colour, _ in figures._verdicts(routing, name, 4)]
    assert found == list(
        zip(range(4), ("good", "bad", "used", "inactive"), (axes.GREEN, axes.RED, axes.SKY, axes.MUTED), strict=True)
    )
    heat = panel(expert_dashboard([{"step": 1, "layers": None}, *rows], routing), "Share of activations")
    (mesh,) = heat.collections
    assert heat.get_ylim() == (-0.5, 3.5)
    np.testing.assert_array_equal(np.reshape(mesh.get_array(), (4, 2)), np.transpose(load))


def test_prototypes_in_use_are_named_and_neighbours_share_a_label():
    proto = np.array([[0, 0], [0.1, 0], [10, 0], [10, 0.1], [10, 0.2], [10, 0.3], [5, 9], [5, 0]])
    routing = {"experts.proto": proto, "experts.load": np.array([1, 1, 1, 1, 1, 1, 1, 0]) / 7}
    said = texts(expert_dashboard([], routing))
    assert {"0, 1", "4 of them", "6"} <= set(said) and "7" not in said
    routing["experts.load"] = np.array([0, 0, 1, 1, 1, 1, 0, 0]) / 4  # near, for the extent is that of all
    assert "4 of them" in texts(expert_dashboard([], routing))
    routing["experts.load"] = np.zeros(8)
    assert "6" not in texts(expert_dashboard([], routing))


def test_only_the_last_block_of_many_is_shown():
    layer = {"load": [0.5, 0.5], "active_share": 1.0}
    layers = {f"{block}.{kind}": layer for block in range(3) for kind in ("attention", "feedforward")}
    rows = [{"step": step, "layers": layers} for step in (10, 20)]
    said = texts(expert_dashboard(rows))
    assert "2 experts" in said and "2 heads" in said and "0 experts" not in said


def test_what_blocks_share_is_shown_of_the_last():
    layer = {
        "load": [[0.5, 0.5], [1.0, 0.0]],
        "active_share": 0.75,
        "active_share_by_block": [1.0, 0.5],
        "kl": 1.0,
        "kl_by_block": [0.9, 0.1],
    }
    figure = core_metrics([{"step": step, "layers": {"feedforward": layer}} for step in (10, 20)])
    assert drawn(panel(figure, "Active modules"))["experts"].tolist() == [[10, 1], [20, 1]]
    assert drawn(panel(figure, "Modules in use"))["experts, of 2"].tolist() == [[10, 1], [20, 1]]
    assert drawn(panel(figure, "Routing KL"))["experts"].tolist() == [[10, 0.1], [20, 0.1]]


def test_shares_of_many_modules_can_be_read():
    load = (np.arange(1.0, 513) / np.arange(1.0, 513).sum()).tolist()
    rows = [{"step": step, "layers": {"feedforward": {"load": load, "active_share": 0.004}}} for step in (10, 20)]
    routing = {"feedforward.proto": np.eye(512, 4), "feedforward.usage": np.array(load)}
    for figure in (core_metrics(rows), expert_dashboard(rows, routing)):
        figure.canvas.draw()
        for ax in figure.findobj(Axes):
            said = [label.get_text() for label in ax.get_yticklabels() if label.get_text().endswith("%")]
            assert len(set(said)) == len(said), said


def test_the_first_row_alone_is_a_point_at_its_step():
    figure = core_metrics([{"step": 1, "layers": {"feedforward": {"load": [0.5, 0.5], "active_share": 1.0}}}])
    figure.canvas.draw()
    for title in ("Active modules", "Modules in use"):
        ax = panel(figure, title)
        assert next(line for line in ax.lines if line.get_label().startswith("experts")).get_marker() == "o"
        assert {label.get_text() for label in ax.get_xticklabels()} <= {"0", "1", "2"}


def test_principal_axes_are_those_of_the_covariance():
    points = np.random.default_rng(0).normal(size=(9, 5)) * [3, 2, 1, 0.5, 0.1]
    flat, explained = figures._plane(points)
    values = np.sort(np.linalg.eigvalsh(np.cov(points.T)))[::-1]
    np.testing.assert_allclose(np.cov(flat.T), np.diag(values[:2]), atol=1e-12)
    np.testing.assert_allclose(explained, values[:2] / values.sum())
    assert figures._plane(np.ones((1, 4)))[0].shape == (1, 2)


def test_smoothing_keeps_constants_and_halves_nothing_at_the_ends():
    np.testing.assert_allclose(axes.smooth(np.full(100, 3.0)), 3.0)
    assert axes.smooth(np.arange(100.0))[0] == pytest.approx(1.0)  # mean of 0, 1, 2: half of a window of five


def test_compare_figure_draws_every_run_and_says_what_is_missing():
    figure = compare_figure({"a": synthetic.rows(steps=400), "b": [{"step": 1, "main_loss": 2.0}], "c": []})
    assert set(drawn(panel(figure, "Loss"))) == {"a", "b"}
    assert set(drawn(panel(figure, "Tokens per second"))) == {"a"}
    assert "not logged" in texts(compare_figure({"b": [{"step": 1, "main_loss": 2.0}]}))


def test_long_names_of_many_runs_stay_within_the_picture():
    runs = {f"{'a rather long name of a run, ' * 3}{i}": synthetic.rows(steps=40) for i in range(20)}
    figure = compare_figure(runs)
    figure.canvas.draw()
    (legend,) = figure.legends
    box, page = legend.get_window_extent(), figure.bbox
    assert box.x0 >= page.x0 and box.x1 <= page.x1 and box.y0 >= page.y0
    looks = {(line.get_color(), line.get_linestyle()) for line in panel(figure, "Loss").lines}
    assert len(looks) == 20
    assert panel(figure, "Loss").get_window_extent().height > 200
    assert _apart(["runs/a/1", "runs/b/2"]) == ["a/1", "b/2"] and _apart(["runs/a"]) == ["a"]


def test_names_of_any_kind_are_shown(tmp_path):
    """matplotlib takes the first for a formula, which is none, leaves the second out of legends, and has no such letters."""
    names = ("x$_$^", "_under", "空")
    figure = compare_figure({name: synthetic.rows(steps=40) for name in names})
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == [r"x\$_\$^", " _under", "空"]
    axes.save(figure, tmp_path / "names.png")
    grid = [[0, 1]]
    axes.save(task_figure(names[0], [{"input": grid, "truth": grid, "greedy": grid, "candidates": []}]), tmp_path / "task.png")
