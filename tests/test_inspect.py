"""`lm status`, `lm explain` and `lm verify` on a run directory made by hand."""

import hashlib
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from experiments import inspect_run
from lm import rundir
from lm.config import UserError
from lm.emergence import table

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {
    "python": "3.13.0",
    "nproc": "1",
    "git_commit": "c0ffee",
    "versions": {"jax": "0.12"},
}


def row(point: str, replica: int, value: float, **more: object) -> dict:
    size = {"layers": 2, "width": 16, "params": 6000, "params_total": 7000}
    seeds = {name: 10 * replica + i for i, name in enumerate(inspect_run.SEEDS)}
    what = {"task": "recall", "level": "5", "format": 0, "metric": "exact_match"}
    return {
        **{"study": "where", "cell": "cell-1", "point": point, "replica": replica},
        **{"role": "ladder", **size, **seeds, "learning_rate": 0.01 * (replica + 1)},
        **{"step": 100, "tokens": 1000, "flops": 1e9, **what},
        **{"value": value, "stderr": 0.1, "n": 64, "chance": 0.2, "status": "ok"},
        **{"attempt": 1, "seconds": 3.0},
        **more,
    }


def finish(cell: Path, points: list[str]) -> None:
    replicas = [
        {"point": p, "replica": r, "status": "done", "diverged_step": None, "params_sha256": p * 8}
        for p in points
        for r in (0, 1)
    ]
    replicas[-1] |= {"status": "diverged", "diverged_step": 40}
    seconds = {"compile": 1.0, "train": 2.0, "eval": 0.5, "total": 3.5}
    result = {"status": "done", "replicas": replicas, "seconds": seconds, "attempts": 2}
    rundir.write_json(cell / "result.json", result)


def train(cell: Path, points: list[str]) -> None:
    """Everything that a worker leaves in a cell, but its result."""
    (cell / "checkpoints" / "100").mkdir(parents=True)
    (cell / "answers").mkdir()
    rundir.write_json(cell / "config.json", {"train": {"tokens": 1000}, "width": 16})
    rundir.write_json(cell / "environment.json", [ENVIRONMENT, ENVIRONMENT | {"nproc": "2"}])
    progress = {"step": 50, "steps": 100, "loss": 2.5, "seconds": 1.5}
    rundir.write_json(cell / "progress.json", progress)
    (cell / "checkpoints" / "100" / "params").write_bytes(bytes(range(200)))
    manifest = rundir.make_manifest(cell / "checkpoints" / "100")
    rundir.write_json(cell / "checkpoints" / "100.manifest.json", manifest)
    np.savez(cell / "answers" / "100-a-0.npz", x=np.arange(5))
    with table.RowWriter(cell / "rows.jsonl") as rows:
        rows.append(row(point, r, 0.1 * r) for point in points for r in (0, 1))
    with rundir.JsonLines(cell / "events.jsonl") as events:
        events.append({"event": "start", "time": rundir.now(), "attempt": 1})
        digest = rundir.sha256(cell / "answers" / "100-a-0.npz")
        events.append({"event": "answers", "file": "answers/100-a-0.npz", "sha256": digest})


@pytest.fixture
def workdir(tmp_path):
    """A study of two cells: one is done, the other has not begun."""
    work = tmp_path / "run"
    (work / "data").mkdir(parents=True)
    (work / "data" / "train.npy").write_bytes(b"tokens" * 100)
    rundir.write_json(work / "data" / "manifest.json", rundir.make_manifest(work / "data"))
    points = [{"name": "a", "rate": 0.1}, {"name": "b"}, {"name": "c", "role": "control"}]
    study = {"name": "where", "points": points, "cells": {"cell-1": ["a", "b"], "cell-2": ["c"]}}
    rundir.write_json(work / "study.json", study)
    train(work / "cell-1", ["a", "b"])
    finish(work / "cell-1", ["a", "b"])
    return work


def run(capsys, verb, *args: object) -> tuple[int, dict]:
    code = verb([*map(str, args), "--json"])
    return code, json.loads(capsys.readouterr().out)


def cells(capsys, workdir) -> dict[str, dict]:
    _, found = run(capsys, inspect_run.status, workdir)
    return {cell["cell"]: cell for cell in found["cells"]}


