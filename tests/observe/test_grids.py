import numpy as np
from matplotlib.image import AxesImage
from matplotlib.text import Text

from tinyonn_jax.observe.answers import answers, judge, solved
from tinyonn_jax.observe.grids import task_figure

A, B, WIDE = [[1, 2], [3, 4]], [[1, 2], [3, 5]], [[1, 2, 0], [3, 4, 0]]


def entry(*candidates, truth=A, greedy=A):
    voted = [{"grid": grid, "votes": 3 - i, "logprob": -1.0} for i, grid in enumerate(candidates)]
    return {"input": B, "truth": truth, "greedy": greedy, "candidates": voted}


def said(figure):
    return [text.get_text() for text in figure.findobj(Text)]


def test_judge():
    assert judge(A, A) == (True, "right")
    assert judge(B, A) == (False, "1 of 4 cells off")
    assert judge(WIDE, A) == (False, "3 × 2, not 2 × 2")
    assert judge(None, A) == (False, "no answer")
    assert judge(A, None) == (None, "") and judge(None, None) == (None, "no answer")


def test_only_two_attempts_count_and_every_test_input_must_be_right():
    assert solved([entry(B, A)]) is True
    assert solved([entry(B, WIDE, A)]) is False, "the third candidate is not submitted"
    assert solved([entry(B, greedy=A)]) is False, "the greedy answer is not submitted by itself"
    assert solved([entry(A), entry(B)]) is False
    assert solved([entry(A, truth=None)]) is None
    assert solved([entry()]) is False


def test_answers_name_votes():
    assert answers(entry(B, A, WIDE)) == [("greedy", A), ("attempt 1 · 3 votes", B), ("attempt 2 · 2 votes", A)]
    assert answers(entry()) == [("greedy", A), ("attempt 1", None)]
    ranked = entry(B, A)
    ranked["candidates"][0] |= {"likelihood": -2.125, "votes": 1}
    assert [name for name, _ in answers(ranked)] == ["greedy", "attempt 1 · 1 vote · -2.12", "attempt 2 · 2 votes"]


def test_task_figure_shows_every_grid_with_its_verdict():
    figure = task_figure("00d62c1b", [entry(B, A), entry(WIDE)], [(A, B), (B, WIDE)])
    words = said(figure)
    assert words.count("✓ right") == 3 and words.count("✗ 1 of 4 cells off") == 1 and words.count("✗ 3 × 2, not 2 × 2") == 1
    assert "00d62c1b ✗ not solved" in words and "input 2" in words and "test input 2" in words
    pictures = [np.asarray(image.get_array()).tolist() for image in figure.findobj(AxesImage)]
    assert pictures == [A, B, B, WIDE, B, A, A, B, A, B, A, A, WIDE]
    figure.draw_without_rendering()


def test_task_figure_without_truth_or_answers():
    figure = task_figure("x", [entry(truth=None, greedy=None)])
    words = said(figure)
    assert words.count("no answer") == 2 and words.count("test input") == 1 and not any("✗" in w or "✓" in w for w in words)
    figure.draw_without_rendering()
