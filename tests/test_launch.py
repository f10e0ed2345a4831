"""The local engine: states, logs, environments and the end of whole sessions."""

import os
import sys
import time

from launch import local


def command(tmp_path, code: str, **env: str) -> local.Command:
    return local.Command((sys.executable, "-c", code), tmp_path / "logs" / "out.log", env)


def wait_for(condition, seconds: float = 20.0) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.02)
    return False


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_states_and_logs(tmp_path):
    good = command(tmp_path, "import os; print(os.environ['NPROC'], os.getsid(0))", NPROC="1")
    bad = command(tmp_path, "import sys; print('oh', file=sys.stderr); sys.exit(3)")
    handles = local.submit([good])
    assert wait_for(lambda: local.status(handles) == ["done"])
    handles += local.submit([bad])
    assert wait_for(lambda: local.status(handles) == ["done", "failed"])
    first, second = good.log.read_text().splitlines()  # the second command has appended
    assert first.split()[0] == "1" and second == "oh"
    assert int(first.split()[1]) == handles[0].process.pid != os.getsid(0)


def test_cancel_lets_a_process_end_itself(tmp_path):
    code = (
        "import signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: (print('ended'), sys.exit(0)))\n"
        "print('up', flush=True); time.sleep(60)\n"
    )
    handles = local.submit([command(tmp_path, code)])
    log = handles[0].command.log
    assert wait_for(lambda: log.read_text() == "up\n") and local.status(handles) == ["running"]
    local.cancel(handles)
    assert local.status(handles) == ["done"] and log.read_text() == "up\nended\n"


def test_cancel_kills_what_does_not_listen_and_its_children(tmp_path):
    code = (
        "import signal, subprocess, sys, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        # What is ignored stays ignored in the child.
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "print(child.pid, flush=True); time.sleep(60)\n"
    )
    handles = local.submit([command(tmp_path, code)])
    log = handles[0].command.log
    assert wait_for(lambda: log.read_text().endswith("\n"))
    child = int(log.read_text())
    assert alive(child)
    local.cancel(handles, grace=0.2)
    assert local.status(handles) == ["failed"]
    assert wait_for(lambda: not alive(child))


def test_cancel_of_what_has_ended_does_nothing(tmp_path):
    handles = local.submit([command(tmp_path, "")])
    assert wait_for(lambda: local.status(handles) == ["done"])
    local.cancel(handles)
    assert local.status(handles) == ["done"]