def test_status_of_done_and_waiting_cells(workdir, capsys):
    code, found = run(capsys, inspect_run.status, workdir)
    assert code == 0 and found["study"] == "where" and found["held_by"] is None
    done, waiting = found["cells"]
    assert (done["state"], done["replicas"], done["diverged"]) == ("done", 4, 1)
    assert done["seconds"] == 3.5 and done["events"] == {"start": 1, "answers": 1}
    assert (waiting["cell"], waiting["state"], waiting["step"]) == ("cell-2", "waiting", None)


def test_status_of_running_stopped_and_failed_cells(workdir, capsys):
    cell = workdir / "cell-2"
    train(cell, ["c"])
    assert cells(capsys, workdir)["cell-2"]["state"] == "stopped"
    with rundir.lock(cell / "lock", "cell-2"):
        running = cells(capsys, workdir)["cell-2"]
    assert running["state"] == "running" and running["held_by"]["what"] == "cell-2"
    assert (running["step"], running["steps"], running["loss"]) == (50, 100, 2.5)
    with rundir.JsonLines(cell / "events.jsonl") as events:
        events.append({"event": "failed", "attempt": 1})
    assert cells(capsys, workdir)["cell-2"]["state"] == "failed"
    with rundir.JsonLines(cell / "events.jsonl") as events:
        events.append({"event": "start", "attempt": 2})
    assert cells(capsys, workdir)["cell-2"]["state"] == "stopped"


def test_status_for_people(workdir, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    with rundir.lock(workdir / "lock", "lm run"):
        assert inspect_run.status([str(workdir)]) == 0
    text = capsys.readouterr().out
    for word in (
        "where: held by pid",
        "cell-1",
        "done",
        "4, 1 diverged",
        "50/100",
        "cell-2",
        "waiting",
    ):
        assert word in text


def test_explain_says_everything_behind_a_point(workdir, capsys):
    code, found = run(capsys, inspect_run.explain, workdir, "b")
    assert code == 0 and found["cell"] == "cell-1"
    assert found["settings"]["train"]["tokens"] == 1000
    assert [r["seed_data"] for r in found["replicas"]] == [1, 11]
    assert [r["learning_rate"] for r in found["replicas"]] == [0.01, 0.02]
    assert [r["status"] for r in found["replicas"]] == ["done", "diverged"]
    assert found["replicas"][1]["diverged_step"] == 40
    assert [attempt["nproc"] for attempt in found["attempts"]] == ["1", "2"]
    assert found["attempts"][0]["git_commit"] == "c0ffee"
    assert found["seconds"]["compile"] == 1.0 and found["chance"] == {"recall.5": 0.2}
    assert run(capsys, inspect_run.explain, workdir, "a")[1]["about"]["rate"] == 0.1


def test_explain_for_people_and_before_it_began(workdir, capsys):
    assert inspect_run.explain([str(workdir), "b"]) == 0
    text = capsys.readouterr().out
    assert "tokens: 1000" in text and "git_commit: c0ffee" in text and "recall.5: 0.2" in text
    assert inspect_run.explain([str(workdir), "c"]) == 0
    assert "cell: cell-2" in capsys.readouterr().out


def test_explain_offers_the_nearest_point(workdir):
    with pytest.raises(UserError, match="'d' is not a point of .*known: a, b, c"):
        inspect_run.explain([str(workdir), "d"])


def test_verify_of_a_whole_directory(workdir, capsys):
    code, found = run(capsys, inspect_run.verify, workdir)
    assert code == 0 and found["ok"] and found["problems"] == [] and found["cells"] == 2
    assert found["table_sha256"] == table.table_sha256(table.load(workdir))
    text = "".join(f"{p}/{r} {p * 8}\n" for p in "ab" for r in (0, 1))
    combined = hashlib.sha256(text.encode()).hexdigest()
    assert found["params_sha256"] == {"cell-1": combined, "cell-2": None}


def test_verify_hashes_depend_on_values_and_not_on_timing(workdir, capsys):
    before = run(capsys, inspect_run.verify, workdir)[1]
    path = workdir / "cell-1" / "rows.jsonl"
    records, _ = rundir.read_lines(path)
    for change, same in [({"seconds": 99.0, "attempt": 7}, True), ({"value": 0.11}, False)]:
        path.unlink()
        with table.RowWriter(path) as rows:
            rows.append(record | change for record in records)
        after = run(capsys, inspect_run.verify, workdir)[1]
        assert after["ok"] and (after["table_sha256"] == before["table_sha256"]) == same
    result = rundir.read_json(workdir / "cell-1" / "result.json")
    result["replicas"][0]["params_sha256"] = "other"
    rundir.write_json(workdir / "cell-1" / "result.json", result)
    after = run(capsys, inspect_run.verify, workdir)[1]
    assert after["params_sha256"]["cell-1"] != before["params_sha256"]["cell-1"]


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "name",
    [
        "data/train.npy",
        "cell-1/rows.jsonl",
        "cell-1/events.jsonl",
        "cell-1/checkpoints/100/params",
        "cell-1/answers/100-a-0.npz",
    ],
)
def test_verify_finds_one_flipped_bit_and_names_the_file(workdir, capsys, name):
    flip(workdir / name)
    code, found = run(capsys, inspect_run.verify, workdir)
    assert code == 1 and not found["ok"]
    assert str(workdir / name) in " ".join(found["problems"])


