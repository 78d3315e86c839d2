"""The report of a run: one `report.html` made from the run folder's files, with everything inside it.

The page needs no network and no script: pictures are data URIs, grids are inline SVG. A file that is missing is said in words.
"""

import base64
import dataclasses
import html
import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tinyonn_jax.config import Config
from tinyonn_jax.observe.answers import ARC_COLOURS, MARK, Entry, Grid, answers, judge, questions, solved
from tinyonn_jax.observe.figures import write_dashboards
from tinyonn_jax.observe.files import (
    CONFIG,
    METRICS,
    PARAMETERS,
    PREDICTIONS,
    SCORE,
    TASKS,
    damaged,
    read_config,
    read_json,
    require_run,
    stored_origin,
    write_atomically,
)
from tinyonn_jax.observe.metrics import Row, column, count, duration, how_scored, latest, percent, training_seconds
from tinyonn_jax.observe.writers import read_metrics
from tinyonn_jax.presets import PRESETS

MOST_TASKS = 200  # pictures of solved, and as many of failed tasks: the page of 400 large tasks stays below ten megabytes
AGGREGATIONS = (
    ("outputs", "test outputs", "share of test outputs that are right"),
    ("task_mean", "mean per task", "share of a task's outputs, averaged over tasks"),
    ("tasks", "whole tasks", "tasks with every output right"),
)


# --- files --------------------------------------------------------------------------------------------------------------


def _flag(section: str, name: str, value: Any) -> str:
    start = f"--{section}." if section else "--"
    if isinstance(value, bool):
        return f"{start}{'' if value else 'no-'}{name}"
    values = value if isinstance(value, tuple) else (value,)
    return " ".join([f"{start}{name}", *(shlex.quote(str(v)) for v in values)])


def preset_and_flags(config: Config, preset: str | None = None) -> tuple[str, list[str]]:
    """The preset that a run began with, or the nearest to its configuration, and the command-line flags that lead from there."""

    def flags(base: Config) -> list[str]:
        start, end = dataclasses.asdict(base), dataclasses.asdict(config)
        return [_flag(s, k, v) for s, values in end.items() for k, v in values.items() if v != start[s][k]]

    candidates = [preset] if preset in PRESETS else PRESETS
    return min(((name, flags(PRESETS[name][1])) for name in candidates), key=lambda found: len(found[1]))


# --- pieces of the page -------------------------------------------------------------------------------------------------


def _esc(value: Any) -> str:
    return html.escape(str(value))


