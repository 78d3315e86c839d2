"""Evaluation end to end with a model that knows the rule of some tasks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tinyonn_jax.arc import generate
from tinyonn_jax.arc.evaluate import answer_cap, evaluate
from tinyonn_jax.arc.submission import build_submission, score, to_json, validate_submission
from tinyonn_jax.arc.tasks import Pair, Task
from tinyonn_jax.arc.tokens import END, ROW, VOCAB
from tinyonn_jax.config import DataConfig, EvalConfig

C = -1  # the colour of the input's last cell
SCRIPT = jnp.array([C, C, ROW, C, C, ROW, END])


def painter(shapes=None):
    """A model that answers 2 x 2 cells in the input's colour plus `params[task, dihedral]`, and nothing without a task."""

    def decode(params, cache, tokens, positions, start, prefix, task, dihedral):
        if shapes is not None:
            shapes.append(tokens.shape)
        seen = jax.vmap(lambda row, new, at: jax.lax.dynamic_update_slice(row, new, (at,)))(cache[0], tokens, start)
        colour = (jnp.take_along_axis(seen, prefix[:, None] - 3, 1) + params[task, dihedral][:, None]) % 10
        step = jnp.clip(start[:, None] + jnp.arange(tokens.shape[1]) + 1 - prefix[:, None], 0, len(SCRIPT) - 1)
        told = jnp.where(SCRIPT[step] == C, colour, SCRIPT[step])
        told = jnp.where((task >= 0)[:, None], told, END)
        return 30.0 * jax.nn.one_hot(told, VOCAB), seen[None]

    return generate.Decoder(lambda batch, length: jnp.zeros((1, batch, length), jnp.int32), decode)


PAINTER = painter()
OFFSET = np.array([[0] * 8, [3] * 8, [0] + [2] * 7])  # task b is answered in a wrong colour, c in all views but the plain one
DATA = DataConfig(max_grid=3, buckets=(4, 6, 13))
EVAL = EvalConfig(augmentations=8, batch=5)


def plain(height, width, colour):
    return np.full((height, width), colour, np.int8)


def task(name, *inputs):
    """Inputs (height, width, colour) to be answered by 2 x 2 cells of the same colour."""
    shown = tuple(Pair(plain(1, 1, c), plain(2, 2, c)) for c in range(1, 9))
    return Task(name, shown, tuple(Pair(plain(h, w, c), plain(2, 2, c)) for h, w, c in inputs))


TASKS = [task("a", (1, 1, 4), (1, 2, 5)), task("b", (1, 1, 6)), task("c", (2, 1, 7)), task("unseen", (1, 1, 3))]
IDS = ("a", "b", "c")


@pytest.mark.parametrize("decode", ["greedy", "search"])
def test_end_to_end(decode):
    cfg = EvalConfig(augmentations=8, batch=5, decode=decode)
    found = evaluate(PAINTER, OFFSET, TASKS, IDS, DATA, cfg, checkpoint=7)
    assert list(found.tasks) == ["a", "b", "c", "unseen"]
    first, second = found.tasks["a"]
    assert first.greedy.tolist() == [[4, 4], [4, 4]] and second.greedy.tolist() == [[5, 5], [5, 5]]
    assert [(c.grid.tolist(), c.votes) for c in first.candidates] == [([[4, 4], [4, 4]], 8)]  # eight views, inverted, agree
    assert first.candidates[0].logprob == pytest.approx(0, abs=1e-4)
    assert found.tasks["b"][0].greedy.tolist() == [[9, 9], [9, 9]]
    assert found.tasks["c"][0].greedy.tolist() == [[7, 7], [7, 7]]
    assert found.tasks["unseen"][0].greedy is None and found.tasks["unseen"][0].candidates == ()
    assert found.too_long == () and found.checkpoint == 7 and found.augmentations == 8
    validate_submission(build_submission(found), TASKS)
    assert build_submission(found)["unseen"] == [{"attempt_1": [[3]], "attempt_2": [[3]]}]
    assert score(found)["pass@1"] == pytest.approx({"outputs": 3 / 5, "task_mean": 2 / 4, "tasks": 2 / 4})


def test_every_evaluation_starts_from_an_empty_vote():
    first = evaluate(PAINTER, OFFSET, TASKS, IDS, DATA, EVAL)
    second = evaluate(PAINTER, OFFSET + 1, TASKS[:1], IDS, DATA, EVAL)
    again = evaluate(PAINTER, OFFSET, TASKS, IDS, DATA, EVAL)
    assert all(c.grid[0, 0] != 4 or c.votes < 8 for c in second.tasks["a"][0].candidates)
    assert [c.votes for p in again.tasks.values() for q in p for c in q.candidates] == [
        c.votes for p in first.tasks.values() for q in p for c in q.candidates
    ]


def test_one_compilation_a_bucket_and_steady_progress():
    shapes, progress = [], []
    evaluate(painter(shapes), OFFSET, TASKS, IDS, DATA, EVAL, progress=lambda done, total: progress.append((done, total)))
    assert sorted(shapes) == [(2, 4), (2, 6), (5, 1), (5, 1)]  # two prompts at once, of 4 or 6 tokens; then one token at a time
    assert progress[-1] == (40, 40)
    steps = np.diff([done for done, _ in progress])
    assert len(progress) == 12 + 8 and all(0 <= step <= 5 for step in steps)  # 24 views of single cells, 16 of dominoes


