"""A run directory of the desk study's shape, written as a study writes it."""

import numpy as np

from lm.emergence import table
from lm.rundir import write_json

LADDER = {400: 6, 784: 3, 1176: 3, 1568: 6, 6208: 3, 24704: 3, 55296: 3}
CONTROL = 12352
STEPS = (0, 1, 4, 16, 64, 250, 1000, 2000)
THROUGH = {1568: (1, 4)}  # the seeds of the threshold size that break through
TASKS = {"recall": 0.25, "random_labels": 0.25, "bigram": 0.15}
ABILITIES = {"recall": "in-context", "random_labels": "control", "bigram": "control"}


def run_directory(path, steps=STEPS, unfinished=()):
    """Writes a study of the desk's shape: recall emerges, labels are noise, bigram is smooth."""
    rng = np.random.default_rng(0)
    points, sizes = [], {**LADDER, CONTROL: 3}
    for params, seeds in sizes.items():
        role = "control" if params == CONTROL else "ladder"
        points.append(
            {"name": f"n{params}", "layers": 2, "width": 8, "params": params, "role": role}
        )
        cell = path / f"n{params}"
        cell.mkdir(parents=True)
        write_json(cell / "config.json", {"params": params})
        write_json(cell / "environment.json", [ENVIRONMENT])
        with table.RowWriter(cell / "rows.jsonl") as writer:
            for replica in range(seeds):
                for step in steps:
                    writer.append(evaluation(rng, params, replica, role, step))
        if f"n{params}" not in unfinished:
            replicas = [{"point": f"n{params}", "replica": r, "status": "ok"} for r in range(seeds)]
            times = {
                "compile": 5.0,
                "train": params / 500,
                "eval": 1.5,
                "total": 6.5 + params / 500,
            }
            result = {"status": "done", "replicas": replicas, "seconds": times, "attempts": 1}
            write_json(cell / "result.json", result)
    study = {
        "name": "desk",
        "fingerprint": "0123456789ab",
        "config": {"train": {"tokens": 4000000}},
    }
    study |= {"docstring": "At which size does in-context recall begin?\n\nMore </script> text."}
    tasks = [
        {"task": t, "level": "1", "format": 0, "ability": ABILITIES[t], "chance": c}
        for t, c in TASKS.items()
    ]
    cells = {p["name"]: [p["name"]] for p in points}
    study |= {"points": points, "cells": cells, "tasks": tasks}
    write_json(path / "study.json", study)
    return path


ENVIRONMENT = {
    **{"python": "3.13.0", "platform": "Linux", "host": "somewhere", "git_commit": "abc123"},
    **{"git_dirty": False, "versions": {"jax": "0.12.0", "numpy": "2.2.0"}},
}


def evaluation(rng, params, replica, role, step):
    """All rows of one evaluation."""
    share = np.clip(np.log10(params / 400) / 2.15, 0, 1)
    learned = step / (step + 300)
    knows = role == "ladder" and (params > 2000 or replica in THROUGH.get(params, ()))
    recalls = 1 / (1 + np.exp(-(step - 700) / 60)) if knows else 0.0
    base = {
        **{"study": "desk", "cell": f"n{params}", "point": f"n{params}", "replica": replica},
        **{"role": role, "layers": 2, "width": 8, "params": params, "params_total": params + 1024},
        **{f"seed_{axis}": replica for axis in ("init", "data", "dropout", "eval")},
        **{"learning_rate": 0.006, "step": step, "tokens": step * 2048},
        **{"flops": step * 2048.0 * 6 * params, "status": "ok", "attempt": 1, "seconds": 0.5},
    }
    exact = {
        "recall": 0.22 + 0.775 * recalls,
        "random_labels": 0.24,
        "bigram": 0.15 + (0.18 + 0.1 * share) * learned,
    }
    loss = {
        "recall": 4.6 - (2.6 + 0.1 * share) * learned * (1 - recalls) - 4.598 * recalls,
        "random_labels": 4.6 - 3.2 * learned,
        "bigram": 4.6 - (2.75 + 0.28 * share) * learned,
    }
    rows = []
    for task, chance in TASKS.items():
        p = rng.binomial(1000, np.clip(exact[task], 0, 1)) / 1000
        nll = max(loss[task] + rng.normal(0, 0.01), 0.001)
        values = {"exact_match": p, "token_accuracy": p, "nll": nll, "brier": 1 - np.exp(-nll)}
        values |= {"log_likelihood": -nll, "answer_probability": np.exp(-nll)}
        for metric, value in values.items():
            row = {
                "task": task,
                "level": "1",
                "format": 0,
                "metric": metric,
                "value": value,
                "stderr": 0.01,
            }
            rows.append(base | row | {"n": 1000, "chance": chance if value is p else None})
    text = 4.6 - learned * (4.6 - 4.0 * params**-0.07) + rng.normal(0, 0.01)
    for task, level, metric, value in (
        ("text", "test", "nll", text),
        ("text", "test", "bpb", text / np.log(2)),
        ("train", "mixture", "loss", text + 0.1),
    ):
        row = {
            "task": task,
            "level": level,
            "format": 0,
            "metric": metric,
            "value": value,
            "stderr": 0.01,
        }
        rows.append(base | row | {"n": 1000, "chance": None})
    return rows
