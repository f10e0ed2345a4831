"""`lm bench decode`: greedy decoding of one row, and the prefill of a prompt, beside transformers.

The model has SmolLM2-135M's shape and random weights, since speed does not depend on their values.
What counts is how fast a token's weights are read, so GB/s are those of the weights; where the
memory gives 15 GB/s, 538 MB of float32 take 36 ms. The peer may live in another Python
(`--python`): it is one file that imports nothing of ours, and draws the same weights.
"""

import argparse
import dataclasses
import json
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lm.config import UserError, nearest, positive

PEER = Path(__file__).with_name("decode_peer.py")
BYTES = {"onset": 4, "xla": 4, "onset_bfloat16": 2, "onset_int8": 1, "transformers": 4}
OURS = ("onset", "onset_bfloat16", "onset_int8", "xla")
# Against float32: rounding, and what 8 and 16 bits of a weight leave of random logits.
TOLERANCE = {"onset_bfloat16": 0.05, "onset_int8": 0.1}
EPILOG = """\
onset, onset_bfloat16, onset_int8   the kernel with float32, bfloat16 and int8 weights
xla                                 the same without the kernel (lm.models.decode)
transformers                        eager PyTorch with its cache, the loop a plain greedy one

example: lm bench decode --peers --python=/somewhere/bin/python
"""


@dataclasses.dataclass(frozen=True)
class DecodeCase:
    """A Llama-like model with a tied head, a prompt, and how many tokens a repetition takes; with
    none it is the prefill that is timed.
    """

    layers: int
    width: int
    heads: int
    kv_heads: int
    mlp_size: int
    vocab: int
    prompt: int
    tokens: int

    @property
    def name(self) -> str:
        """What is done."""
        return f"decode after {self.prompt}" if self.tokens else f"prefill {self.prompt}"

    @property
    def weights(self) -> int:
        """Numbers that a token multiplies."""
        head = self.width // self.heads
        attention = self.width * head * (2 * self.heads + 2 * self.kv_heads)
        return self.layers * (attention + 3 * self.width * self.mlp_size) + self.vocab * self.width


SMOL = 30, 576, 9, 3, 1536, 49_152
CASES = DecodeCase(*SMOL, prompt=32, tokens=16), DecodeCase(*SMOL, prompt=512, tokens=0)
TINY = 2, 64, 4, 2, 96, 80
SMOKE = DecodeCase(*TINY, prompt=20, tokens=4), DecodeCase(*TINY, prompt=40, tokens=0)


def main(argv: list[str]) -> int:
    """`lm bench decode [--peers] [--json] ...`; exit code 1 if a result was wrong."""
    args = _parse(argv)
    from lm.bench import table

    rows: list[dict[str, Any]] = []
    with table.progress() as say:
        for case in SMOKE if args.smoke else CASES:
            say(case.name)
            rows += measure(case, args)
    if args.json:
        print(json.dumps(rows))
    else:
        _show(rows)
    return int(any((row["reason"] or "").startswith("WRONG") for row in rows))


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="lm bench decode",
        description="Times cached decoding and prefill of a 135M model, interleaved and checked.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="for machines: a list of rows")
    parser.add_argument("--peers", action="store_true", help="transformers too")
    parser.add_argument("--python", default=sys.executable, help="the Python that has transformers")
    parser.add_argument(
        "--impls", default=",".join(OURS), metavar="A,B", help="of ours, only these"
    )
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="default: 5")
    parser.add_argument("--smoke", action="store_true", help="a tiny model: does it run at all?")
    args = parser.parse_args(argv)
    positive("--repeats", args.repeats)
    args.impls = [name for name in args.impls.split(",") if name]
    for name in args.impls:
        if name not in OURS:
            raise UserError(f"no implementation {name!r}; {nearest(name, OURS)}")
    return args


