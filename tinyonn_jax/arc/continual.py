"""Continual learning: stages of tasks one after another, nothing replayed; how much of the earlier ones is left?

With a_ij the accuracy on stage j after learning stage i (row 0: before any) of S stages,

    average accuracy    mean_j a_Sj
    learning accuracy   mean_j a_jj                              (Riemer et al., 2019)
    forgetting          mean_{j<S} max_{0<i<S} a_ij − a_Sj       (Chaudhry et al., 2018)
    backward transfer   mean_{j<S} a_Sj − a_jj                   (Lopez-Paz and Ranzato, 2017)
    forward transfer    mean_{j>1} a_{j−1,j} − a_0j              (the same)
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from tinyonn_jax.arc.augment import DIHEDRALS, Augmentation
from tinyonn_jax.arc.batches import (
    Batch,
    Dataset,
    Query,
    answered,
    batch_at,
    batch_size,
    bucket_for,
    build_dataset,
    query_length,
    round_up,
)
from tinyonn_jax.arc.sets import TaskSets
from tinyonn_jax.arc.tasks import DataError
from tinyonn_jax.config import DataConfig

MEASURES = ("average_accuracy", "learning_accuracy", "forgetting", "backward_transfer", "forward_transfer")


@dataclass(frozen=True)
class Stages:
    """What each stage learns from and is tested on, and for how many steps it lasts."""

    datasets: tuple[Dataset, ...]
    tests: tuple[tuple[Batch, ...], ...]
    steps: int

    def batch_at(self, seed: int, step: int, process: tuple[int, int] = (0, 1), multiple: int = 1) -> Batch:
        """The batch of one step of the whole run, see `batches.batch_at`; a stage starts anew with its own step 0."""
        stage, within = divmod(step, self.steps)
        return batch_at(self.datasets[stage], seed, within, process, multiple)


def build_stages(sets: TaskSets, cfg: DataConfig, steps: int, seed: int, multiple: int = 1) -> Stages:
    """The tasks dealt to `cfg.sequence` stages in an order that `seed` shuffles, `steps` in all.

    A stage learns from the pairs of its tasks as a run on them alone would, and is tested on the test inputs of its scored
    tasks, each in the dihedral views that it learns from, in teacher-forced batches of one shape (rows divide by `multiple`).

    Raises:
        DataError: a stage has nothing to learn from or no test output that is known and fits.
    """
    order = np.random.default_rng((seed, len(sets.tasks))).permutation(len(sets.tasks))
    groups = [sorted(group.tolist()) for group in np.array_split(order, cfg.sequence)]
    row_of = {name: row for row, name in enumerate(sets.task_ids)}
    queries: list[list[Query]] = [[] for _ in groups]
    views = DIHEDRALS if cfg.augment else 1
    stage_of = {row: stage for stage, group in enumerate(groups) for row in group}
    for task in sets.evaluation:
        for test, pair in enumerate(task.test):
            if task.id in row_of and pair.output is not None:
                row = row_of[task.id]
                queries[stage_of[row]] += [Query(task, test, row, Augmentation(view)) for view in range(views)]
    longest = max((query_length(query, cfg.format, answer=True) for group in queries for query in group), default=0)
    bucket = bucket_for(longest, cfg.buckets)
    if bucket is None or not all(queries):
        raise DataError(
            f"data.sequence {cfg.sequence}: every stage needs a test output that is known and fits the longest of data.buckets "
            f"({cfg.buckets[-1]} tokens; the longest test has {longest}): take fewer stages, more tasks or longer buckets"
        )
    rows = round_up(min(max(map(len, queries)), batch_size(cfg.tokens_per_batch, bucket)), multiple)
    tests = tuple(
        tuple(answered(group[i : i + rows], rows, bucket, cfg.format) for i in range(0, len(group), rows)) for group in queries
    )
    return Stages(tuple(build_dataset(sets, cfg, group) for group in groups), tests, steps // cfg.sequence)


def measures(matrix: Float[np.ndarray, "S+1 S"]) -> dict[str, float]:
    """The `MEASURES` of a matrix of accuracies whose first row was taken before any learning."""
    before, after = matrix[0], matrix[1:]
    last, learned = after[-1, :-1], np.diagonal(after)
    forward = np.diagonal(after, 1) - before[1:]
    forgetting = after[:-1, :-1].max(0) - last
    means = (after[-1].mean(), learned.mean(), forgetting.mean(), (last - learned[:-1]).mean(), forward.mean())
    return dict(zip(MEASURES, map(float, means), strict=True))
