import copy
import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.arc.files import GOOD, OPEN, change, kaggle, write
from tinyonn_jax.arc.tasks import DataError, Pair, load_source


def test_folder(tmp_path):
    (task,), faults = load_source(write(tmp_path / "f", a=GOOD), "train")
    assert (task.id, faults) == ("a", {})
    assert [pair.input.tolist() for pair in task.train] == [[[1, 2]], [[4]], [[7]]]
    assert task.train[1].output.tolist() == [[5, 6]] and task.test[0].output.tolist() == [[0]]
    assert task.train[0].input.dtype == np.int8


def test_same_cells_in_another_shape_are_not_identical():
    row, column = np.array([[1, 2]], np.int8), np.array([[1], [2]], np.int8)
    assert Pair(row, row).key != Pair(row, column).key != Pair(column, column).key
    assert Pair(row, None).key != Pair(row, row).key == Pair(row.copy(), row.T.copy().T).key


IN = ("train", 1, "input")
BAD = [
    (change(IN, [[1, 2], [3]]), "train pair 2 input, row 2: 1 cells where row 1 has 2"),
    (change(IN, [[1, 12]]), "train pair 2 input, row 1, column 2: 12 is no colour"),
    (change(IN, [[-1]]), "row 1, column 1: -1 is no colour"),
    (change(IN, [[True]]), "row 1, column 1: True is no colour"),
    (change(IN, [[1.0]]), "row 1, column 1: 1.0 is no colour"),
    (change(IN, [[None]]), "row 1, column 1: None is no colour"),
    (change(IN, [["1\n2"]]), r"row 1, column 1: '1\n2' is no colour"),
    (change(IN, [[[1]]]), "row 1, column 1: [1] is no colour"),
    (change(IN, []), "train pair 2 input: 0 rows; a grid has 1 to 30"),
    (change(IN, [[]]), "row 1: 0 cells; a row has 1 to 30"),
    (change(IN, [[0] * 31] * 31), "train pair 2 input: 31 rows"),
    (change(IN, [[0] * 31]), "row 1: 31 cells"),
    (change(IN, "grid"), "train pair 2 input: must be a list of rows, not text"),
    (change(IN, [1]), "train pair 2 input, row 1: must be a list of cells, not a number"),
    (change(("train", 1, "output"), None), "train pair 2 output: must be a list of rows, not nothing"),
    (change(("train", 0), 3), "train pair 1: must be an object"),
    (change(("test", 0), {}), "test pair 1 input: must be a list of rows, not nothing"),
    (change(("test", 0, "output"), [[11]]), "test pair 1 output, row 1, column 1: 11 is no colour"),
    (change(("train",), []), "no demonstrations"),
    (change(("test",), []), "no test inputs"),
    (change(("test",), {}), '"test" must be a list of pairs, not an object'),
    ({"train": GOOD["train"]}, '"test" must be a list of pairs, not nothing'),
    ([1], "must be an object"),
    ("{", "not JSON (line 1, column 2"),
    ("", "not JSON"),
    ('{"train": [{"input": [[1]], "input": [[2]]}]}', "input stands twice in one object"),
    ("[" * 100_000, "brackets too deep"),
    ("1" * 5000, "a number too long"),
]


@pytest.mark.parametrize(("raw", "message"), BAD, ids=[message for _, message in BAD])
def test_bad_task(tmp_path, raw, message):
    folder = write(tmp_path / "f", bad=raw, good=GOOD)
    with pytest.raises(DataError) as caught:
        load_source(folder, "train")
    line = str(caught.value)
    assert message in line and str(tmp_path / "f" / "bad.json") in line and "--data.skip-invalid" in line
    assert "\n" not in line and len(line) < 400
    tasks, faults = load_source(folder, "train", skip_invalid=True)
    assert [task.id for task in tasks] == ["good"] and list(faults) == ["bad"]
    assert message in faults["bad"] and "skip-invalid" not in faults["bad"]


def test_invalid_tasks_are_all_named_at_once(tmp_path):
    folder = write(tmp_path / "f", good=GOOD, **{f"bad{i:02}": "{" for i in range(22)})
    with pytest.raises(DataError) as caught:
        load_source(folder, "train")
    head, *lines = str(caught.value).splitlines()
    assert head.startswith(f"22 of 23 tasks of {folder} are invalid") and "--data.skip-invalid" in head
    assert [f"bad{i:02}.json: not JSON" in line for i, line in enumerate(lines[:20])] == [True] * 20
    assert lines[20:] == ["  and 2 more"]


