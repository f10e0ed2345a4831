"""Programming problems in HumanEval's format: reading them, checking completions, pass@k.

A completion passes if a judge, which holds the problem's tests, finds that the function returns
what they ask for (`lm.eval.pair`); both run in one jail (`lm.eval.sandbox`), and nothing of it in
this process. pass@k is the unbiased estimator of Chen et al. 2021 (Evaluating large language models
trained on code, eq. 1), with an interval from problems drawn anew.
"""

import collections
import dataclasses
import gzip
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from lm.config import UserError, within
from lm.emergence.bootstrap import bca, resample
from lm.eval import sandbox
from lm.eval.sandbox import Isolation, Limits, Outcome

PAIR = Path(__file__).with_name("pair.py")
LARGEST = 1 << 26  # bytes of a file of problems, unpacked
LARGEST_SAMPLES = 1 << 30  # two hundred samples of a thousand problems
LONGEST = 1 << 20  # characters of one text
# Where a completion of a function body ends; Chen et al. 2021, and the fence of a chat model.
STOPS = ("\nclass ", "\ndef ", "\n#", "\nif ", "\nprint", "\n@", "\nassert ", "\n```")


@dataclasses.dataclass(frozen=True)
class Problem:
    """The beginning of a function, and `check(candidate)` that raises if the function is wrong."""

    task_id: str
    prompt: str
    test: str
    entry_point: str
    canonical_solution: str = ""


@dataclasses.dataclass(frozen=True)
class Sample:
    """What completes a problem's prompt."""

    task_id: str
    completion: str


@dataclasses.dataclass(frozen=True)
class Checked:
    """A sample's verdict, one word, and why: `passed` `failed` (a test) `raised` `ended` `time`
    `memory` `output`, or `broken`, which is the problem's fault.
    """

    task_id: str
    verdict: str
    why: str
    seconds: float


def read_problems(path: Path) -> list[Problem]:
    """The problems of a JSON lines file, plain or .gz; raises UserError naming file and line."""
    found: dict[str, Problem] = {}
    needed = ("task_id", "prompt", "test", "entry_point")
    for where, record in _records(path, LARGEST):
        texts = {key: _text(record, key, where) for key in needed}
        if "canonical_solution" in record:
            texts["canonical_solution"] = _text(record, "canonical_solution", where)
        problem = Problem(**texts)
        if problem.task_id in found:
            raise UserError(f"{where}: {problem.task_id!r} was there before; keep one of them")
        if not problem.entry_point.isidentifier():
            raise UserError(
                f"{where}: entry_point is {problem.entry_point[:60]!r}; it must be a function's"
                " name"
            )
        found[problem.task_id] = problem
    return list(found.values())


def read_samples(path: Path, problems: Sequence[Problem]) -> list[Sample]:
    """The completions of a JSON lines file, plain or .gz, {"task_id", "completion"} a line."""
    known = {problem.task_id for problem in problems}
    found = []
    for where, record in _records(path, LARGEST_SAMPLES):
        sample = Sample(*(_text(record, key, where) for key in ("task_id", "completion")))
        if sample.task_id not in known:
            raise UserError(
                f"{where}: task_id {sample.task_id[:60]!r} is not among the problems; give samples"
                " of the same file"
            )
        found.append(sample)
    return found


def _records(path: Path, largest: int) -> Iterable[tuple[str, dict[str, Any]]]:
    """Every line with its place."""
    some = False
    for number, line in enumerate(_read(path, largest).split("\n"), 1):
        if not line.strip():
            continue
        where, some = f"{path}:{number}", True
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            what = "nested too deeply" if isinstance(error, RecursionError) else str(error)
            raise UserError(f"{where} is not a line of JSON: {what}; repair it") from error
        if not isinstance(record, dict):
            raise UserError(f"{where} is a {type(record).__name__}; every line must be an object")
        yield where, record
    if not some:
        raise UserError(f"{path} is empty; give a file with one JSON object a line")


