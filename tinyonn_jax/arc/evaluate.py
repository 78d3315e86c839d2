"""Evaluation: every test input in several views, decoded in batches, and voted on.

Letters: W completions a query, K prompts, P processes, S prompts of each. Source: mdlARC.
"""

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from tinyonn_jax.arc import generate
from tinyonn_jax.arc.augment import Augmentation, views
from tinyonn_jax.arc.batches import Prompts, Query, by_bucket, encode_query, prompts, rows_of
from tinyonn_jax.arc.submission import Prediction, Predictions
from tinyonn_jax.arc.tasks import Pair, Task
from tinyonn_jax.arc.tokens import MAX_SIDE
from tinyonn_jax.arc.vote import Answer, read, vote
from tinyonn_jax.config import DataConfig, EvalConfig

_Answers = dict[tuple[str, int], list[Answer]]  # by task id and test input
_Ask = Callable[[Sequence[int]], Prompts]  # the prompts of these numbers
_Found = Iterator[tuple[np.ndarray, generate.Completions]]  # numbers [K] of prompts, and what follows them [K,W,…]


class _Work(NamedTuple):
    """Different prompts, each as (bucket, a query that has it), shortest first; and every query with the number of its prompt."""

    asked: list[tuple[int, Query]]
    askers: list[tuple[Query, int]]


def answer_cap(data: DataConfig, tasks: Iterable[Task] = ()) -> int:
    """Tokens that an answer may have: those of a square grid and its END, at most the longest bucket.

    Its side is `max_grid` (else 30), or that of the largest demonstration or test input of `tasks`, where one is larger. An
    answer longer than every bucket is longer than any sequence the model was trained on.
    """
    side = max([data.max_grid or MAX_SIDE, *(max(grid.shape) for task in tasks for grid in task.visible)])
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
    process: tuple[int, int] = (0, 1),
    gather: Callable[[Any], Any] | None = None,
) -> Predictions:
    """Answers every test input of `tasks`: greedily as it is, and by a vote over `cfg.augmentations` views.

    Queries are grouped by prompt length, so that each bucket compiles once; equal prompts are decoded once, for all that ask.
    Prompts longer than the longest bucket are not cut: they go unanswered, and `too_long` says so.

    Args:
        decoder: the model, on devices of this process; one that stops recursing early (`cfg.entropy_stop`) does so by itself.
        task_ids: rows of the task embedding; other tasks, and with `cfg.blank_task` all, get a blank one (-1).
        seed: of the augmentations.
        cap: tokens an answer may have; `answer_cap(data, tasks)` unless given.
        checkpoint: step of `params`, for the record.
        progress: called with the number of sequences that this process has decoded so far, and of all that it will, now and then.
        process: (p, P) decodes the p-th of P shares, by itself.
        gather: makes arrays `[P,S,…]` of those of each process `[S,…]`, and waits for all; needed where P > 1.
    """
    cap = answer_cap(data, tasks) if cap is None else cap
    rows = rows_of(task_ids, cfg.blank_task)
    queries = [
        Query(task, test, rows.get(task.id, -1), view)
        for task in tasks
        for view in views(task, cfg.augmentations, seed, data.permute_zero)
        for test in range(len(task.test))
    ]
    groups, too_long = by_bucket(queries, data)
    p, processes = process

    def decode(work: _Work, width: int, run: Callable[[_Ask, int], _Found]) -> _Answers:
        """The finished answers to each test input, in the order of the queries."""
        nonlocal done
        share = -(-len(work.asked) // processes)
        # Prompt i is number i // P of process i % P. Few have many completions: what is not written to takes no memory.
        tokens = np.zeros((width, share, cap), np.int8).swapaxes(0, 1)
        logprob, finished = np.zeros((share, width), np.float32), np.zeros((share, width), bool)
        mine = range(p, len(work.asked), processes)
        for bucket in reversed(groups):
            chosen = np.array([i for i in mine if work.asked[i][0] == bucket][::-1])  # longest first: what is last is done soon

            def ask(numbers: Sequence[int], bucket: int = bucket, chosen: np.ndarray = chosen) -> Prompts:
                return prompts([work.asked[i][1] for i in chosen[numbers]], bucket, data.format)

            for numbers, found in run(ask, len(chosen)):
                which, rank = np.nonzero(found.finished)
                at = chosen[numbers][which] // processes, rank
                tokens[at], logprob[at], finished[at] = found.tokens[which, rank], found.logprob[which, rank], True
                done += len(numbers)
                if progress:
                    progress(done, total)
        answers: _Answers = defaultdict(list)
        if gather:
            everyone = gather((tokens, logprob, finished))
            tokens, logprob, finished = (a.swapaxes(0, 1).reshape(-1, *a.shape[2:]) for a in everyone)
        for query, i in work.askers:
            answers[query.task.id, query.test] += [
                Answer(query.view, tokens[i, w], float(logprob[i, w])) for w in np.flatnonzero(finished[i])
            ]
        return answers

    def greedily(ask: _Ask, count: int) -> _Found:
        for numbers, found in generate.greedy(decoder, params, ask, count, cap, cfg.batch):
            yield numbers, jax.tree.map(lambda a: a[:, None], found)

    def searching(ask: _Ask, count: int) -> _Found:
        return generate.search(decoder, params, ask, count, cap, cfg.min_probability, cfg.batch)

    everything, plain = _distinct(groups, data), _Work([], [])
    width = generate.search_width(cfg.min_probability)
    if cfg.decode == "search":
        plain = _distinct({b: [query for query in group if query.view == Augmentation()] for b, group in groups.items()}, data)
    done, total = 0, sum(len(range(p, len(work.asked), processes)) for work in (plain, everything))
    if cfg.decode == "search":
        first = decode(plain, 1, greedily)
        answers = decode(everything, width, searching)
    else:
        answers = decode(everything, 1, greedily)
        first = {key: [answer for answer in found if answer.view == Augmentation()] for key, found in answers.items()}

    def prediction(task: Task, test: int, pair: Pair) -> Prediction:
        key = (task.id, test)
        greedy = next(map(read, first.get(key, [])), None)
        return Prediction(pair.input, pair.output, greedy, vote(pair.input, answers.get(key, [])))

    found = {task.id: tuple(prediction(task, i, pair) for i, pair in enumerate(task.test)) for task in tasks}
    return Predictions(found, cfg.augmentations, checkpoint, too_long, len(plain.asked) + len(everything.asked))


def _distinct(groups: Mapping[int, Sequence[Query]], data: DataConfig) -> _Work:
    """The work that queries, by bucket, are: prompts are equal when the model is told the same."""
    work, numbers = _Work([], []), {}
    for bucket, group in groups.items():
        for query in group:
            tokens, positions, _ = encode_query(query, data.format)
            prompt = hashlib.sha256(tokens.tobytes() + positions.tobytes()).digest()
            told = (prompt, query.row, query.view.dihedral)
            if told not in numbers:
                numbers[told] = len(work.asked)
                work.asked.append((bucket, query))
            work.askers.append((query, numbers[told]))
    return work
