"""The README's examples run as they stand, and learn."""

import re
from pathlib import Path

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_the_example_runs_and_learns_and_its_state_is_kept(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    for code in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        exec(compile(code, "README.md", "exec"), names)
    start = float(names["jnp"].mean(names["batch"][1] ** 2))  # the loss of answering zero
    assert float(names["metrics"]["main_loss"]) < 0.3 * start
    assert int(names["state"].step) == 200 and (tmp_path / "runs" / "mine" / "200").is_dir()
