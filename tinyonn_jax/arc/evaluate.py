"""Evaluation: every test input in several views, decoded in batches, voted on; and the exact match of teacher-forced sequences.

The two agree: a greedy answer is right exactly when every teacher-forced arg-max is, which validation uses (one forward pass, no
decoding). Letters: B sequences, T positions, V vocabulary, R recursions, W completions a query. Source: ARC.md.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from tinyonn_jax.arc import generate
from tinyonn_jax.arc.augment import Augmentation, views
from tinyonn_jax.arc.batches import Batch, Prompts, Query, answered, bucket_for, encode_query, prompts
from tinyonn_jax.arc.submission import Prediction, Predictions
from tinyonn_jax.arc.tasks import Pair, Task
from tinyonn_jax.arc.tokens import MAX_SIDE
from tinyonn_jax.arc.vote import Answer, read, vote
from tinyonn_jax.config import DataConfig, EvalConfig

_Answers = dict[tuple[str, int], list[Answer]]  # by task id and test input


def answer_cap(data: DataConfig) -> int:
    """Tokens that an answer may have: those of a grid of `max_grid` (else 30) squared and its END, at most the longest bucket.

    An answer longer than every bucket is longer than any sequence the model was trained on.
    """
    side = data.max_grid or MAX_SIDE
    return min(side * (side + 1) + 1, data.buckets[-1])


def evaluate(
    decoder: generate.Decoder,
    params: Any,
    tasks: Sequence[Task],
    task_ids: Sequence[str],
    data: DataConfig,
    cfg: EvalConfig,
    *,
    seed: int = 0,
    cap: int | None = None,
    checkpoint: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Predictions:
    """Answers every test input of `tasks`: greedily as it is, and by a vote over `cfg.augmentations` views.

    Queries are grouped by prompt length, and the last batch of a group is filled up, so that each bucket compiles once. Prompts
    longer than the longest bucket are not cut: they go unanswered, and `too_long` says so.

    Args:
        decoder: the model; one that stops recursing early (`cfg.entropy_stop`) does so by itself.
        task_ids: rows of the task embedding; other tasks, and with `cfg.blank_task` all, get a blank one (-1).
        seed: of the augmentations.
        cap: tokens an answer may have; `answer_cap(data)` unless given.
        checkpoint: step of `params`, for the record.
        progress: called with the number of sequences decoded so far, and of all, after each batch.
    """
    cap = answer_cap(data) if cap is None else cap
    rows = _rows(task_ids, cfg)
    queries = [
        Query(task, test, rows.get(task.id, -1), view)
        for task in tasks
        for view in views(task, cfg.augmentations, seed, data.permute_zero)
        for test in range(len(task.test))
    ]
    groups, too_long = _group(queries, data)
    plain = {bucket: [query for query in group if query.view == Augmentation()] for bucket, group in groups.items()}
    searching = cfg.decode == "search"
    total = sum(map(len, groups.values())) + searching * sum(map(len, plain.values()))
    done = 0

    def decode(groups: dict[int, list[Query]], size: int, run: Callable[[Prompts], generate.Completions]) -> _Answers:
        """The finished answers to each test input, in the order of the queries."""
        nonlocal done
        answers: _Answers = defaultdict(list)
        for bucket, group in groups.items():
            for chunk in (group[i : i + size] for i in range(0, len(group), size)):
                filled = chunk + chunk[-1:] * (size - len(chunk))
                found = jax.device_get(run(prompts(filled, bucket, data.format)))
                for row, query in enumerate(chunk):
                    answers[query.task.id, query.test] += [
                        Answer(query.view, np.asarray(found.tokens[row, w]), float(found.logprob[row, w]))
                        for w in np.flatnonzero(found.finished[row])
                    ]
                done += len(chunk)
                if progress:
                    progress(done, total)
        return answers

    def greedily(batch: Prompts) -> generate.Completions:
        return jax.tree.map(lambda a: a[:, None], generate.greedy(decoder, params, batch, cap))

    if searching:
        width = generate.search_width(cfg.min_probability)
        first = decode(plain, cfg.batch, greedily)
        answers = decode(
            groups, max(1, cfg.batch // width), lambda batch: generate.search(decoder, params, batch, cap, cfg.min_probability)
        )
    else:
        answers = decode(groups, cfg.batch, greedily)
        first = {key: [answer for answer in found if answer.view == Augmentation()] for key, found in answers.items()}

    def prediction(task: Task, test: int, pair: Pair) -> Prediction:
        key = (task.id, test)
        greedy = next(map(read, first.get(key, [])), None)
        return Prediction(pair.input, pair.output, greedy, vote(pair.input, answers.get(key, [])))

    found = {task.id: tuple(prediction(task, i, pair) for i, pair in enumerate(task.test)) for task in tasks}
    return Predictions(found, cfg.augmentations, checkpoint, too_long)


@jax.jit
def exact(logits: Float[Array, "*R B T V"], batch: Batch) -> Bool[Array, "*R B"]:
    """Whether every token that a sequence is trained on is the arg-max before it; true for a row that only fills the batch."""
    right = jnp.argmax(logits, -1)[..., :-1] == batch.tokens[:, 1:]
    return jnp.all(right | (batch.loss_mask[:, :-1] == 0), -1)


def teacher_forced_exact(apply_fn: Callable[[Batch], Array], batches: Iterable[Batch]) -> float:
    """The share in [0, 1] of sequences with every output token right; `apply_fn` gives logits `[B,T,V]`. NaN for no sequences."""
    return exact_per_step(lambda batch: apply_fn(batch)[None], batches)[0]


def exact_per_step(apply_fn: Callable[[Batch], Array], batches: Iterable[Batch]) -> list[float]:
    """`teacher_forced_exact` of every recursion; `apply_fn` gives logits `[R,B,T,V]`. One NaN for no sequences."""
    right, sequences = np.zeros(1), 0
    for batch in batches:
        real = np.asarray(batch.length) > 0
        right = right + np.sum(np.asarray(exact(apply_fn(batch), batch)) & real, -1)
        sequences += int(real.sum())
    return (right / sequences if sequences else right + np.nan).tolist()


def exact_per_recursion(
    apply_fn: Callable[[Batch], Array], tasks: Sequence[Task], task_ids: Sequence[str], data: DataConfig, cfg: EvalConfig
) -> list[float]:
    """The share of known test outputs that the greedy answer would have right after 1, …, R recursions, without augmentation.

    If the first already has what the last has, recursion is not earning its cost. `apply_fn` gives logits `[R,B,T,V]`. What fits
    no bucket counts as wrong. NaN if no output is known.
    """
    rows = _rows(task_ids, cfg)
    known = [
        Query(task, i, rows.get(task.id, -1), Augmentation())
        for task in tasks
        for i, test in enumerate(task.test)
        if test.output is not None
    ]
    groups, _ = _group(known, data, answer=True)
    batches = (
        answered(group[i : i + cfg.batch], cfg.batch, bucket, data.format)
        for bucket, group in groups.items()
        for i in range(0, len(group), cfg.batch)
    )
    fitting = sum(map(len, groups.values())) / max(len(known), 1)
    return [share * fitting for share in exact_per_step(apply_fn, batches)]


def _rows(task_ids: Sequence[str], cfg: EvalConfig) -> dict[str, int]:
    """Rows of the task embedding by task id; none for blank ones."""
    return {} if cfg.blank_task else {name: row for row, name in enumerate(task_ids)}


def _group(queries: Sequence[Query], data: DataConfig, answer: bool = False) -> tuple[dict[int, list[Query]], tuple[str, ...]]:
    """Queries by bucket, shortest prompts first (`answer`: with their true answers), and a line for each test input with a view
    that fits no bucket."""
    sizes = [len(encode_query(query, data.format, answer).tokens) for query in queries]
    groups: dict[int, list[Query]] = defaultdict(list)
    misfits: dict[tuple[str, int], list[int]] = defaultdict(list)
    for size, query in sorted(zip(sizes, queries, strict=True), key=lambda item: item[0]):
        bucket = bucket_for(size, data.buckets)
        if bucket is None:
            misfits[query.task.id, query.test].append(size)
        else:
            groups[bucket].append(query)
    return groups, tuple(
        f"task {name}, test input {test + 1}: the prompts of {len(sizes)} views are longer than the largest bucket "
        f"({data.buckets[-1]} tokens) and go unanswered; the longest has {sizes[-1]}: raise --data.buckets"
        for (name, test), sizes in sorted(misfits.items())
    )
