from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from tinyonn_jax.arc.augment import Augmentation, transform, views
from tinyonn_jax.arc.batches import (
    Query,
    batch_at,
    bucket_for,
    build_dataset,
    encode_query,
    prompts,
    query_length,
    validation_batches,
)
from tinyonn_jax.arc.sets import Example, TaskSets
from tinyonn_jax.arc.tasks import DataError, Pair, Task
from tinyonn_jax.arc.tokens import END, ROW, SEP, START, decode, encode, pair_length
from tinyonn_jax.config import DataConfig

CFG = DataConfig(buckets=(12, 16, 24, 36), tokens_per_batch=72)


def grid(rng, h, w, colours=10):
    return rng.integers(colours, size=(h, w)).astype(np.int8)


def make_sets(tasks=7, seed=0):
    """Tasks of 2 to 4 random demonstrations, and one more pair of the first task to validate on."""
    rng = np.random.default_rng(seed)
    built = []
    for i in range(tasks):
        shapes = [(1 + (i + j) % 3, 1 + (i * j) % 4) for j in range(2 + i % 3)]
        built.append(Task(f"t{i}", tuple(Pair(grid(rng, h, w), grid(rng, w, h)) for h, w in shapes), ()))
    held = Example(0, "t0", Pair(grid(rng, 2, 2), grid(rng, 2, 2)))
    return TaskSets(tuple(built), (held,), tuple(built), "")


def unaugmented(row):
    """The pair that a row of a batch shows, brought back to dihedral 0, colours as they are."""
    tokens, prefix, length, dihedral = row
    view = Augmentation(int(dihedral))
    return view.invert(decode(np.append(tokens[1 : prefix - 1], END))), view.invert(decode(tokens[prefix:length]))


def rows(batch):
    return [
        (int(batch.task[i]), unaugmented((batch.tokens[i], batch.prefix[i], batch.length[i], batch.dihedral[i])))
        for i in range(len(batch.tokens))
        if batch.length[i]
    ]


def same(a, b):
    return all(np.array_equal(getattr(a, name), getattr(b, name)) for name in type(a).__dataclass_fields__)


def test_batch_worked_by_hand():
    task = Task("t", (Pair(np.array([[1, 2]], np.int8), np.array([[3], [4]], np.int8)),), ())
    dataset = build_dataset(TaskSets((task,), (), (task,), ""), DataConfig(buckets=(12,), tokens_per_batch=24, augment=False))
    batch = batch_at(dataset, 0, 5)
    assert batch.tokens.tolist() == [[START, 1, 2, ROW, SEP, 3, ROW, 4, ROW, END, END, END], [END] * 12]
    assert batch.positions[0, :, 0].tolist() == [0, 0, 1, 2, 0, 0, 1, 0, 1, 0, 0, 0]
    assert batch.positions[0, :, 2].tolist() == [0, 1, 1, 1, 2, 3, 3, 3, 3, 4, 0, 0]
    assert batch.loss_mask.tolist() == [[0, 0, 0, 0, 1, 1, 1, 1, 1, 0, 0, 0], [0] * 12]
    assert (batch.prefix.tolist(), batch.length.tolist()) == ([5, 0], [10, 0])
    assert (batch.task.tolist(), batch.dihedral.tolist()) == ([0, -1], [0, 0])
    assert {batch.tokens.dtype, batch.positions.dtype, batch.task.dtype} == {np.dtype("int32")}
    assert batch.loss_mask.dtype == np.float32


def test_a_bucket_holds_the_longest_view():
    """Three rows of two cells are longer than two of three, by the tokens that end a row."""
    rng = np.random.default_rng(0)
    task = Task("t", (Pair(grid(rng, 2, 3), grid(rng, 2, 3)),), ())
    dataset = build_dataset(TaskSets((task,), (), (task,), ""), DataConfig(buckets=(20, 24), tokens_per_batch=24))
    batches = [batch_at(dataset, 0, step) for step in range(20)]
    assert {int(batch.length.max()) for batch in batches} == {19, 21}
    assert all(output.shape == input.shape == (2, 3) for batch in batches for _, (input, output) in rows(batch))


