"""`lm bench attention|step|population|eval`: how fast the hot path is, beside what else there is.
`lm bench verdicts` asks how often the statistics are right instead (`lm.bench.verdicts`).

One repetition of every implementation in turn, each in a process that waits while the others run,
and a float32 product of 2048 x 2048 matrices among them, which says what the machine gives at that
time. Results are compared before anything is timed. FLOPs: see `lm.bench.cases`.
"""

import argparse
import dataclasses
import importlib.util
import json
import os
from collections.abc import Sequence
from typing import Any, get_args

from lm.config import UserError, nearest, positive

BENCHES = ("attention", "step", "population", "eval")
APART = ("decode", "verdicts")  # these have a main of their own
PEERS = {
    "attention": ("torch_sdpa",),
    "step": ("torch_eager", "torch_compiled"),
    "population": (),
    "eval": ("torch_hflm",),
}
PRODUCT_SIZE = 2048

EPILOG = """\
attention   forward and backward of causal attention: every backend of lm.attention
step        training steps of whole models: the program of a cell with one replica
population  16 replicas at once, in every mode of lm.train.population and in single-threaded
            processes that share them
decode      cached decoding and prefill of a 135M model; its --help says more
eval        log-likelihoods of 200 four-way items, of which a repetition asks 25; the peer is
            lm-eval's own model for PyTorch (the extras 'peers' and 'harness')
verdicts    no times: how often the verdicts are right about planted tables (--tables=200, --json)

Threads are NPROC, or as many as this process may use. ONSET_PEERS names the Python (3.12 or newer)
that has PyTorch, if it is not this one. peak_mib is the growth of resident memory
during a call, over operands, parameters and state.

examples:
  lm bench attention --peers
  lm bench attention --peers --cases=4x8x1024x64,1x8x4096x64 --pass=forward
  lm bench step --peers --json > step.json
  NPROC=1 lm bench population --cases=2x16 --impls=vmap,sequential
"""


def main(argv: list[str]) -> int:
    """`lm bench BENCH [...]`; exit code 1 if a result was wrong or nothing ran."""
    if argv[:1] == ["verdicts"]:
        from lm.bench import verdicts

        return verdicts.main(argv[1:])
    if argv[:1] == ["decode"]:
        from lm.bench import decode

        return decode.main(argv[1:])
    args = _parse(argv)
    # Cases need nothing; backends and modes need JAX, which --help does not wait for.
    from lm.bench import table, timing

    impls = _implementations(args)
    rows: list[dict[str, Any]] = []
    with table.progress() as say:
        jobs = _jobs(args, impls)
        for i, job in enumerate(jobs, 1):
            say(f"{job.bench} {job.case}, case {i} of {len(jobs)}")
            rows += timing.measure(job, args.repeats)
    if args.json:
        print(json.dumps(rows))
    else:
        table.show(rows)
    wrong = any((row["reason"] or "").startswith("WRONG") for row in rows)
    return int(wrong or not any(row["ms"] for row in rows))


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="lm bench",
        description="Times attention, training steps or populations, interleaved and checked.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("bench", metavar="|".join([*BENCHES, *APART]))
    parser.add_argument("--json", action="store_true", help="for machines: a list of rows")
    parser.add_argument("--peers", action="store_true", help="PyTorch too (the extra 'peers')")
    parser.add_argument("--cases", default="", metavar="A,B", help="only these")
    parser.add_argument("--impls", default="", metavar="A,B", help="only these")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="of attention's operands")
    parser.add_argument(
        "--pass",
        dest="which",
        choices=["forward", "both"],
        help="of attention; both (forward and backward) is the default",
    )
    parser.add_argument("--repeats", type=int, default=7, metavar="N", help="default: 7")
    parser.add_argument("--smoke", action="store_true", help="tiny cases: does it run at all?")
    args = parser.parse_args(argv)
    if args.bench not in BENCHES:
        raise UserError(f"no bench {args.bench!r}; {nearest(args.bench, (*BENCHES, *APART))}")
    for name, value in (("dtype", args.dtype), ("pass", args.which)):
        if value and args.bench != "attention":
            raise UserError(f"--{name} is for attention; leave it out of {args.bench}")
    positive("--repeats", args.repeats)
    args.dtype, args.which = args.dtype or "float32", args.which or "both"
    return args


