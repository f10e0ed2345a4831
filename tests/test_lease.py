"""Leases: one taker, proofs of death, silence, and a holder that comes back from the dead."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny

from lm import lease
from lm.lease import Lost, Watch
from lm.rundir import Held, holder

HOLDER = """
import sys, time
from pathlib import Path
from lm import lease
with lease.lease(Path(sys.argv[1]), "a test") as held:
    print(held.token, flush=True)
    sys.stdin.readline()
    try:
        held.check()
        print("writes", flush=True)
    except lease.Lost as lost:
        held.ended = "lost"
        print(lost, flush=True)
"""


@pytest.fixture
def hold(tmp_path):
    """Starts processes that hold the lease of a folder, beating every 50 ms."""
    started = []

    def start(folder: Path = tmp_path) -> subprocess.Popen:
        process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, str(folder)],
            cwd=tiny.ROOT,
            env={**os.environ, "ONSET_LEASE": "0.3"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        assert process.stdout.readline().strip().isdigit()
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def forge(folder: Path, **change: object) -> None:
    """The newest lease with other words in it."""
    record = lease.newest(folder) | change
    path = folder / "leases" / f"{record['token']}.json"
    path.write_text(json.dumps(record).ljust(511) + "\n")


def test_tokens_grow_and_the_end_is_written(tmp_path):
    """Catches a token that is given twice, and an end that leaves the cell held."""
    for token in (1, 2, 3):
        with lease.lease(tmp_path, "a test") as held:
            assert held.token == token and holder(tmp_path / "lock")["pid"] == os.getpid()
            held.check()
            held.ended = "done"
        assert lease.newest(tmp_path)["ended"] == "done" and holder(tmp_path / "lock") is None


def test_a_live_holder_keeps_its_cell_however_slow_it_is(tmp_path, hold):
    """Catches a takeover from somebody who still beats, and a sentence that does not name him."""
    process, watch = hold(), Watch(0.4)
    for _ in range(12):
        with pytest.raises(Held, match=f"pid {process.pid} on "), lease.lease(tmp_path, "", watch):
            pass
        time.sleep(0.1)
    assert process.communicate("\n", timeout=10)[0] == "writes\n"


def test_a_dead_holder_is_followed_at_once(tmp_path, hold):
    """Catches a wait for a process of this machine that is provably gone (11)."""
    process = hold()
    process.kill()
    process.wait()
    begin = time.monotonic()
    with lease.lease(tmp_path, "a test") as held:
        assert held.token == 2 and held.previous["pid"] == process.pid
        assert held.previous["ended"] is None
    assert time.monotonic() - begin < 5


def test_a_number_that_was_given_to_another_process_proves_a_death(tmp_path, hold):
    """Catches a stale lease that lives on in whoever has its process number now (11)."""
    other = hold(tmp_path_of(tmp_path, "other"))
    with lease.lease(tmp_path, "a test"):
        pass
    forge(tmp_path, ended=None, pid=other.pid, start="1")
    with lease.lease(tmp_path, "a test") as held:
        assert held.token == 2


def tmp_path_of(tmp_path: Path, name: str) -> Path:
    (tmp_path / name).mkdir()
    return tmp_path / name


@pytest.mark.parametrize("change", [{"host": "elsewhere"}, {"boot": "another"}, {"pid": 1}])
def test_what_cannot_be_proven_is_waited_for(tmp_path, change):
    """Catches a takeover from another machine, or from a process that lives, whose lock merely
    looks free here; and one that never comes (11).
    """
    with lease.lease(tmp_path, "a test"):
        pass
    start = lease._start(1) if "pid" in change else "1"
    forge(tmp_path, ended=None, start=start, **change)
    watch, begin = Watch(0.5), time.monotonic()
    with pytest.raises(Held), lease.lease(tmp_path, "a test"):
        pass
    while time.monotonic() - begin < 10:
        try:
            with lease.lease(tmp_path, "a test", watch) as held:
                assert held.token == 2 and time.monotonic() - begin >= 0.5
                return
        except Held:
            time.sleep(0.05)
    pytest.fail("nobody took the cell over")


@pytest.mark.parametrize("text", ["", "{", "[]", "x" * 600])
def test_rubbish_is_waited_for_as_well(tmp_path, text):
    """Catches a lease that cannot be read and counts as none (11)."""
    with lease.lease(tmp_path, "a test"):
        pass
    (tmp_path / "leases" / "1.json").write_text(text)
    with pytest.raises(Held), lease.lease(tmp_path, "a test"):
        pass
    watch = Watch(0.0)
    with lease.lease(tmp_path, "a test", watch) as held:
        assert held.token == 2


def test_a_holder_that_was_stopped_and_comes_back_is_rejected(tmp_path, hold):
    """Catches a zombie that still may write after somebody has taken its cell over, one that takes
    the successor's lock or lease with it, and a takeover before the lease has expired (12).
    """
    process, watch = hold(), Watch(0.5)
    os.kill(process.pid, signal.SIGSTOP)
    begin = time.monotonic()
    while True:
        try:
            with lease.lease(tmp_path, "a test", watch) as held:
                assert held.token == 2 and time.monotonic() - begin >= 0.5
                os.kill(process.pid, signal.SIGCONT)
                out, _ = process.communicate("\n", timeout=10)
                assert "was taken over by" in out and str(os.getpid()) in out
                held.check()
                assert holder(tmp_path / "lock")["pid"] == os.getpid()
                with pytest.raises(Held), lease.lease(tmp_path, "a third"):
                    pass
            break
        except Held:
            assert time.monotonic() - begin < 20
            time.sleep(0.05)
    with lease.lease(tmp_path, "a test") as held:
        assert held.token == 3


def test_check_sees_the_next_token(tmp_path):
    """Catches a check that reads something else than who came after."""
    with lease.lease(tmp_path, "a test") as held:
        (tmp_path / "leases" / "2.json").write_text('{"pid": 7, "host": "there"}')
        with pytest.raises(Lost, match="taken over by pid 7 on there"):
            held.check()


def test_an_observer_that_slept_knows_nothing_of_the_time(tmp_path, monkeypatch):
    """Catches a takeover by whoever was itself stopped, and any use of the wall clock (14)."""
    with lease.lease(tmp_path, "a test"):
        pass
    forge(tmp_path, ended=None, host="elsewhere")
    tick = [1000.0]
    monkeypatch.setattr(lease.time, "monotonic", lambda: tick[0])
    monkeypatch.setattr(lease.time, "time", lambda: pytest.fail("a wall clock was asked"))
    watch = Watch(60.0)
    assert watch.silent(tmp_path) == 0
    tick[0] += 3600
    assert watch.silent(tmp_path) == 0
    for _ in range(4):
        tick[0] += 20
        last = watch.silent(tmp_path)
    assert last == 80 and watch.expired(tmp_path)


def test_fifty_takers_at_one_moment(tmp_path):
    """Catches two that both think that they have the cell (10)."""
    code = (
        "import os, sys, time; from pathlib import Path; from lm import lease\n"
        "from lm.rundir import Held\n"
        "cell, gate, pids = Path(sys.argv[1]), Path(sys.argv[2]), []\n"
        "for child in range(50):\n"
        "    if pid := os.fork():\n"
        "        pids.append(pid); continue\n"
        "    while not gate.exists(): time.sleep(0.001)\n"
        "    try:\n"
        "        with lease.lease(cell, 'race', lease.Watch(60)) as held:\n"
        "            os.write(1, b'%d\\n' % held.token); time.sleep(2)\n"
        "    except Held: pass\n"
        "    os._exit(0)\n"
        "gate.touch()\n"
        "for pid in pids: os.waitpid(pid, 0)\n"
    )
    for name in "ab":  # where somebody was before, and where nobody was
        cell = tmp_path_of(tmp_path, name)
        if name == "a":
            with lease.lease(cell, "a test"):
                pass
            forge(cell, ended=None, pid=2**22 + 1)
        command = [sys.executable, "-c", code, str(cell), str(tmp_path / f"gate-{name}")]
        done = subprocess.run(command, cwd=tiny.ROOT, capture_output=True, text=True, timeout=60)
        assert done.stdout.split() == ["2" if name == "a" else "1"], done.stderr


def test_a_token_goes_to_one_taker_where_locks_do_not_work(tmp_path, monkeypatch):
    """Catches a token that two machines get which saw the same leases, on a file system without
    locks: creating must be exclusive.
    """
    monkeypatch.setattr(lease, "try_lock", lambda fd: True)
    monkeypatch.setattr(lease, "_largest", lambda folder: 0)
    with lease.lease(tmp_path, "one") as one:
        with pytest.raises(Held), lease.lease(tmp_path, "two"):
            pass
        one.check()
