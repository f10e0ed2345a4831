"""The batch script: its text, what a plain bash makes of it when signals come, and the settings.

S1, S2 … are the traps that running a real Slurm showed.
"""

import functools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import until

from launch import Command
from launch.slurm_script import Settings, script
from lm.config import UserError, build

GOLDEN = """#!/bin/bash
#SBATCH --job-name=onset-0123456789ab
#SBATCH --array=0-1%4
#SBATCH --nodes=2
#SBATCH --ntasks=4
#SBATCH --ntasks-per-node=2
#SBATCH --cpus-per-task=8
#SBATCH --gpus-per-node=2
#SBATCH --mem=64G
#SBATCH --time=240
#SBATCH --partition=long
#SBATCH --account=lab
#SBATCH --qos=normal
#SBATCH --constraint=a100|h100
#SBATCH --signal=B:USR1@300
#SBATCH --open-mode=append
#SBATCH --requeue
"""
CASES = """case $index in
0)
  exec >>'/runs/a b/logs/w.log' 2>&1
  export NPROC=1
  exec srun --kill-on-bad-exit=1 --nodes=2 --ntasks=4 --cpus-per-task=8 python -m worker '$(x)' ;;
1)
  exec >>'/runs/a b/logs/w.log' 2>&1
  exec srun --kill-on-bad-exit=1 --nodes=2 --ntasks=4 --cpus-per-task=8 echo ';' '
#SBATCH --nodes=9' ;;
*) exit 2 ;;
esac
"""


def test_the_script_is_what_it_was():
    """Catches an option that is lost or moved below the first command, where Slurm ignores it, an
    unquoted word, and a multi-process command whose ranks do not end together (S12).
    """
    settings = Settings(
        partition="long",
        account="lab",
        qos="normal",
        constraint="a100|h100",
        memory="64G",
        time=240,
        lead=300,
        cpus=8,
        gpus=2,
        nodes=2,
        at_once=4,
    )
    log = Path("/runs/a b/logs/w.log")
    commands = [
        Command(("python", "-m", "worker", "$(x)"), log, {"NPROC": "1"}, processes=4),
        Command(("echo", ";", "\n#SBATCH --nodes=9"), log, processes=4),
    ]
    text = script(commands, settings, Path("/runs/a b/logs/onset-0123456789ab"))
    assert text.startswith(GOLDEN + "\n")
    assert CASES in text and "folder='/runs/a b/logs/onset-0123456789ab'\n" in text
    plain = script([Command(("true",), log)], Settings(), Path("/r/onset-0123456789ab"))
    assert "srun" not in plain and "--array=0-0\n" in plain and "--time" not in plain
    # Before the first command there are only options: then come the traps, before all else.
    assert text[len(GOLDEN) :].lstrip().startswith("asked=")
    assert text.index("trap ") < text.index("folder=") < text.index("case $index")


def test_no_word_reaches_the_shell_unquoted(tmp_path):
    """Catches a word of a command, a path or a variable that the shell reads as its own."""
    nasty = [
        "a b",
        "$HOME",
        "`id`",
        "$(id)",
        "'",
        '"',
        "\\",
        ";id",
        "\n#SBATCH --x",
        "*",
        "-rf",
        "",
    ]
    show = "import json, os, sys; print(json.dumps([sys.argv[1:], os.environ['NASTY']]))"
    for text in nasty:
        folder = tmp_path / "it's $(x) ; *"
        log = folder / "out.log"
        log.unlink(missing_ok=True)
        one = Command((sys.executable, "-c", show, text, "end"), log, {"NASTY": text})
        done, _ = batch([one], folder)
        assert done.returncode == 0, done.stderr
        assert json.loads(log.read_text()) == [[text, "end"], text]