def test_wrong_encoding(tmp_path):
    folder = write(tmp_path / "f")
    (tmp_path / "f" / "a.json").write_bytes(json.dumps(GOOD).encode("utf-16"))
    with pytest.raises(DataError, match=r"a\.json: not UTF-8 text \(byte 0\)"):
        load_source(folder, "train")
    with pytest.raises(DataError, match="has no valid task"):
        load_source(folder, "train", skip_invalid=True)
    (tmp_path / "f" / "a.json").write_bytes(json.dumps(GOOD).encode("utf-8-sig"))
    assert len(load_source(folder, "train").tasks) == 1


def test_missing_sources(tmp_path):
    with pytest.raises(DataError, match=r"data\.train: 'arc3' does not exist; give a folder, .*arc2/evaluation"):
        load_source("arc3", "train")
    with pytest.raises(DataError, match=r"holds no \.json file"):
        load_source(write(tmp_path / "empty"), "eval")
    kaggle = tmp_path / "kaggle"
    kaggle.mkdir()
    (kaggle / "x_challenges.json").write_text("{}")
    with pytest.raises(DataError, match=r"holds Kaggle files.* name one of them: .*x_challenges\.json"):
        load_source(str(kaggle), "train")
    (tmp_path / "f" / "a.json").mkdir(parents=True)
    with pytest.raises(DataError, match=r"a\.json: cannot be read \(Is a directory\)"):
        load_source(str(tmp_path / "f"), "train")


def test_kaggle(tmp_path):
    path = kaggle(tmp_path, {"b": OPEN, "a": OPEN})
    tasks = load_source(path, "eval").tasks
    assert [task.id for task in tasks] == ["a", "b"] and all(pair.output is None for task in tasks for pair in task.test)
    kaggle(tmp_path, {"b": OPEN, "a": OPEN}, {"a": [[[4]], [[5]]], "b": [[[6]], [[7]]]})
    outputs = [[pair.output.tolist() for pair in task.test] for task in load_source(path, "eval").tasks]
    assert outputs == [[[[4]], [[5]]], [[[6]], [[7]]]]


@pytest.mark.parametrize(
    ("challenges", "solutions", "message"),
    [
        ([], None, "must hold an object of tasks by id, not a list"),
        (OPEN, None, "holds one task, not tasks by id; name a folder of such files"),
        ({"a": OPEN}, [], "mine_solutions.json: must hold an object of solutions"),
        ({"a": OPEN}, {}, "mine_solutions.json: task a: must be a list of 2 grids"),
        ({"a": OPEN}, {"a": [[[1]]]}, "mine_solutions.json: task a: must be a list of 2 grids"),
        ({"a": OPEN}, {"a": [[[1]], [[10]]]}, "mine_solutions.json: task a, solution 2, row 1, column 1: 10 is no colour"),
        ({"a\n": OPEN}, None, r"task 'a\n': the task id must be printable text"),
        ({"": OPEN}, None, "the task id must be printable"),
        ({}, None, "has no valid task"),
    ],
)
def test_bad_kaggle(tmp_path, challenges, solutions, message):
    with pytest.raises(DataError) as caught:
        load_source(kaggle(tmp_path, challenges, solutions), "eval")
    assert message in str(caught.value) and "\n" not in str(caught.value)


leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3)
junk = st.recursive(leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3))


@st.composite
def mutated(draw):
    """A good task with one place replaced by junk, removed, or repeated many times."""
    raw = copy.deepcopy(GOOD)
    place, parents = raw, []
    while isinstance(place, dict | list) and place and draw(st.integers(0, 5)):
        key = draw(st.sampled_from(list(place) if isinstance(place, dict) else range(len(place))))
        parents.append((place, key))
        place = place[key]
    if not parents:
        return draw(junk)
    parent, key = parents[-1]
    action = draw(st.sampled_from(["replace", "remove", "repeat"]))
    if action == "remove":
        del parent[key]
    else:
        parent[key] = draw(junk) if action == "replace" else [parent[key]] * draw(st.integers(0, 40))
    return raw


contents = mutated().map(lambda raw: json.dumps(raw).encode()) | st.binary(max_size=40)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(contents, st.integers(0, 200), st.binary(max_size=3))
def test_mutated_files_never_raise_anything_else(tmp_path, content, at, noise):
    content = content[:at] + noise + content[at + len(noise) :] if noise else content
    folder, file = tmp_path / "f", tmp_path / "mine_challenges.json"
    folder.mkdir(exist_ok=True)
    (folder / "t.json").write_bytes(content)
    file.write_bytes(b'{"t": ' + content + b"}")
    for source in (str(folder), str(file)):
        try:
            for task in load_source(source, "train").tasks:
                for pair in task.train + task.test:
                    for grid in (pair.input, pair.output):
                        assert grid is None or (grid.ndim == 2 and grid.min() >= 0 and grid.max() <= 9 and max(grid.shape) <= 30)
        except DataError as error:
            assert "\n" not in str(error) and str(error).isprintable() and len(str(error)) < 500
