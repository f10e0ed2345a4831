"""A sweep of twelve cells under everything at once, seeded; the table must come out as undisturbed.

    make soak                      the same as
    python tests/faults/soak.py --workdir=runs/soak --how=local --how=slurm --seed=0

Every `--every` seconds, more or less, one fault: a worker, its whole session or the runner is
killed; a worker is asked to stop, or stopped past its lease and woken; the newest checkpoint of a
cell is damaged, or a line of its rows torn, while its worker is killed; the disk is full for a
while; a second runner comes. On Slurm also: a job is put back, and the controller killed and its
answer late. Prints a line a fault, then what `lm verify` and `lm status` say. Exit code 1 where the
table, the parameters or the goodput are not what they must be.
"""

import argparse
import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[1]))

import kill
import tiny

from lm.rundir import read_json
from lm.train.checkpoint import sealed_steps

LEASE = 15.0  # seconds; a worker that is stopped sleeps half as long again
LIMIT = 5400.0  # seconds for one sweep
GOODPUT = 0.5
CELLS = tuple(f"{layers}x{width}" for layers in (1, 2, 3) for width in (4, 8, 12, 16))
TWO = 'return [{"name": size, "model.size": size} for size in ("1x4", "2x4")]'
TWELVE = f'return [{{"name": size, "model.size": size}} for size in {CELLS}]'
LARGE, DISK = "size=4g", "tmpfs"
LOCAL = {
    **{"worker": 3, "session": 2, "runner": 1, "asked": 2, "stopped": 1},
    **{"damage": 2, "torn": 1, "disk": 1, "second": 1},
}
SLURM = {**LOCAL, "requeue": 1, "controller": 1}


class Sweep:
    """A study in a workdir, its runner, and what has been done to it."""

    def __init__(self, study: Path, workdir: Path, how: str, settings: tuple[str, ...]) -> None:
        self.study, self.workdir, self.how, self.settings = study, workdir, how, settings
        self.asleep: list[tuple[float, int]] = []  # when to wake which process
        self.done: Counter[str] = Counter()
        self.runner = self.start()

    def start(self) -> subprocess.Popen[bytes]:
        return kill.run(self.study, self.workdir, self.how, *self.settings)

    def workers(self) -> dict[str, int]:
        """Cell -> the process that has it."""
        held = {name: tiny.worker(self.workdir / name) for name in CELLS}
        return {name: pid for name, pid in held.items() if pid}

    def wake(self, all_of_them: bool = False) -> None:
        """Wakes the processes whose time has come."""
        for when, pid in list(self.asleep):
            if all_of_them or time.monotonic() > when:
                self.asleep.remove((when, pid))
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)


def kinds_of(how: str, wanted: str, mounted: bool) -> dict[str, int]:
    """The faults of a sweep with their weights: those that were asked for, or all that can be."""
    kinds = SLURM if how == "slurm" else LOCAL
    names = wanted.split(",") if wanted else list(kinds)
    return {n: kinds[n] for n in names if n in kinds and (mounted or n != "disk")}


def one_fault(sweep: Sweep, rng: random.Random, kinds: dict[str, int]) -> str:
    """Does one thing to a sweep; what it was, empty if there was nobody to do it to."""
    what = rng.choices(list(kinds), list(kinds.values()))[0]
    if what == "runner":
        sweep.runner.kill()
        sweep.runner.wait()
        return what
    if what == "second":
        second = sweep.start()
        refused = second.wait(600) == 2
        assert refused or sweep.runner.poll() is not None, "a second runner was not refused"
        return what
    if what == "disk":
        return full_disk(sweep)
    if what == "controller":
        for verb in ("crash", "up"):
            command = [kill.SCRIPT, verb, sweep.workdir.parents[1] / "slurm"]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=120)
            time.sleep(5)
        return what
    there = sweep.workers()
    if not there:
        return ""
    cell = rng.choice(sorted(there))
    return to_a_worker(sweep, rng, what, cell, there[cell])


def to_a_worker(sweep: Sweep, rng: random.Random, what: str, cell: str, pid: int) -> str:
    """Does one thing to the process that has a cell."""
    with contextlib.suppress(ProcessLookupError):
        if what == "asked":
            os.kill(pid, rng.choice((signal.SIGTERM, signal.SIGUSR1)))
        elif what == "stopped":
            os.kill(pid, signal.SIGSTOP)
            sweep.asleep.append((time.monotonic() + 1.5 * LEASE, pid))
        elif what == "requeue":
            job = read_json(sweep.workdir / "launch.json")["commands"][cell]["id"].split("@")[0]
            done = subprocess.run(["scontrol", "requeue", job], capture_output=True, timeout=60)
            return what if done.returncode == 0 else ""
        elif not kill.kill(pid, session=what == "session"):
            return ""
        elif what == "damage":
            return damage(sweep.workdir / cell, rng)
        elif what == "torn":
            with open(sweep.workdir / cell / "rows.jsonl", "ab") as file:
                file.write(b'{"study":"tiny","cell":"')
        return what
    return ""


