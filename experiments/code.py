"""`lm code CHECKPOINT PROBLEMS`: completes programming problems and counts what passes the tests.

Generated code runs in a jail (docs/code.md) and never in this process. `--samples=FILE` scores
completions that are there already, of whatever model. The rows have the columns of a study's table.
"""

import argparse
import collections
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lm.config import UserError, within
from lm.eval import code, sandbox
from lm.eval.code import Checked, Problem, Sample
from lm.eval.sandbox import ISOLATIONS, Limits
from lm.generate.cli import Parser

BATCH = 10  # completions at a time


def main(argv: list[str]) -> int:
    """`lm code [CHECKPOINT] PROBLEMS [--n= --k= | --samples=FILE] [--out=FILE] [--json]`."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.explain:
        print(sandbox.explain())
        return 0
    if len(args.given) != (2 if args.samples is None else 1):
        raise UserError(
            "give a checkpoint and a file of problems, or only the problems and --samples=FILE;"
            " `lm code --help` shows both"
        )
    ks, path = _numbers(args.k), Path(args.given[-1])
    asked = code.read_problems(path)
    limits = Limits(wall_s=args.seconds)
    if args.out and not args.out.parent.is_dir():
        raise UserError(f"there is no folder {args.out.parent} for --out; make it first")
    sandbox.require(args.isolation)  # before a model is loaded
    if args.samples is None:
        within("--n", args.n, max(ks))
        samples = _complete(args.given[0], asked, args)
    else:
        samples = code.read_samples(args.samples, asked)
    checked = code.check_all(asked, samples, limits, args.isolation, _progress(len(samples)))
    rows = code.measure(checked, ks, code.set_name(path))
    if args.out:
        _write(args.out, samples, checked)
    _show(rows, checked, args)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        "lm code",
        description="Completes programming problems and counts how many pass their tests.",
        epilog="example: lm code runs/desk/2x48 tests/data/easy.jsonl --n=20 --k=1,10",
    )
    parser.add_argument(
        "given",
        nargs="*",
        metavar="CHECKPOINT PROBLEMS",
        help="what `lm chat` takes, and problems in HumanEval's format, .jsonl or .jsonl.gz",
    )
    parser.add_argument(
        "--samples", type=Path, help='score these, {"task_id", "completion"} a line'
    )
    parser.add_argument("--chat", action="store_true", help="ask in the model's chat template")
    parser.add_argument("--n", type=int, default=20, help="samples of every problem (20)")
    parser.add_argument("--k", default="1,10", help="pass@k for these k (1,10)")
    parser.add_argument("--temperature", type=float, default=0.8, help="of sampling (0.8)")
    parser.add_argument("--top_p", type=float, default=0.95, help="of sampling (0.95)")
    parser.add_argument("--tokens", type=int, default=300, help="of one completion (300)")
    parser.add_argument("--weights", default="float32", help="float32, bfloat16 or int8")
    parser.add_argument("--seed", type=int, default=0, help="of sampling (0)")
    parser.add_argument(
        "--isolation",
        choices=ISOLATIONS,
        default="namespaces",
        help="limits: also where this machine has no namespaces; its files are in reach then",
    )
    parser.add_argument("--seconds", type=float, default=20.0, help="for one sample (20)")
    parser.add_argument("--out", type=Path, help="write every sample with its verdict here")
    parser.add_argument("--explain", action="store_true", help="say what isolation there is here")
    parser.add_argument("--json", action="store_true", help="one JSON object, for machines")
    return parser


def _numbers(text: str) -> list[int]:
    try:
        found = [int(k) for k in text.split(",")]
    except ValueError:
        found = [0]
    if min(found) < 1:
        raise UserError(f"--k is {text!r}; it must be whole numbers from 1 on, such as 1,10")
    return found


def _progress(total: int) -> Any:
    passed = 0

    def progress(done: int, more: int) -> None:
        nonlocal passed
        passed += more
        _say(f"{done:,} of {total:,} checked, {passed:,} passed", done == total)

    return progress


def _write(path: Path, samples: Sequence[Sample], checked: Sequence[Checked]) -> None:
    """Whole or not at all: samples take hours to make."""
    part = path.with_name(path.name + ".part")
    with part.open("w") as file:
        for sample, found in zip(samples, checked, strict=True):
            record: dict[str, Any] = {"task_id": sample.task_id, "completion": sample.completion}
            passed = found.verdict == "passed"
            record |= {"passed": passed, "verdict": found.verdict, "why": found.why}
            file.write(json.dumps(record) + "\n")
    os.replace(part, path)


def _show(rows: list[dict[str, Any]], checked: Sequence[Checked], args: argparse.Namespace) -> None:
    verdicts = collections.Counter(c.verdict for c in checked)
    if args.json:
        about = {"rows": rows, "verdicts": verdicts, "isolation": args.isolation}
        print(json.dumps(about | {"problems": dict(_problems(checked))}))
        return
    from rich.console import Console
    from rich.table import Table

    grid = Table("problem", "samples", "passed", "the others", box=None)
    for task, found in _problems(checked):
        others = ", ".join(f"{n} {word}" for word, n in found.items() if word != "passed")
        grid.add_row(task, str(sum(found.values())), str(found.get("passed", 0)), others)
    Console(width=100).print(grid)
    for row in rows:
        low, high = row["ci"]
        print(
            f"{row['metric']} = {row['value']:.3f}, 95 % interval {low:.3f} to {high:.3f} over"
            f" {row['n']} problems"
        )


def _problems(checked: Sequence[Checked]) -> Iterator[tuple[str, dict[str, int]]]:
    """How often each verdict was given, by problem."""
    found: dict[str, collections.Counter[str]] = {}
    for one in checked:
        found.setdefault(one.task_id, collections.Counter())[one.verdict] += 1
    return ((task, dict(counts.most_common())) for task, counts in found.items())


def _complete(
    checkpoint: str, problems: Sequence[Problem], args: argparse.Namespace
) -> list[Sample]:
    """n samples of every problem, in order; the same seed gives the same ones."""
    from lm.generate import Options, choose_sampler, generate
    from lm.generate.weights import open_checkpoint

    sampler = choose_sampler(args.temperature, top_p=args.top_p if args.temperature else 1.0)
    loaded = open_checkpoint(checkpoint, args.weights)
    rows = [problem for problem in problems for _ in range(args.n)]
    found: list[Sample] = []
    for first in range(0, len(rows), BATCH):
        part = rows[first : first + BATCH]
        seeds = [(args.seed + first + i) % 2**32 for i in range(len(part))]
        options = [Options(args.tokens, () if args.chat else code.STOPS, s) for s in seeds]
        prompts = [_prompt(loaded, problem, args.chat) for problem in part]
        for problem, answer in zip(part, generate(loaded, prompts, sampler, options), strict=True):
            text = code.from_answer(problem, answer.text) if args.chat else answer.text
            found.append(Sample(problem.task_id, text))
        _say(f"{len(found):,} of {len(rows):,} samples made", len(found) == len(rows))
    return found


def _prompt(loaded: Any, problem: Problem, chat: bool) -> Any:
    """The problem's own, or ids of a chat that asks for it."""
    if not chat:
        return problem.prompt
    return loaded.tokenizer.encode_chat([{"role": "user", "content": code.question(problem)}])


def _say(text: str, last: bool) -> None:
    """On stderr, for somebody who looks."""
    if sys.stderr.isatty():
        print(text, end="\n" if last else "\r", file=sys.stderr, flush=True)
