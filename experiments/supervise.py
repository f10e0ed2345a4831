"""The commands that carry out a workdir, kept running on an engine until nothing is left to do.

What an engine runs is in `launch.json`: ids, attempts, settings. A launcher that was killed is
replaced by one that reads it and goes on with what still runs. What became of a cell is in its
folder: the result, the progress, and how the last lease ended. From these follows what a command
that has ended meant for which cell, and `exits.RULES` says whether that cell is tried again.
"""

import contextlib
import dataclasses
import hashlib
import re
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from experiments import exits
from experiments.worker import failed
from launch import Command, Status, local
from lm import lease
from lm.config import UserError, build, to_dict
from lm.rundir import holder, read_json, write_json

PLACES = ("local", "slurm", "kubernetes")
LAUNCHED = "launch.json"
LINGER = 15.0  # seconds for commands to end by themselves
LIVE = ("waiting", "running")


def engine(place: str) -> ModuleType:
    """The module of an engine; none but the one asked for is imported."""
    if place == "slurm":
        from launch import slurm

        return slurm
    if place == "kubernetes":
        from launch import kubernetes

        return kubernetes
    return local


@dataclasses.dataclass
class Slot:
    """A place for one command: the cells it is for (None: all), and what runs in it now."""

    name: str
    cells: tuple[str, ...] | None
    id: str = ""
    tag: str = ""
    attempts: int = 0


class Crew:
    """The commands of a workdir. `say` takes sentences for the user."""

    def __init__(
        self,
        cells: Sequence[str],
        workdir: Path,
        workers: int,
        command: Command,
        say: Callable[[str], None],
    ) -> None:
        self.workdir, self.command, self.say = workdir, command, say
        there = launched(workdir)
        self.place = there["where"]
        self.engine = engine(self.place)
        self.settings = build(self.engine.Settings, there["settings"], "where")
        self.together = self.engine.processes(self.settings)
        self.pooled = self.place == "local" and self.together == 1  # any worker takes any cell
        self.workers = workers
        self.left = dict.fromkeys(cells)  # in order
        self.given_up: set[str] = set()
        self.stopped = False
        self._strikes: dict[str, tuple[int, Counter[str]]] = {}
        self._watch = lease.Watch()
        self._over = time.monotonic()  # when there was last something to do
        if self.pooled:
            slots = [Slot(f"worker-{n}", None) for n in range(workers)]
        else:
            slots = [Slot(name, (name,)) for name in cells]
        self.slots = {slot.name: slot for slot in slots}
        self._adopt(there["commands"])
        if self.pooled and self.live():
            busy = [slot for slot in self.slots.values() if slot.id]
            free = [slot for slot in self.slots.values() if not slot.id]
            self.slots = {s.name: s for s in [*busy, *free[: max(0, workers - len(busy))]]}
        self.idle = {name for name, slot in self.slots.items() if not slot.id}

    def step(self) -> bool:
        """Looks once at everything and starts what has to be started; False when all is over."""
        live = self.live()
        states = self.engine.status([slot.id for slot in live], self.settings) if live else []
        for slot, state in zip(live, states, strict=True):
            if state.state not in LIVE:
                self._ended(slot, state)
        self.left = {n: None for n in self.left if not (self.workdir / n / "result.json").exists()}
        todo = [name for name in self.left if name not in self.given_up]
        if todo:
            self._over = time.monotonic()
        # Workers end by themselves when nothing is left; one that is stopped never does.
        late = time.monotonic() - self._over > LINGER
        if self.stopped or (not todo and (late or not self.live())):
            return False
        if todo and not self.live() and not self.idle:
            self._all_idle(todo)
        self._start(set(todo))
        return True

    def live(self) -> list[Slot]:
        """The slots in which something runs."""
        return [slot for slot in self.slots.values() if slot.id]

    def cancel(self, grace: float = 10.0) -> None:
        """Asks everything to stop, and ends what does not."""
        self.engine.cancel([slot.id for slot in self.live()], self.settings, grace)

    def _adopt(self, commands: Mapping[str, Mapping[str, Any]]) -> None:
        known = {name: c for name, c in commands.items() if c["id"]}
        states = self.engine.status([c["id"] for c in known.values()], self.settings)
        for (name, there), state in zip(known.items(), states, strict=True):
            slot = self.slots.get(name) or Slot(name, None if self.pooled else (name,))
            slot.attempts = there["attempts"]
            if state.state in LIVE:
                slot.id, slot.tag = there["id"], there["tag"]
                self.slots[name] = slot
        if found := self.live():
            self.say(f"{len(found)} of an earlier run still at work: going on with them")

    def _start(self, todo: set[str]) -> None:
        """Starts a command in every idle slot that has something to do."""
        slots = [self.slots[name] for name in self.slots if name in self.idle]
        slots = [s for s in slots if todo and (s.cells is None or todo & {*s.cells})]
        if self.place == "local":  # elsewhere a scheduler decides how many run
            slots = slots[: max(0, self.workers - len(self.live()))]
        if not slots:
            return
        commands = []
        for slot in slots:
            slot.attempts += 1
            slot.tag = f"{slot.name}.{slot.attempts}"
            commands.append(self._command(slot, todo))
        ids = self.engine.submit(commands, self.settings)
        for slot, identity in zip(slots, ids, strict=True):
            slot.id = identity
            self.idle.discard(slot.name)
        self._write()

    def _command(self, slot: Slot, todo: set[str]) -> Command:
        argv, log = self.command.argv, self.command.log
        if slot.cells is not None:
            argv, log = (*argv, "--cells", *slot.cells), log.with_name(f"{slot.name}.log")
            if self.together > 1 and self.place == "local":
                argv = (*argv, f"--processes={self.together}")
        elif self.given_up:  # the others alone
            argv = (*argv, "--cells", ",".join(n for n in self.left if n in todo))
        text = f"{self.workdir.absolute()} {slot.tag}"
        words = re.sub(r"[^a-z0-9]+", "-", slot.name.lower())[:30].strip("-")
        name = f"onset-{words}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
        env = {**self.command.env, lease.COMMAND: slot.tag}
        processes = 1 if self.place == "local" else self.together
        return dataclasses.replace(
            self.command, argv=argv, log=log, env=env, name=name, processes=processes
        )

    def _write(self) -> None:
        begun = [slot for slot in self.slots.values() if slot.attempts]
        commands = {s.name: {"id": s.id, "tag": s.tag, "attempts": s.attempts} for s in begun}
        there = {"where": self.place, "settings": to_dict(self.settings), "commands": commands}
        write_json(self.workdir / LAUNCHED, {"of": _identity(self.workdir), **there})

    def _ended(self, slot: Slot, state: Status) -> None:
        slot.id = ""
        blamed = False
        own = self.left if slot.cells is None else [n for n in slot.cells if n in self.left]
        names = [n for n in own if not (self.workdir / n / "result.json").exists()]
        for name in names:
            kind = self._end_of(name, slot, state)
            if kind in exits.RULES:
                blamed = True
                self._strike(name, kind, state)
        # It ended before it had taken a cell, or somebody has taken the cell over since, or, where
        # each cell has its own command, it found the cell in other hands.
        if names and not blamed and (state.state != "done" or slot.cells is not None):
            name = "" if slot.cells is None else names[0]
            self._strike(name, exits.kind_of_exit(state.code, state.why), state)
        if state.state == "done" and slot.cells is None:
            return  # what is left is in other hands
        self.idle.add(slot.name)

    def _end_of(self, name: str, slot: Slot, state: Status) -> str:
        """The kind of end of a cell's attempt in this slot; empty if it had none, or is done."""
        folder = self.workdir / name
        record = lease.newest(folder)
        if not record or record.get("command") != slot.tag or (folder / "result.json").exists():
            return ""
        if record.get("ended"):
            return str(record["ended"])
        kind = exits.kind_of_exit(state.code, state.why)
        if lease.close_dead(folder, slot.tag, kind) is None:
            return ""
        failed(folder, kind, f"its worker {exits.RULES[kind].words} ({_words(state)})")
        return kind

    def _strike(self, name: str, kind: str, state: Status) -> None:
        """Counts an end of this kind without progress; gives the cell up when there were enough."""
        at, counts = self._strikes.get(name, (-1, Counter[str]()))
        here = progress(self.workdir / name) if name else len(self.given_up) - len(self.left)
        if here > at:
            counts = Counter()
        counts[kind] += 1
        self._strikes[name] = here, counts
        rule = exits.RULES[kind]
        over = counts[kind] > rule.retries
        if not name:
            self.stopped |= over
        elif over:
            self.given_up.add(name)
        self.stopped |= kind in exits.STOPS_ALL
        what = "given up" if over else f"try {counts[kind]} of {rule.retries} without progress"
        self.say(f"{name or 'a worker'} {rule.words} ({_words(state)}): {what}")

    def _all_idle(self, todo: Sequence[str]) -> None:
        """Nothing runs and something is left: in the hands of processes that no file knows of."""
        for name in todo:
            if holder(self.workdir / name / "lock") and not self._watch.expired(
                self.workdir / name
            ):
                return
        self._strike("", "killed", Status("done", 0, "and left something to do"))
        self.idle |= self.slots.keys()


