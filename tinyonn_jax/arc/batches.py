"""Data as a function: `batch_at(dataset, seed, step)` is pure, so that resuming needs the step number and nothing else.

`build_dataset` serialises every view of every sequence once; a batch is then one gather and one colour look-up. Sequences are
bucketed by length under a fixed token budget. Letters: B batch, T positions (the bucket), P positions of a prompt, n sequences,
V views of each (8 dihedral ones, or 1), S stored tokens.
"""

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import lcm
from typing import NamedTuple

import flax.struct
import numpy as np
from jaxtyping import Bool, Float, Int

from tinyonn_jax.arc.augment import DIHEDRALS, Augmentation, free_colours, transform, turns_rows
from tinyonn_jax.arc.sets import TaskSets
from tinyonn_jax.arc.tasks import DataError, Pair, Task
from tinyonn_jax.arc.tokens import COLOURS, END, VOCAB, Encoded, Format, Grid, encode, pair_length, prompt_length
from tinyonn_jax.config import DataConfig

_FILLER = np.array([END, 0, 0, 0], np.int16)


@flax.struct.dataclass
class Batch:
    """Sequences of one bucket, as NumPy arrays on the host. Rows that only fill the batch have length 0 and task -1."""

    tokens: Int[np.ndarray, "B T"]
    positions: Int[np.ndarray, "B T 3"]
    """(x, y, z) of each token, see `tokens.py`."""
    prefix: Int[np.ndarray, "B"]
    """Tokens that everyone sees: those through the last SEP."""
    length: Int[np.ndarray, "B"]
    """Real tokens; END fills the rest."""
    loss_mask: Float[np.ndarray, "B T"]
    """1 where the *next* token is trained on: the last output, its ROWs and its END."""
    task: Int[np.ndarray, "B"]
    """Row of the task embedding; -1 is blank."""
    dihedral: Int[np.ndarray, "B"]
    """0..7."""


class Block(NamedTuple):
    """One batch of an epoch before shuffling: `count` sequences from `first` on, longest buckets first."""

    bucket: int
    first: int
    count: int


@dataclass(frozen=True, eq=False)
class Layouts:
    """Every view of n sequences, serialised back to back.

    `records` holds (token, x, y, z) as four int16 in one uint64, and a filler after each sequence (and as the very first record):
    what is read past the end of a sequence, clipped, is filler.
    """

    records: np.ndarray
    start: Int[np.ndarray, "n V"]
    length: Int[np.ndarray, "n V"]
    prefix: Int[np.ndarray, "n V"]
    bucket: Int[np.ndarray, "n"]
    task: Int[np.ndarray, "n"]
    free: Bool[np.ndarray, "n 10"]
    blocks: tuple[Block, ...]


@dataclass(frozen=True, eq=False)
class Dataset:
    """Sequences to train and to validate on, ready to be gathered. `messages` say, one line each, what did not fit."""

    training: Layouts
    validation: Layouts
    augment: bool
    tokens_per_batch: int
    messages: tuple[str, ...]

    @property
    def steps_per_epoch(self) -> int:
        """Batches that show every training sequence once."""
        return len(self.training.blocks)


def build_dataset(sets: TaskSets, cfg: DataConfig, rows: Collection[int] | None = None) -> Dataset:
    """Serialises what `sets` trains and validates on; with `rows`, of the tasks in these rows alone.

    In the `context` format, each training pair of a task is the target once, after the task's other demonstrations. A sequence
    with a view longer than the largest bucket is left out, and counted in `messages`.

    Raises:
        DataError: no training sequence fits, or none of those that were held out.
    """
    messages: list[str] = []
    free = [free_colours(task.train, cfg.permute_zero) for task in sets.tasks]

    def layouts(targets: Iterable[tuple[int, Pair]], views: int, what: str) -> Layouts:
        fit, too_long, longest = [], 0, 0
        for row, target in targets:
            if rows is not None and row not in rows:
                continue
            shown = [pair for pair in sets.tasks[row].train if pair is not target] if cfg.format == "context" else []
            encoded = [_encode(shown, target, view) for view in range(views)]
            length = max(len(e.tokens) for e in encoded)
            bucket = bucket_for(length, cfg.buckets)
            if bucket is None:
                too_long, longest = too_long + 1, max(longest, length)
            else:
                fit.append((bucket, row, encoded))
        if too_long:
            messages.append(
                f"{too_long} of {too_long + len(fit)} {what} sequences are longer than the largest bucket ({cfg.buckets[-1]} "
                f"tokens) and left out; the longest has {longest}: add larger --data.buckets, and as many --data.tokens-per-batch"
            )
        return _lay_out(fit, free, views, cfg.tokens_per_batch)

    training = layouts(((row, pair) for row, _, pair in sets.training), DIHEDRALS if cfg.augment else 1, "training")
    validation = layouts(((row, pair) for row, _, pair in sets.validation), 1, "validation")
    if not training.blocks:
        raise DataError(f"data.train: nothing to train on{': ' + messages[0] if messages else ''}")
    if sets.validation and not validation.blocks:
        raise DataError(f"data.holdout: nothing to validate on: {messages[-1]}")
    return Dataset(training, validation, cfg.augment, cfg.tokens_per_batch, tuple(messages))


