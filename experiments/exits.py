"""How an attempt at a cell ends, what is done about it, and the watchdog that ends one that hangs.

Kinds are what events, `lm status` and the rules below speak of. A cell that diverges is no failure:
it has a result. Nothing here imports JAX: a launcher, and workers that do without it, need this.
"""

import faulthandler
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

from lm.config import UserError

AGAIN = 75  # sysexits' EX_TEMPFAIL: stopped after a checkpoint, start the same command again
USER = 2  # the user has to mend something
HUNG = 70  # sysexits' EX_SOFTWARE: ended by the watchdog

# Seconds without a step. The first step of a large model is compiled for minutes.
HANGS_AFTER = float(os.environ.get("ONSET_HANG") or 1800)


class Rule(NamedTuple):
    """How often an attempt of this kind is followed by another one without the cell having got any
    further in between, and what to call it in a sentence.
    """

    retries: int
    words: str


RULES = {
    # Whoever takes machines away does so again: as long as there is a checkpoint now and then.
    "preempted": Rule(20, "was asked to stop"),
    "killed": Rule(5, "was killed"),
    "hang": Rule(2, "made no step"),
    "oom": Rule(1, "ran out of memory"),  # unchanged it will not fit the second time either
    "bug": Rule(2, "failed"),
    "disk": Rule(0, "found the disk full"),
    "user": Rule(0, "was refused"),
}
STOPS_ALL = ("disk", "user")  # every other cell would meet the same
QUIET = ("preempted", "killed")  # nothing was wrong with the cell

POLITE = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
# What JAX says in one process when another one of the same cell is gone.
PEER = re.compile(r"\bGloo\b|coordination (service|agent)|distributed service|\bBarrier timed out")
MEMORY = re.compile(r"RESOURCE_EXHAUSTED|out.of.memory|\boom", re.IGNORECASE)


def kind_of(error: BaseException) -> str:
    """The kind of an exception, after `disk_error` has made it a sentence where that is due."""
    if isinstance(error, UserError):
        return "disk" if str(error).startswith("disk full") else "user"
    # Orbax says RESOURCE_EXHAUSTED of a full disk, too; `disk_error` has looked for that.
    if isinstance(error, MemoryError) or MEMORY.search(str(error)):
        return "oom"
    return "killed" if PEER.search(str(error)) else "bug"


def kind_of_exit(code: int | None, why: str = "") -> str:
    """The kind of an attempt that has left no word, from its exit code and the engine's words."""
    if code is not None and code > 128:
        code = 128 - code  # as shells and containers spell a signal
    if MEMORY.search(why):
        return "oom"
    if code == AGAIN or (code is not None and -code in POLITE):
        return "preempted"
    if code == HUNG:
        return "hang"
    if code == USER or "cancelled" in why.lower():  # by hand: starting it again would be rude
        return "user"
    # Not known: the machine is gone, or its session was killed as a whole.
    return "killed" if code in (None, 0, -signal.SIGKILL) else "bug"


class Watchdog:
    """Ends a process that makes no step for `after` seconds: stacks of all threads on stderr, then
    `tell`, then exit code HUNG. `step` shows progress; somebody's thread calls `look`.
    """

    def __init__(self, tell: Callable[[str], None], after: float | None = None) -> None:
        self.after = HANGS_AFTER if after is None else after
        self._tell, self._last = tell, time.monotonic()
        self._arm()

    def step(self) -> None:
        """There was progress."""
        self._last = time.monotonic()

    def look(self) -> None:
        """Ends the process if it hangs."""
        self._arm()
        if time.monotonic() - self._last > self.after:
            faulthandler.dump_traceback(sys.stderr, all_threads=True)
            self._tell(f"no step for {self.after:.0f} s; the log has the stacks of all threads")
            os._exit(HUNG)

    def stop(self) -> None:
        """Nothing is watched any more."""
        faulthandler.cancel_dump_traceback_later()

    def _arm(self) -> None:
        # For a hang that does not give the interpreter back: its own thread, which needs none. It
        # is set anew at every look, so that it acts when no more looks are taken.
        faulthandler.dump_traceback_later(self.after + 60, exit=True, file=sys.stderr)


def stop_signal() -> Callable[[], bool]:
    """True once SIGTERM or SIGUSR1 came; one that comes more than a second later ends the process
    at once, with the last checkpoint as it is.
    """
    asked: list[float] = []

    def ask(number: int, frame: object) -> None:
        asked.append(time.monotonic())
        # Schedulers send the same wish twice within an instant: to the step and to the script.
        if asked[-1] - asked[0] > 1:
            os._exit(AGAIN)

    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, ask)
    return lambda: bool(asked)
