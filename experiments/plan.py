"""`lm plan STUDY --topology=NAME`: what a study would take on accelerators that are not here.

Every point's training step is compiled for the topology; memory and collectives are the
compiler's own. Without the compiler (the extras `tpu` and `cuda`) both are estimates.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from typing import Any, NoReturn

from lm.config import UserError, nearest
from lm.plan import topology as places

EPILOG = """topologies: v5e:16x16, v5p:8x8x8, v6e:16x16 (a slice of TPUs), 2xv5e:16x16 (two slices),
h100:32x8 (hosts x GPUs)

examples:
  lm plan experiments/ladder_7b.py --topology=v5e:16x16
  lm plan experiments/ladder_7b.py --topology=h100:32x8 --point=7b --json
  lm plan experiments/ladder_70b.py --topology=v5p:8x8x8 --config.model.remat=dots"""
GIB = 2**30


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; `lm plan --help` shows what there is")


def main(argv: list[str]) -> int:
    """The verb `plan`; exit code 1 if a point does not fit."""
    overrides = [a for a in argv if a.startswith("--config.")]
    parser = _Parser(
        "lm plan",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("study", help="a study file, such as experiments/ladder_7b.py")
    parser.add_argument("--topology", required=True, metavar="NAME", help="such as v5e:16x16")
    parser.add_argument("--point", default="", metavar="A,B", help="only these points")
    parser.add_argument("--json", action="store_true", help="for machines: a list of points")
    parser.add_argument("--estimate", action="store_true", help="compile nothing")
    parser.add_argument("--text", default="", metavar="FILE", help="keep a program's text")
    args = parser.parse_args([a for a in argv if a not in overrides])
    topology = places.parse(args.topology)
    without = "nothing was compiled, as asked" if args.estimate else places.missing(topology)
    if not without:
        places.set_environment(topology)
    todo = _cells(args.study, overrides, args.point)
    if args.text and len(todo) > 1:
        raise UserError(f"--text {args.text} takes one program; choose its point with --point")
    rows = plan(todo, topology, not without, args.text)
    if args.json:
        print(json.dumps(rows, allow_nan=False))
    else:
        print(table(rows, topology))
    if without:
        print(f"lm plan: {without}", file=sys.stderr)
    return int(not all(row["fits"] for row in rows))


def _cells(study_file: str, overrides: Sequence[str], wanted: str) -> list[Any]:
    """The cells of a study, or those that hold the points that are asked for."""
    from experiments.runner import points_of
    from experiments.study import load
    from lm.train.cell import cells

    study = load(study_file, overrides)
    if study.train:
        raise UserError(f"{study_file} trains by itself, and its cost is not known; plan another")
    todo = cells(study.name, points_of(study))
    names = {r.point for c in todo for r in c.replicas}
    for name in filter(None, wanted.split(",")):
        if name not in names:
            raise UserError(f"--point {name!r} is not in the study; {nearest(name, sorted(names))}")
    asked = set(filter(None, wanted.split(","))) or names
    return [c for c in todo if asked & {r.point for r in c.replicas}]


def plan(
    todo: Sequence[Any], topology: places.Topology, compiles: bool, text: str = ""
) -> list[dict[str, Any]]:
    """One row per cell, as `--json` prints it; raises UserError where something does not divide."""
    from lm.plan import compile as compiler
    from lm.plan import estimate, search
    from lm.sizes import parameters

    for cell in todo:
        compiler.check(cell, topology)
    devices = compiler.describe(topology) if compiles else None
    rows = []
    for cell in todo:
        made = compiler.compile_step(cell, topology, devices, text) if compiles else None
        guess = estimate.memory(cell, topology)
        fits = made.fits if made else guess.total <= topology.chip.limit
        said = made.collectives if made and made.fits else estimate.collectives(cell, topology)
        spent = estimate.cost(cell, topology, said)
        row: dict[str, Any] = {
            "point": cell.name,
            "params": parameters(cell.model).total,
            "flops_per_step": estimate.flops_per_step(cell),
            "hbm_gib": {
                "args": (made.args if made and not made.refused else guess.args) / GIB,
                "temp": (made.temp if made and not made.refused else guess.total - guess.args)
                / GIB,
                "peak": (made.peak if made else guess.total) / GIB,
                "limit": topology.chip.limit / GIB,
            },
            "fits": fits,
            "collectives": _counts(said),
            "compile_s": made.seconds if made else None,
            "compiled": bool(made),
            "refused": made.refused if made else "",
            "kernels": made.kernels if made else {},
            "attention": compiler.attention_for(cell, topology),
            "host_gib": made.host_gib if made else None,
            "compile_processor_s": made.processor_seconds if made else None,
            "estimated_gib": {
                kind: getattr(guess, kind) / GIB for kind in (*guess.__dataclass_fields__, "total")
            },
            "collective_gib": sum(one.received for one in said) / GIB,
            "collective_s": sum(one.seconds(topology) for one in said),
            "step_s": spent.step,
            "tokens_per_s": spent.tokens_per_second,
            "hours": spent.hours,
            "dollars": spent.dollars,
            "replicas": len(cell.replicas),
            "steps": cell.steps,
        }
        if not fits:
            confirm = None
            if compiles:
                confirm = lambda c: compiler.compile_step(c, topology, devices).fits  # noqa: E731
            other = search.nearest(cell, topology, confirm)
            row["nearest"] = search.say(cell, other) if other else ""
        rows.append(row)
    return rows


def _counts(said: Sequence[Any]) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for one in said:
        counts[one.kind] += round(one.times)
    return dict(sorted(counts.items()))


def table(rows: Sequence[dict[str, Any]], topology: places.Topology) -> str:
    """What a person reads: at most 100 columns."""
    from lm.plan.estimate import BUSY

    head = (
        f"{'point':<9}{'params':>7}{'FLOPs':>9}{'args':>7}{'temp':>7}{'peak':>7}{'fits':>5}"
        f"{'links':>9}{'s':>7}{'s a step':>13}{'tokens/s':>12}{'days':>8}"
    )
    under = (
        f"{'':<9}{'':>7}{'a step':>9}{'GiB':>7}{'GiB':>7}{'GiB':>7}{'':>5}"
        f"{'GiB':>9}{'':>7}{'from to':>13}{'from to':>12}{'to':>8}"
    )
    lines = [
        f"{topology.name}: {topology.devices} devices, {topology.chip.limit / GIB:.2f} GiB each",
        head,
        under,
    ]
    for row in rows:
        hbm, step, rate = row["hbm_gib"], row["step_s"], row["tokens_per_s"]
        lines.append(
            f"{row['point'][:8]:<9}{_short(row['params']):>7}{row['flops_per_step']:>9.1e}"
            f"{hbm['args']:>7.2f}{hbm['temp']:>7.2f}{hbm['peak']:>7.2f}"
            f"{'yes' if row['fits'] else 'NO':>5}{row['collective_gib']:>9.1f}"
            f"{row['collective_s']:>7.2f}{f'{_seconds(step[0])}-{_seconds(step[1])}':>13}"
            f"{f'{_short(rate[0])}-{_short(rate[1])}':>12}{row['hours'][1] / 24:>8.1f}"
        )
    lines.append("")
    for row in rows:
        lines += _details(row)
    lines += [
        "",
        "args: between steps; temp: allocated beside them; peak: live at once;"
        " GiB: by kind, estimated.",
        f"s a step: products at {BUSY[0]:.0%} to {BUSY[1]:.0%} of the peak, what remat repeats"
        " counted; links beside",
        "products (from) or after them (to), with nothing else on them. Dollars: list prices.",
    ]
    return "\n".join(lines)


def _details(row: dict[str, Any]) -> list[str]:
    parts = row["estimated_gib"]
    kinds = " ".join(f"{k} {v:.2f}" for k, v in parts.items() if k != "total")
    source = f"compiled in {row['compile_s']:.0f} s" if row["compiled"] else "estimated"
    counts = ", ".join(f"{n} {k}" for k, n in row["collectives"].items()) or "none"
    low, high = row["dollars"]
    lines = [
        f"{row['point'][:40]}: {source}, attention {row['attention']},"
        f" ${_short(low)} to ${_short(high)}",
        f"  collectives: {counts}",
        f"  GiB: {kinds}",
    ]
    if not row["fits"]:
        remedy = row.get("nearest") or "none was found; take more devices"
        lines.append(f"  does not fit; the nearest that does: {remedy}")
        if row["refused"]:
            lines.append(f"  the compiler: {row['refused'][:90]}")
    return lines


def _seconds(number: float) -> str:
    return f"{number:.2f}" if number < 100 else _short(number)


def _short(number: float) -> str:
    """Three digits and a letter."""
    for letter, unit in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= 0.9995 * unit:
            return f"{number / unit:.3g}{letter}"
    return f"{number:.3g}"