def batch_at(dataset: Dataset, seed: int, step: int, process: tuple[int, int] = (0, 1), multiple: int = 1) -> Batch:
    """The batch of one step: a pure function of its arguments.

    An epoch shows every training sequence once, under a fresh dihedral transform and colour permutation, in shuffled batches. A
    batch takes its bucket from its longest sequence and tops up with the next shorter ones; B is how many such
    sequences `data.tokens_per_batch` holds, from 8 on a multiple of 8, as cores and devices like it.

    Args:
        process: (p, P) gives the p-th of P equal contiguous slices of the rows of the same batch.
        multiple: empty rows are added until B divides by this (and by P): the number of devices that share the batch.
    """
    epoch, index = divmod(step, dataset.steps_per_epoch)
    plan = _plan(dataset, seed, epoch)
    block = dataset.training.blocks[plan.blocks[index]]
    members = slice(block.first, block.first + block.count)
    rows = _rows(dataset.tokens_per_batch, block.bucket, process, multiple)
    return _gather(dataset.training, plan.order[members], plan.dihedral[members], plan.colours[members], block.bucket, rows)


def validation_batches(dataset: Dataset, process: tuple[int, int] = (0, 1), multiple: int = 1) -> Iterator[Batch]:
    """The held-out demonstrations once, as they are, in batches shaped like those of training; none without `data.holdout`."""
    for bucket, first, count in dataset.validation.blocks:
        items, zeros = np.arange(first, first + count), np.zeros(count, np.int64)
        colours = np.tile(np.arange(VOCAB), (count, 1))
        rows = _rows(dataset.tokens_per_batch, bucket, process, multiple)
        yield _gather(dataset.validation, items, zeros, colours, bucket, rows)


class Query(NamedTuple):
    """One test input of a task in one view, to be answered. `row` is the row of the task embedding, -1 for an unseen task."""

    task: Task
    test: int
    row: int
    view: Augmentation


@flax.struct.dataclass
class Prompts:
    """Queries as padded sequences that end with SEP; the answer's first token belongs at position `prefix`."""

    tokens: Int[np.ndarray, "B P"]
    positions: Int[np.ndarray, "B P 3"]
    prefix: Int[np.ndarray, "B"]
    task: Int[np.ndarray, "B"]
    dihedral: Int[np.ndarray, "B"]


def encode_query(query: Query, format: Format = "pair", answer: bool = False) -> Encoded:
    """The prompt of one query: its test input in its view (after its task's demonstrations in the same view, for `context`).

    `answer`: with the true output after it.

    Raises:
        ValueError: the true output is asked for and not known.
    """
    see = query.view.apply
    shown, input, output = _asked(query, format, answer)
    return encode([(see(a), see(b)) for a, b in shown], see(input), None if output is None else see(output))


def _asked(query: Query, format: Format, answer: bool) -> tuple[list[tuple[Grid, Grid]], Grid, Grid | None]:
    """The grids of a query's sequence in the original view: demonstrations, the test input, and its output if wanted."""
    test = query.task.test[query.test]
    if answer and test.output is None:
        raise ValueError(f"task {query.task.id}, test input {query.test + 1}: the output is not known")
    shown = query.task.train if format == "context" else ()
    return [(p.input, p.output) for p in shown if p.output is not None], test.input, test.output if answer else None


def query_length(query: Query, format: Format = "pair", answer: bool = False) -> int:
    """How many tokens `encode_query` gives, from the shapes of grids alone.

    Raises:
        ValueError: the true output is asked for and not known.
    """
    shown, input, output = _asked(query, format, answer)
    pairs = shown if output is None else [*shown, (input, output)]
    if turns_rows(query.view.dihedral):
        pairs, input = [(a.T, b.T) for a, b in pairs], input.T
    return sum(pair_length(*pair) for pair in pairs) + (prompt_length(input) if output is None else 0)


