"""Exact match against the decoder, and candidates ranked by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.arc.test_evaluate import DATA, EVAL, IDS, TASKS, plain, task
from tinyonn_jax.arc import generate, tokens
from tinyonn_jax.arc.augment import Augmentation, views
from tinyonn_jax.arc.batches import Batch, Query, prompts
from tinyonn_jax.arc.forced import exact, exact_per_recursion, ranked
from tinyonn_jax.arc.submission import Prediction, Predictions
from tinyonn_jax.arc.tasks import Pair, Task
from tinyonn_jax.arc.tokens import END, ROW, VOCAB
from tinyonn_jax.arc.vote import Candidate
from tinyonn_jax.config import DataConfig, EvalConfig, ModelConfig
from tinyonn_jax.layers import base
from tinyonn_jax.models import transformer


def hand_batch():
    """Three sequences of which the last two, three and no tokens count; the last row only fills the batch."""
    return Batch(
        tokens=np.array([[1, 2, 3, 4], [5, 6, 7, 8], [END] * 4], np.int32),
        positions=np.zeros((3, 4, 3), np.int32),
        prefix=np.array([2, 1, 0], np.int32),
        length=np.array([4, 4, 0], np.int32),
        loss_mask=np.array([[0, 1, 1, 0], [1, 1, 1, 0], [0] * 4], np.float32),
        task=np.array([0, 1, -1], np.int32),
        dihedral=np.zeros(3, np.int32),
    )


def said(*rows):
    """Logits whose arg-max at each position is the given token."""
    return jnp.array(np.eye(VOCAB)[np.array(rows)])


def test_exact_by_hand():
    batch = hand_batch()
    right = said([9, 3, 4, 9], [6, 7, 8, 9], [9] * 4)
    half = said([2, 3, 4, 9], [0, 7, 8, 9], [9] * 4)
    neither = said([2, 3, 0, 9], [6, 7, 0, 9], [9] * 4)
    assert exact(right, batch).tolist() == [True, True, True]
    assert exact(half, batch).tolist() == [True, False, True]
    steps = jnp.stack([neither, half, right])
    assert exact(steps, batch).tolist() == [[False, False, True], [True, False, True], [True, True, True]]


@pytest.mark.parametrize("kind", ["dense", "dyntrm"])
def test_what_is_decoded_with_a_cache_is_exact_when_teacher_forced(kind):
    """And what differs in one token is not: the decoder and one forward pass of the real network agree."""
    cfg = ModelConfig(kind=kind, dim=24, heads=2, head_dim=6, latent_heads=4, hidden=32, experts=4, expert_hidden=8, depth=2)
    params = base.init(jax.random.key(0), transformer.spec(cfg, 2))
    params = params.replace(head=params.head * 50)  # far from ties
    decoder = generate.Decoder(
        lambda batch, length: transformer.init_cache(cfg, batch, length), lambda *a: transformer.decode(*a, cfg)
    )
    cap = 12
    queries = [Query(t, 0, row, Augmentation(d)) for row, t in enumerate(TASKS[:2], -1) for d in (0, 3, 5, 6)]
    asked = prompts(queries, 8)
    said = np.zeros((len(queries), cap), np.int32)
    for numbers, found in generate.greedy(decoder, params, lambda i: prompts([queries[k] for k in i], 8), len(queries), cap, 4):
        said[numbers] = found.tokens  # two rows of the cache served three prompts each
    assert len(np.unique(said)) > 3
    batch = written(asked, said)
    forward = jax.jit(lambda batch: transformer.apply(params, batch, cfg))
    assert np.all(exact(forward(batch).logits, batch))
    for row, at in enumerate([0, 1, 2, 3, 5, 8, 10, 11]):
        said[row, at] = (said[row, at] + 1) % 10
    batch = written(asked, said)
    assert not np.any(exact(forward(batch).logits, batch))


def written(asked, said):
    """Prompts and what was said to them, as a batch for teacher forcing; every token said counts, but for END after the first."""
    n, cap = said.shape
    length = asked.tokens.shape[1] + cap
    batch = Batch(
        tokens=np.full((n, length), END, np.int32),
        positions=np.zeros((n, length, 3), np.int32),
        prefix=asked.prefix,
        length=asked.prefix + cap,
        loss_mask=np.zeros((n, length), np.float32),
        task=asked.task,
        dihedral=asked.dihedral,
    )
    for row, prefix in enumerate(asked.prefix):
        batch.tokens[row, :prefix], batch.positions[row, :prefix] = asked.tokens[row, :prefix], asked.positions[row, :prefix]
        x = y = 0
        for i, token in enumerate(said[row]):
            batch.tokens[row, prefix + i] = token
            batch.positions[row, prefix + i] = (0, 0, tokens.Z_END) if token == END else (x, y, tokens.Z_OUTPUT)
            batch.loss_mask[row, prefix + i - 1] = 1
            x, y = (0, y + 1) if token == ROW else (x + 1, y)
            if token == END:
                break
    return batch


def test_exact_per_recursion_scores_the_known_test_outputs():
    """Recursion 1 knows all answers, recursion 2 those of task b; what fits no bucket counts as wrong, unknown as nothing."""
    hidden = Task("hidden", TASKS[0].train, (Pair(plain(1, 1, 2), None),))
    large = Task("large", TASKS[0].train, (Pair(plain(9, 9, 2), plain(2, 2, 2)),))
    batches = []

    def known(batch):
        batches.append(batch)
        return np.stack([batch.length >= 0, (batch.task == 1) | (batch.length == 0)])

    shares = exact_per_recursion(known, [*TASKS, hidden, large], IDS, DataConfig(buckets=(13, 16)), EvalConfig(batch=3), 2)
    assert shares == pytest.approx([5 / 6, 1 / 6])
    assert {batch.tokens.shape for batch in batches} == {(4, 13)}, "three, rounded up to what divides by two"
    assert sum(int((batch.length > 0).sum()) for batch in batches) == 5
    assert {int(t) for batch in batches for t in batch.task[batch.length > 0]} == {0, 1, 2, -1}
    assert np.isnan(exact_per_recursion(known, [hidden], IDS, DATA, EVAL)[0])
    assert exact_per_recursion(known, [large], IDS, DataConfig(buckets=(13, 16)), EVAL) == [0], "known, and none fits"


# --- finalists ------------------------------------------------------------------------------------------------------------


def opinion(batch):
    """A score that every view has of its own: the fives it sees in an answer, less what its dihedral transform costs."""
    fives = np.sum((np.roll(batch.tokens, -1, 1) == 5) & (batch.loss_mask > 0), 1)
    return jnp.asarray(fives - batch.dihedral / 8 - 10.0 * (batch.length == 0), jnp.float32)


def candidate(votes, *rows):
    return Candidate(np.array(rows, np.int8), votes, -1.0)


def voted(name, *candidates):
    return Predictions({name: (Prediction(plain(1, 1, 4), None, None, candidates),)}, 8, 7, (), 3)


KNOWN = Task("k", (Pair(plain(1, 1, 4), plain(1, 1, 5)),), (Pair(plain(1, 1, 4), None),))  # colour 5 is in outputs only: fixed
WIDE = DataConfig(max_grid=3, buckets=(8, 12, 16))


def test_finalists_are_ordered_by_their_mean_score_over_all_views():
    told = voted("k", candidate(4, [4]), candidate(3, [5, 5]), candidate(2, [5]), candidate(1, [5, 5, 5]))
    cfg = EvalConfig(augmentations=8, batch=3, finalists=3)
    (found,) = ranked(told, opinion, [KNOWN], ("k",), WIDE, cfg).tasks["k"]
    seen = [view.dihedral for view in views(KNOWN, 8, 0)]
    assert sorted(seen) == list(range(8))
    assert [(c.votes, c.likelihood) for c in found.candidates[:3]] == [
        (3, pytest.approx(2 - np.mean(seen) / 8)),
        (2, pytest.approx(1 - np.mean(seen) / 8)),
        (4, pytest.approx(0 - np.mean(seen) / 8)),
    ]
    assert found.candidates[3] == told.tasks["k"][0].candidates[3]  # no finalist: as it was, and behind them


def test_equals_keep_the_order_of_the_vote_also_those_that_fit_no_bucket():
    long = candidate(9, *[[1, 1, 1]] * 3)
    told = voted("k", long, candidate(4, [6]), candidate(3, [7]), candidate(2, [5]))
    (found,) = ranked(told, opinion, [KNOWN], ("k",), DataConfig(max_grid=3, buckets=(8, 12)), EvalConfig(finalists=8)).tasks["k"]
    assert [c.votes for c in found.candidates] == [2, 9, 4, 3]


def test_a_likelihood_that_is_not_finite_is_none_and_comes_last():
    told = voted("k", candidate(9, [5, 5]), candidate(4, [6]))
    (found,) = ranked(
        told, lambda batch: jnp.where(opinion(batch) > 0, jnp.nan, opinion(batch)), [KNOWN], ("k",), WIDE, EvalConfig(finalists=2)
    ).tasks["k"]
    assert [c.votes for c in found.candidates] == [4, 9] and found.candidates[-1].likelihood is None


def test_processes_share_the_scoring():
    told = voted("k", candidate(4, [4]), candidate(3, [5, 5]), candidate(2, [5]))
    cfg = EvalConfig(augmentations=8, batch=2, finalists=3)
    alone = ranked(told, opinion, [KNOWN], ("k",), WIDE, cfg)
    parts, steps = [], []

    def keep(mine):
        parts.append(mine)
        return np.stack([mine] * 5)

    for p in range(5):
        ranked(told, opinion, [KNOWN], ("k",), WIDE, cfg, process=(p, 5), gather=keep, progress=lambda *done: steps.append(done))
    assert sum(done == total for done, total in steps) == 5 and sum(total for done, total in steps if done == total) == 24
    together = ranked(told, opinion, [KNOWN], ("k",), WIDE, cfg, process=(2, 5), gather=lambda mine: np.stack(parts))
    assert [c.likelihood for c in together.tasks["k"][0].candidates] == [c.likelihood for c in alone.tasks["k"][0].candidates]
    assert [c.votes for c in together.tasks["k"][0].candidates] == [3, 2, 4]
    assert (together.augmentations, together.checkpoint, together.sequences) == (8, 7, 3)


@pytest.mark.parametrize("blank", [False, True])
@pytest.mark.parametrize("permute_zero", [False, True])
def test_every_view_hears_each_finalist_as_the_answer_to_its_own_input(blank, permute_zero):
    """Of two tasks with two inputs each: the task's embedding, the input and the candidate, in the views of this seed."""
    tasks, shown = [*TASKS[:1], task("b", (1, 1, 6), (2, 1, 7))], set()
    claims = {"a": [[[1]], [[2], [2]]], "b": [[[3, 3]], [[4, 4], [4, 4]]]}
    told = Predictions(
        {
            name: tuple(Prediction(plain(1, 1, 4), None, None, (candidate(2, *grid), candidate(1, [9]))) for grid in grids)
            for name, grids in claims.items()
        },
        *(8, 7, (), 3),
    )

    def listen(batch):
        for row, (prefix, length) in enumerate(zip(batch.prefix, batch.length, strict=True)):
            sequence = bytes(batch.tokens[row, :length])
            shown.add((int(batch.task[row]), int(batch.dihedral[row]), int(prefix), sequence))
        return opinion(batch)

    data = DataConfig(max_grid=3, buckets=(16,), permute_zero=permute_zero)
    ranked(told, listen, tasks, IDS, data, EvalConfig(augmentations=8, batch=4, finalists=2, blank_task=blank), seed=3)
    want = set()
    for number, one in enumerate(tasks):
        for view in views(one, 8, 3, permute_zero):
            for pair, grid in zip(one.test, claims[one.id], strict=True):
                for answer in (grid, [[9]]):
                    text = tokens.encode((), view.apply(pair.input), view.apply(np.array(answer, np.int8)))
                    want.add((-1 if blank else number, view.dihedral, text.prefix, bytes(text.tokens.astype(np.int32))))
    assert {key for key in shown if key[3]} == want and len(want) > 32
