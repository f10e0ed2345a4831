"""The Slurm engine on a real Slurm: a controller and two nodes on this machine.

`launch/slurm_test_cluster.sh` starts it; without root, or where Slurm is not installed, these tests
skip and say so. The commands are a toy worker: it counts to a number, keeps the count in a file,
and stops with 75 when it is asked to. One is a quick test, and one only: two of them
at a time, on two workers of pytest, would be two clusters.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny import CELLS, params, rows, size, start, unfinished, until, write_study

from launch import Command, slurm
from lm.rundir import read_json

SCRIPT = Path(__file__).parents[1] / "launch" / "slurm_test_cluster.sh"
MISSING = [p for p in ("slurmctld", "slurmd", "sbatch", "munged") if not shutil.which(p)]
pytestmark = [
    pytest.mark.skipif(os.getuid() != 0, reason="a test cluster of Slurm needs root"),
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}"),
]
TOY = """
import os, signal, sys, time
from pathlib import Path
folder, steps = Path(sys.argv[1]), int(sys.argv[2])
rank = os.environ.get("SLURM_PROCID", "0")
asked = []
for number in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(number, lambda n, _: asked.append(n))
count = folder / f"count.{rank}"
done = int(count.read_text()) if count.exists() else 0
with open(folder / f"attempts.{rank}", "a") as file:
    file.write(f"{done} {os.getpid()}\\n")
while done < steps:
    time.sleep(0.1)
    done += 1
    count.with_suffix(".new").write_text(str(done))
    count.with_suffix(".new").rename(count)
    if asked:
        print("asked by", asked, "at", done, flush=True)
        sys.exit(75)
sys.exit(int(os.environ.get("TOY_CODE", "0")))
"""


def cluster(verb: str, folder: Path, **more: str) -> str:
    done = subprocess.run(
        [SCRIPT, verb, folder],
        env=os.environ | more,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """The folder of a running cluster; SLURM_CONF is set."""
    folder = tmp_path_factory.mktemp("slurm")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", f"{folder}/slurm.conf")
        patch.setenv("PORT", str(20000 + free_port() % 10000))
        try:
            cluster("up", folder)
            yield folder
        finally:
            cluster("down", folder)
    assert not folder.exists()


@pytest.fixture(autouse=True)
def healed(root):
    """Every test begins with an empty queue and all nodes up."""
    cluster("up", root)
    yield
    run("scancel", "--user=root")
    until(lambda: not run("squeue", "--noheader"), 30)


def run(*argv: object) -> str:
    done = subprocess.run(
        [str(a) for a in argv], capture_output=True, text=True, timeout=30, check=True
    )
    return done.stdout


def toy(folder: Path, steps: int, processes: int = 1, **env: str) -> Command:
    folder.mkdir(parents=True, exist_ok=True)
    (folder.parent / "toy.py").write_text(TOY)
    argv = (sys.executable, str(folder.parent / "toy.py"), str(folder), str(steps))
    log = folder.parent / "logs" / f"{folder.name}.log"
    return Command(argv, log, env, folder.name, processes)


def attempts(folder: Path, rank: int = 0) -> list[list[int]]:
    """(count, pid) of every start."""
    file = folder / f"attempts.{rank}"
    return [[int(x) for x in line.split()] for line in read(file).splitlines()]


def read(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def count(folder: Path) -> int:
    return int(read(folder / "count.0") or 0)


def ended(ids, settings, seconds: float = 60.0):
    """The states once none waits or runs any more."""

    def look():
        found = slurm.status(ids, settings)
        return None if {"waiting", "running"} & {s.state for s in found} else found

    return until(look, seconds)


def only(ids, settings):
    (state,) = slurm.status(ids, settings)
    return state


def test_an_array_with_every_kind_of_end(tmp_path):
    """Catches a lost exit code, output or environment, and an array that runs more than it may."""
    settings = slurm.Settings(at_once=2, cpus=1)
    commands = [toy(tmp_path / "good", 5)]
    commands += [toy(tmp_path / f"code{code}", 1, TOY_CODE=str(code)) for code in (2, 3)]
    commands += [toy(tmp_path / "killed", 1000)]
    ids = slurm.submit(commands, settings)
    until(lambda: slurm.status(ids, settings)[3].state == "running" and count(tmp_path / "killed"))
    os.kill(attempts(tmp_path / "killed")[0][1], signal.SIGKILL)
    found = ended(ids, settings)
    assert [s.state for s in found] == ["done", "failed", "failed", "failed"]
    assert [s.code for s in found] == [0, 2, 3, -9]
    assert len(attempts(tmp_path / "killed")) == 1  # Slurm starts nothing again that failed


@pytest.mark.slow
def test_the_time_limit(tmp_path):
    """Catches a warning that does not reach the command, a job that is not put back, and one that
    is put back for ever.
    """
    settings = slurm.Settings(time=2, lead=55)
    ids = slurm.submit([toy(tmp_path / "a", 1000)], settings)
    until(lambda: len(attempts(tmp_path / "a")) == 2, 180)
    again = attempts(tmp_path / "a")[1][0]
    assert 0 < again < 1000 and only(ids, settings).state == "running"
    assert "asked by [10]" in read(tmp_path / "logs" / "a.log")


@pytest.mark.slow
def test_a_warning_puts_the_last_task_back_and_no_other(tmp_path):
    """Catches `scontrol requeue ARRAY`: the last task's own number is that of the whole array."""
    settings = slurm.Settings()
    ids = slurm.submit([toy(tmp_path / n, 100) for n in "ab"], settings)
    until(lambda: count(tmp_path / "a") and count(tmp_path / "b"))
    job = ids[1].partition("_")[0]
    run("scancel", "--batch", "--signal=USR1", f"{job}_1")
    until(lambda: only(ids[1:], settings).state == "waiting")
    assert only(ids[:1], settings).state == "running"
    assert [s.state for s in ended(ids, settings)] == ["done", "done"]
    assert len(attempts(tmp_path / "a")) == 1 and len(attempts(tmp_path / "b")) == 2
    assert attempts(tmp_path / "b")[1][0] > 0  # it went on where it was