def prompts(queries: Sequence[Query], length: int, format: Format = "pair") -> Prompts:
    """The prompts of queries, filled with END to `length` tokens each.

    Find a length with `bucket_for(query_length(query, format), buckets)`; repeat a query where the batch must have a fixed size.
    An answer's tokens carry z = (z of SEP) + 1, END one more; `query.view.invert` brings the decoded grid back.

    Raises:
        ValueError: a prompt is longer than `length`.
    """
    return _fill(queries, len(queries), length, format, answer=False)[0]


def answered(queries: Sequence[Query], rows: int, length: int, format: Format = "pair") -> Batch:
    """Queries with their true answers, teacher forced, in a batch of `rows` sequences of `length` tokens; empty rows at the end.

    Raises:
        ValueError: a sequence is longer than `length`, or an answer is not known.
    """
    p, size = _fill(queries, rows, length, format, answer=True)
    return Batch(p.tokens, p.positions, p.prefix, size, _trained(np.arange(length), p.prefix, size), p.task, p.dihedral)


def _fill(queries: Sequence[Query], rows: int, length: int, format: Format, answer: bool) -> tuple[Prompts, Int[np.ndarray, "B"]]:
    """Queries in the first of `rows` padded sequences, and how long each is."""
    tokens, positions = np.full((rows, length), END, np.int32), np.zeros((rows, length, 3), np.int32)
    prefix, sizes, dihedral = np.zeros((3, rows), np.int32)
    task = np.full(rows, -1, np.int32)
    for i, query in enumerate(queries):
        encoded = encode_query(query, format, answer)
        size = len(encoded.tokens)
        if size > length:
            what = "answered prompt" if answer else "prompt"
            raise ValueError(f"the {what} of task {query.task.id}, test input {query.test + 1}, has {size} tokens, not {length}")
        tokens[i, :size], positions[i, :size] = encoded.tokens, encoded.positions
        prefix[i], sizes[i], task[i], dihedral[i] = encoded.prefix, size, query.row, query.view.dihedral
    return Prompts(tokens, positions, prefix, task, dihedral), sizes


def bucket_for(length: int, buckets: Sequence[int]) -> int | None:
    """The shortest bucket that holds `length` tokens; None if none does."""
    return next((bucket for bucket in buckets if length <= bucket), None)


def rows_of(task_ids: Sequence[str], blank: bool = False) -> dict[str, int]:
    """Rows of the task embedding by task id; none if they are to be blank."""
    return {} if blank else {name: row for row, name in enumerate(task_ids)}


def by_bucket(queries: Sequence[Query], data: DataConfig) -> tuple[dict[int, list[Query]], tuple[str, ...]]:
    """Queries by bucket, shortest prompts first, and a line for each test input with a view that fits no bucket."""
    sizes = [query_length(query, data.format) for query in queries]
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
        f"({data.buckets[-1]} tokens) and go unanswered; the longest has {sizes[-1]}: train with larger --data.buckets for them"
        for (name, test), sizes in sorted(misfits.items())
    )


class _Plan(NamedTuple):
    """One epoch: which sequence stands where, how it is seen, and the order of the blocks."""

    order: Int[np.ndarray, "n"]
    dihedral: Int[np.ndarray, "n"]
    colours: Int[np.ndarray, "n 14"]
    blocks: Int[np.ndarray, "steps"]


@lru_cache(maxsize=4)
def _plan(dataset: Dataset, seed: int, epoch: int) -> _Plan:
    """The random choices of one epoch. Cached, for every step of it asks; a function of its arguments all the same."""
    rng = np.random.default_rng((seed, epoch))
    layouts = dataset.training
    n = len(layouts.task)
    order = np.lexsort((rng.random(n), -layouts.bucket))
    blocks = rng.permutation(len(layouts.blocks))
    colours = np.tile(np.arange(VOCAB), (n, 1))
    if not dataset.augment:
        return _Plan(order, np.zeros(n, np.int64), colours, blocks)
    # Among the free colours of a row: the k-th becomes the k-th in random order. The fixed ones follow, each in its own place.
    free = layouts.free[order]
    places = np.argsort(~free, axis=1, kind="stable")
    images = np.argsort(np.where(free, rng.random((n, COLOURS)), 1.0), axis=1, kind="stable")
    np.put_along_axis(colours, places, images, axis=1)
    return _Plan(order, rng.integers(DIHEDRALS, size=n), colours, blocks)