@pytest.mark.parametrize(
    "name",
    [
        "data/train.npy",
        "data/manifest.json",
        "cell-1/checkpoints/100/params",
        "cell-1/answers/100-a-0.npz",
    ],
)
def test_verify_finds_what_is_missing(workdir, capsys, name):
    (workdir / name).unlink()
    code, found = run(capsys, inspect_run.verify, workdir)
    assert code == 1 and len(found["problems"]) == 1


@pytest.mark.parametrize(
    "name",
    [
        "data/manifest.json",
        "cell-1/config.json",
        "cell-1/result.json",
        "cell-1/checkpoints/100.manifest.json",
    ],
)
def test_verify_finds_truncated_json(workdir, capsys, name):
    path = workdir / name
    path.write_bytes(path.read_bytes()[:-9])
    code, found = run(capsys, inspect_run.verify, workdir)
    assert code == 1 and any(str(path) in problem for problem in found["problems"])


def test_verify_reports_a_replay_with_other_bits(workdir, capsys):
    with table.RowWriter(workdir / "cell-1" / "rows.jsonl") as rows:
        rows.append([row("a", 0, math.nextafter(0.0, 1.0), attempt=2)])
    code, found = run(capsys, inspect_run.verify, workdir)
    assert code == 1 and "a/0/100/recall/5/0/exact_match" in found["problems"][0]


def test_verify_ignores_a_torn_tail_because_the_next_run_drops_it(workdir, capsys):
    before = run(capsys, inspect_run.verify, workdir)
    with open(workdir / "cell-1" / "rows.jsonl", "ab") as file:
        file.write(b'{"half":')
    assert run(capsys, inspect_run.verify, workdir) == before


def test_verify_for_people(workdir, capsys):
    assert inspect_run.verify([str(workdir)]) == 0
    assert "2 cells, all checksums hold" in capsys.readouterr().out
    flip(workdir / "data" / "train.npy")
    assert inspect_run.verify([str(workdir)]) == 1
    assert "problems: 1" in capsys.readouterr().out


@pytest.mark.parametrize("verb", [inspect_run.status, inspect_run.verify])
def test_what_is_no_run_directory_is_refused(tmp_path, verb):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="has no study.json"):
        verb([str(tmp_path)])
    for name in ("file", "absent"):
        with pytest.raises(UserError, match=f"{name} is not a folder"):
            verb([str(tmp_path / name)])
    (tmp_path / "study.json").write_text("[]")
    with pytest.raises(UserError, match="is damaged"):
        verb([str(tmp_path)])


def test_none_of_them_imports_jax(workdir):
    code = (
        "import sys; from lm.cli import main\n"
        "for verb in (['status'], ['verify']): main([*verb, sys.argv[1], '--json'])\n"
        "main(['explain', sys.argv[1], 'a'])\n"
        "assert 'pandas' in sys.modules\n"
        "assert not {'jax', 'flax', 'ml_collections'} & set(sys.modules)\n"
    )
    command = [sys.executable, "-c", code, str(workdir)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