@pytest.mark.slow
def test_cancel(tmp_path):
    """Catches a cancelled command that Slurm puts back, or that had no time for a checkpoint."""
    settings = slurm.Settings(cpus=2)  # two of the four run, on one node each
    ids = slurm.submit([toy(tmp_path / n, 1000) for n in "abcd"], settings)
    until(lambda: count(tmp_path / "a") and count(tmp_path / "b"))
    states = [s.state for s in slurm.status(ids, settings)]
    assert states == ["running", "running", "waiting", "waiting"]
    slurm.cancel(ids, settings, grace=20)
    found = ended(ids, settings, 20)
    assert [(s.state, s.code) for s in found] == [("failed", 75)] * 2 + [("failed", None)] * 2
    assert [s.why for s in found[2:]] == ["cancelled"] * 2
    time.sleep(12)  # cred_expire: what was put back would start now
    assert not run("squeue", "--noheader") and not (tmp_path / "c" / "count.0").exists()
    assert "asked by [10]" in read(tmp_path / "logs" / "a.log")


@pytest.mark.slow
def test_scancel_by_hand_is_not_undone(tmp_path):
    """Catches a script that puts back what the user has cancelled."""
    settings = slurm.Settings()
    ids = slurm.submit([toy(tmp_path / "a", 1000)], settings)
    until(lambda: count(tmp_path / "a"))
    run("scancel", ids[0].partition("@")[0])
    (state,) = ended(ids, settings)
    assert (state.state, state.code) == ("failed", None) and "CANCELLED" in state.why
    time.sleep(12)
    assert len(attempts(tmp_path / "a")) == 1


@pytest.mark.slow
def test_preemption(tmp_path):
    """Catches a preempted job that counts as done or failed, or begins at 0 again."""
    settings = slurm.Settings(cpus=2)
    ids = slurm.submit([toy(tmp_path / n, 150) for n in "ab"], settings)
    until(lambda: count(tmp_path / "a") > 5 and count(tmp_path / "b") > 5)
    urgent = slurm.Settings(cpus=2, partition="urgent")
    other = slurm.submit([toy(tmp_path / "urgent", 20)], urgent)
    until(lambda: "waiting" in [s.state for s in slurm.status(ids, settings)], 30)
    assert [s.state for s in ended(other, urgent)] == ["done"]
    assert [s.state for s in ended(ids, settings, 90)] == ["done", "done"]
    starts = [attempts(tmp_path / n) for n in "ab"]
    assert sorted(map(len, starts)) == [1, 2]
    assert max(starts, key=len)[1][0] > 5


@pytest.mark.slow
def test_preemption_with_notice(tmp_path):
    """Catches a command that is not told when its grace begins, and one that is put back twice."""
    settings = slurm.Settings(cpus=2, nodes=1, partition="polite")
    ids = slurm.submit([toy(tmp_path / n, 100) for n in "ab"], settings)
    until(lambda: count(tmp_path / "a") > 5 and count(tmp_path / "b") > 5)
    urgent = slurm.Settings(cpus=2, partition="urgent")
    other = slurm.submit([toy(tmp_path / "urgent", 20)], urgent)
    began = time.monotonic()
    assert [s.state for s in ended(other, urgent)] == ["done"]
    assert time.monotonic() - began < 15  # GraceTime is 20: it was told, and made room at once
    assert [s.state for s in ended(ids, settings, 90)] == ["done", "done"]
    assert sorted(len(attempts(tmp_path / n)) for n in "ab") == [1, 2]
    logs = read(tmp_path / "logs" / "a.log") + read(tmp_path / "logs" / "b.log")
    assert logs.count("asked by [10]") == 1


@pytest.mark.slow
def test_a_lost_node(tmp_path):
    """Catches a NODE_FAIL that is taken for the command's own end."""
    settings = slurm.Settings(cpus=1)
    ids = slurm.submit([toy(tmp_path / "a", 60)], settings)
    until(lambda: count(tmp_path / "a") > 5)
    node = run("squeue", "--noheader", "-o", "%N").strip()
    run("scontrol", "update", f"nodename={node}", "state=down", "reason=test")
    assert until(lambda: only(ids, settings).state != "running", 30)
    assert only(ids, settings).state == "waiting"
    assert ended(ids, settings)[0].state == "done"
    assert len(attempts(tmp_path / "a")) == 2 and attempts(tmp_path / "a")[1][0] > 5