def batch(
    commands,
    folder: Path,
    signals=(),
    index: int = 0,
    scontrol: str = "exit 0",
    setup: str = "",
    **env: str,
):
    """Runs the script as Slurm would, with a `scontrol` in its PATH; signals are (when, which,
    whom): "shell" alone or "all" processes. Returns how it ended and the code file's text.
    """
    place = folder / "onset-0123456789ab"
    (folder / "bin").mkdir(parents=True, exist_ok=True)
    place.mkdir(exist_ok=True)
    program = folder / "bin" / "scontrol"
    program.write_text(f"#!/bin/bash\necho \"$@\" >>'{folder.parent}/requeued'\n{scontrol}\n")
    program.chmod(0o755)
    (folder / "batch.sh").write_text(script(commands, Settings(setup=setup), place))
    process = subprocess.Popen(
        ["bash", folder / "batch.sh"],
        env=os.environ
        | {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}"}
        | {"SLURM_ARRAY_TASK_ID": str(index), "SLURM_ARRAY_JOB_ID": "4711", "SLURM_JOB_ID": "4711"}
        | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    for ready, number, whom in signals:
        until(ready)
        (os.killpg if whom == "all" else os.kill)(process.pid, number)
    out, err = process.communicate(timeout=60)
    written = place / f"{index}.code"
    text = written.read_text() if written.exists() else ""
    return subprocess.CompletedProcess(process.args, process.returncode, out, err), text


WORKER = """
import signal, sys, time
def stop(n, f):
    print("asked", n, flush=True)
    asked.append(n)
asked = []
for n in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(n, stop)
print("up", flush=True)
while not asked:
    time.sleep(0.01)
time.sleep(0.2)
sys.exit(75)
"""


def worker(folder: Path, program: str = WORKER) -> tuple[Command, object]:
    log = folder / "out.log"
    ready = lambda: log.exists() and "up\n" in log.read_text()  # noqa: E731
    return Command((sys.executable, "-c", program), log), ready


def requeued(tmp_path: Path) -> list[str]:
    file = tmp_path / "requeued"
    return file.read_text().splitlines() if file.exists() else []


def test_a_warning_stops_the_command_and_puts_the_job_back(tmp_path):
    """Catches a warning that ends the shell and not the command, and S3's lost exit code."""
    one, ready = worker(tmp_path / "a")
    done, text = batch([one], tmp_path / "a", [(ready, signal.SIGUSR1, "shell")])
    assert (done.returncode, text) == (75, "75\n")
    assert one.log.read_text() == "up\nasked 10\n"
    assert requeued(tmp_path) == ["requeue 4711_0"]  # never 4711 alone: that is the whole array


def test_ended_by_slurm_is_not_put_back_by_the_script(tmp_path):
    """Catches a script that revives a cancelled job (S7: the command stops at SIGTERM, too), or
    sends what Slurm sends to every process a second time.
    """
    one, ready = worker(tmp_path / "a")
    done, text = batch([one], tmp_path / "a", [(ready, signal.SIGTERM, "all")])
    assert (done.returncode, text) == (75, "75\n") and requeued(tmp_path) == []
    assert one.log.read_text() == "up\nasked 15\n"


def test_the_end_after_a_warning(tmp_path):
    """Catches a job that Slurm ends within the lead, by the user's wish or at the limit, and the
    script puts back; and a script that ends with the signal instead of with its command.
    """
    slow = WORKER.replace("time.sleep(0.2)", "time.sleep(1)")
    one, ready = worker(tmp_path / "a", slow)
    asked = lambda: "asked 10" in one.log.read_text()  # noqa: E731
    signals = [(ready, signal.SIGUSR1, "shell"), (asked, signal.SIGTERM, "all")]
    done, text = batch([one], tmp_path / "a", signals)
    assert (done.returncode, text) == (75, "75\n") and requeued(tmp_path) == []
    one, ready = worker(tmp_path / "b", slow.replace("exit(75)", "exit(3)"))
    done, text = batch([one], tmp_path / "b", [(ready, signal.SIGTERM, "all")])
    assert (done.returncode, text) == (3, "3\n")


def test_a_warning_before_the_command_listens(tmp_path):
    """Catches S3: a command that dies of the signal it was asked with has not failed."""
    one, ready = worker(tmp_path / "a", "import time; print('up', flush=True); time.sleep(60)")
    done, text = batch([one], tmp_path / "a", [(ready, signal.SIGUSR1, "shell")])
    assert (done.returncode, text) == (75, "75\n") and len(requeued(tmp_path)) == 1
    # All processes at once: where `wait` gave the code, it was -1 in one case of three.
    for i in range(8):
        sleep = "echo up; exec sleep 60"
        one = Command(("sh", "-c", sleep), tmp_path / f"b{i}" / "out.log")
        ready = functools.partial(lambda log: log.exists() and log.read_text(), one.log)
        done, text = batch([one], tmp_path / f"b{i}", [(ready, signal.SIGTERM, "all")])
        assert (done.returncode, text) == (75, "75\n") and len(requeued(tmp_path)) == 1


def test_a_warning_before_there_is_a_command(tmp_path):
    """Catches a warning that comes while the script is starting, and is lost or is no more than
    asking: then the command works on until it is killed.
    """
    one, _ = worker(tmp_path / "a")
    setup = tmp_path / "setup.sh"
    setup.write_text(f"touch '{tmp_path}/here'; sleep 0.5\n")
    here = (tmp_path / "here").exists
    done, text = batch([one], tmp_path / "a", [(here, signal.SIGUSR1, "shell")], setup=str(setup))
    assert (done.returncode, text) == (75, "75\n") and len(requeued(tmp_path)) == 1


def test_requeue_survives_the_end_it_causes(tmp_path):
    """Catches S6: the SIGTERM of the requeue reaches scontrol itself."""
    one, ready = worker(tmp_path / "a")
    hit = f"kill -TERM $$ $PPID; echo survived >>'{tmp_path}/requeued'"
    done, text = batch([one], tmp_path / "a", [(ready, signal.SIGUSR1, "shell")], scontrol=hit)
    assert text == "75\n" and requeued(tmp_path) == ["requeue 4711_0", "survived"]


def test_what_is_not_put_back(tmp_path):
    """Catches a requeue after the user has cancelled, after the last of the allowed ones, and of a
    command that ended with 75 without having been asked; and one that gives up at the first error.
    """
    one, ready = worker(tmp_path / "a")
    marker = tmp_path / "a" / "onset-0123456789ab" / "0.cancelled"
    marker.parent.mkdir(parents=True)
    marker.touch()
    warn = [(ready, signal.SIGUSR1, "shell")]
    assert batch([one], tmp_path / "a", warn)[1] == "75\n" and requeued(tmp_path) == []
    one, ready = worker(tmp_path / "b")
    warn = [(ready, signal.SIGUSR1, "shell")]
    batch([one], tmp_path / "b", warn, SLURM_RESTART_COUNT="1000")
    assert requeued(tmp_path) == []
    alone = Command(("sh", "-c", "exit 75"), tmp_path / "c" / "out.log")
    assert batch([alone], tmp_path / "c")[1] == "75\n" and requeued(tmp_path) == []
    one, ready = worker(tmp_path / "d")
    warn = [(ready, signal.SIGUSR1, "shell")]
    twice = "[ $(wc -l <'{}') -gt 1 ]".format(tmp_path / "requeued")
    batch([one], tmp_path / "d", warn, scontrol=twice)
    assert len(requeued(tmp_path)) == 2


def test_codes_of_the_script(tmp_path):
    """Catches S8, a command that is killed and not noticed, a code of an earlier start that stays,
    an index without a command, and a job whose submission was given up.
    """
    log = tmp_path / "a" / "out.log"
    ends = [Command(("sh", "-c", x), log) for x in ("exit 3", "kill -9 $$", "exit 0")]
    assert [batch(ends, tmp_path / "a", index=i)[1] for i in range(3)] == ["3\n", "137\n", "0\n"]
    missing = Command(("/no/such/program",), log)
    assert batch([missing], tmp_path / "a")[1] == "127\n" and "/no/such" in log.read_text()
    assert batch(ends, tmp_path / "a", index=7)[1] == "2\n"
    stale = tmp_path / "b" / "onset-0123456789ab" / "0.code"
    seen = Command(("test", "!", "-e", str(stale)), tmp_path / "b" / "out.log")
    stale.parent.mkdir(parents=True)
    stale.write_text("75\n")
    assert batch([seen], tmp_path / "b")[1] == "0\n"
    ghost = tmp_path / "c"
    text = script(ends[2:], Settings(), ghost / "onset-0123456789ab")
    done = subprocess.run(
        ["bash", "-c", text], env=os.environ | {"SLURM_ARRAY_TASK_ID": "0"}, timeout=30
    )
    assert done.returncode == 2 and not ghost.exists()


def test_setup_is_read_before_the_command(tmp_path):
    """Catches a setup file that is pasted instead of read, or read too late."""
    setup = tmp_path / "it's.sh"
    setup.write_text("export FROM_SETUP=yes\n")
    text = script([Command(("true",), tmp_path / "a.log")], Settings(setup=str(setup)), tmp_path)
    line = next(x for x in text.splitlines() if x.startswith(". "))
    shown = subprocess.run(
        ["bash", "-c", f"{line}\necho $FROM_SETUP"], capture_output=True, text=True, timeout=30
    )
    assert shown.stdout == "yes\n"
    assert text.index("trap") < text.index(line) < text.index("case $index")


@pytest.mark.parametrize(
    "wrong",
    [
        {"partition": "a b"},
        {"partition": "-rf"},
        {"account": "x\n#SBATCH --uid=0"},
        {"account": "$(id)"},
        {"qos": "a" * 200},
        {"constraint": "a;b"},
        {"constraint": "-x"},
        {"memory": "16 G"},
        {"memory": "-1"},
        {"time": -1},
        {"time": 3},  # the warning may come at once
        {"lead": 0},
        {"lead": 100_000},
        {"cpus": 0},
        {"nodes": 0},
        {"requeues": -1},
        {"setup": "/no/such/file"},
        {"partitoin": "main"},
        {"cpus": "many"},
    ],
    ids=str,
)
def test_settings_are_refused_in_a_sentence(wrong):
    """Catches what a scheduler would take for an option or refuse after the data were prepared."""
    with pytest.raises(UserError) as error:
        build(Settings, wrong, "where")
    assert str(error.value).startswith("where") and next(iter(wrong)) in str(error.value)