def _read(path: Path, largest: int) -> str:
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            content = file.read(largest + 1)
        if len(content) > largest:
            raise UserError(f"{path} holds more than {largest} bytes; split the file")
        return content.decode()
    except (OSError, EOFError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{path} cannot be read: {reason}; give a file of JSON lines") from error


def _text(record: dict[str, Any], key: str, where: str) -> str:
    value = record.get(key)
    if not isinstance(value, str):
        kind = "missing" if key not in record else f"a {type(value).__name__}"
        raise UserError(f"{where}: {key} is {kind}; it must be a string")
    if len(value) > LONGEST:
        raise UserError(
            f"{where}: {key} has {len(value)} characters; at most {LONGEST} are checked"
        )
    return value


def truncate(completion: str, stops: Sequence[str] = STOPS) -> str:
    """What comes before the first of the stop strings."""
    ends = [at for stop in stops if (at := completion.find(stop)) >= 0]
    return completion[: min(ends, default=len(completion))]


def question(problem: Problem) -> str:
    """What a chat model is asked."""
    return (
        f"Complete this Python function. Answer with code only.\n\n```python\n{problem.prompt}```"
    )


def from_answer(problem: Problem, answer: str) -> str:
    """The completion in a chat model's answer: its first block of code, or all of it.

    A block that defines the function anew comes after a prompt that is ended by `pass`.
    """
    block = re.search(r"```(?:python|py)?[ \t]*\n(.*?)(?:```|\Z)", answer, re.DOTALL)
    found = block[1] if block else answer
    if re.search(rf"^\s*(async\s+)?def\s+{problem.entry_point}\b", found, re.MULTILINE):
        return f"    pass\n\n\n{found}"
    return found


def check(
    problem: Problem,
    completion: str,
    limits: Limits | None = None,
    isolation: Isolation = "namespaces",
) -> Checked:
    """Runs the problem's tests on its prompt with `completion` after it."""
    source = PAIR.read_text()
    asked = (problem.prompt, problem.test, problem.entry_point)
    judge = f"{source}\n\njudge(*{_literal(asked)})\n"
    given = (problem.prompt + completion, problem.entry_point)
    outcome = sandbox.run(f"{source}\n\nsolve(*{_literal(given)})\n", limits, isolation, judge)
    return Checked(problem.task_id, *_verdict(outcome), outcome.seconds)


def _literal(texts: Sequence[str]) -> str:
    return ascii(tuple(texts))


def _verdict(outcome: Outcome) -> tuple[str, str]:
    """What the judge said, unless the run was stopped: whoever overdraws has not passed."""
    if outcome.end in ("time", "cpu"):
        return "time", f"stopped after {outcome.seconds:.1f} s"
    if outcome.end in ("memory", "output"):
        return outcome.end, f"it used more {outcome.end} than a run may"
    if outcome.end == "killed":
        return "ended", "the judge was killed"
    try:
        verdict, why = json.loads(outcome.said)
        return str(verdict), str(why)
    except ValueError:
        return "ended", f"the judge ended with {outcome.code} and said nothing"


def check_all(
    problems: Sequence[Problem],
    samples: Sequence[Sample],
    limits: Limits | None = None,
    isolation: Isolation = "namespaces",
    progress: Callable[[int, int], None] = lambda done, passed: None,
) -> list[Checked]:
    """The verdicts of all samples, as many at a time as there are processors.

    Threads only wait here: every run is processes of its own. Raises UserError where there is no
    such isolation, or a problem cannot be judged.
    """
    sandbox.require(isolation)
    by_id = {problem.task_id: problem for problem in problems}
    found: list[Checked] = []
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        runs = pool.map(lambda s: check(by_id[s.task_id], s.completion, limits, isolation), samples)
        try:
            for checked in runs:
                if checked.verdict == "broken":
                    raise UserError(f"{checked.task_id}: {checked.why}; leave the problem out")
                found.append(checked)
                progress(len(found), sum(c.verdict == "passed" for c in found[-1:]))
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    return found


def pass_at_k(n: int, passed: int, k: int) -> float:
    """1 - C(n - c, k) / C(n, k): the chance that one of k samples passes, from c of n that did.

    The quotient as a product (Chen et al. 2021, figure 3), one of whose factors is 0 where fewer
    than k samples failed.
    """
    within("k", k, 1, n)
    return 1.0 - math.prod(1.0 - k / i for i in range(n - passed + 1, n + 1))


def measure(checked: Sequence[Checked], ks: Sequence[int], name: str) -> list[dict[str, Any]]:
    """A row of the table for each k: the mean over problems, with its 95 % interval.

    Raises UserError where a problem has fewer than k samples.
    """
    counts = collections.Counter(c.task_id for c in checked)
    passed = collections.Counter(c.task_id for c in checked if c.verdict == "passed")
    if not counts:
        raise UserError("there are no samples to measure; give at least one")
    rows = []
    for k in ks:
        few = min(counts, key=lambda task: counts[task])
        if counts[few] < k:
            raise UserError(
                f"pass@{k} needs {k} samples of every problem, {few} has {counts[few]}; give more"
                " (--n), or a smaller --k"
            )
        each = np.array([[pass_at_k(counts[task], passed[task], k) for task in counts]])
        drawn = resample({"pass": (each, np.ones_like(each))})
        value, draws = float(drawn.value["pass"]), drawn.draws["pass"]
        low, high = bca(value, draws, [u["pass"] for u in drawn.jackknife])
        about = {"task": "code", "level": name, "format": 0, "metric": f"pass@{k}"}
        spread = {"stderr": float(draws.std()), "ci": [low, high]}
        rows.append(about | {"value": value, **spread, "n": len(counts), "chance": 0.0})
    return rows


def set_name(path: Path) -> str:
    """The name of a problem set as a level: its file's name without what says the format."""
    return re.sub(r"(\.jsonl|\.json|\.gz)+$", "", path.name)