@pytest.mark.slow
def test_a_controller_that_is_away_and_one_that_forgot(root, tmp_path):
    """Catches `gone` while nobody could have said so, and a wait for ever when Slurm has lost a
    job; also one that takes a stranger's job for its own because of the number.
    """
    settings = slurm.Settings()
    quick, slow = toy(tmp_path / "quick", 1), toy(tmp_path / "slow", 1000)
    ids = slurm.submit([quick, slow], settings)
    until(lambda: slurm.status(ids, settings)[0].state == "done" and count(tmp_path / "slow"))
    cluster("crash", root)
    began = time.monotonic()
    away = slurm.status(ids, settings)
    assert [s.state for s in away] == ["done", "running"] and "squeue" in away[1].why
    assert time.monotonic() - began < 35
    for file in (root / "state").glob("job_state*"):
        file.unlink()
    # Numbers begin again where the first cluster began: a stranger gets ours.
    conf = (root / "slurm.conf").read_text()
    first = int(ids[0].partition("_")[0])
    lines = [x for x in conf.splitlines() if not x.startswith("FirstJobId")]
    (root / "slurm.conf").write_text("\n".join([*lines, f"FirstJobId={first}", ""]))
    (root / "state" / "last_config_lite").unlink(missing_ok=True)
    cluster("controller", root)
    other = slurm.submit([toy(tmp_path / "other", 1000), toy(tmp_path / "second", 1000)], settings)
    assert [s.state for s in slurm.status(ids, settings)] == ["done", "gone"]
    slurm.cancel(ids, settings, grace=0)
    assert "gone" not in [s.state for s in slurm.status(other, settings)]
    until(lambda: count(tmp_path / "other"), 60)
    assert other[0].partition("@")[0] == ids[0].partition("@")[0]


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_two_processes_end_together(tmp_path, rank):
    """Catches a rank that outlives the other one, and a warning that does not reach both."""
    settings = slurm.Settings(nodes=2)
    ids = slurm.submit([toy(tmp_path / "a", 1000, processes=2)], settings)
    until(lambda: attempts(tmp_path / "a", 0) and attempts(tmp_path / "a", 1), 30)
    pids = [attempts(tmp_path / "a", r)[0][1] for r in (0, 1)]
    os.kill(pids[rank], signal.SIGKILL)
    began = time.monotonic()
    (state,) = ended(ids, settings, 30)
    assert state.state == "failed" and state.code == -9
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
    assert time.monotonic() - began < 30


@pytest.mark.slow
def test_two_processes_are_asked_to_stop(tmp_path):
    """Catches srun keeping the warning for itself."""
    settings = slurm.Settings(nodes=2)
    ids = slurm.submit([toy(tmp_path / "a", 60, processes=2)], settings)
    until(lambda: attempts(tmp_path / "a", 0) and attempts(tmp_path / "a", 1), 30)
    run("scancel", "--batch", "--signal=USR1", ids[0].partition("@")[0])
    until(lambda: only(ids, settings).state == "waiting", 30)
    assert ended(ids, settings)[0].state == "done"
    assert [len(attempts(tmp_path / "a", r)) for r in (0, 1)] == [2, 2]


@pytest.mark.slow
def test_a_study_by_the_real_worker(tmp_path, monkeypatch):
    """Catches a worker that a job cannot stop, resume or finish: two cells, each warned in the
    middle and put back, give the bits of an undisturbed run.
    """
    monkeypatch.delenv("XLA_FLAGS", raising=False)  # sbatch hands the environment on
    study = write_study(tmp_path / "study")
    local = start("run", study, f"--workdir={tmp_path / 'local'}")
    out, err = local.communicate(timeout=300)
    assert local.returncode == 0, out + err
    workdir = unfinished(tmp_path / "local", tmp_path / "slurm", *CELLS)
    settings = slurm.Settings()
    python = (sys.executable, "-m", "experiments.worker", str(workdir))
    commands = [
        Command((*python, "--cells", name), workdir / "logs" / f"{name}.log", {"NPROC": "1"}, name)
        for name in CELLS
    ]
    ids = slurm.submit(commands, settings)
    for identity, name in zip(ids, CELLS, strict=True):
        until(lambda name=name: size(workdir / name / "rows.jsonl"), 120)
        run("scancel", "--batch", "--signal=USR1", identity.partition("@")[0])
    logs = [read(c.log) for c in commands]
    assert [(s.state, s.code) for s in ended(ids, settings, 180)] == [("done", 0)] * 2, logs
    for name in CELLS:
        assert rows(workdir / name) == rows(tmp_path / "local" / name)
        assert params(workdir / name) == params(tmp_path / "local" / name)
    again = [len(read_json(workdir / name / "environment.json")) for name in CELLS]
    print("attempts", again)
