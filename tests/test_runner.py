"""`lm run` end to end on a tiny study: what it writes, what it says, and what it leaves alone."""

import shutil

import pytest
import tiny

from experiments import cost
from lm.rundir import read_json


def test_a_run_leaves_a_page_and_results_that_verify(finished, lm):
    """Fails if a cell, the page or a checksum is missing at the end of the one command."""
    assert "<html" in (finished / "report.html").read_text()
    assert list((finished / "figures").glob("*.png"))
    found = lm("verify", finished, "--json").json
    assert found["ok"] is True and found["problems"] == [] and found["cells"] == 2
    assert len(found["table_sha256"]) == 64
    assert found["params_sha256"].keys() == set(tiny.CELLS)
    assert all(len(digest) == 64 for digest in found["params_sha256"].values())


def test_rows_are_complete(finished):
    """Fails if an evaluation, a task or a metric leaves a hole in the table."""
    for cell in tiny.CELLS:
        found = tiny.rows(finished / cell)
        for replica in (0, 1):
            for metric, steps in {
                ("text", "test", 0, "bpb"): [5, 10, 20, 30],
                ("recall", "3", 0, "choice_brier"): [5, 10, 20, 30],
                ("addition", "1", 1, "exact_match"): [5, 10, 20, 30],
                ("addition", "1", 0, "edit_similarity"): [5, 10, 20, 30],
                ("train", "mixture", 0, "loss"): [5, 10, 15, 20, 25, 30],
            }.items():
                assert [s for p, r, s, *m in found if r == replica and tuple(m) == metric] == steps


def test_the_second_call_does_nothing(finished, study, lm):
    """Fails if a finished cell is trained, prepared or even written again."""
    before = tiny.snapshot(finished)
    for cell in tiny.CELLS:
        assert len(read_json(finished / cell / "environment.json")) == 1
    done = lm("run", study, f"--workdir={finished}", "--workers=2")
    assert (done.code, done.err) == (0, "") and "page: " in done.out
    assert "reading" not in done.out and "replicas x" not in done.out
    after = tiny.snapshot(finished)
    assert after.keys() == before.keys()
    # The report sees to itself that it is not made again for nothing (tests/test_report.py).
    made_anew = ("analysis.json", "report.html", "table.parquet", "figures/")
    assert [n for n in before if after[n] != before[n] and not n.startswith(made_anew)] == []


def test_one_worker_and_two_give_the_same_bits(finished, study, tmp_path, lm):
    """Fails if what runs beside a cell can change a bit of it; data are prepared anew, too."""
    done = lm("run", study, f"--workdir={tmp_path / 'one'}", "--workers=1")
    assert (done.code, done.err) == (0, "")
    for cell in tiny.CELLS:
        assert f"{cell}: 2 replicas x 30 steps in " in done.out
    pins = [read_json(workdir / "pins.json") for workdir in (finished, tmp_path / "one")]
    assert pins[0] == pins[1] == {"NPROC": "1"}
    one = lm("verify", tmp_path / "one", "--json").json
    assert one["ok"] and one == lm("verify", finished, "--json").json
    for cell in tiny.CELLS:
        assert tiny.rows(tmp_path / "one" / cell) == tiny.rows(finished / cell)
        assert tiny.params(tmp_path / "one" / cell) == tiny.params(finished / cell)


def test_dry_run_prints_every_point_and_writes_nothing(study, tmp_path, lm, monkeypatch):
    """Fails if a point or a figure is missing or cut, or if the workdir is made."""
    monkeypatch.setenv("COLUMNS", "40")
    workdir = f"--workdir={tmp_path / 'a' / 'b'}"
    done = lm("run", study, workdir, "--dry_run", "--config.train.tokens=123456789")
    lines = done.out.splitlines()
    assert done.code == 0 and lines[0].split() == list(cost.COLUMNS)
    for line, size, params in zip(lines[1:], tiny.CELLS, ("204", "404"), strict=False):
        point, count, _, replicas, tokens, steps, flops, mib, minutes = line.split()
        assert (point, count, replicas) == (size, params, "2")
        # Rounded up to whole dispatches of 5 steps of 256 tokens.
        assert (tokens, steps) == ("123,457,280", "482,255")
        assert float(flops) > 1e11 and int(mib) >= 1 and float(minutes) > 0
    assert "…" not in done.out and "2 points, 4 replicas, 2 cells" in " ".join(done.out.split())
    assert list(tmp_path.iterdir()) == []