def _encode(shown: Iterable[Pair], target: Pair, dihedral: int) -> Encoded:
    known = [(pair.input, pair.output) for pair in (*shown, target) if pair.output is not None]
    (*before, last) = [(transform(dihedral, input), transform(dihedral, output)) for input, output in known]
    return encode(before, *last)


def _lay_out(fit: list[tuple[int, int, list[Encoded]]], free: list[np.ndarray], views: int, tokens_per_batch: int) -> Layouts:
    """Longest buckets first; blocks of B sequences each, B by the bucket of a block's first one: the fewest possible batches."""
    fit = sorted(fit, key=lambda item: -item[0])
    parts = [_FILLER[None]]
    for _, _, encoded in fit:
        for e in encoded:
            parts += [np.concatenate([e.tokens[:, None], e.positions], axis=1), _FILLER[None]]
    length = np.array([[len(e.tokens) for e in encoded] for _, _, encoded in fit], np.int64).reshape(-1, views)
    ends = 1 + np.cumsum(length + 1)
    blocks, first = [], 0
    while first < len(fit):
        bucket = fit[first][0]
        count = min(batch_size(tokens_per_batch, bucket), len(fit) - first)
        blocks.append(Block(bucket, first, count))
        first += count
    return Layouts(
        records=np.concatenate(parts).astype(np.int16).view(np.uint64).ravel(),
        start=ends.reshape(length.shape) - length - 1,
        length=length,
        prefix=np.array([[e.prefix for e in encoded] for _, _, encoded in fit], np.int64).reshape(-1, views),
        bucket=np.array([bucket for bucket, _, _ in fit], np.int64),
        task=np.array([row for _, row, _ in fit], np.int32),
        free=np.array([free[row] for _, row, _ in fit], bool).reshape(-1, COLOURS),
        blocks=tuple(blocks),
    )


def round_up(size: int, multiple: int) -> int:
    """The least multiple that is not below `size`."""
    return -(-size // multiple) * multiple


def batch_size(tokens_per_batch: int, bucket: int) -> int:
    """Sequences in one batch: from 8 on a multiple of 8."""
    size = tokens_per_batch // bucket
    return size - size % 8 if size >= 8 else size


def _rows(tokens_per_batch: int, bucket: int, process: tuple[int, int], multiple: int) -> slice:
    """This process's rows of a batch whose B is rounded up to divide evenly."""
    p, count = process
    share = round_up(batch_size(tokens_per_batch, bucket), lcm(count, multiple)) // count
    return slice(p * share, (p + 1) * share)


def _gather(layouts: Layouts, items: np.ndarray, view: np.ndarray, colours: np.ndarray, bucket: int, rows: slice) -> Batch:
    """Those of the sequences that fall into `rows`, each in its view and colours, and fillers after the last."""
    size = rows.stop - rows.start
    items, view, colours = items[rows], view[rows], colours[rows]
    real = len(items)

    def column(values: np.ndarray, filler: int, dtype: type = np.int32) -> np.ndarray:
        full = np.full(size, filler, dtype)
        full[:real] = values
        return full

    start, length = column(layouts.start[items, view], 0, np.int64), column(layouts.length[items, view], 0)
    prefix = column(layouts.prefix[items, view], 0)
    t = np.arange(bucket)
    index = np.minimum(t, length[:, None]) + start[:, None]
    fields = layouts.records.take(index).view(np.int16).reshape(size, bucket, 4)
    tokens = fields[..., 0].astype(np.int32)
    tokens[:real] = colours.take(tokens[:real] + VOCAB * np.arange(real)[:, None])
    return Batch(
        tokens=tokens,
        positions=fields[..., 1:].astype(np.int32),
        prefix=prefix,
        length=length,
        loss_mask=_trained(t, prefix, length),
        task=column(layouts.task[items], -1),
        dihedral=column(view, 0),
    )


def _trained(t: np.ndarray, prefix: np.ndarray, length: np.ndarray) -> np.ndarray:
    """Which positions t predict a token after SEP, 0 or 1, `[B,T]`."""
    return ((t >= prefix[:, None] - 1) & (t < length[:, None] - 1)).astype(np.float32)
