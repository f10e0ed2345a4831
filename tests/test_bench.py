"""`lm bench`: what it counts, in which order it measures, and what it says.

No test looks at a time: that is what the machine does, not what the code does.
"""

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lm import bench, cli
from lm.bench import cases, table, timing, worker
from lm.bench.cases import AttentionCase, TrainCase
from lm.bench.timing import Failed, Job, Lane, Ready, Worker

ROOT = Path(__file__).parents[1]
KEYS = [
    *("bench", "case", "impl", "dtype", "ms", "tokens_per_s", "gflops"),
    *("fraction_of_peak", "peak_mib", "n"),
]
MORE = [
    *("pass", "replicas", "threads", "peak_gflops", "temporary_mib", "compile_s", "error"),
    "reason",
]


def row(impl, case="8x8x256x64", ms=1.0, **more):
    """A row of attention as `measure` makes it."""
    which = "forward+backward" if more.get("bench", "attention") == "attention" else "step"
    return {
        **{"bench": "attention", "case": case, "impl": impl, "dtype": "float32"},
        "ms": {"median": ms, "min": ms * 0.9, "max": ms * 1.4} if ms else None,
        **{"tokens_per_s": 1e3, "gflops": 1e2, "fraction_of_peak": 0.5, "peak_mib": 32.0, "n": 7},
        **{"pass": which, "replicas": 1, "threads": 2, "peak_gflops": 200.0},
        **{"temporary_mib": 4.0, "compile_s": 0.1, "error": 1e-6, "reason": None},
        **more,
    }


def test_attention_flops_by_hand():
    """Breaks if the masked half is counted, the diagonal forgotten, or backward is not 2.5 times
    forward.
    """
    case = AttentionCase(2, 3, 1, 4, 8)
    pairs = 4 + 3 + 2 + 1
    assert case.flops("forward") == 2 * 3 * pairs * (2 * 8 + 2 * 8) == 1920
    assert case.flops("both") == 3.5 * 1920
    assert case.tokens == 8 and case.name == "2x3/1x4x8"
    q, kv = 2 * 4 * 3 * 8, 2 * 4 * 1 * 8
    assert case.operand_bytes(4) == 4 * (4 * q + 4 * kv)


