"""The local engine: states, logs, environments, the end of whole sessions, and a new launcher."""

import os
import subprocess
import sys
import time

from launch import Command, local

FOREVER = "import time; time.sleep(60)"


def command(tmp_path, code: str, **env: str) -> Command:
    return Command((sys.executable, "-c", code), tmp_path / "logs" / "out.log", env)


def wait_for(condition, seconds: float = 20.0) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.02)
    return False


def states(ids: list[str]) -> list[str]:
    return [status.state for status in local.status(ids)]


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    return local.started(pid) != ""


def log(tmp_path) -> str:
    path = tmp_path / "logs" / "out.log"
    return path.read_text() if path.exists() else ""


def test_states_and_logs(tmp_path):
    """Catches an exit code that is lost, a log that is overwritten, a shared session."""
    good = command(tmp_path, "import os; print(os.environ['NPROC'], os.getsid(0))", NPROC="1")
    bad = command(tmp_path, "import sys; print('oh', file=sys.stderr); sys.exit(3)")
    ids = local.submit([good])
    assert wait_for(lambda: states(ids) == ["done"])
    ids += local.submit([bad])
    assert wait_for(lambda: states(ids) == ["done", "failed"])
    assert [status.code for status in local.status(ids)] == [0, 3]
    first, second = log(tmp_path).splitlines()  # the second command has appended
    assert first.split()[0] == "1" and second == "oh"
    assert first.split()[1] == ids[0].split(":")[0] != str(os.getsid(0))


def test_arguments_reach_the_command_as_they_are(tmp_path):
    """Catches an argument that the shell reads: quotes, variables, a line break, an option."""
    words = ("a b", "$HOME", "'", '"', "`id`", "x\ny", "-rf", "*", "")
    code = "import sys; print(sys.argv[1:])"
    whole = Command((sys.executable, "-c", code, *words), tmp_path / "logs" / "out.log")
    ids = local.submit([whole])
    assert wait_for(lambda: states(ids) == ["done"]) and log(tmp_path) == f"{list(words)}\n"


def test_cancel_lets_a_process_end_itself(tmp_path):
    """Catches a shell that dies of the signal before it has the exit code."""
    code = (
        "import signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: (print('ended'), sys.exit(75)))\n"
        "print('up', flush=True); time.sleep(60)\n"
    )
    ids = local.submit([command(tmp_path, code)])
    assert wait_for(lambda: log(tmp_path) == "up\n") and states(ids) == ["running"]
    local.cancel(ids)
    (status,) = local.status(ids)
    assert (status.state, status.code) == ("failed", 75) and log(tmp_path) == "up\nended\n"


def test_cancel_kills_what_does_not_listen_and_its_children(tmp_path):
    """Catches a child that outlives its session."""
    code = (
        "import signal, subprocess, sys, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        # What is ignored stays ignored in the child.
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "print(child.pid, flush=True); time.sleep(60)\n"
    )
    ids = local.submit([command(tmp_path, code)])
    assert wait_for(lambda: log(tmp_path).endswith("\n"))
    child = int(log(tmp_path))
    assert alive(child)
    local.cancel(ids, grace=0.2)
    (status,) = local.status(ids)
    assert (status.state, status.code) == ("failed", -9)
    assert wait_for(lambda: not alive(child))


def test_cancel_of_what_has_ended_does_nothing(tmp_path):
    """Catches a signal to a number that somebody else may have by now."""
    ids = local.submit([command(tmp_path, "")])
    assert wait_for(lambda: states(ids) == ["done"])
    local.cancel(ids)
    assert states(ids) == ["done"]


def test_a_command_that_is_killed_is_told_by_its_signal(tmp_path):
    """Catches a kill -9 of the command, or of its whole session, that passes for an end."""
    codes = [FOREVER.replace("import", "import os; print(os.getpid(), flush=True); import"), ""]
    ids = local.submit([command(tmp_path, code.strip() or FOREVER) for code in codes])
    assert wait_for(lambda: log(tmp_path).endswith("\n"))
    os.kill(int(log(tmp_path)), 9)
    os.killpg(int(ids[1].split(":")[0]), 9)
    assert wait_for(lambda: states(ids) == ["failed", "failed"])
    assert [status.code for status in local.status(ids)] == [-9, -9]


def test_a_signal_before_any_handler_is_told_too(tmp_path):
    """Catches a launcher that hangs, or a shell that takes the signal, while Python starts (3)."""
    ids = local.submit([command(tmp_path, FOREVER)])
    local.cancel(ids, grace=10)
    assert [status.code for status in local.status(ids)] == [-15]


def test_another_launcher_goes_on_with_the_ids(tmp_path):
    """Catches an id that only its launcher can read, an exit code that dies with it, and a number
    that is taken for the process that once had it.
    """
    script = (
        "import sys; from pathlib import Path; from launch import Command, local\n"
        "log = Path(sys.argv[1]) / 'logs' / 'out.log'\n"
        "argv = (sys.executable, '-c', 'import sys; sys.stdin = open(sys.argv[1]); input();'\n"
        "        'sys.exit(5)', sys.argv[2])\n"
        "print(*local.submit([Command(argv, log), Command(argv, log)]), flush=True)\n"
    )
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    launcher = [sys.executable, "-c", script, str(tmp_path), str(gate)]
    done = subprocess.run(launcher, capture_output=True, text=True, timeout=30)
    ids = done.stdout.split()
    assert states(ids) == ["running", "running"]
    pid, start, *rest = ids[0].split(":")
    assert states([":".join([pid, str(int(start) - 1), *rest])]) == ["gone"]
    os.killpg(int(ids[1].split(":")[0]), 9)
    assert wait_for(lambda: states(ids)[1] == "gone")  # and nobody was there to note the signal
    with open(gate, "w") as file:
        file.write("go\n")
    assert wait_for(lambda: states(ids)[0] == "failed")
    assert local.status(ids)[0].code == 5