def damage(cell: Path, rng: random.Random) -> str:
    """Changes one file of a cell's newest checkpoint, if there is one before it."""
    steps = sealed_steps(cell / "checkpoints")
    if len(steps) < 2:
        return "worker"
    files = [p for p in (cell / "checkpoints" / str(steps[-1])).rglob("*") if tiny.size(p)]
    path = rng.choice(sorted(p for p in files if p.is_file()))
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(rng.choice((data, data[: len(data) // 2], b"")))
    return "damage"


def full_disk(sweep: Sweep) -> str:
    """Leaves no room until the runner has given up, or for half a minute."""
    disk = sweep.workdir.parent
    used = shutil.disk_usage(disk).used
    mount(disk, f"remount,size={used + 4096}")
    try:
        with contextlib.suppress(subprocess.TimeoutExpired):
            sweep.runner.wait(30)
    finally:
        mount(disk, f"remount,{LARGE}")
    return "disk"


def mount(folder: Path, options: str) -> bool:
    command = ["mount", "-t", DISK, "-o", options, DISK, str(folder)]
    return subprocess.run(command, capture_output=True).returncode == 0


@contextlib.contextmanager
def disk(folder: Path) -> Iterator[bool]:
    """A file system of its own while the block runs, if one can be mounted."""
    folder.mkdir(parents=True, exist_ok=True)
    mounted = mount(folder, LARGE)
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "-l", folder], check=True)


def disturb(sweep: Sweep, rng: random.Random, every: float, kinds: dict[str, int]) -> None:
    """Carries a sweep out, whatever happens to it."""
    begun = time.monotonic()
    following = begun + every
    try:
        while True:
            assert time.monotonic() - begun < LIMIT, f"not done within {LIMIT:.0f} s"
            sweep.wake()
            if sweep.runner.poll() == 0:
                return
            if sweep.runner.poll() is not None:
                sweep.runner = sweep.start()
            if time.monotonic() > following:
                following = time.monotonic() + every * (0.5 + rng.random())
                if what := one_fault(sweep, rng, kinds):
                    sweep.done[what] += 1
                    print(f"{time.monotonic() - begun:6.0f} s  {what}", flush=True)
            time.sleep(0.1)
    finally:
        sweep.wake(all_of_them=True)
        if sweep.runner.poll() is None:
            sweep.runner.kill()
        kill.cancel(sweep.workdir)


def soak(args: argparse.Namespace, how: str, study: Path, wanted: dict[str, object]) -> bool:
    """One disturbed sweep; whether it came out as it must."""
    shutil.rmtree(args.workdir / f"disk-{how}", ignore_errors=True)
    with disk(args.workdir / f"disk-{how}") as mounted:
        if not mounted:
            print("no file system can be mounted here: the disk is never full", flush=True)
        workdir = args.workdir / f"disk-{how}" / "run"
        settings = settings_of(args)
        begun = time.monotonic()
        sweep = Sweep(study, workdir, how, settings)
        disturb(sweep, random.Random(args.seed), args.every, kinds_of(how, args.kinds, mounted))
        found = kill.verify(workdir)
        status = kill.ask("status", workdir)
        noticed = sum(c["events"].get("checkpoint_quarantined", 0) for c in status["cells"])
    same, goodput = found == wanted, status["goodput"]
    words = ", ".join(f"{count} {what}" for what, count in sorted(sweep.done.items()))
    attempts = sum(cell["attempts"] for cell in status["cells"])
    print(
        f"{how}: {'same table and parameters' if same else 'DIFFERS'}; {sweep.done.total()} faults"
        f" ({words}) in {time.monotonic() - begun:.0f} s; {attempts} attempts at"
        f" {len(CELLS)} cells; {noticed} of {sweep.done['damage']} damaged checkpoints noticed;"
        f" goodput {goodput:.2f}",
        flush=True,
    )
    return same and noticed >= sweep.done["damage"] and goodput >= args.goodput


def settings_of(args: argparse.Namespace) -> tuple[str, ...]:
    """A checkpoint every twentieth of a cell; dispatches of 50 steps."""
    return (
        f"--config.train.tokens={args.steps * 8 * 32}",
        "--config.train.chunk=50",
        f"--config.train.checkpoint_every={max(50, args.steps // 20)}",
    )


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--workdir", type=Path, required=True, help="a folder of its own")
    parser.add_argument("--how", action="append", choices=("local", "slurm"), help="both")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", default="", help="only these faults, such as worker,session")
    parser.add_argument("--every", type=float, default=20.0, help="seconds from fault to fault")
    parser.add_argument("--steps", type=int, default=6000, help="of each cell")
    parser.add_argument("--goodput", type=float, default=GOODPUT, help="at least")
    args = parser.parse_args()
    if unknown := set(filter(None, args.kinds.split(","))) - set(SLURM):
        parser.error(f"{', '.join(sorted(unknown))}: the faults are {', '.join(SLURM)}")
    args.workdir = args.workdir.absolute()
    study = args.workdir / "study" / "tiny.py"
    if not study.exists():
        text = tiny.write_study(study.parent).read_text()
        assert TWO in text
        study.write_text(text.replace(TWO, TWELVE))
    os.environ["ONSET_LEASE"] = str(LEASE)
    began = time.monotonic()
    finished = args.workdir / "finished"
    code = kill.run(study, finished, "local", *settings_of(args)).wait(LIMIT)
    assert code == 0, (
        f"see {finished}.log; an earlier soak with other settings needs another folder"
    )
    wanted = kill.verify(finished)
    useful = kill.ask("status", finished)["goodput"]
    print(f"undisturbed: {time.monotonic() - began:.0f} s, goodput {useful:.2f}", flush=True)
    good = True
    for how in args.how or ("local", "slurm"):
        if how == "slurm" and (why := without_slurm()):
            print(f"not on Slurm: {why}", flush=True)
            continue
        place = kill.cluster(args.workdir / "slurm") if how == "slurm" else contextlib.nullcontext()
        with place:
            good = soak(args, how, study, wanted) and good
    return 0 if good else 1


def without_slurm() -> str:
    """Why there can be no Slurm here; empty if there can."""
    if os.getuid():
        return "a test cluster needs root"
    missing = [p for p in ("slurmctld", "slurmd", "sbatch", "munged") if not shutil.which(p)]
    return f"{', '.join(missing)} not installed (.ci/run does that)" if missing else ""


if __name__ == "__main__":
    sys.exit(main())