def test_step_flops_by_hand():
    """Breaks if the head, the causal half of attention, the rows or the replicas are left out."""
    from lm.bench.xla import flops_per_step

    case = TrainCase(1, 1, 16, vocab=32, length=8, rows=4, chunk=2, replicas=3)
    weights = 4 * 16 * 16 + 2 * 16 * 64 + 32 * 16  # q k v out, up and down, head
    attention = 3 * 4 * 16 * (8 * 9 // 2)  # forward and twice that backward
    assert flops_per_step(case) == 3 * 4 * (6 * weights * 8 + attention)
    assert case.tokens == 3 * 4 * 8


def test_the_cases_are_those_of_the_issue():
    """Breaks if a shape is lost or its name changes: figures are quoted by it."""
    names = {
        group: [c.name for c in cases.ATTENTION if c.group == group] for group in ("large", "tiny")
    }
    assert names["large"] == [
        *("8x8x256x64", "4x8x1024x64", "1x8x4096x64", "64x4x64x32", "2x16x512x128"),
        "4x8/2x1024x64",
    ]
    assert names["tiny"] == ["48x2x64x8", "48x4x64x8", "192x2x48x16"]
    assert [c.name for c in cases.STEP] == ["6x6x384", "4x4x128", "2x16", "2x32"]
    assert [(c.name, c.replicas) for c in cases.POPULATION] == [("2x16", 16), ("2x32", 16)]


def test_one_repetition_of_each_in_turn():
    """Breaks if an implementation gets its repetitions in a row, or if one that falls out takes the
    others along.
    """
    order = []

    def lane(name, fails_at=99):
        def repetition():
            order.append(name)
            if order.count(name) == fails_at:
                raise Failed("it died")
            return float(order.count(name))

        return repetition

    lanes = {"a": lane("a"), "b": lane("b", fails_at=2), "c": lane("c")}
    times, reasons = timing.interleave(lanes, 3, pause=0)
    assert order == ["a", "b", "c", "a", "b", "c", "a", "c"]
    assert times["a"] == times["c"] == [1.0, 2.0, 3.0] and reasons == {"b": "it died"}


def test_a_short_call_is_warmed_and_a_long_one_is_not(monkeypatch):
    """Breaks if the first call after others had the caches is counted."""
    now, calls = [0.0], []

    def call():
        calls.append(now[0])
        now[0] += 100.0 if len(calls) == 1 else 1.0

    monkeypatch.setattr(worker.time, "perf_counter", lambda: now[0])
    begin, end = worker.repetition(call, 3)
    assert end - begin == 3.0 and len(calls) == 4
    calls.clear()
    begin, end = worker.repetition(call, 1)
    assert end - begin == 100.0 and len(calls) == 1


def job(*impls, name="attention"):
    lanes = [Lane(impl, "xla", 1, [{}]) for impl in impls]
    return Job(name, "case", "float32", "forward", 1, 1000, 2e9, lanes, 64)


def ready(values, seconds=0.5):
    about = {"threads": 2, "growth": 2**20, "temporaries": None, "compile_s": None}
    return Ready(lambda: seconds, about, {"out": np.array(values)})


def test_rows_of_a_case(monkeypatch):
    """Breaks if an implementation that computes something else is timed, if NaN passes for
    agreement, or if a figure is not what the median says.
    """
    found = {
        "product": Ready(lambda: 0.25, {}, {}),
        "first": ready([1.0, -4.0]),
        "close": ready([1.0, -4.0001], seconds=2.0),
        "wrong": ready([1.0, -4.1]),
        "nan": ready([np.nan, -4.0]),
    }

    def prepare(lane, workers):
        if lane.impl not in found:
            raise Failed("no compiler")
        return found[lane.impl]

    @contextlib.contextmanager
    def started(lanes):
        yield {lane.impl: [] for lane in lanes}

    monkeypatch.setattr(timing, "prepare", prepare)
    monkeypatch.setattr(timing, "started", started)
    monkeypatch.setattr(timing, "PAUSE", 0)
    impls = ("absent", "first", "close", "wrong", "nan")
    rows = timing.measure(job(*impls), repeats=2)
    assert [r["impl"] for r in rows] == list(impls)
    absent, first, close, wrong, nan = rows
    assert absent["reason"] == "no compiler" and absent["ms"] is None and absent["n"] == 0
    assert first["ms"] == {"median": 500.0, "min": 500.0, "max": 500.0} and first["n"] == 2
    assert first["tokens_per_s"] == 2000 and first["gflops"] == 4.0 and first["error"] is None
    assert first["peak_gflops"] == 2 * 64**3 / 0.25 / 1e9
    assert first["fraction_of_peak"] == 4.0 / first["peak_gflops"] and first["peak_mib"] == 1.0
    assert close["error"] == pytest.approx(2.5e-5) and close["gflops"] == 1.0
    for bad in (wrong, nan):
        assert bad["ms"] is None and bad["reason"].startswith(
            "WRONG: its results differ from those"
        )


def test_a_dead_worker_is_a_reason(tmp_path):
    """Breaks if a crash of a kernel ends the bench or hangs it."""
    worker = Worker("xla", 1, tmp_path / "log")
    worker.process.kill()
    worker.process.wait()
    worker.send(do="run", loops=1)
    with pytest.raises(Failed, match="its process ended with -9: it said nothing"):
        worker.receive()
    worker.close()


def test_a_defect_is_a_reason_and_not_the_end(tmp_path):
    """Breaks if an exception in one case takes its process away, or loses the traceback."""
    worker = Worker("xla", 1, tmp_path / "log")
    for _ in range(2):
        worker.send(do="prepare", spec={"bench": "product"}, results="x")
        with pytest.raises(Failed, match="KeyError: 'size'"):
            worker.receive()
    worker.close()
    assert worker.process.returncode == 0 and "Traceback" in worker.errors.read_text()


@pytest.mark.skipif(sys.platform != "linux", reason="growth is read from /proc")
def test_growth_is_that_of_the_call():
    """Breaks if memory that a call frees before it returns is not seen, or if what stood before, or
    an earlier peak, is counted.
    """
    size, held = 64 * 2**20, b"\1" * 2**26
    assert len(held) and worker.growth(lambda: None) < size / 4
    grown = worker.growth(lambda: len(b"\1" * size))
    assert 0.9 * size < grown < 1.5 * size
    assert worker.growth(lambda: None) < size / 4


def test_replicas_are_shared_out_once():
    """Breaks if a process trains a replica twice or not at all, or in another mode than its name
    says.
    """
    lane = bench._train_lane("processes", {}, 3, 16)
    assert [spec["replicas"] for spec in lane.specs] == [[0, 5], [5, 10], [10, 16]]
    assert lane.threads == 1 and {spec["mode"] for spec in lane.specs} == {"sequential"}
    assert bench._train_lane("processes_vmap", {}, 2, 16).specs[1]["mode"] == "vmap"
    (spec,) = bench._train_lane("vmap", {}, 3, 16).specs
    assert spec["replicas"] == [0, 16] and spec["mode"] == "vmap"


def test_ratios_by_hand():
    """Breaks if a mean is not geometric, a ratio is upside down, or a group has the wrong cases."""
    shapes = {"8x8x256x64": 1.0, "4x8x1024x64": 4.0, "48x2x64x8": 9.0, "1x1x16384x64": 100.0}
    rows = [row("cpu", case, 2.0) for case in shapes]
    rows += [row("torch_sdpa", case, 2.0 * x) for case, x in shapes.items()]
    rows += [row("reference", "4x8x1024x64", 6.0), row("blockwise", ms=None, reason="no")]
    assert table.speedups(rows, "cpu", "torch_sdpa") == shapes
    found = [list(column.cells) for column in table.ratios(rows)[1].columns]
    assert list(zip(*found, strict=True)) == [
        ("cpu", "torch_sdpa", "2.00x", "9.00x", "4.00x", "1.00x at 8x8x256x64"),
        ("reference", "torch_sdpa", "1.33x", "-", "1.33x", "1.33x at 4x8x1024x64"),
        ("cpu", "reference", "3.00x", "-", "3.00x", "3.00x at 4x8x1024x64"),
    ]


def test_baselines():
    """Breaks if a step is compared with the slower PyTorch, or a layout with the slower of the two
    that it has to beat.
    """
    steps = [row("onset", "2x16", 2.0), row("torch_eager", "2x16", 8.0)]
    steps = [r | {"bench": "step"} for r in [*steps, row("torch_compiled", "2x16", 5.0)]]
    assert "2x16: onset is 2.50x as fast as torch_compiled" in table.notes(steps)
    times = {"vmap": 2.0, "sequential": 4.0, "processes": 3.0}
    many = [row(impl, "2x16", ms, bench="population", replicas=16) for impl, ms in times.items()]
    assert "2x16: vmap is 1.50x as fast as processes" in table.notes(many)


def test_notes_say_what_was_checked_and_what_did_not_run():
    """Breaks if a reason is lost, or repeated once a case."""
    rows = [row(impl, case) for case in ("8x8x256x64", "48x2x64x8") for impl in ("a", "b")]
    rows[1] |= {"ms": None, "reason": "no compiler"}
    assert "b at 8x8x256x64: no compiler" in table.notes(rows)
    rows[3] |= {"ms": None, "reason": "no compiler"}
    lines = table.notes(rows)
    assert [line for line in lines if "no compiler" in line] == ["b: no compiler"]
    assert "checked: all outputs and gradients agree within 1e-06 of the largest entry" in lines
    assert "200 GFLOP/s" in lines[0]
    assert not any("not quiet" in line for line in lines)
    rows[0]["ms"]["max"] = 2.1 * rows[0]["ms"]["min"]
    assert any("not quiet: in 1 of 2 rows" in line for line in table.notes(rows))


@pytest.mark.parametrize("name", bench.BENCHES)
def test_tables_fit_100_columns(name, monkeypatch, capsys):
    """Breaks if the longest names and largest numbers make a row wider than 100, or if a pipe cuts
    columns off.
    """
    known = getattr(cases, name.upper())
    impls = {"attention": ["torch_sdpa"], "step": ["torch_compiled"]}.get(name, ["processes_lanes"])
    more = {"bench": name, "replicas": 16 if name == "population" else 1, "error": 1e-6}
    numbers = {"tokens_per_s": 1234567.0, "gflops": 12345.6, "peak_mib": 12345.6}
    rows = [
        row(impl, case.name, 12345.6, **more, **numbers)
        for case in known
        for impl in ["blockwise", "sequential", *impls]
    ]
    monkeypatch.setenv("COLUMNS", "40")
    table.show(rows)
    lines = capsys.readouterr().out.splitlines()
    assert max(len(line.rstrip()) for line in lines) <= 100
    assert any("12,346" in line and "12,345.6" in line for line in lines)


SLOW = ("population", "eval")  # their programs take half a minute to compile


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if n in SLOW else ()) for n in bench.BENCHES]
)
def test_json_of_a_smoke_run(name, lm, monkeypatch):
    """Breaks if a key is renamed, if something else is printed to stdout, or if implementations of
    one case do not agree.
    """
    impls = {"attention": ["reference", "blockwise"], "step": ["onset"], "eval": ["onset"]}
    chosen = impls.get(name, ["vmap", "processes"])
    monkeypatch.setenv("NPROC", "2")
    first = getattr(cases, f"SMOKE_{name.upper()}")[0].name
    some = [f"--cases={first}", f"--impls={','.join(chosen)}", "--repeats=2"]
    done = lm("bench", name, "--smoke", "--json", *some)
    assert done.code == 0, done.err
    rows = json.loads(done.out)
    assert [(r["case"], r["impl"]) for r in rows] == [(first, impl) for impl in chosen]
    for r in rows:
        assert list(r) == [*KEYS, *MORE]
        assert r["bench"] == name and r["dtype"] == "float32" and r["n"] == 2 and not r["reason"]
        assert 0 < r["ms"]["min"] <= r["ms"]["median"] <= r["ms"]["max"]
        assert r["tokens_per_s"] > 0 and r["threads"] == 2
        assert r["fraction_of_peak"] == pytest.approx(r["gflops"] / r["peak_gflops"])
        assert (r["error"] is None) == (r["impl"] == chosen[0])
        assert r["error"] is None or r["error"] < 1e-4


