"""What a teacher-forced pass says of answers: whether every token of them is the likeliest, and how probable they are.

A greedy answer is right exactly when every teacher-forced arg-max is, which validation uses: one forward pass, no decoding.
Letters: B sequences, T positions, V vocabulary, R recursions, P processes. The ranking is the product of experts of
Franzen et al. (2025, arXiv 2505.07859).
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import groupby, islice
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from tinyonn_jax.arc.augment import Augmentation, views
from tinyonn_jax.arc.batches import Batch, Query, answered, batch_size, bucket_for, query_length, round_up, rows_of
from tinyonn_jax.arc.submission import Prediction, Predictions
from tinyonn_jax.arc.tasks import Task
from tinyonn_jax.config import DataConfig, EvalConfig


@jax.jit
def exact(logits: Float[Array, "*R B T V"], batch: Batch) -> Bool[Array, "*R B"]:
    """Whether every token that a sequence is trained on is the arg-max before it; true for a row that only fills the batch."""
    right = jnp.argmax(logits, -1)[..., :-1] == batch.tokens[:, 1:]
    return jnp.all(right | (batch.loss_mask[:, :-1] == 0), -1)


def exact_per_recursion(
    exact_fn: Callable[[Batch], Bool[Array, "R B"]],
    tasks: Sequence[Task],
    task_ids: Sequence[str],
    data: DataConfig,
    cfg: EvalConfig,
    multiple: int = 1,
) -> list[float]:
    """The share of known test outputs that the greedy answer would have right after 1, …, R recursions, without augmentation.

    If the first already has what the last has, recursion is not earning its cost. `exact_fn` says after which recursions a
    batch's sequences are `exact`; its rows divide by `multiple`. What fits no bucket counts as wrong. NaN if no output is known.
    """
    rows = rows_of(task_ids, cfg.blank_task)
    known = [
        Query(task, i, rows.get(task.id, -1), Augmentation())
        for task in tasks
        for i, test in enumerate(task.test)
        if test.output is not None
    ]
    fitting = [query for query in known if query_length(query, data.format, answer=True) <= data.buckets[-1]]
    right = np.zeros(1)
    for numbers, batch in _batches(fitting, data, cfg, multiple):
        right = right + np.sum(np.asarray(exact_fn(batch))[:, : len(numbers)], -1)
    return (right / len(known) if known else right + np.nan).tolist()


def _batches(queries: Sequence[Query], data: DataConfig, cfg: EvalConfig, multiple: int) -> Iterator[tuple[list[int], Batch]]:
    """Queries with their answers in batches, each with the numbers of those in it, longest first: what is last is done soon.

    A batch has no more tokens than one in training, and `cfg.batch` rows at most, rounded up to a `multiple`. A sequence that
    fits no bucket has a length of its own.
    """
    lengths = [query_length(query, data.format, answer=True) for query in queries]
    buckets = [bucket_for(length, data.buckets) or round_up(length, 64) for length in lengths]
    order = sorted(range(len(queries)), key=lambda i: -buckets[i])
    for bucket, members in groupby(order, lambda i: buckets[i]):
        rows = round_up(min(cfg.batch, max(batch_size(data.tokens_per_batch, bucket), 1)), multiple)
        while numbers := list(islice(members, rows)):
            yield numbers, answered([queries[i] for i in numbers], rows, bucket, data.format)


def ranked(
    predictions: Predictions,
    score: Callable[[Batch], Float[Array, "B"]],
    tasks: Sequence[Task],
    task_ids: Sequence[str],
    data: DataConfig,
    cfg: EvalConfig,
    *,
    seed: int = 0,
    multiple: int = 1,
    progress: Callable[[int, int], None] | None = None,
    process: tuple[int, int] = (0, 1),
    gather: Callable[[Any], Any] | None = None,
) -> Predictions:
    """The predictions, with the first `cfg.finalists` of every vote ordered anew: by their mean log-probability in all views.

    A vote hears of every view its likeliest answer; here each also says what it thinks of the answers of the others, and one that
    finds a grid improbable can rule it out. A grid that fits no bucket in a view has a length of its own there, so that all are
    heard on all; one whose mean is not finite comes last.

    Args:
        score: log-probability of what the sequences of a batch are trained on, in nats.
        task_ids, seed, process, gather: as for `evaluate`, whose predictions these are.
        multiple: what the rows of a batch divide by.
        progress: called with the number of sequences that this process has scored so far, and of all that it will.
    """
    rows = rows_of(task_ids, cfg.blank_task)
    places: list[tuple[str, int, int]] = []  # task id, test input, place in the vote
    claims: list[Query] = []  # in which that candidate is the answer
    for task in tasks:
        seen = views(task, cfg.augmentations, seed, data.permute_zero)
        for test, prediction in enumerate(predictions.tasks[task.id]):
            for number, candidate in enumerate(prediction.candidates[: cfg.finalists]):
                pairs = [replace(pair, output=candidate.grid) if i == test else pair for i, pair in enumerate(task.test)]
                claimed = replace(task, test=tuple(pairs))
                claims += [Query(claimed, test, rows.get(task.id, -1), view) for view in seen]
                places += [(task.id, test, number)] * len(seen)

    p, processes = process
    mine = claims[p::processes]
    logprob = np.zeros(-(-len(claims) // processes), np.float32)  # claim i is number i // P of process i % P
    done = 0
    for numbers, batch in _batches(mine, data, cfg, multiple):
        logprob[numbers] = np.asarray(score(batch))[: len(numbers)]
        done += len(numbers)
        if progress:
            progress(done, len(mine))
    if gather:
        logprob = gather(logprob).T.ravel()
    heard: dict[tuple[str, int, int], list[float]] = defaultdict(list)
    for place, value in zip(places, logprob.tolist(), strict=False):
        heard[place].append(value)

    def anew(name: str, test: int, prediction: Prediction) -> Prediction:
        means = [float(np.mean(heard.get((name, test, number), np.nan))) for number in range(len(prediction.candidates))]
        scored = [
            candidate._replace(likelihood=mean if np.isfinite(mean) else None)
            for candidate, mean in zip(prediction.candidates, means, strict=True)
        ]
        scored.sort(key=lambda candidate: -np.inf if candidate.likelihood is None else candidate.likelihood, reverse=True)
        return replace(prediction, candidates=tuple(scored))

    found = {name: tuple(anew(name, i, p) for i, p in enumerate(answers)) for name, answers in predictions.tasks.items()}
    return replace(predictions, tasks=found)
