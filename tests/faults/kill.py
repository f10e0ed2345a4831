"""Random `kill -9` over a study, seeded; the table must come out bit-identical.

    python tests/faults/kill.py --workdir=/tmp/kills --kills=40 --seed=0 [--how=processes|slurm]

Trains the tiny study of tests/tiny.py once undisturbed, then again and again in fresh workdirs
while somebody kills, at random moments, a worker's whole session, a worker alone (of a cell on two
processes: one of the two), or the runner, which is then started again. A workdir counts when its
table and its parameters are those of the undisturbed one, bit by bit, and `lm verify` finds
nothing. Prints one line a workdir; exit code 1 if one differs. `slurm` starts a cluster of its own
(`launch/slurm_test_cluster.sh`, root).
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[1]))

import tiny

from experiments import supervise
from lm.config import build

STEPS = 200  # dispatches are five steps: 40 of them, 20 checkpoints
DEADLINE = 1200.0  # seconds for one workdir, however often it is disturbed
WHAT = ("session", "session", "worker", "runner")
HOW = {
    "local": ("--workers=2",),
    "processes": ("--workers=1", "--where.processes=2"),
    "slurm": ("--where=slurm",),
    "slurm-processes": ("--where=slurm", "--where.nodes=2"),
}
SCRIPT = tiny.ROOT / "launch" / "slurm_test_cluster.sh"


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--workdir", type=Path, required=True, help="a folder of its own")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--each", type=int, default=4, help="kills of one workdir, at most")
    parser.add_argument("--how", choices=HOW, default="local", help="what carries out the cells")
    args = parser.parse_args()
    args.workdir.mkdir(parents=True, exist_ok=True)
    with cluster(args.workdir / "slurm") if "slurm" in args.how else contextlib.nullcontext():
        return kills(args)


def kills(args: argparse.Namespace) -> int:
    """Workdir after workdir, until enough kills have landed."""
    study, finished = args.workdir / "study" / "tiny.py", args.workdir / "finished"
    if not study.exists():
        tiny.write_study(study.parent)
    run(study, finished, args.how).wait(DEADLINE)
    wanted = verify(finished)
    rng, landed, trial, wrong = random.Random(args.seed), 0, 0, 0
    while landed < args.kills:
        workdir = tiny.unfinished(finished, args.workdir / f"trial-{trial}", *tiny.CELLS)
        (workdir / "launch.json").unlink(missing_ok=True)
        done = disturb(study, workdir, rng, min(args.each, args.kills - landed), args.how)
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


def disturb(study: Path, workdir: Path, rng: random.Random, most: int, how: str) -> Counter[str]:
    """Carries out a workdir, killing at random moments; what was hit, by kind."""
    deadline, hits, runner = time.monotonic() + DEADLINE, Counter[str](), run(study, workdir, how)
    try:
        while runner.poll() is None or hits.total() < most:
            assert time.monotonic() < deadline, f"{workdir} did not finish in {DEADLINE:.0f} s"
            if runner.poll() is not None:
                if runner.returncode == 0:
                    break
                runner = run(study, workdir, how)
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
                chosen = rng.choice(pids)
                if what == "worker" and "processes" in how:
                    chosen = rng.choice([chosen, *beside(chosen)])
                hits[what] += kill(chosen, session=what == "session")
        while runner.wait(DEADLINE):
            assert time.monotonic() < deadline, f"{workdir} did not finish in {DEADLINE:.0f} s"
            runner = run(study, workdir, how)
        return hits
    finally:
        if runner.poll() is None:
            runner.kill()
        cancel(workdir)


def trains(workdir: Path) -> list[int]:
    """The processes that have a cell."""
    return [pid for cell in tiny.CELLS if (pid := tiny.worker(workdir / cell))]


def beside(pid: int) -> list[int]:
    """The processes that carry out a cell together with the one that has it."""
    with contextlib.suppress(OSError):
        words = Path(f"/proc/{pid}/cmdline").read_bytes()
        found = [p for p in Path("/proc").iterdir() if p.name.isdigit() and int(p.name) != pid]
        return [int(p.name) for p in found if words == _read(p / "cmdline")]
    return []


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def kill(pid: int, session: bool) -> bool:
    """SIGKILL for a process, or for its whole group; False if it was gone."""
    try:
        os.killpg(os.getpgid(pid), signal.SIGKILL) if session else os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True


def cancel(workdir: Path) -> None:
    """Ends whatever `launch.json` knows of."""
    there = supervise.launched(workdir)
    engine = supervise.engine(there["where"])
    ids = [command["id"] for command in there["commands"].values() if command["id"]]
    engine.cancel(ids, build(engine.Settings, there["settings"], "where"), grace=0)


def run(study: Path, workdir: Path, how: str, *more: str) -> subprocess.Popen[bytes]:
    """`lm run` of the study in `workdir`."""
    command = [sys.executable, "-m", "lm.cli", "run", str(study), f"--workdir={workdir}"]
    command += [*HOW[how], *(more or (f"--config.train.tokens={STEPS * 8 * 32}",))]
    with open(workdir.parent / f"{workdir.name}.log", "ab") as log:
        return subprocess.Popen(
            command,
            cwd=tiny.ROOT,
            env=tiny.environment(JAX_PLATFORMS="cpu"),
            stdout=log,
            stderr=log,
        )


def verify(workdir: Path) -> dict[str, Any]:
    """What `lm verify --json` says of a workdir."""
    return ask("verify", workdir)


def ask(verb: str, workdir: Path) -> dict[str, Any]:
    """What a verb says of a workdir."""
    command = [sys.executable, "-m", "lm.cli", verb, str(workdir), "--json"]
    done = subprocess.run(command, cwd=tiny.ROOT, capture_output=True, text=True, timeout=DEADLINE)
    assert done.returncode == 0, done.stdout + done.stderr
    return dict(json.loads(done.stdout))


@contextlib.contextmanager
def cluster(folder: Path) -> Iterator[None]:
    """A real Slurm on this machine while the block runs."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = 20000 + s.getsockname()[1] % 10000
    os.environ |= {"PORT": str(port), "SLURM_CONF": f"{folder}/slurm.conf"}
    try:
        subprocess.run([SCRIPT, "up", folder], check=True, stdout=subprocess.DEVNULL, timeout=300)
        yield
    finally:
        subprocess.run([SCRIPT, "down", folder], check=True, timeout=120)


if __name__ == "__main__":
    sys.exit(main())