@pytest.mark.parametrize("augment", [True, False])
def test_every_pair_exactly_once_an_epoch(augment):
    sets = make_sets()
    dataset = build_dataset(sets, replace(CFG, augment=augment))

    def name(task, input, output):
        both = np.append(input, output)
        return task, input.shape, pattern(both) if augment else tuple(both.tolist())

    expected = Counter(name(row, pair.input, pair.output) for row, _, pair in sets.training)
    for epoch in range(3):
        steps = range(epoch * dataset.steps_per_epoch, (epoch + 1) * dataset.steps_per_epoch)
        assert Counter(name(task, *pair) for step in steps for task, pair in rows(batch_at(dataset, 0, step))) == expected


def pattern(values):
    """Which cells are equal: what a permutation of the colours keeps."""
    first = {v: i for i, v in reversed(list(enumerate(values.tolist())))}
    return tuple(first[v] for v in values.tolist())


def test_augmentation_is_consistent_and_fresh():
    """Within a pair one permutation acts on both grids, keeps 0 and made colours, and the views vary over epochs."""
    sets = make_sets()
    dataset = build_dataset(sets, CFG)
    originals = {(row, pair.input.shape, pattern(np.append(pair.input, pair.output))): pair for row, _, pair in sets.training}
    seen, moves, possible = set(), set(), set()
    for step in range(40 * dataset.steps_per_epoch):
        batch = batch_at(dataset, 3, step)
        seen.update(batch.dihedral[batch.length > 0].tolist())
        for task, (input, output) in rows(batch):
            original = originals[task, input.shape, pattern(np.append(input, output))]
            before, after = np.append(original.input, original.output), np.append(input, output)
            mapping = dict(zip(before.tolist(), after.tolist(), strict=True))
            made = {c for p in sets.tasks[task].train for c in np.setdiff1d(p.output, p.input).tolist()}
            assert all(mapping[c] == c for c in mapping if c == 0 or c in made)
            assert len(set(mapping.values())) == len(mapping)
            moves.update((task, a, b) for a, b in mapping.items() if a != b)
            free = set(range(1, 10)) - made
            possible.update((task, a, b) for a in free.intersection(mapping) for b in free - {a})
    assert seen == set(range(8)) and moves <= possible and len(moves) > 0.9 * len(possible) > 60


def test_positions_follow_the_view():
    dataset = build_dataset(make_sets(), CFG)
    for step in range(5):
        batch = batch_at(dataset, 0, step)
        for i in np.flatnonzero(batch.length):
            n, prefix = batch.length[i], batch.prefix[i]
            input, output = decode(np.append(batch.tokens[i, 1 : prefix - 1], END)), decode(batch.tokens[i, prefix:n])
            assert input is not None and output is not None
            expected = encode((), input, output)
            assert batch.tokens[i, :n].tolist() == expected.tokens.tolist()
            assert batch.positions[i, :n].tolist() == expected.positions.tolist()


def test_pure_in_seed_and_step():
    sets = make_sets()
    one, two = build_dataset(sets, CFG), build_dataset(sets, CFG)
    steps = range(4 * one.steps_per_epoch)
    forwards = [batch_at(one, 7, step) for step in steps]
    for step in reversed(steps):
        again = batch_at(two, 7, step)
        assert same(again, forwards[step])
        again.tokens[:] = 0  # a caller's scribbles must not reach the next call
        again.positions[:] = 0
        assert same(batch_at(two, 7, step), forwards[step])
    assert not all(same(batch_at(one, 8, step), forwards[step]) for step in steps)
    assert not same(forwards[0], forwards[one.steps_per_epoch])