def measure(case: DecodeCase, args: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of a case: every implementation in a process of its own, in turn."""
    from lm.bench.timing import Lane, allowed_threads, interleave, prepare_all, started

    threads = allowed_threads()
    impls = [*args.impls, *(["transformers"] if args.peers else [])]
    spec = {"bench": "decode", "case": dataclasses.asdict(case)}
    command = {"transformers": (args.python, str(PEER))}
    lanes = [
        Lane(impl, "xla", threads, [spec | {"impl": impl}], command.get(impl, ())) for impl in impls
    ]
    with started(lanes) as workers:
        ready, reasons = prepare_all(lanes, workers)
        logits = {impl: found.results["logits"] for impl, found in ready.items()}
        errors = _errors(logits)
        for impl, error in errors.items():
            if not error <= TOLERANCE.get(impl, 1e-4):
                reasons[impl] = f"WRONG: its logits differ by {error:.1e} of the largest"
        running = {i: found.repetition for i, found in ready.items() if i not in reasons}
        times, fallen = interleave(running, args.repeats)
    reasons |= fallen
    rows = [_row(case, impl, threads, times.get(impl, []), errors.get(impl)) for impl in impls]
    return [row | {"reason": reasons.get(row["impl"])} for row in rows]


def _errors(logits: Mapping[str, Any]) -> dict[str, float]:
    """Largest difference from the first, relative to its largest entry."""
    if not logits:
        return {}
    first = next(iter(logits.values()))
    return {impl: float(abs(y - first).max() / abs(first).max()) for impl, y in logits.items()}


def _row(
    case: DecodeCase, impl: str, threads: int, times: Sequence[float], error: float | None
) -> dict[str, Any]:
    row: dict[str, Any] = {"bench": "decode", "case": case.name, "impl": impl, "threads": threads}
    row |= {"n": len(times), "ms": None, "tokens_per_s": None, "gb_per_s": None, "error": error}
    if times:
        tokens, median = case.tokens or case.prompt, statistics.median(times)
        ms = {"median": median * 1e3, "min": min(times) * 1e3, "max": max(times) * 1e3}
        row |= {"ms": ms, "tokens_per_s": tokens / median}
        if case.tokens:
            row["gb_per_s"] = tokens * case.weights * BYTES[impl] / median / 1e9
    return row


def _show(rows: Sequence[Mapping[str, Any]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    table = Table(box=box.SIMPLE, padding=(0, 1, 0, 0))
    for head in ("case", "impl"):
        table.add_column(head, no_wrap=True)
    for head in ("tokens/s", "min - max", "GB/s", "against\ntransformers", "error"):
        table.add_column(head, justify="right", no_wrap=True)
    last = ""
    for row in rows:
        if last and row["case"] != last:
            table.add_section()
        name, last = "" if row["case"] == last else row["case"], row["case"]
        table.add_row(name, row["impl"], *_cells(row, rows))
    console.print(f"{rows[0]['threads']} threads, medians of {rows[0]['n']}, interleaved")
    # A pipe is no reason to cut columns off.
    console.width = max(console.width, table.__rich_measure__(console, console.options).maximum)
    console.print(table)
    for row in rows:
        if row["reason"]:
            console.print(f"{row['case']}, {row['impl']}: {row['reason']}", soft_wrap=True)


def _cells(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> list[str]:
    if not row["ms"]:
        return ["-"] * 5
    ms, rate = row["ms"], row["tokens_per_s"]
    peers = [r for r in rows if r["case"] == row["case"] and r["impl"] == "transformers"]
    ratio = peers[0]["ms"]["median"] / ms["median"] if peers and peers[0]["ms"] else math.nan
    span = f"{rate * ms['median'] / ms['max']:.3g} - {rate * ms['median'] / ms['min']:.3g}"
    gb = "-" if row["gb_per_s"] is None else f"{row['gb_per_s']:.1f}"
    return [
        f"{rate:.3g}",
        span,
        gb,
        "-" if math.isnan(ratio) else f"{ratio:.2f}x",
        f"{row['error']:.0e}",
    ]
