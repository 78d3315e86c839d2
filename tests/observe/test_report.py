import dataclasses
import io
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import tyro
from rich.console import Console

from tests.observe import synthetic
from tinyonn_jax import cli
from tinyonn_jax.config import Config, ConfigError, EvalConfig
from tinyonn_jax.observe.compare import compare, comparison
from tinyonn_jax.observe.report import grid_svg, preset_and_flags, write_report
from tinyonn_jax.presets import PRESETS
from tinyonn_jax.stored import from_json

VOID = {"meta", "img", "path"}


class Page(HTMLParser):
    """Checks that tags nest, and collects the visible text and the attributes."""

    def __init__(self, text):
        super().__init__()
        self.open, self.text, self.attributes = [], "", []
        self.feed(text)
        assert self.open == [], f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.attributes += [(tag, *attr) for attr in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.attributes += [(tag, *attr) for attr in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] != ["style"]:
            self.text += data + " "


@pytest.fixture(scope="module")
def page(run):
    return Page(write_report(run).read_text())


def test_nothing_comes_from_outside(run, page):
    text = (run / "report.html").read_text()
    assert "http" not in text and "url(" not in text and "<script" not in text and "@import" not in text and "<link" not in text
    links = [value for _, name, value in page.attributes if name in ("src", "href", "srcset", "data", "action")]
    assert links and all(value.startswith(("data:image/png;base64,", "#")) for value in links)
    assert "prefers-color-scheme:dark" in text and 'name="viewport"' in text


def test_the_numbers_of_the_run_are_there(page):
    words = " ".join(page.text.split())
    for said in (
        "41.7 %", "15 of 36", "[26.1, 58.3]", "43.3 %", "12 of 30", "61.1 %", "22 of 36", "[45.2, 76.9]", "18 of 30",
        "each test input by 16 views", "checkpoint of step 2,200",
        "701,208", "of which embeddings 8,192", "of which routers 3,096", "feedforward 589,824",
        "Solved 20", "Failed 10", "expert_hidden 192", "python experiments/arc.py train --preset demo --workdir runs/routed",
    ):  # fmt: skip
        assert said in words, said
    assert words.count("Demonstrations") == 30
    for task_id in synthetic.predictions()[0]["tasks"]:
        assert task_id in words
    assert [tag for tag, name, _ in page.attributes if name == "src"] == ["img", "img"]


def test_how_the_answers_were_chosen_is_said_and_can_be_repeated(run, tmp_path):
    folder = Path(shutil.copytree(run, tmp_path / "run"))
    own = dataclasses.asdict(from_json((folder / "config.json").read_text()).eval)
    asked = own | {"augmentations": 16, "finalists": 12, "blank_task": True, "decode": "search"}
    (folder / "score.json").write_text(json.dumps(synthetic.score() | {"eval": asked}))
    words = " ".join(Page(write_report(folder).read_text()).text.split())
    assert "the likeliest two of 12 finalists" in words and "of the vote" not in words
    (command,) = re.findall(r"arc.py evaluate --workdir \S+ ((?:--\S+ ?(?:[^-\s]\S* ?)?)+)", words)
    again = cli.parse("evaluate", ["--workdir", str(folder), *command.split()])
    assert again.eval == EvalConfig(**asked) and again.checkpoint == "2200"  # not the run's last


def test_missing_pieces_are_said_in_words(tmp_path):
    (tmp_path / "metrics.jsonl").touch()
    words = Page(write_report(tmp_path).read_text()).text
    for name in ("score.json", "parameters.json", "metrics.jsonl", "predictions.json", "config.json"):
        assert name in words


def test_text_from_files_is_escaped(tmp_path):
    task = {"<b>&": [{"input": [[0]], "truth": None, "greedy": None, "candidates": []}]}
    (tmp_path / "predictions.json").write_text(json.dumps({"tasks": task, "augmentations": 1, "checkpoint": 1}))
    (tmp_path / "config.json").write_text('{"<i>other version</i>": 1}')
    text = write_report(tmp_path).read_text()
    assert "&lt;b&gt;&amp;" in text and "<i>other" not in text and "&lt;i&gt;other" in text
    assert "Not scored" in text


def test_damaged_files_and_missing_folders_are_named(tmp_path):
    with pytest.raises(ConfigError, match="no such run folder"):
        write_report(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="no run folder, it has neither"):
        write_report(tmp_path)
    (tmp_path / "metrics.jsonl").touch()
    for name, content, says in (
        ("score.json", '{"pass@1": ', "not JSON"),
        ("score.json", "{}", "damaged"),
        ("predictions.json", "{}", "damaged"),
        ("parameters.json", "{}", "damaged"),
        ("routing_latest.npz", "", "damaged"),
        ("score.json", json.dumps(synthetic.score()).replace('"outputs": 36', '"outputs": 1e999'), "damaged"),
        ("metrics.jsonl", '{"step": "x"}\n{"step": 2}\n', "line 1 is not a row"),
        ("metrics.jsonl", '{"step": NaN}\n{"step": 2}\n', "line 1 is not a row"),
        ("metrics.jsonl", '{"step": 1, "layers": {"a": {"load": [0.5, -0.5]}}}\n', "damaged"),
    ):
        (tmp_path / name).write_text(content)
        with pytest.raises(ConfigError, match=re.escape(name) + ".*" + says):
            write_report(tmp_path)
        (tmp_path / name).write_text("") if name == "metrics.jsonl" else (tmp_path / name).unlink()


def test_an_evaluation_without_known_outputs_is_not_scored(run, tmp_path):
    """As of a Kaggle file without solutions: shares are null."""
    run = Path(shutil.copytree(run, tmp_path / "unknown"))
    score = synthetic.score()
    for name in ("pass@1", "pass@2"):
        score[name] = dict.fromkeys(score[name])
        score["intervals"][name] = dict.fromkeys(score["intervals"][name])
    (run / "score.json").write_text(json.dumps(score))
    assert "–" in Page(write_report(run).read_text()).text


@pytest.mark.parametrize("preset", PRESETS)
def test_flags_lead_back_to_the_configuration(preset):
    base = PRESETS[preset][1]
    config = dataclasses.replace(
        base,
        model=dataclasses.replace(base.model, inject=False, shared_experts=1),
        data=dataclasses.replace(base.data, train=("arc1", "arc2"), drop_overlap=True),
        optim=dataclasses.replace(base.optim, lr=1e-5),
    )
    nearest, flags = preset_and_flags(config)
    parsed = tyro.cli(Config, default=PRESETS[nearest][1], args=" ".join(flags).split())
    assert parsed == config
    assert preset_and_flags(base) == (preset, [])


def test_fields_that_differ_from_the_preset_are_marked(dense_run):
    text = write_report(dense_run).read_text()
    assert re.findall(r"<mark>(.*?)</mark>", text) == ["dense", "none"]
    assert "--preset demo --workdir runs/dense --model.kind dense --learning.rule none" in text
    assert from_json((dense_run / "config.json").read_text()).model.kind == "dense"


def test_grid_svg_paints_every_cell_once():
    cells = np.random.default_rng(0).integers(0, 4, (7, 9))
    painted = np.full((7, 9), -1)
    for colour, path in re.findall(r'class="c(\d)" d="([^"]*)"', grid_svg(cells.tolist())):
        for x, y, width in re.findall(r"M(\d+) (\d+)h(\d+)v1h-\3z", path):
            area = painted[int(y), int(x) : int(x) + int(width)]
            assert (area == -1).all()
            area[:] = int(colour)
    assert (painted == cells).all()


def test_comparison_puts_runs_side_by_side(run, dense_run, tmp_path):
    header, (routed, dense, nothing) = comparison([run, dense_run, tmp_path])
    assert dict(zip(header, routed, strict=True)) | {"run": "", "loss": "", "val. grids": "", "tokens/s": ""} == {
        "run": "", "kind": "dyntrm", "rule": "sars", "parameters": "701 k", "steps": "2200", "time": "5:00", "loss": "",
        "val. grids": "", "tokens/s": "", "pass@1": "41.7 %", "pass@2": "61.1 %", "interval": "[45.2, 76.9]",
        "by": "16 views",
    }  # fmt: skip
    assert dense[1:3] == ["dense", "–"] and nothing[1:] == ["–"] * 12
    console = Console(file=io.StringIO(), force_terminal=False)
    assert compare([run, dense_run], tmp_path / "compare.png", console).stat().st_size > 10_000
    assert console.file.getvalue().count("61.1 %") == 2
    (tmp_path / "score.json").write_text(json.dumps(synthetic.score() | {"intervals": {"pass@2": {"outputs": [0.1]}}}))
    with pytest.raises(ConfigError, match=r"score.json: damaged"):
        comparison([tmp_path])
    with pytest.raises(ConfigError, match="no such run folder"):
        compare([run, tmp_path / "nowhere"], tmp_path / "other.png")
