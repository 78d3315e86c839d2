"""The README's example runs as it stands, and learns."""

import re
from pathlib import Path

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_the_example_runs_and_learns():
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names = {}
    exec(compile(code, "README.md", "exec"), names)
    start = float(names["jnp"].mean(names["batch"][1] ** 2))  # the loss of answering zero
    assert float(names["metrics"]["main_loss"]) < 0.3 * start