def test_peers_train_the_same_model(lm):
    """Breaks if the PyTorch twin has another shape, initial value, optimiser or loss than ours."""
    pytest.importorskip("torch")
    chosen = "--impls=onset,torch_eager"
    done = lm("bench", "step", "--smoke", "--json", "--repeats=1", chosen)
    assert done.json[1]["impl"] == "torch_eager" and done.json[1]["error"] < 1e-5


def test_peers_attend_alike(lm):
    """Breaks if PyTorch gets other operands, another layout or another mask than we do."""
    pytest.importorskip("torch")
    chosen = "--impls=reference,torch_sdpa"
    done = lm("bench", "attention", "--smoke", "--json", "--repeats=1", chosen)
    assert [r["error"] < 1e-5 for r in done.json[1::2]] == [True, True]


def test_peers_score_alike(lm):
    """Breaks if lm-eval's own model gets other weights or other items than ours."""
    if not os.environ.get("ONSET_PEERS"):
        pytest.importorskip("torch")
        pytest.importorskip("transformers")
    done = lm("bench", "eval", "--smoke", "--json", "--repeats=1", "--peers")
    assert done.json[1]["impl"] == "torch_hflm" and done.json[1]["error"] < 1e-5, done.json


def test_without_pytorch(lm, monkeypatch):
    """Breaks if --peers without PyTorch is a traceback, or is silently less than asked for."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.delenv("ONSET_PEERS", raising=False)
    sentence = "PyTorch is not installed; install the extra: pip install 'onset-lm[peers]'"
    assert lm("bench", "step", "--peers").refusal == sentence
    assert lm("bench", "attention", "--impls=torch_sdpa").refusal == sentence


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["atention"], "no bench 'atention'; did you mean 'attention'?"),
        (["step", "--cases=6x6x348"], "no case '6x6x348'; did you mean '6x6x384'?"),
        (
            ["attention", "--impls=blokwise"],
            "no implementation 'blokwise'; did you mean 'blockwise'?",
        ),
        (["population", "--impls=torch_eager"], "no implementation 'torch_eager'; known:"),
        (["step", "--dtype=bfloat16"], "--dtype is for attention; leave it out of step"),
        (["step", "--repeats=0"], "--repeats is 0; it must be greater than 0"),
    ],
)
def test_mistakes_are_one_sentence(args, sentence, lm):
    """Breaks if a misspelt name starts a worker, or is answered by a traceback."""
    assert lm("bench", *args).refusal.startswith(sentence)


def test_help_is_there_for_each_bench(capsys):
    """Breaks if `lm bench attention --help` is an error, or says less than `lm bench --help`."""
    for args in (["--help"], ["attention", "--help"]):
        with pytest.raises(SystemExit) as ended:
            cli.main(["bench", *args])
        out = capsys.readouterr().out
        assert ended.value.code == 0 and "lm bench" in out and "example" in out


def test_threads_are_those_of_xla(monkeypatch):
    """Breaks if PyTorch or the table get another number than XLA, which reads NPROC."""
    monkeypatch.setenv("NPROC", "3")
    assert timing.allowed_threads() == 3
    monkeypatch.setenv("NPROC", "")
    assert timing.allowed_threads() >= 1


def test_what_libraries_print_is_not_an_answer(tmp_path):
    """Breaks if a library that prints to stdout ends up in the protocol."""
    program = (
        "import os, sys\nfrom lm.bench import worker, xla\nfrom lm.bench.work import Work\n"
        "def build(*_): os.system('echo noise'); print('noise'); return Work(int, dict), 1\n"
        "worker._build = build\nworker.serve('xla', 1)\n"
    )
    message = json.dumps({"do": "prepare", "spec": {}, "results": str(tmp_path / "r.npz")})
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, input=f"{message}\n", capture_output=True, text=True, cwd=ROOT)
    assert json.loads(done.stdout)["threads"] == 1 and done.stderr.count("noise") == 2


def test_memory_by_hand():
    """Breaks if results are counted as extra memory, or the ratio is to something else."""
    rows = [row("cpu", "1x1x16384x64", peak_mib=20.0, temporary_mib=3.2)]
    what, found = table.memory(rows)
    assert what.endswith("at 1x1x16384x64; q, k, v, out and their gradients: 32 MiB")
    assert [list(c.cells) for c in found.columns] == [["cpu"], ["3.2"], ["0.10"], ["4.0"], ["0.12"]]
