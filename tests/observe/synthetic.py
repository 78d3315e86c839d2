"""A made-up run folder with every file that a real one has, for looking at figures and the report, and for their tests.

`python -m tests.observe.synthetic FOLDER` writes two runs, a routed one and a dense one, and everything that is drawn from them.
"""

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np

from tinyonn_jax.presets import PRESETS
from tinyonn_jax.stored import to_json


def rows(steps: int = 2200, every: int = 20, routed: bool = True, validate: int = 500) -> list[dict]:
    """Rows as the training loop logs them: losses fall, an expert dies half-way, one skipped step has a null loss."""
    rng = np.random.default_rng(0)
    out, tokens = [], 2048
    drift = {"attention": rng.normal(size=(2, 16)), "feedforward": rng.normal(size=(2, 8))}
    for step in range(every, steps + 1, every):
        t = step / steps
        noise = lambda scale: float(rng.normal(0, scale))  # noqa: E731
        row = {
            "step": step, "main_loss": 2.4 * np.exp(-4.5 * t) * np.exp(noise(0.12)) + 0.02,
            "main_acc": float(np.clip(1 - 0.75 * np.exp(-4 * t) + noise(0.012), 0, 1)),
            "exact": float(np.clip(1 / (1 + np.exp(-9 * (t - 0.5))) + noise(0.04), 0, 1)),
            "grad_norm_main": abs(1 + noise(0.2)), "grad_norm_meta": 0.1 * abs(1 + noise(0.2)) if routed else 0.0,
            "lr_main": 0.02 * min(1, 2 - 2 * t), "skipped": int(step == 5 * every),
            "tokens": tokens, "seconds": 14 + step * 0.13, "tokens_per_second": 16200 + noise(350),
        }  # fmt: skip
        if step % validate == 0 or step == steps:
            row |= {"valid_loss": row["main_loss"] * 1.6 + 0.1, "valid_acc": row["main_acc"] * 0.93}
            row["valid_exact"] = row["exact"] * 0.6
        if routed:
            layers = {}
            for name, (start, end) in drift.items():
                load = np.exp(2.2 * ((1 - t) * start + t * end) * (0.25 + t) + rng.normal(0, 0.15, len(start)))
                if name == "feedforward" and t > 0.5:
                    load[1] = 0
                load /= load.sum()
                active = 2 if name == "feedforward" else 4
                layers[name] = {
                    "load": load.tolist(), "active_share": active / len(load), "dead_modules": int((load == 0).sum()),
                    "usage_entropy": float(-(load * np.log(load + 1e-12)).sum() / np.log(len(load))),
                    "max_load": float(load.max() * len(load)), "kl": 0.02 * np.exp(-3 * t + noise(0.2)),
                }  # fmt: skip
            row |= {
                "meta_loss": 1.9 - 0.5 * t + noise(0.02), "gating_acc": float(np.clip(0.3 + 0.5 * t + noise(0.02), 0, 1)),
                "tau": 1.2 - 0.8 * t + noise(0.02), "surprise_output": 0.4 * np.exp(-2 * t + noise(0.15)),
                "surprise_param": 2.0 * np.exp(-2.5 * t + noise(0.15)), "pi": float(np.clip(0.6 + 0.35 * t + noise(0.01), 0, 1)),
                "ema_acc": 1 - 0.75 * np.exp(-4 * t), "active_share": 0.25,
                "good_share": 0.5, "bad_share": 0.25, "idle_share": 0.25,
                "layers": layers, "elbo": -row["main_loss"] - sum(layer["kl"] for layer in layers.values()),
            }  # fmt: skip
        out.append(row | ({"main_loss": None} if row["skipped"] else {}))
    return out


def routing(experts: int = 8, heads: int = 16, dim: int = 24) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    out = {}
    for name, modules in (("attention", heads), ("feedforward", experts)):
        goodness, usage = rng.normal(0, 1, modules), rng.dirichlet(np.ones(modules) * 2)
        goodness[1] = usage[1] = 0
        out |= {f"{name}.proto": rng.normal(size=(modules, dim)), f"{name}.goodness": goodness, f"{name}.usage": usage * 2}
        out[f"{name}.load"] = usage
    return {key: value.astype(np.float32) for key, value in out.items()}


