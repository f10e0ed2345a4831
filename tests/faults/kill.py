"""Random `kill -9` over a study on this machine, seeded; the table must come out bit-identical.

    python tests/faults/kill.py --workdir=/tmp/kills --kills=100 --seed=0

Trains the tiny study of tests/tiny.py once undisturbed, then again and again in fresh workdirs
while somebody kills, at random moments, a worker's whole session, a worker alone, or the runner,
which is then started again. A workdir counts when its table and its parameters are those of the
undisturbed one, bit by bit, and `lm verify` finds nothing. Prints one line a workdir; exit code 1
if one differs.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import tiny

from launch import local
from lm.rundir import read_json

STEPS = 200  # dispatches are five steps: 40 of them, 20 checkpoints
DEADLINE = 600.0  # seconds for one workdir, however often it is disturbed
WHAT = ("session", "session", "worker", "runner")


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--workdir", type=Path, required=True, help="a folder of its own")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--each", type=int, default=4, help="kills of one workdir, at most")
    args = parser.parse_args()
    args.workdir.mkdir(parents=True, exist_ok=True)
    study, finished = args.workdir / "study" / "tiny.py", args.workdir / "finished"
    if not study.exists():
        tiny.write_study(study.parent)
    run(study, finished).wait(DEADLINE)
    wanted = verify(finished)
    rng, landed, trial, wrong = random.Random(args.seed), 0, 0, 0
    while landed < args.kills:
        workdir = tiny.unfinished(finished, args.workdir / f"trial-{trial}", *tiny.CELLS)
        (workdir / "launch.json").unlink(missing_ok=True)
        done = disturb(study, workdir, rng, min(args.each, args.kills - landed))
        same = verify(workdir) == wanted
        landed, trial, wrong = landed + sum(done.values()), trial + 1, wrong + (not same)
        words = ", ".join(f"{count} {what}" for what, count in sorted(done.items()))
        print(
            f"{workdir.name}: {'same' if same else 'DIFFERS'}; killed {words or 'nothing'}", end=""
        )
        print(f"; {landed}/{args.kills}", flush=True)
        if same:
            shutil.rmtree(workdir)
    print(f"{landed} kills over {trial} workdirs: {trial - wrong} bit-identical, {wrong} not")
    return 1 if wrong else 0


def disturb(study: Path, workdir: Path, rng: random.Random, most: int) -> Counter[str]:
    """Carries out a workdir, killing at random moments; what was hit, by kind."""
    deadline, hits, runner = time.monotonic() + DEADLINE, Counter[str](), run(study, workdir)
    try:
        while runner.poll() is None or hits.total() < most:
            assert time.monotonic() < deadline, f"{workdir} did not finish in {DEADLINE:.0f} s"
            if runner.poll() is not None:
                if runner.returncode == 0:
                    break
                runner = run(study, workdir)
            if hits.total() == most:
                runner.wait(DEADLINE)
                continue
            what = rng.choice(WHAT)
            # A runner anywhere from its first import on; a worker once it has a cell.
            while what != "runner" and not trains(workdir) and runner.poll() is None:
                time.sleep(0.01)
            time.sleep(rng.choice((0.01, 0.1, 1.0, 4.0)) * rng.random())
            pids = trains(workdir)
            if what == "runner" and runner.poll() is None:
                runner.kill()
                hits[what] += 1
            elif what != "runner" and pids:
                hits[what] += kill(rng.choice(pids), session=what == "session")
        while runner.wait(DEADLINE):
            assert time.monotonic() < deadline, f"{workdir} did not finish in {DEADLINE:.0f} s"
            runner = run(study, workdir)
        return hits
    finally:
        if runner.poll() is None:
            runner.kill()
        for identity in ids(workdir):
            local.cancel([identity], grace=0)


def trains(workdir: Path) -> list[int]:
    """The processes that have a cell."""
    return [pid for cell in tiny.CELLS if (pid := tiny.worker(workdir / cell))]


def kill(pid: int, session: bool) -> bool:
    """SIGKILL for a process, or for its whole group; False if it was gone."""
    try:
        os.killpg(os.getpgid(pid), signal.SIGKILL) if session else os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True


def ids(workdir: Path) -> list[str]:
    """What `launch.json` knows of."""
    path = workdir / "launch.json"
    return [c["id"] for c in read_json(path)["commands"].values()] if path.exists() else []


def run(study: Path, workdir: Path) -> subprocess.Popen[bytes]:
    """`lm run` of the study in `workdir`."""
    command = [sys.executable, "-m", "lm.cli", "run", str(study), f"--workdir={workdir}"]
    command += ["--workers=2", f"--config.train.tokens={STEPS * 8 * 32}"]
    with open(workdir.parent / f"{workdir.name}.log", "ab") as log:
        return subprocess.Popen(
            command,
            cwd=tiny.ROOT,
            env=tiny.environment(JAX_PLATFORMS="cpu"),
            stdout=log,
            stderr=log,
        )


def verify(workdir: Path) -> dict[str, object]:
    """What `lm verify --json` says of a workdir."""
    command = [sys.executable, "-m", "lm.cli", "verify", str(workdir), "--json"]
    done = subprocess.run(command, cwd=tiny.ROOT, capture_output=True, text=True, timeout=DEADLINE)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


if __name__ == "__main__":
    sys.exit(main())