def _missing(text: str) -> str:
    return f'<p class="missing">{text}</p>'


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "") -> str:
    """A table of cells that are HTML already."""
    head = "".join(f"<th>{cell}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table class="{kind}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def grid_svg(grid: Grid, side: int = 150) -> str:
    """An ARC grid as inline SVG about `side` pixels long, one path per colour."""
    cells = np.asarray(grid)
    h, w = cells.shape
    paths = []
    for colour in np.unique(cells):
        y, x = np.nonzero(np.diff(np.pad(cells == colour, ((0, 0), (1, 1))), axis=1))  # a run begins, ends, the next begins, …
        runs = [f"M{a} {row}h{b - a}v1h-{b - a}z" for row, a, b in zip(y[::2], x[::2], x[1::2], strict=True)]
        paths.append(f'<path class="c{int(colour)}" d="{"".join(runs)}"/>')
    lines = "".join(f"M{x} 0v{h}" for x in range(1, w)) + "".join(f"M0 {y}h{w}" for y in range(1, h))
    size = max(side / 40, min(side / 8, side / max(h, w)))
    box = f'viewBox="0 0 {w} {h}" width="{w * size:.0f}" height="{h * size:.0f}"'
    return f'<svg {box} role="img" aria-label="{w} by {h} cells">{"".join(paths)}<path class="lines" d="{lines}"/></svg>'


def _cell(title: str, grid: Grid | None, truth: Grid | None = None, judged: bool = False) -> str:
    right, why = judge(grid, truth) if judged else (None, "")
    state = {True: "right", False: "wrong", None: ""}[right]
    picture = grid_svg(grid) if grid is not None else '<span class="none">none</span>'
    return (
        f'<figure class="{state}"><figcaption>{_esc(title)}</figcaption>{picture}<small>{MARK[right]}{_esc(why)}</small></figure>'
    )


def _task(task_id: str, entries: Sequence[Entry], pairs: Sequence[Sequence[Grid]]) -> str:
    rows = ""
    if pairs:
        cells = [_cell(f"input {i}", pair[0]) + _cell(f"output {i}", pair[1]) for i, pair in enumerate(pairs, 1)]
        shown = "".join(f'<div class="pair">{pair}</div>' for pair in cells)
        rows += f'<h4>Demonstrations</h4><div class="grids">{shown}</div><h4>Test</h4>'
    for question, entry in zip(questions(entries), entries, strict=True):
        truth = entry.get("truth")
        cells = [_cell(question, entry["input"]), _cell("truth" if truth is not None else "truth: unknown", truth)]
        cells += [_cell(name, grid, truth, judged=True) for name, grid in answers(entry)]
        rows += f'<div class="grids">{"".join(cells)}</div>'
    right = sum(solved([entry]) is True for entry in entries)
    first = [entries[0]["input"], entries[0].get("truth"), answers(entries[0])[1][1]]
    thumbs = "".join(grid_svg(grid, 44) if grid is not None else '<i class="none"></i>' for grid in first)
    note = {True: "solved", False: f"{right} of {len(entries)} right", None: "not scored"}[solved(entries)]
    return f"<details><summary><b>{thumbs}</b><code>{_esc(task_id)}</code><span>{note}</span></summary>{rows}</details>"


def _scores(score: Entry | None) -> str:
    if score is None:
        return _missing("No score yet: <code>evaluate</code> writes <code>score.json</code>.")
    counts = score["counts"]
    rows = []
    finalists = score.get("eval", {}).get("finalists")
    chosen = f"the likeliest two of {finalists} finalists" if finalists else "the best two of the vote"
    for name, says in (("pass@1", "greedy answer, no augmentation"), ("pass@2", chosen)):
        row = [f"<b>{name}</b><small>{says}</small>"]
        for key, _, _ in AGGREGATIONS:
            share, interval = score[name][key], score.get("intervals", {}).get(name, {}).get(key)
            of = counts["outputs"] if key == "outputs" else counts["tasks"]
            number = "" if key == "task_mean" or share is None else f"{round(share * of)} of {of}"
            limits = f"[{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]" if interval else ""
            row.append(f"<b>{percent(share)}</b>" + "".join(f"<small>{line}</small>" for line in (number, limits) if line))
        rows.append(row)
    header = ["", *(f'<abbr title="{says}">{label}</abbr>' for _, label, says in AGGREGATIONS)]
    note = f"each test input by {_esc(how_scored(score))} · checkpoint of step {score['checkpoint']:,}"
    if score.get("greedy_per_recursion"):
        note += f" · greedy answers right after each recursion: {', '.join(map(percent, score['greedy_per_recursion']))}"
    return _table(header, rows, "scores") + f'<p class="note">{note} · bootstrap intervals in brackets</p>'


def _parameters(parameters: Entry | None) -> str:
    if parameters is None:
        return _missing("No parameter counts: <code>parameters.json</code> is missing.")
    total = max(parameters["total"], 1)
    rows = [[_esc(name), f"{number:,}", percent(number / total)] for name, number in parameters.get("groups", {}).items()]
    rows.append(["<b>all, including embeddings</b>", f"<b>{parameters['total']:,}</b>", ""])
    for name in ("embeddings", "routers"):
        rows.append([f"of which {name}", f"{parameters[name]:,}", percent(parameters[name] / total)])
    return _table(["group", "parameters", "share"], rows, "numbers")


def _last_values(rows: Sequence[Row]) -> str:
    if not rows:
        return _missing("Nothing logged yet: <code>metrics.jsonl</code> is missing or empty.")
    values = latest(rows)
    cells = "".join(f"<div><dt>{_esc(name)}</dt><dd>{value:.5g}</dd></div>" for name, value in values.items())
    title = f"Newest value of every metric<span>{len(values)}</span>"
    return f'<details><summary>{title}</summary><dl class="values">{cells}</dl></details>'


def _picture(path: Path, caption: str) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    image = f'<img alt="{_esc(caption)}" src="data:image/png;base64,{data}">'
    return f'<div class="scroll plot">{image}</div><p class="note">{_esc(caption)}</p>'


def _demonstrations(tasks: Entry | None) -> dict[str, list[tuple[Grid, Grid]]]:
    """The pairs of each evaluated task, by its id."""
    evaluated = tasks["evaluation"] if tasks else []
    return {task["id"]: [(pair["input"], pair["output"]) for pair in task["train"]] for task in evaluated}


def _tasks(predictions: Entry | None, shown: dict[str, list[tuple[Grid, Grid]]]) -> str:
    if predictions is None:
        return _missing("No predictions yet: <code>evaluate</code> writes <code>predictions.json</code>.")
    out = ""
    for title, verdict in (("Solved", True), ("Failed", False), ("Not scored", None)):
        group = {name: entries for name, entries in predictions["tasks"].items() if solved(entries) is verdict}
        if not group and verdict is None:
            continue
        pictures = "".join(_task(name, entries, shown.get(name, ())) for name, entries in list(group.items())[:MOST_TASKS])
        more = f'<p class="note">{len(group) - MOST_TASKS} more are in predictions.json.</p>' if len(group) > MOST_TASKS else ""
        shelf = f'<div class="tasks">{pictures}</div>' if group else _missing("None.")
        out += f"<h3>{title} <span>{len(group)}</span></h3>{shelf}{more}"
    note = (
        "Solved: one of two attempts is right for every test input. Small: input, truth, first attempt; open a task to see all."
    )
    return f'<p class="note">{note}</p>{out}'


def _configuration(folder: Path, config: Config | None) -> str:
    path = folder / CONFIG
    if config is None:
        if not path.exists():
            return _missing("No configuration: <code>config.json</code> is missing.")
        text = _esc(path.read_text(encoding="utf-8", errors="replace"))
        return _missing("Written by another version; shown as it is.") + f'<pre class="scroll">{text}</pre>'
    preset, _ = preset_and_flags(config, stored_origin(folder))
    base = dataclasses.asdict(PRESETS[preset][1])
    out = f'<p class="note">Marked fields differ from preset <code>{preset}</code>.</p><div class="sections">'
    for section, values in dataclasses.asdict(config).items():
        rows = []
        for name, value in values.items():
            said = " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
            rows.append([_esc(name), _esc(said) if value == base[section][name] else f"<mark>{_esc(said)}</mark>"])
        out += f"<div>{_table([section, ''], rows, 'config')}</div>"
    return out + "</div>"


def _reproduce(folder: Path, config: Config | None, score: Entry | None) -> str:
    if config is None:
        return _missing("The command is not known without a readable <code>config.json</code>.")
    preset, flags = preset_and_flags(config, stored_origin(folder))
    workdir = f"--workdir runs/{shlex.quote(folder.resolve().name)}"
    lines = [" ".join(["python experiments/arc.py train", f"--preset {preset}", workdir, *flags])]
    own, used = dataclasses.asdict(config.eval), (score or {}).get("eval", {})
    asked = {"augmentations": (score or own)["augmentations"]} | {k: v for k, v in used.items() if v != own.get(k)}
    if score and score["checkpoint"] != config.train.steps:
        asked["checkpoint"] = score["checkpoint"]
    lines.append(" ".join([f"python experiments/arc.py evaluate {workdir}", *(_flag("", *option) for option in asked.items())]))
    return f'<pre class="scroll">{_esc(chr(10).join(lines))}</pre>'


def _facts(rows: Sequence[Row], config: Config | None, score: Entry | None, parameters: Entry | None) -> str:
    values = latest(rows)
    facts = []
    if score is not None:
        facts.append((percent(score["pass@2"]["outputs"]), "test outputs right, pass@2"))
    if parameters is not None:
        facts.append((count(parameters["total"]), "parameters"))
    if rows:
        of = f" of {config.train.steps:,}" if config else ""
        facts.append((f"{rows[-1]['step']:,}", f"steps{of}"))
    if "seconds" in values:
        facts.append((duration(training_seconds(rows)), "of training"))
    if values.get("flops_per_second"):
        facts.append((count(float(np.median(column(rows, "flops_per_second")[1]))), "useful FLOP/s"))
    if "tokens_per_second" in values:
        facts.append((count(float(np.median(column(rows, "tokens_per_second")[1]))), "tokens per second"))
    cards = "".join(f"<div><b>{_esc(number)}</b><span>{_esc(what)}</span></div>" for number, what in facts)
    return f'<div class="facts">{cards}</div>'


# --- the page -----------------------------------------------------------------------------------------------------------


def write_report(folder: str | os.PathLike[str]) -> Path:
    """Draws the dashboards again and writes `report.html` from whatever files the run folder has; returns the page's path.

    Raises:
        ConfigError: the folder does not exist, or one of its files is damaged.
    """
    folder = Path(folder)
    require_run(folder)
    rows, config = read_metrics(folder), read_config(folder)
    score, predictions, parameters, known = (read_json(folder / name) for name in (SCORE, PREDICTIONS, PARAMETERS, TASKS))
    with damaged(folder / SCORE):
        scores = _scores(score)
    with damaged(folder / TASKS):
        shown = _demonstrations(known)
    with damaged(folder / PREDICTIONS):
        tasks = _tasks(predictions, shown)
    with damaged(folder / PARAMETERS):
        sizes = _parameters(parameters)
    with damaged(folder / METRICS):
        core, experts = write_dashboards(folder)
    name = folder.resolve().name
    says = ""
    if config is not None:
        m = config.model
        says = f"{m.kind}, width {m.dim}, {m.depth} {'recursions of one block' if m.recursed else 'blocks'}"
        if m.kind != "dense":
            modules = f"{m.active_experts} of {m.experts} experts" if m.kind == "dyntrm" else "neurons"
            says += f", routed {modules}, rule {config.learning.rule}"
        says += f" · trained on {', '.join(config.data.train)} · scored on {config.data.eval} · seed {config.train.seed}"
    sections = (
        ("Score", scores),
        ("Parameters", sizes),
        ("Curves", _picture(core, "Bold: running mean over a twentieth of the run. Faint: as logged.") + _last_values(rows)),
        ("Experts", _picture(experts, "The last block's experts and attention heads. Shares are of a layer's own activations.")),
        ("Tasks", tasks),
        ("Configuration", _configuration(folder, config)),
        ("Reproduce", _reproduce(folder, config, score)),
    )
    body = "".join(f'<section id="{title.lower()}"><h2>{title}</h2>{content}</section>' for title, content in sections)
    links = "".join(f'<a href="#{title.lower()}">{title}</a>' for title, _ in sections)
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" content="light dark">'
        f"<title>{_esc(name)} · tinyonn_jax</title><style>{_CSS}</style></head>"
        f"<body><header><p>tinyonn_jax · run report</p><h1>{_esc(name)}</h1><p>{_esc(says)}</p>"
        f"{_facts(rows, config, score, parameters)}<nav>{links}</nav></header><main>{body}</main></body></html>\n"
    )
    return write_atomically(folder / "report.html", page)


