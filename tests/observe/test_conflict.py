import numpy as np
from matplotlib.text import Text

from tinyonn_jax.observe.conflict import conflict_figure


def rows(cosines):
    return [{"step": 10 * i, "cosine": c, "shared_share": 0.5, "task_loss": 1.0} for i, c in enumerate(cosines)]


def test_means_over_seeds_and_what_is_undefined():
    figure = conflict_figure({"one": [rows([0.2, -0.4, None]), rows([0.4, -0.8, 0.1])], "two": [rows([None] * 3)]})
    cosine, shared, _ = figure.axes
    curves = {line.get_label(): line.get_xydata() for line in cosine.lines}
    np.testing.assert_allclose(curves["one"], [(0, 0.3), (10, -0.6)])  # at the last step only one seed has it
    assert "two" not in curves
    assert "two: undefined" in [text.get_text() for text in cosine.findobj(Text)]
    assert {line.get_label() for line in shared.lines} == {"one", "two"}
    (band,) = (c for c in cosine.collections)
    np.testing.assert_allclose([band.get_paths()[0].vertices[:, 1].min(), band.get_paths()[0].vertices[:, 1].max()], [-0.8, 0.4])
