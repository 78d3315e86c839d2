import json
import re

import numpy as np
import pytest

from tests.arc.files import GOOD, OPEN, change, kaggle, shifted, write
from tinyonn_jax.arc.augment import Augmentation, free_colours
from tinyonn_jax.arc.sets import audit, from_json, load_task_sets, to_json
from tinyonn_jax.arc.tasks import DataError, Pair, Task
from tinyonn_jax.config import DataConfig
from tinyonn_jax.presets import PRESETS


def test_conceptarc_shape(tmp_path):
    """A training source in Kaggle form with solutions contributes its test pairs, one without only its demonstrations."""
    evaluated = write(tmp_path / "e", e=shifted(1))
    for solutions, pairs in ((None, 3), ({"a": [[[4]], [[5]]]}, 5)):
        sets = load_task_sets(DataConfig(train=(kaggle(tmp_path, {"a": OPEN}, solutions),), eval=evaluated))
        assert [example.task_id for example in sets.training].count("a") == pairs


@pytest.fixture(scope="module")
def laptop():
    return load_task_sets(PRESETS["laptop"][1].data)


def test_laptop(laptop):
    assert (len(laptop.tasks), len(laptop.training), sum(len(task.test) for task in laptop.evaluation)) == (178, 587, 190)
    assert laptop.task_ids == tuple(task.id for task in laptop.evaluation) == tuple(sorted(laptop.task_ids))
    assert all(task.test == () for task in laptop.tasks)
    assert laptop.audit.startswith("leakage audit: 0 by task id and 0 by identical pair, of 587 training pairs")
    assert laptop.audit.endswith("; test pairs that augmentation makes of training pairs: 5")
    assert {example.row for example in laptop.training} == set(range(178))
    assert all(laptop.task_ids[row] == name for row, name, _ in laptop.training)


def test_demo():
    sets = load_task_sets(PRESETS["demo"][1].data)
    assert (len(sets.tasks), sum(len(task.test) for task in sets.evaluation)) == (30, 36)


def test_holdout(laptop):
    sets = load_task_sets(DataConfig(max_grid=10, holdout=True))
    assert len(sets.training) + len(sets.validation) == 587
    assert len(sets.validation) == sum(len(task.train) >= 3 for task in laptop.tasks)
    for row, name, pair in sets.validation:
        whole = next(task for task in laptop.evaluation if task.id == name)
        assert sets.task_ids[row] == name and pair.key == whole.train[-1].key
        assert pair.key not in {p.key for p in sets.tasks[row].train} and len(sets.tasks[row].train) == len(whole.train) - 1
    assert [len(task.train) for task in sets.evaluation] == [len(task.train) for task in laptop.evaluation]


def test_arc1_evaluation_in_arc2_training_is_refused():
    with pytest.raises(DataError, match=r"376 of 1000 tasks of arc2 are scored \(data\.eval arc1\).*--data\.drop-overlap"):
        load_task_sets(DataConfig(train=("arc2",), eval="arc1"))


def test_arc1_with_overlap_dropped():
    sets = load_task_sets(DataConfig(train=("arc1", "arc2"), eval="arc1", drop_overlap=True))
    # 400 + 1000 training tasks, less the 376 that are scored and the 391 that ARC-AGI-1 training has too, and the 400 scored.
    assert len(sets.tasks) == 400 + 400 + 1000 - 376 - 391 and len(sets.evaluation) == 400
    assert len(set(sets.task_ids)) == len(sets.tasks)
    assert sum(len(task.test) for task in sets.evaluation) == 419
    assert any(line.startswith("391 of 1000 tasks of arc2 stand in an earlier source too") for line in sets.messages)
    assert any(line == "1 of the training pairs equal a scored test pair: left out" for line in sets.messages)
    naive = {(p.input.tobytes(), p.output.tobytes(), p.input.shape) for t in sets.evaluation for p in t.test}
    assert not any((p.input.tobytes(), p.output.tobytes(), p.input.shape) in naive for _, _, p in sets.training)