@pytest.mark.parametrize(("processes", "multiple"), [(2, 1), (3, 1), (2, 4), (1, 8)])
def test_slices_make_the_batch(processes, multiple):
    dataset = build_dataset(make_sets(), CFG)
    for step in range(dataset.steps_per_epoch):
        whole = batch_at(dataset, 0, step, multiple=np.lcm(processes, multiple))
        parts = [batch_at(dataset, 0, step, process=(p, processes), multiple=multiple) for p in range(processes)]
        assert len({len(part.tokens) for part in parts}) == 1 and len(whole.tokens) % multiple == 0
        for name in type(whole).__dataclass_fields__:
            np.testing.assert_array_equal(np.concatenate([getattr(part, name) for part in parts]), getattr(whole, name))
        plain = batch_at(dataset, 0, step)
        np.testing.assert_array_equal(whole.tokens[: len(plain.tokens)], plain.tokens)
        assert not whole.length[len(plain.tokens) :].any()


def test_shapes_are_constant_per_bucket():
    dataset = build_dataset(make_sets(20), CFG)
    shapes = {batch_at(dataset, 0, step).tokens.shape for step in range(2 * dataset.steps_per_epoch)}
    assert shapes <= {(72 // bucket, bucket) for bucket in CFG.buckets} and len(shapes) > 1


def test_batches_of_eight_or_more_are_multiples_of_eight():
    dataset = build_dataset(make_sets(20), replace(CFG, tokens_per_batch=240))
    shapes = {batch_at(dataset, 0, step).tokens.shape for step in range(dataset.steps_per_epoch)}
    sizes = {12: 16, 16: 8, 24: 8, 36: 6}  # not 20, 15, 10, 6
    assert len(shapes) > 1 and all(sizes[length] == rows for rows, length in shapes)


def test_padding_is_small():
    """Free rows are topped up: only the last batch of an epoch may have empty rows."""
    dataset = build_dataset(make_sets(20), CFG)
    empty = [(batch_at(dataset, 0, step).length == 0).sum() for step in range(dataset.steps_per_epoch)]
    assert np.count_nonzero(empty) <= 1


def test_too_long_is_reported_not_cut():
    sets = make_sets()
    cfg = replace(CFG, buckets=(12, 16))
    dataset = build_dataset(sets, cfg)
    pairs = [example.pair for example in sets.training]
    lengths = [max(pair_length(transform(d, p.input), transform(d, p.output)) for d in (0, 1)) for p in pairs]
    too_long = sum(length > 16 for length in lengths)
    assert 0 < too_long < len(lengths)
    assert len(dataset.training.task) == len(lengths) - too_long
    assert dataset.messages[0].startswith(f"{too_long} of {len(lengths)} training sequences are longer than the largest bucket")
    with pytest.raises(DataError, match=r"nothing to train on: .*larger --data.buckets"):
        build_dataset(sets, replace(CFG, buckets=(4,)))
    longest = Pair(np.ones((4, 4), np.int8), np.ones((4, 4), np.int8))
    held = replace(sets, validation=(Example(0, sets.tasks[0].id, longest),))
    with pytest.raises(DataError, match=r"data.holdout: nothing to validate on: 1 of 1 validation sequences"):
        build_dataset(held, replace(CFG, buckets=(12, 24)))


def test_context_format():
    sets = make_sets()
    dataset = build_dataset(sets, replace(CFG, format="context", augment=False, buckets=(64, 128), tokens_per_batch=512))
    found = {}
    for step in range(dataset.steps_per_epoch):
        batch = batch_at(dataset, 0, step)
        for i in np.flatnonzero(batch.length):
            found[tuple(batch.tokens[i, : batch.length[i]].tolist())] = batch.prefix[i], batch.loss_mask[i].sum()
    assert len(found) == len(sets.training)
    for task in sets.tasks:
        for j, target in enumerate(task.train):
            others = [(p.input, p.output) for k, p in enumerate(task.train) if k != j]
            expected = encode(others, target.input, target.output)
            assert found[tuple(expected.tokens.tolist())] == (expected.prefix, len(expected.tokens) - expected.prefix)


def test_context_of_a_held_out_pair_is_the_other_demonstrations():
    sets = make_sets()
    dataset = build_dataset(sets, replace(CFG, format="context", buckets=(64, 128), tokens_per_batch=512))
    (batch,) = validation_batches(dataset)
    held = sets.validation[0].pair
    expected = encode([(p.input, p.output) for p in sets.tasks[0].train], held.input, held.output)
    assert batch.tokens[0, : batch.length[0]].tolist() == expected.tokens.tolist()


def test_validation_batches():
    sets = make_sets()
    (batch,) = validation_batches(build_dataset(sets, CFG))
    assert batch.tokens.shape == (72 // 16, 16)
    ((task, (input, output)),) = rows(batch)
    assert task == 0
    np.testing.assert_array_equal(input, sets.validation[0].pair.input)
    np.testing.assert_array_equal(output, sets.validation[0].pair.output)
    assert list(validation_batches(build_dataset(replace(sets, validation=()), CFG))) == []


@pytest.mark.parametrize("format", ["pair", "context"])
def test_prompts(format):
    rng = np.random.default_rng(0)
    task = Task("t", (Pair(grid(rng, 2, 3, 4), grid(rng, 1, 2, 4)),), (Pair(grid(rng, 3, 2, 4)), Pair(grid(rng, 2, 2, 4))))
    queries = [Query(task, test, 5, view) for test in (0, 1) for view in views(task, 3, 0)] + [Query(task, 0, -1, Augmentation())]
    longest = max(query_length(q, format) for q in queries)
    batch = prompts(queries, longest + 2, format)
    assert batch.tokens.shape == (7, longest + 2) and batch.positions.shape == (7, longest + 2, 3)
    assert batch.task.tolist() == [5] * 6 + [-1] and batch.dihedral.tolist() == [q.view.dihedral for q in queries]
    for i, query in enumerate(queries):
        n = batch.prefix[i]
        tokens = batch.tokens[i]
        assert tokens[n - 1] == SEP and np.all(tokens[n:] == END)
        assert batch.positions[i, n - 1, 2] == (2 if format == "pair" else 7)
        starts, seps = np.flatnonzero(tokens == START), np.flatnonzero(tokens == SEP)
        assert len(starts) == len(seps) == (1 if format == "pair" else 2)
        shown = [decode(np.append(tokens[a + 1 : b], END)) for a, b in zip(starts, seps, strict=True)]
        asked = [task.test[query.test].input] if format == "pair" else [task.train[0].input, task.test[query.test].input]
        for seen, original in zip(shown, asked, strict=True):
            np.testing.assert_array_equal(query.view.invert(seen), original)
    with pytest.raises(ValueError, match="task t, test input"):
        prompts(queries, longest - 1, format)


@pytest.mark.parametrize("format", ["pair", "context"])
@pytest.mark.parametrize("answer", [False, True])
def test_the_length_of_a_query_is_that_of_its_sequence(format, answer):
    """Turned grids of unequal sides have as many cells and another number of rows."""
    rng = np.random.default_rng(0)
    task = Task("t", (Pair(grid(rng, 2, 3, 4), grid(rng, 1, 2, 4)),), (Pair(grid(rng, 3, 2, 4), grid(rng, 5, 1, 4)),))
    queries = [Query(task, 0, 5, Augmentation(dihedral)) for dihedral in range(8)]
    lengths = [query_length(query, format, answer) for query in queries]
    assert lengths == [len(encode_query(query, format, answer).tokens) for query in queries] and len(set(lengths)) == 2


def test_bucket_for():
    assert [bucket_for(n, (4, 8)) for n in (1, 4, 5, 8, 9)] == [4, 4, 8, 8, None]


def test_a_query_in_context_shows_every_demonstration():
    rng = np.random.default_rng(1)
    shown = [(grid(rng, 1, 2), grid(rng, 2, 1)) for _ in range(3)]
    asked = grid(rng, 2, 2)
    query = Query(Task("t", tuple(Pair(*pair) for pair in shown), (Pair(asked, None),)), 0, -1, Augmentation())
    np.testing.assert_array_equal(encode_query(query, "context").tokens, encode(shown, asked).tokens)