def test_the_number_of_rows_in_a_batch_does_not_matter():
    one, many = (evaluate(PAINTER, OFFSET, TASKS[1:2], IDS, DATA, EvalConfig(augmentations=4, batch=batch)) for batch in (1, 64))
    assert build_submission(one) == build_submission(many)


def test_equal_prompts_are_decoded_once_for_all_that_ask():
    """Colour 0 is never permuted: sixteen views of a black cell are eight different prompts, and sixteen votes."""
    found = evaluate(PAINTER, OFFSET, [task("a", (1, 1, 0))], IDS, DATA, EvalConfig(augmentations=16, batch=5))
    assert found.sequences == 8
    assert [(c.grid.tolist(), c.votes) for c in found.tasks["a"][0].candidates] == [([[0, 0], [0, 0]], 16)]


@pytest.mark.parametrize("decode", ["greedy", "search"])
def test_processes_share_the_work_and_all_have_the_answers(decode):
    cfg = EvalConfig(augmentations=5, batch=4, decode=decode)
    alone = evaluate(PAINTER, OFFSET, TASKS, IDS, DATA, cfg)
    parts: list[list] = [[], [], []]

    def keep(mine):
        parts[p].append(mine)
        return _stack([mine] * 3)

    for p in range(3):  # what each decodes …
        evaluate(PAINTER, OFFSET, TASKS, IDS, DATA, cfg, process=(p, 3), gather=keep)
    given = map(_stack, zip(*parts, strict=True))  # … is given to all of them
    seen: list[int] = []
    together = evaluate(
        *(PAINTER, OFFSET, TASKS, IDS, DATA, cfg),
        progress=lambda done, total: seen.append(total),
        process=(2, 3),
        gather=lambda mine: next(given),
    )
    assert to_json(together) == to_json(alone) and together.sequences == alone.sequences
    assert alone.sequences // 3 - 1 <= seen[-1] <= alone.sequences // 3


def _stack(trees):
    return jax.tree.map(lambda *a: np.stack(a), *trees)


def test_a_blank_task_leaves_nothing_to_know():
    found = evaluate(PAINTER, OFFSET, TASKS, IDS, DATA, EvalConfig(augmentations=2, batch=5, blank_task=True))
    assert score(found)["counts"]["pass@2_outputs"] == 0


def test_context_prompts_show_the_demonstrations():
    data = DataConfig(max_grid=3, format="context", buckets=(128,))
    found = evaluate(PAINTER, OFFSET, TASKS[:1], IDS, data, EvalConfig(augmentations=2, batch=2))
    assert score(found)["pass@1"]["outputs"] == 1


def test_what_is_too_long_is_reported_and_still_an_entry():
    tasks = [TASKS[0], task("large", (1, 1, 3), (3, 3, 2), (1, 6, 8))]  # 14 tokens; 9 lying or 14 standing
    found = evaluate(PAINTER, np.zeros((2, 8), int), tasks, ("a", "large"), DATA, EVAL)
    assert [line.split(":")[0] for line in found.too_long] == ["task large, test input 2", "task large, test input 3"]
    assert "the prompts of 8 views are longer than the largest bucket (13 tokens)" in found.too_long[0]
    assert "the longest has 14" in found.too_long[0] and "--data.buckets" in found.too_long[0]
    assert "the prompts of 4 views" in found.too_long[1]
    assert build_submission(found)["large"][1] == dict.fromkeys(("attempt_1", "attempt_2"), [[2] * 3] * 3)
    assert found.tasks["large"][1].greedy is None
    assert found.tasks["large"][2].candidates[0].votes == 4  # of the views that fit
    assert found.tasks["large"][0].candidates[0].votes == 8


def test_the_cap_cuts_answers_off():
    assert answer_cap(DataConfig(max_grid=3, buckets=(64,))) == 13
    assert answer_cap(DataConfig(buckets=(64, 2000), tokens_per_batch=2000)) == 931
    assert answer_cap(DataConfig(buckets=(64, 200))) == 200
    wide = Task("wide", (Pair(np.zeros((2, 5), np.int8), np.zeros((1, 1), np.int8)),), ())  # of the user's own
    assert answer_cap(DataConfig(max_grid=3, buckets=(64,)), (wide,)) == 31
    asked = Task("asked", (), (Pair(np.zeros((4, 1), np.int8), np.zeros((1, 6), np.int8)),))
    assert answer_cap(DataConfig(max_grid=3, buckets=(64,)), (asked,)) == 21, "the input counts, the output is not known"
    assert evaluate(PAINTER, OFFSET, TASKS[:1], IDS, DATA, EVAL, cap=6).tasks["a"][0].greedy is None
    assert evaluate(PAINTER, OFFSET, TASKS[:1], IDS, DATA, EVAL, cap=7).tasks["a"][0].greedy is not None