def test_another_sources_tasks_are_trained_whole(tmp_path):
    train, scored = write(tmp_path / "t", a=GOOD), write(tmp_path / "e", b=shifted(1))
    sets = load_task_sets(DataConfig(train=(train, train), eval=scored))
    assert sets.task_ids == ("b", "a")
    assert [(row, name) for row, name, _ in sets.training] == [(0, "b")] * 3 + [(1, "a")] * 4
    same_source = load_task_sets(DataConfig(train=(scored,), eval=scored))
    assert [name for _, name, _ in same_source.training] == ["b"] * 3


def test_planted_overlaps(tmp_path):
    scored = write(tmp_path / "e", b=GOOD)
    by_id = write(tmp_path / "i", b=shifted(1), c=shifted(3))
    with pytest.raises(DataError, match=r"1 of 2 tasks of .* are scored"):
        load_task_sets(DataConfig(train=(by_id,), eval=scored))
    sets = load_task_sets(DataConfig(train=(by_id,), eval=scored, drop_overlap=True))
    assert [name for _, name, _ in sets.training] == ["b"] * 3 + ["c"] * 4
    assert [pair.input.tolist() for row, _, pair in sets.training if row == 0] == [pair["input"] for pair in GOOD["train"]]

    copied = shifted(1)
    copied["train"][1] = GOOD["test"][0]
    by_pair = write(tmp_path / "p", c=copied)
    with pytest.raises(DataError, match=r"1 of the training pairs equal a scored test pair; .*--data\.drop-overlap"):
        load_task_sets(DataConfig(train=(by_pair,), eval=scored))
    sets = load_task_sets(DataConfig(train=(by_pair,), eval=scored, drop_overlap=True))
    assert [name for _, name, _ in sets.training] == ["b"] * 3 + ["c"] * 3


RECOLOURED = (0, 5, 3, 1, 9, 2, 6, 4, 8, 7)
BLACK_MOVED = (1, 0, 2, 3, 4, 5, 6, 7, 8, 9)


def made(seen, scored, **fields):
    """How many of the scored pairs the audit says augmentation makes of one demonstration."""
    said = audit([Task("t", (seen,), ())], [Task("s", (), scored)], DataConfig(**fields))
    return int((re.findall(r"; test pairs that augmentation makes of training pairs: (\d+)$", said) or [0])[0])


@pytest.mark.parametrize(
    ("turn_in", "turn_out", "permutation", "count", "of_zero"),
    [
        *((turn, turn, RECOLOURED, 1, 1) for turn in range(8)),
        (1, 1, BLACK_MOVED, 0, 1),
        (0, 1, RECOLOURED, 0, 0),
        (0, 0, (0, 1, 1, 3, 4, 5, 6, 7, 8, 9), 0, 0),  # two colours become one
    ],
)
def test_audit_counts_scored_pairs_that_augmentation_makes(turn_in, turn_out, permutation, count, of_zero):
    grid = np.array([[0, 1, 2], [3, 1, 0]], np.int8)
    scored = Pair(grid, grid[::-1])
    seen = Pair(Augmentation(turn_in, permutation).apply(grid), Augmentation(turn_out, permutation).apply(scored.output))
    assert made(seen, (scored, Pair(grid, None))) == count
    assert made(seen, (scored,), permute_zero=True) == of_zero
    assert made(seen, (scored,), augment=False) == 0


def test_audit_knows_that_colours_which_a_demonstration_makes_stay():
    one = lambda a, b: Pair(np.array([[a]], np.int8), np.array([[b]], np.int8))  # noqa: E731
    assert made(one(1, 2), (one(3, 2),)) == 1
    assert made(one(1, 2), (one(3, 4),)) == 0


def becomes(seen, scored, free):
    """Whether some view of one pair, with only free colours changed, is the other."""
    for view in map(Augmentation, range(8)):
        grids = [(view.apply(seen.input), scored.input), (view.apply(seen.output), scored.output)]
        if all(a.shape == b.shape for a, b in grids):
            changes = {change for a, b in grids for change in zip(a.flat, b.flat, strict=True)}
            unique = all(len(set(colours)) == len(changes) for colours in zip(*changes, strict=True))
            if unique and all(a == b or (free[a] and free[b]) for a, b in changes):
                return True
    return False


def test_audit_of_demo_against_every_view_of_every_training_pair():
    sets = load_task_sets(PRESETS["demo"][1].data)
    free = [free_colours(task.train) for task in sets.tasks]
    scored = [pair for task in sets.evaluation for pair in task.test]
    found = sum(any(becomes(seen, pair, free[row]) for row, _, seen in sets.training) for pair in scored)
    assert sets.audit.endswith(f"of training pairs: {found}") and found == 3


