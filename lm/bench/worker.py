"""The process in which implementations run: `python -m lm.bench.worker xla|torch THREADS`.

PyTorch's OpenMP threads go on spinning after a parallel region and XLA's pool is its own, so
neither lives with the other, and nothing is computed where the repetitions are ordered. The process
reads one JSON object a line and answers each with one:

    {"do": "prepare", "spec", "results"}  make the case ready and write its results (.npz)
                       -> {"seconds" of a call, "steps", "growth", "temporaries", "compile_s",
                           "threads"}
    {"do": "run", "loops"}                one repetition -> {"begin", "end"}, in seconds on the
                                          clock that all processes of a machine share

What cannot be done is answered by {"reason"}; the traceback of a defect goes to stderr.
"""

import ctypes
import gc
import importlib
import json
import os
import re
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from lm.bench.cases import AttentionCase, EvalCase, TrainCase
from lm.bench.work import Work
from lm.config import UserError


def serve(kind: str, threads: int) -> None:
    """Answers until stdin ends."""
    # Libraries print to stdout; the protocol keeps the real one for itself.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    importlib.import_module("lm.bench.peers" if kind == "torch" else "lm.bench.xla")
    work: Work | None = None
    for line in sys.stdin:
        try:
            message = json.loads(line)
            if message["do"] == "prepare":
                work, used = _build(kind, threads, message["spec"])
                answer = _first_calls(work, message["results"]) | {"threads": used}
            else:
                assert work, "nothing is prepared"
                begin, end = repetition(work.call, message["loops"])
                answer = {"begin": begin, "end": end}
        except UserError as error:
            answer = {"reason": str(error)}
        except Exception as error:
            traceback.print_exc()
            answer = {"reason": _one_line(error)}
        print(json.dumps(answer), file=answers, flush=True)


def _first_calls(work: Work, results: str) -> dict[str, Any]:
    """Writes the results, then measures.

    Memory is that of the second call: the first one touches code and starts threads (38 MiB with
    PyTorch), and by the third XLA has kept some of what it had.
    """
    np.savez(results, allow_pickle=False, **work.results())
    grown = growth(work.call)
    return {
        "seconds": min(end - begin for begin, end in (repetition(work.call, 1) for _ in range(2))),
        "steps": work.steps,
        "growth": grown,
        "temporaries": work.temporaries,
        "compile_s": work.compile_s,
    }


def repetition(call: Callable[[], Any], loops: int) -> tuple[float, float]:
    """When `loops` calls began and ended. Short calls are warmed by one that is not counted: others
    have had the caches since.
    """
    if loops > 1:
        call()
    begin = time.perf_counter()
    for _ in range(loops):
        call()
    return begin, time.perf_counter()


def growth(call: Callable[[], Any]) -> int | None:
    """Bytes by which a call raises the resident memory of this process at its peak, results
    included; None where the system does not say (it takes Linux and the GNU C library).
    """
    gc.collect()
    try:
        # Freed memory that the allocator keeps would hide what the call asks for.
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before = _resident("VmRSS")
        call()
        return max(0, _resident("VmHWM") - before)
    except (OSError, AttributeError):
        return None


def _resident(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024 if found else 0


def _build(kind: str, threads: int, spec: dict[str, Any]) -> tuple[Work, int]:
    """The implementation that a spec names, and the threads it runs on."""
    if kind == "torch":
        import torch

        from lm.bench import peers

        torch.set_num_threads(threads)
        return peers.build(spec), torch.get_num_threads()
    import jax

    from lm.bench import choices, xla

    if spec["bench"] == "product":
        work = xla.product(spec["size"])
    elif spec["bench"] == "decode":
        from lm.bench import decode_work
        from lm.bench.decode import DecodeCase

        work = decode_work.build(DecodeCase(**spec["case"]), spec["impl"])
    elif spec["bench"] == "eval":
        work = choices.ours(EvalCase(**spec["case"]))
    elif spec["bench"] == "attention":
        case = AttentionCase(**spec["case"])
        work = xla.attend(case, spec["impl"], spec["dtype"], spec["pass"])
    else:
        work = xla.train(TrainCase(**spec["case"]), spec["mode"], range(*spec["replicas"]))
    if jax.default_backend() != "cpu":  # resident memory and compiler count are not the host's
        return work._replace(temporaries=None), threads
    return work, xla.threads() or threads


def _one_line(error: Exception) -> str:
    """The first line of an error that says something, with its kind."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {text}"[:200]


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]))