_CSS = """
:root{--page:#f6f8fa;--card:#fff;--ink:#1f2328;--muted:#59636e;--line:#d8dee4;--accent:#0072B2;--right:#1a7f37;
--wrong:#cf222e;--mark:#fff3c4}
@media(prefers-color-scheme:dark){:root{--page:#0d1117;--card:#161b22;--ink:#e6edf3;--muted:#9198a1;--line:#30363d;
--accent:#56B4E9;
--right:#3fb950;--wrong:#f85149;--mark:#5a4a0a}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);
font:15px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Liberation Sans",sans-serif}
header,main{max-width:1060px;margin:0 auto;padding:0 20px}
header{padding-top:36px}header p{margin:0;color:var(--muted)}
h1{margin:2px 0 4px;font-size:30px;line-height:1.2;overflow-wrap:anywhere}
h2{margin:0 0 14px;font-size:19px}h3{margin:22px 0 8px;font-size:15px}h4{margin:14px 0 2px;font-size:13px;color:var(--muted);
font-weight:600}
h3 span,summary span{color:var(--muted);font-weight:400;margin-left:8px}
.facts{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:12px;margin:22px 0 18px}
.facts div,section{background:var(--card);border:1px solid var(--line);border-radius:12px}
.facts div{padding:14px 16px}.facts b{display:block;font-size:24px;line-height:1.2;font-variant-numeric:tabular-nums}
.facts span{color:var(--muted);font-size:13px}
.facts div:first-child b{color:var(--accent)}
nav{display:flex;flex-wrap:wrap;gap:4px 18px;margin:0 0 16px}a{color:var(--accent);text-decoration:none}
a:hover{text-decoration:underline}
section{padding:20px 22px;margin:0 0 18px}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th{text-align:left;font-weight:600;color:var(--muted);font-size:13px}
th,td{padding:6px 14px 6px 0;border-bottom:1px solid var(--line);vertical-align:top}tbody tr:last-child td{border-bottom:0}
td small{display:block;color:var(--muted);white-space:nowrap}abbr{text-decoration:none}
.scores td+td b{font-size:20px;white-space:nowrap}.scores td,.scores th{min-width:112px}
.numbers td+td,.numbers th+th{text-align:right;white-space:nowrap}.numbers{max-width:560px}
.numbers td:first-child{overflow-wrap:anywhere}
.config{font-size:13px}.config td,.config th{padding:3px 10px 3px 0}.config th{color:var(--ink);font-size:14px}
.config td{overflow-wrap:anywhere}.config td:first-child{color:var(--muted);width:45%;overflow-wrap:normal}
.sections{columns:3 260px;column-gap:36px}.sections>div{break-inside:avoid;margin:0 0 18px}
mark{background:var(--mark);color:inherit;border-radius:4px;padding:0 5px}
.scroll{overflow-x:auto}.plot{background:#fff;border-radius:8px}.plot img{display:block;width:100%;min-width:640px;
height:auto}
.note,.missing{color:var(--muted);font-size:13px;margin:8px 0}.missing{font-style:italic}
pre{background:var(--page);border:1px solid var(--line);border-radius:8px;padding:12px 14px;
font:13px/1.6 ui-monospace,"Liberation Mono",monospace;
margin:8px 0;white-space:pre-wrap;overflow-wrap:anywhere}
code{font:13px ui-monospace,"Liberation Mono",monospace}
details{border-top:1px solid var(--line)}details:last-of-type{border-bottom:1px solid var(--line)}
summary{padding:7px 2px;cursor:pointer}summary:hover{color:var(--accent)}
.tasks{display:grid;grid-template-columns:repeat(auto-fill,minmax(215px,1fr));gap:8px}
.tasks details{border:1px solid var(--line);border-radius:8px;padding:0 10px}.tasks details[open]{grid-column:1/-1}
.tasks summary{display:grid;grid-template-columns:auto 1fr;gap:0 12px;align-items:center;list-style:none}
.tasks summary::-webkit-details-marker{display:none}
.tasks summary b{grid-row:1/3;display:flex;gap:5px;align-items:center;min-height:48px}.tasks summary code{align-self:end}
.tasks summary span{margin:0;align-self:start;font-size:12px}summary .none{width:30px;height:30px}
.values{display:grid;grid-template-columns:repeat(auto-fill,minmax(150px,1fr));gap:8px 16px;margin:6px 0 12px}
.values dt{color:var(--muted);font-size:12px}.values dd{margin:0;font-variant-numeric:tabular-nums}
.grids{display:flex;flex-wrap:wrap;gap:14px 22px;padding:8px 2px 14px}.pair{display:flex;gap:8px;padding-right:14px;
border-right:1px solid var(--line)}
.pair:last-child{border-right:0}
figure{margin:0;display:flex;flex-direction:column;align-items:flex-start;gap:4px;max-width:100%}
figcaption,figure small{font-size:12px;color:var(--muted)}
svg{display:block;max-width:100%;height:auto;outline:1px solid #555;shape-rendering:crispEdges}
.lines{stroke:#666;stroke-width:.7;vector-effect:non-scaling-stroke;fill:none}
.right svg{outline:2px solid var(--right)}.wrong svg{outline:2px solid var(--wrong)}
figure.right small{color:var(--right)}figure.wrong small{color:var(--wrong)}
.none{display:grid;place-items:center;width:70px;height:54px;border:1px dashed var(--line);color:var(--muted);font-size:12px}
@media(max-width:600px){header,main{padding-left:12px;padding-right:12px}section{padding:16px 14px}h1{font-size:25px}
.facts{grid-template-columns:1fr 1fr}
.scores td,.scores th{min-width:0;padding-right:8px}.scores td small{white-space:normal}.scores td+td b{font-size:16px}}
""" + "".join(f".c{i}{{fill:{colour}}}" for i, colour in enumerate(ARC_COLOURS))