def test_dry_run_of_the_demo_fits_a_terminal(lm, monkeypatch):
    """Fails if a column of the table that everybody sees first is wider than 80 characters."""
    monkeypatch.setenv("COLUMNS", "80")
    done = lm("run", tiny.ROOT / "experiments" / "desk.py", "--dry_run")
    assert done.code == 0 and all(len(line) <= 80 for line in done.out.splitlines())


def test_status_says_how_far_each_cell_is(finished, lm, monkeypatch):
    """Fails if a key of the JSON is renamed, or if the table shows routine events or cuts words."""
    found = lm("status", finished, "--json").json
    assert found["study"] == "tiny" and found["held_by"] is None
    by_name = {cell["cell"]: cell for cell in found["cells"]}
    assert by_name.keys() == set(tiny.CELLS)
    for cell in by_name.values():
        assert (cell["state"], cell["replicas"], cell["diverged"]) == ("done", 2, 0)
        assert cell["step"] == cell["steps"] == 30 and cell["seconds"] > 0 and cell["loss"] > 0
    monkeypatch.setenv("COLUMNS", "80")
    out = lm("status", finished).out
    assert "2 of 2 cells done" in out and "noteworthy" in out and "30/30" in out
    assert "answers" not in out and "begin" not in out and "…" not in out


def test_explain_says_everything_behind_a_point(finished, lm):
    """Fails if a setting, a seed, a version, the commit or the seconds can no longer be had."""
    found = lm("explain", finished, "2x4", "--json").json
    assert found["settings"]["train"]["tokens"] == 7680 and found["cell"] == "2x4"
    assert found["size"]["params"] == 404
    assert [r["seed_init"] for r in found["replicas"]] == [0, 1]
    assert {r["status"] for r in found["replicas"]} == {"ok"}
    attempt = found["attempts"][0]
    assert {"jax", "jaxlib", "flax", "orbax-checkpoint"} <= attempt["versions"].keys()
    assert {"git_commit", "git_dirty", "host", "nproc", "device"} <= attempt.keys()
    assert found["seconds"].keys() == {"compile", "train", "eval", "total"}
    assert found["chance"].keys() == {"recall.3", "addition.1"}


def test_report_has_the_keys_of_its_contract(finished, lm):
    """Fails if a key that others read is renamed or a task gets no verdict."""
    found = lm("report", finished, "--json").json
    keys = {"study", "points", "replicas", "rows", "verdicts", "scaling", "seconds"}
    assert keys <= found.keys()
    assert (found["study"], found["points"], found["replicas"]) == ("tiny", 2, 4)
    assert found["rows"] == sum(len(tiny.rows(finished / cell)) for cell in tiny.CELLS)
    verdict = {"task", "level", "metric", "verdict", "onset_params", "ci95", "chance"}
    assert all(verdict <= v.keys() for v in found["verdicts"])
    assert {(v["task"], v["level"]) for v in found["verdicts"]} == {
        ("recall", "3"),
        ("addition", "1"),
    }
    assert {"alpha", "ci95", "n"} <= found["scaling"].keys()
    assert found["seconds"].keys() == {"compile", "train", "eval", "total"}


@pytest.mark.parametrize("change", ["train.replicas=vmap", "optim.learning_rate=0.02"])
def test_a_changed_config_is_refused_with_a_diff(finished, study, lm, change):
    """Fails if a workdir takes rows of another config, or if the message hides what changed."""
    before = tiny.snapshot(finished)
    done = lm("run", study, f"--workdir={finished}", f"--config.{change}")
    assert done.code == 2 and done.out == ""
    first, *lines = done.err.splitlines()
    assert "another config" in first and "choose another --workdir" in first
    key, value = change.split("=")
    assert [line.split(":")[0].strip() for line in lines] == [f"{c}.{key}" for c in tiny.CELLS]
    assert all(line.endswith(f"-> {value}") for line in lines)
    assert tiny.snapshot(finished) == before


def test_a_copy_of_the_workdir_is_as_good(finished, tmp_path, lm):
    """Fails if a path of the first machine is baked into what `verify` and `status` read."""
    copy = shutil.copytree(finished, tmp_path / "copy")
    for verb in ("verify", "status"):
        assert lm(verb, copy, "--json").json == lm(verb, finished, "--json").json