def _cases(args: argparse.Namespace) -> list[Any]:
    """The cases asked for, in the order of the table; raises UserError on an unknown one."""
    from lm.bench import cases

    known = getattr(cases, ("SMOKE_" if args.smoke else "") + args.bench.upper())
    names = _chosen("case", args.cases, [case.name for case in known])
    return [case for case in known if case.name in names]


def _implementations(args: argparse.Namespace) -> list[str]:
    """The implementations asked for; raises UserError on an unknown one, or without PyTorch."""
    own, peers = _own(args.bench), PEERS[args.bench]
    if args.impls:
        chosen = _chosen("implementation", args.impls, [*own, *peers])
        chosen += [p for p in peers if args.peers and p not in chosen]
    else:
        chosen = [*own, *(peers if args.peers else ())]
    here = os.environ.get("ONSET_PEERS") or importlib.util.find_spec("torch")
    if set(chosen) & set(peers) and not here:
        raise UserError(
            "PyTorch is not installed; install the extra: pip install 'onset-lm[peers]'"
        )
    return chosen


def _own(bench: str) -> list[str]:
    """The names of our implementations."""
    if bench in ("step", "eval"):
        return ["onset"]
    if bench == "population":
        modes = _modes()
        inside = [f"processes_{mode}" for mode in modes if mode != "sequential"]
        return [*modes, "processes", *inside]
    import jax

    from lm.attention import ORDER

    here = [name for name, _ in ORDER[jax.default_backend()]]
    return [*dict.fromkeys(["reference", "blockwise", *here])]


def _modes() -> list[str]:
    from lm.train.population import Mode

    return [mode for mode in get_args(Mode) if mode != "auto"]


def _chosen(what: str, text: str, known: Sequence[str]) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()] if text else list(known)
    for name in names:
        if name not in known:
            raise UserError(f"no {what} {name!r}; {nearest(name, known)}")
    return names


def _jobs(args: argparse.Namespace, impls: Sequence[str]) -> list[Any]:
    from lm.bench.timing import Job, Lane, allowed_threads
    from lm.bench.xla import flops_per_step

    threads = allowed_threads()
    jobs = []
    for case in _cases(args):
        spec = {"bench": args.bench, "case": dataclasses.asdict(case)}
        if args.bench == "attention":
            spec |= {"dtype": args.dtype, "pass": args.which}
            flops = case.flops(args.which)
            which = "forward" if args.which == "forward" else "forward+backward"
        elif args.bench == "eval":
            flops, which = case.flops, "items"
        else:
            flops, which = flops_per_step(case), "step"
        lanes = []
        for impl in impls:
            if impl.startswith("torch_"):
                lanes.append(Lane(impl, "torch", threads, [spec | {"impl": impl}]))
            elif args.bench in ("attention", "eval"):
                lanes.append(Lane(impl, "xla", threads, [spec | {"impl": impl}]))
            else:
                lanes.append(_train_lane(impl, spec, threads, case.replicas))
        replicas = case.each if args.bench == "eval" else getattr(case, "replicas", 1)
        size = PRODUCT_SIZE // 4 if args.smoke else PRODUCT_SIZE
        facts = (args.bench, case.name, args.dtype, which, replicas, case.tokens, flops)
        jobs.append(Job(*facts, lanes, size))
    return jobs


def _train_lane(impl: str, spec: dict[str, Any], threads: int, replicas: int) -> Any:
    """`processes` are as many single-threaded workers as there are threads, one replica after
    another in each; `processes_MODE` the same in another mode.
    """
    from lm.bench.timing import Lane

    if impl.startswith("processes"):
        mode = impl.removeprefix("processes").removeprefix("_") or "sequential"
        count = min(threads, replicas)
        ends = [replicas * i // count for i in range(count + 1)]
        shares = zip(ends[:-1], ends[1:], strict=True)
        specs = [spec | {"mode": mode, "replicas": [low, high]} for low, high in shares]
        return Lane(impl, "xla", 1, specs)
    mode = "auto" if impl == "onset" else impl
    return Lane(impl, "xla", threads, [spec | {"mode": mode, "replicas": [0, replicas]}])
