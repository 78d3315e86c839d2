"""Task files for tests: a good one, variants of it, and how to write them."""

import copy
import json

GOOD = {
    "train": [{"input": [[1, 2]], "output": [[3]]}, {"input": [[4]], "output": [[5, 6]]}, {"input": [[7]], "output": [[8]]}],
    "test": [{"input": [[9]], "output": [[0]]}],
}


def write(folder, **tasks):
    folder.mkdir(exist_ok=True)
    for name, raw in tasks.items():
        (folder / f"{name}.json").write_text(raw if isinstance(raw, str) else json.dumps(raw))
    return str(folder)


def shifted(by, raw=GOOD):
    """The task with every colour moved on, so that its pairs differ from those of `raw`."""
    return {k: [{n: [[(c + by) % 10 for c in row] for row in g] for n, g in pair.items()} for pair in raw[k]] for k in raw}


def change(path, value):
    raw = copy.deepcopy(GOOD)
    place = raw
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    return raw


def kaggle(tmp_path, challenges, solutions=None):
    path = tmp_path / "mine_challenges.json"
    path.write_text(json.dumps(challenges))
    if solutions is not None:
        (tmp_path / "mine_solutions.json").write_text(json.dumps(solutions))
    return str(path)


OPEN = {"train": GOOD["train"], "test": [{"input": [[1]]}, {"input": [[2, 3]]}]}
