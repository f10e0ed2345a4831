"""Processes that carry out a cell together, and the places where they meet (20, 21).

Toys stand for the processes here; what JAX does in them is in tests/test_processes.py (slow).
"""

import os
import socket
import subprocess
import sys
import time

import pytest
import tiny

from experiments import processes
from experiments.processes import COORDINATOR, COUNT, INDEX
from lm.config import UserError

# Every process waits for ever but the one of index 1, which does what it is told.
TOY = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if os.environ["ONSET_PROCESS"] == "1":
    if sys.argv[1] == "killed":
        os.kill(os.getpid(), 9)
    sys.exit(int(sys.argv[1]))
open(sys.argv[2], "w").write(str(os.getpid()))
time.sleep(600)
"""


@pytest.mark.parametrize(
    ("end", "code"), [("killed", 137), ("1", 1), ("2", 2), ("70", 70), ("0", 1)]
)
def test_all_end_when_one_does(end, code, tmp_path, monkeypatch):
    """Catches an attempt that waits for ever when a process dies, fails or leaves before the others
    (20), an end of the wrong kind, and one that is left behind.
    """
    monkeypatch.setattr(processes, "GRACE", 0.3)
    monkeypatch.setattr(processes, "HEARTBEAT", 1)
    monkeypatch.setattr(processes.signal, "signal", lambda *a: None)  # pytest has its own
    tick, pid = time.monotonic(), tmp_path / "pid"
    command = [sys.executable, "-c", TOY, end, str(pid)]
    assert processes.together(command, 3) == code
    assert time.monotonic() - tick < 30
    if pid.exists() and pid.read_text():
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid.read_text()), 0)


def joined(where: str, index: int, seconds: float) -> subprocess.CompletedProcess[str]:
    code = (
        "import os, sys; from experiments import processes\n"
        f"processes.MEET = {seconds}\n"
        "processes.join(os.environ)\n"
    )
    env = tiny.environment(**{COORDINATOR: where, COUNT: "2", INDEX: str(index)})
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=tiny.ROOT,
        env=env | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=90,
    )


def test_a_port_that_is_taken_ends_the_attempt_at_once():
    """Catches a wait for others at a place where somebody else listens (21)."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        done = joined(f"127.0.0.1:{port}", 0, 120)
    assert done.returncode == 1 and done.stderr.startswith(f"port {port} is taken"), done.stderr


@pytest.mark.parametrize(
    ("where", "words"),
    [("no-such-host.invalid:1", "cannot be found"), ("nowhere", "HOST:PORT"), (":1", "HOST:PORT")],
)
def test_a_place_that_cannot_be_is_a_sentence(where, words, monkeypatch):
    """Catches a name that is asked for for ever, and an error of JAX in its place (21)."""
    monkeypatch.setattr(processes, "MEET", 0.1)
    with pytest.raises(UserError, match=f"{COORDINATOR}.*{words}"):
        processes._meeting(where, True)


@pytest.mark.slow
def test_a_first_process_that_never_comes_is_not_waited_for_for_ever():
    """Catches a process that waits longer than MEET for the first one (21)."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        port = other.getsockname()[1]
    tick = time.monotonic()
    done = joined(f"127.0.0.1:{port}", 1, 3)
    assert done.returncode not in (0, 75) and time.monotonic() - tick < 60
