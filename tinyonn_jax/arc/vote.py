"""Voting: the answers that a model gives to many views of one test input become a ranking of grids.

Every answer is brought back to the original view; malformed ones and copies of the input are discarded; equal grids are counted,
and ties broken by mean log-probability. Nothing outlives a call, so no evaluation can vote in another. Source: mdlARC.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from tinyonn_jax.arc import tokens
from tinyonn_jax.arc.augment import Augmentation
from tinyonn_jax.arc.tokens import Grid


class Answer(NamedTuple):
    """The tokens after SEP that were generated for one view, and their total log-probability in nats."""

    view: Augmentation
    tokens: Int[np.ndarray, " T"]
    logprob: float


class Candidate(NamedTuple):
    """A grid in the original view, the answers that agree on it, and their mean log-probability.

    `likelihood`: its mean log-probability over all views, whatever they answered, where that was asked for (`forced.ranked`).
    """

    grid: Grid
    votes: int
    logprob: float
    likelihood: float | None = None


def read(answer: Answer) -> Grid | None:
    """The grid of an answer in the original view; None if it spells no rectangle that END closes."""
    grid = tokens.decode(answer.tokens)
    return None if grid is None else answer.view.invert(grid)


def vote(input: Grid, answers: Iterable[Answer]) -> tuple[Candidate, ...]:
    """The grids answered to `input`: most votes first, ties by the highest mean log-probability, then by size and colours."""
    ballots: dict[tuple, tuple[Grid, list[float]]] = {}
    for answer in answers:
        grid = read(answer)
        if grid is not None and not np.array_equal(grid, input):
            ballots.setdefault((grid.shape, grid.tobytes()), (grid, []))[1].append(answer.logprob)
    ranked = sorted((-len(logprobs), -float(np.mean(logprobs)), key) for key, (_, logprobs) in ballots.items())
    return tuple(Candidate(ballots[key][0], -votes, -logprob) for votes, logprob, key in ranked)
