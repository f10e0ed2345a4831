"""One repetition of every implementation in turn, again and again, and the rows that come of it.

A machine that is noisy for a while is so for all, and medians compare what was measured side by
side. The float32 product that sets the scale takes its turn with the others, in every case.
"""

import contextlib
import dataclasses
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

PRODUCT = "product"
LEAST = 0.02  # seconds of a repetition; shorter calls are repeated
# Between repetitions: OpenMP threads spin for some milliseconds before they sleep.
PAUSE = 0.02
# Largest difference of results, relative to the largest entry, that rounding explains.
TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2, "losses": 1e-3}


def allowed_threads() -> int:
    """NPROC, as XLA reads it, or the CPUs that this process may use."""
    given = os.environ.get("NPROC", "")
    if given.isdigit() and int(given):
        return int(given)
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


class Failed(Exception):
    """An implementation cannot go on; the text is the reason that its row gives."""


class Worker:
    """A process that speaks the protocol of `lm.bench.worker`."""

    def __init__(self, kind: str, threads: int, errors: Path, command: Sequence[str] = ()) -> None:
        self.errors = errors
        python, env = sys.executable, os.environ | {"NPROC": str(threads)}
        if kind == "torch" and os.environ.get("ONSET_PEERS"):
            python = os.environ["ONSET_PEERS"]
            env["PYTHONPATH"] = str(Path(__file__).parents[2])
        with errors.open("w") as stderr:
            self.process = subprocess.Popen(
                [*(command or (python, "-m", "lm.bench.worker", kind)), str(threads)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                env=env,
            )

    def send(self, **message: Any) -> None:
        """Asks; `receive` has the answer."""
        assert self.process.stdin
        # A dead one is found out when its answer is read.
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps(message), file=self.process.stdin, flush=True)

    def receive(self) -> dict[str, Any]:
        """The answer; raises Failed if it is a reason, or if the process is dead."""
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            code = self.process.wait()
            last = (self.errors.read_text().strip().splitlines() or ["it said nothing"])[-1]
            raise Failed(f"its process ended with {code}: {last[:150]}")
        answer = json.loads(line)
        if "reason" in answer:
            raise Failed(answer["reason"])
        return answer

    def close(self) -> None:
        """Ends the process; it goes by itself when it has nothing more to read."""
        try:
            self.process.communicate(timeout=5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.communicate()


@dataclasses.dataclass(frozen=True)
class Lane:
    """Where an implementation runs: one worker, or several at once that share the replicas."""

    impl: str
    kind: str  # "xla" or "torch"
    threads: int  # of each worker
    specs: Sequence[dict[str, Any]]  # one a worker
    command: Sequence[str] = ()  # in place of `python -m lm.bench.worker KIND`


@dataclasses.dataclass(frozen=True)
class Ready:
    """A lane whose workers hold the case: what they said, and what they found."""

    repetition: Callable[[], float]  # seconds of a step
    about: dict[str, Any]
    results: dict[str, np.ndarray]


@contextlib.contextmanager
def started(lanes: Sequence[Lane]) -> Iterator[dict[str, list[Worker]]]:
    """The workers of each lane, which end with the block.

    Each case has its own: allocators keep what was freed, and a case would find it there.
    """
    with tempfile.TemporaryDirectory(prefix="lm-bench-") as name, contextlib.ExitStack() as stack:
        workers: dict[str, list[Worker]] = {}
        for lane in lanes:  # all of them before the first is asked: they import at the same time
            for i in range(len(lane.specs)):
                log = Path(name) / f"{lane.impl}-{i}.log"
                worker = Worker(lane.kind, lane.threads, log, lane.command)
                stack.callback(worker.close)
                workers.setdefault(lane.impl, []).append(worker)
        yield workers


def prepare(lane: Lane, workers: Sequence[Worker], least: float = LEAST) -> Ready:
    """Makes a lane ready; raises Failed with the reason if one of its workers cannot."""
    files = [worker.errors.with_suffix(".npz") for worker in workers]
    for worker, spec, path in zip(workers, lane.specs, files, strict=True):
        worker.send(do="prepare", spec=spec, results=str(path))
    answers = _receive(workers)
    slowest = max(a["seconds"] for a in answers)
    loops = max(1, math.ceil(least / slowest))
    steps = loops * answers[0]["steps"]

    def repetition() -> float:
        for worker in workers:
            worker.send(do="run", loops=loops)
        times = _receive(workers)
        return (max(t["end"] for t in times) - min(t["begin"] for t in times)) / steps

    found = [dict(np.load(path, allow_pickle=False)) for path in files]
    return Ready(
        repetition,
        {
            "threads": sum(a["threads"] for a in answers),
            "growth": _sum(a["growth"] for a in answers),
            "temporaries": _sum(a["temporaries"] for a in answers),
            "compile_s": max((a["compile_s"] or 0.0 for a in answers), default=0.0) or None,
        },
        {name: np.concatenate([f[name] for f in found]) for name in found[0]},
    )


def interleave(
    lanes: Mapping[str, Callable[[], float]], repeats: int, pause: float = PAUSE
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Times of every lane, one of each in turn; and the reasons of those that fell out."""
    times: dict[str, list[float]] = {name: [] for name in lanes}
    reasons: dict[str, str] = {}
    for _ in range(repeats):
        for name, repetition in lanes.items():
            if name in reasons:
                continue
            try:
                times[name].append(repetition())
            except Failed as failed:
                reasons[name] = str(failed)
            time.sleep(pause)
    return times, reasons


@dataclasses.dataclass(frozen=True)
class Job:
    """One case with everything its rows need; FLOPs and tokens are of a step (or a call)."""

    bench: str
    case: str
    dtype: str
    which: str  # "forward", "forward+backward" or "step"
    replicas: int
    tokens: int
    flops: float
    lanes: Sequence[Lane]
    product_size: int


def prepare_all(
    lanes: Sequence[Lane], workers: Mapping[str, Sequence[Worker]]
) -> tuple[dict[str, Ready], dict[str, str]]:
    """Those that are ready by name, and why the others are not."""
    ready: dict[str, Ready] = {}
    reasons: dict[str, str] = {}
    for lane in lanes:
        try:
            ready[lane.impl] = prepare(lane, workers[lane.impl])
        except Failed as failed:
            reasons[lane.impl] = str(failed)
    return ready, reasons


def measure(job: Job, repeats: int) -> list[dict[str, Any]]:
    """The rows of a case, in the order of its lanes."""
    threads = max(lane.threads * len(lane.specs) for lane in job.lanes)
    spec = {"bench": PRODUCT, "size": job.product_size}
    lanes = [Lane(PRODUCT, "xla", threads, [spec]), *job.lanes]
    with started(lanes) as workers:
        ready, reasons = prepare_all(lanes, workers)
        errors = _compare(job, ready)
        for impl, (error, other) in errors.items():
            if not error <= _tolerance(job):  # NaN is no agreement
                reasons[impl] = f"WRONG: its results differ from those of {other} by {error:.1e}"
        running = {impl: r.repetition for impl, r in ready.items() if impl not in reasons}
        times, fallen = interleave(running, repeats)
    reasons |= fallen
    peak = 0.0
    if PRODUCT not in reasons:
        peak = 2 * job.product_size**3 / statistics.median(times[PRODUCT]) / 1e9
    rows = []
    for lane in job.lanes:
        row = _blank(job, lane.impl)
        if lane.impl in reasons:
            row["reason"] = reasons[lane.impl]
        else:
            row |= _figures(job, times[lane.impl], peak) | _facts(ready[lane.impl])
            row["error"] = errors.get(lane.impl, (None,))[0]
        rows.append(row)
    return rows


def _blank(job: Job, impl: str) -> dict[str, Any]:
    """A row without figures: first the keys that every tool may count on."""
    figures = ("ms", "tokens_per_s", "gflops", "fraction_of_peak", "peak_mib")
    more = ("threads", "peak_gflops", "temporary_mib", "compile_s", "error", "reason")
    return {
        **{"bench": job.bench, "case": job.case, "impl": impl, "dtype": job.dtype},
        **dict.fromkeys(figures),
        "n": 0,
        **{"pass": job.which, "replicas": job.replicas},
        **dict.fromkeys(more),
    }


def _figures(job: Job, times: Sequence[float], peak: float) -> dict[str, Any]:
    median = statistics.median(times)
    gflops = job.flops / median / 1e9
    ms = {"median": median * 1e3, "min": min(times) * 1e3, "max": max(times) * 1e3}
    return {
        "ms": ms,
        "tokens_per_s": job.tokens / median,
        "gflops": gflops,
        "fraction_of_peak": gflops / peak if peak else None,
        "peak_gflops": peak or None,
        "n": len(times),
    }


def _facts(ready: Ready) -> dict[str, Any]:
    about = ready.about
    mib = {"peak_mib": about["growth"], "temporary_mib": about["temporaries"]}
    sizes = {name: None if value is None else value / 2**20 for name, value in mib.items()}
    return {"threads": about["threads"], "compile_s": about["compile_s"], **sizes}


def _compare(job: Job, ready: Mapping[str, Ready]) -> dict[str, tuple[float, str]]:
    """Largest relative difference of each implementation from the first one, and its name."""
    first, *others = [lane.impl for lane in job.lanes if lane.impl in ready] or [""]
    found = {}
    for impl in others:
        pairs = [(ready[impl].results[n], a) for n, a in ready[first].results.items()]
        worst = np.max([abs(b - a).max() / abs(a).max() for b, a in pairs])  # keeps NaN
        found[impl] = float(worst), first
    return found


def _tolerance(job: Job) -> float:
    return TOLERANCE[job.dtype if job.bench == "attention" else "losses"]


def _receive(workers: Sequence[Worker]) -> list[dict[str, Any]]:
    """All answers, also when one is a failure: none may be left in a pipe."""
    answers, failures = [], []
    for worker in workers:
        try:
            answers.append(worker.receive())
        except Failed as failed:
            failures.append(failed)
    if failures:
        raise failures[0]
    return answers


def _sum(values: Iterable[int | None]) -> int | None:
    found = list(values)
    return None if None in found else sum(v for v in found if v is not None)