def predictions(tasks: int = 30) -> tuple[dict, dict]:
    """Answers to tasks of random grids, of which two in three are solved, and the failures miss a cell, a shape or an answer; and
    the tasks, as a run folder stores them."""
    rng = np.random.default_rng(2)
    out, shown = {}, []
    for t in range(tasks):
        h, w = rng.integers(2, 11, 2)
        grids = [rng.integers(0, 10, (h, w)) * (rng.random((h, w)) < 0.4) for _ in range(9)]
        entries = []
        for k in range(1 + (t % 5 == 0)):
            question, truth = grids[k], grids[k][::-1]
            off = truth.copy()
            off[0, 0] = (off[0, 0] + 1) % 10
            best, second = (truth, off) if t % 3 != 1 else (off, truth[:, :-1])
            candidates = [
                {"grid": grid.tolist(), "votes": votes, "logprob": -2.0 / votes} for grid, votes in ((best, 11), (second, 1))
            ]
            if t % 9 == 4:
                candidates = []
            greedy = None if not candidates else (truth if t % 2 == 0 and t % 3 != 1 else off).tolist()
            entries.append({"input": question.tolist(), "truth": truth.tolist(), "greedy": greedy, "candidates": candidates})
        out[f"{t:04x}{rng.integers(16**4):04x}"] = entries
        pairs = [{"input": g.tolist(), "output": g[::-1].tolist()} for g in grids[2:5]]
        shown.append({"id": list(out)[-1], "train": pairs, "test": []})
    return {"tasks": out, "augmentations": 16, "checkpoint": 2200}, {"evaluation": shown}


def score() -> dict:
    return {
        "pass@1": {"outputs": 0.4167, "task_mean": 0.4333, "tasks": 0.4},
        "pass@2": {"outputs": 0.6111, "task_mean": 0.6333, "tasks": 0.6},
        "counts": {"outputs": 36, "tasks": 30, "pass@1_outputs": 15, "pass@2_outputs": 22},
        "intervals": {
            "pass@1": {"outputs": [0.2612, 0.5834], "task_mean": [0.2671, 0.6015], "tasks": [0.2333, 0.5667]},
            "pass@2": {"outputs": [0.4523, 0.7691], "task_mean": [0.4674, 0.7989], "tasks": [0.4333, 0.7667]},
        },
        "checkpoint": 2200, "augmentations": 16,
    }  # fmt: skip


def write_run(folder: Path, routed: bool = True, **kwargs) -> Path:
    """The files of a finished run in `folder`, as training and evaluation leave them."""
    folder.mkdir(parents=True, exist_ok=True)
    config = PRESETS["demo"][1]
    if not routed:
        model, learning = dataclasses.replace(config.model, kind="dense"), dataclasses.replace(config.learning, rule="none")
        config = dataclasses.replace(config, model=model, learning=learning)
    groups = {"attention": 98_304, "feedforward": 589_824, "embedding": 8192, "head": 1792}
    if routed:
        groups["router"] = 3096
    total = sum(groups.values())
    parameters = {"total": total, "embeddings": 8192, "routers": groups.get("router", 0), "groups": groups}
    answered, tasks = predictions()
    contents = {
        "config.json": to_json(config),
        "metrics.jsonl": "".join(json.dumps(row) + "\n" for row in rows(routed=routed, **kwargs)),
        "score.json": json.dumps(score()),
        "predictions.json": json.dumps(answered),
        "tasks.json": json.dumps(tasks),
        "parameters.json": json.dumps(parameters),
    }
    for name, text in contents.items():
        (folder / name).write_text(text)
    if routed:
        np.savez(folder / "routing_latest.npz", **routing())  # pyright: ignore[reportArgumentType]
    return folder


if __name__ == "__main__":
    from tinyonn_jax.observe import axes, compare, figures, grids

    target = Path(sys.argv[1])
    for name, is_routed in (("dyntrm", True), ("dense", False)):
        run = write_run(target / name, is_routed)
        figures.write_dashboards(run)
    data, known = predictions()
    for i in (0, 1, 4):
        task = list(data["tasks"])[i]
        pairs = [(pair["input"], pair["output"]) for pair in known["evaluation"][i]["train"]]
        axes.save(grids.task_figure(task, data["tasks"][task], pairs), target / f"task{i}.png")
    runs = {"runs/dyntrm": rows(), "runs/dense": rows(routed=False, steps=1500)}
    axes.save(compare.compare_figure(runs), target / "compare.png")