def progress(folder: Path) -> int:
    """A number that grows when a cell gets further."""
    manifests = (folder / "checkpoints").glob("[0-9]*.manifest.json")
    sealed = max((int(path.name.split(".")[0]) for path in manifests), default=-1)
    return sealed + 1 + (folder / "result.json").exists()


def launched(workdir: Path) -> dict[str, Any]:
    """What `launch.json` says; that nothing was started, and here, where it is not there."""
    nothing: dict[str, Any] = {"where": "local", "settings": {}, "commands": {}}
    with contextlib.suppress(FileNotFoundError):
        there = nothing | read_json(workdir / LAUNCHED)
        # What works for the original of a copy does nothing for the copy.
        return there if there.get("of") == _identity(workdir) else there | {"commands": {}}
    return nothing


def together(workdir: Path) -> int:
    """How many processes carry out one cell, where the workdir's cells are carried out."""
    there = launched(workdir)
    chosen = engine(there["where"])
    return int(chosen.processes(build(chosen.Settings, there["settings"], "where")))


def _identity(workdir: Path) -> str:
    return str(workdir.resolve())


def choose(workdir: Path, place: str, settings: Any) -> None:
    """Writes down where the cells of a workdir are carried out from now on. Raises UserError while
    some still run elsewhere.
    """
    there = launched(workdir)
    if there["where"] != place and there["commands"]:
        before = engine(there["where"])
        ids = [c["id"] for c in there["commands"].values() if c["id"]]
        states = before.status(ids, build(before.Settings, there["settings"], "where"))
        if live := sum(state.state in LIVE for state in states):
            raise UserError(
                f"{live} commands of {workdir} are at work on {there['where']}; go on with"
                f" --where={there['where']}, or stop them first"
            )
        there["commands"] = {}
    if (there["where"], there["settings"]) != (place, to_dict(settings)):
        there |= {"where": place, "settings": to_dict(settings)}
        write_json(workdir / LAUNCHED, there | {"of": _identity(workdir)})


def _words(state: Status) -> str:
    code = "exit code unknown" if state.code is None else f"exit code {state.code}"
    if state.code is not None and state.code < 0:
        code = f"signal {-state.code}"
    return f"{code}, {state.why}" if state.why else code