def test_audit_turns_every_pair_once(monkeypatch):
    turned = []
    monkeypatch.setattr("tinyonn_jax.arc.sets._form", lambda pair, fixed: turned.append(pair) or pair.key)
    seen, scored = (tuple(Pair(np.array([[c]], np.int8), np.array([[d]], np.int8)) for c in range(1, 6)) for d in (6, 7))
    audit([Task("t", seen, ())], [Task("s", (), scored)], DataConfig())
    assert len(turned) == len(seen) + len(scored)


def test_audit_catches_leaks():
    def pair(*cells):
        return Pair(*(np.array([[cell]], np.int8) for cell in cells))

    scored = Task("s", (pair(1, 2),), (pair(3, 4), Pair(np.array([[5]], np.int8))))
    honest = Task("h", (pair(3, 5),), (pair(4, 3),))
    assert "(1 of their test outputs are unknown)" in audit([Task("s", scored.train, ()), honest], [scored], DataConfig())
    with pytest.raises(DataError, match="1 by task id and 0 by identical pair, of 2 training pairs"):
        audit([Task("s", (*scored.train, pair(5, 6)), ())], [scored], DataConfig())
    with pytest.raises(DataError, match="0 by task id and 1 by identical pair, of 2 training pairs"):
        audit([Task("h", honest.train, (pair(3, 4),))], [scored], DataConfig())
    with pytest.raises(DataError, match="1 by task id and 1 by identical pair"):
        audit([scored.__class__("s", scored.train, scored.test[:1])], [scored], DataConfig())


def test_filters(tmp_path):
    with pytest.raises(DataError, match=r"no task has only grids up to 1 x 1; raise --data\.max-grid"):
        load_task_sets(DataConfig(train=(write(tmp_path / "f", a=GOOD),), eval=str(tmp_path / "f"), max_grid=1))
    big = shifted(1)
    big["test"][0]["output"] = [[1] * 5]
    write(tmp_path / "f", b=big)
    cfg = DataConfig(train=(str(tmp_path / "f"),), eval=str(tmp_path / "f"), max_grid=4)
    assert load_task_sets(cfg).task_ids == ("a",)
    wide = shifted(2)
    wide["train"][0]["input"] = [[1, 2, 3]]
    write(tmp_path / "f", _=wide)  # first by id, not by size
    assert load_task_sets(DataConfig(train=cfg.train, eval=cfg.eval, smallest=2)).task_ids == ("a", "b")


def test_skipped_tasks_are_counted(tmp_path):
    folder = write(tmp_path / "f", a=GOOD, b="{", c="{")
    with pytest.raises(DataError):
        load_task_sets(DataConfig(train=(folder,), eval=folder))
    sets = load_task_sets(DataConfig(train=(folder,), eval=folder, skip_invalid=True))
    assert sets.skipped == 2 and len(sets.messages) == 2 and sets.task_ids == ("a",)


def test_json_round_trip(tmp_path):
    write(tmp_path / "t", a=GOOD, c=shifted(3))
    path = kaggle(tmp_path, {"k": change(("test",), [{"input": [[1]]}])})
    cfg = DataConfig(train=(str(tmp_path / "t"),), eval=path, holdout=True)
    sets = load_task_sets(cfg)
    text = to_json(sets)
    again = from_json(text, cfg)
    assert to_json(again) == text and json.loads(text)["task_ids"] == ["k", "a", "c"]
    assert (again.task_ids, again.audit, again.skipped) == (sets.task_ids, sets.audit, sets.skipped)
    assert [(e.row, e.task_id, e.pair.key) for e in again.training] == [(e.row, e.task_id, e.pair.key) for e in sets.training]
    assert [(e.row, e.task_id, e.pair.key) for e in again.validation] == [(e.row, e.task_id, e.pair.key) for e in sets.validation]
    for damaged in (text[: len(text) // 2], "[]", "{}", text.replace('"row": 0', '"row": 9'), text.replace("[[4]]", "[[40]]")):
        with pytest.raises(DataError, match=r"tasks\.json"):
            from_json(damaged, DataConfig())
