"""Where work runs: engines that know argument lists and files, and nothing of models.

An engine is a module with one contract, so that the runner needs to know only its name:

    Settings                                    frozen, what the user may say (`--where.KEY=VALUE`)
    ready(settings) -> None                     UserError if nothing can be submitted from here
    processes(settings) -> int                  how many carry out one cell together
    submit(commands, settings) -> ids           starts every command
    status(ids, settings) -> [Status]           without waiting
    cancel(ids, settings, grace) -> None        asks each to stop, ends those that do not

An id is a text: whoever has it can ask for the state, so a runner that was killed is replaced by
one that reads the ids from the workdir. What a command achieved is in the run directory and nowhere
else; an engine that has forgotten a command says `gone`, and the run directory decides.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, NamedTuple

State = Literal["waiting", "running", "done", "failed", "gone"]


@dataclasses.dataclass(frozen=True)
class Command:
    """An argument list, what it adds to the environment, the file its output goes to, a name that
    is fit for a scheduler, and how many processes carry it out together (`jax.distributed`).
    """

    argv: tuple[str, ...]
    log: Path
    env: Mapping[str, str] = dataclasses.field(default_factory=dict)
    name: str = "onset"
    processes: int = 1


class Status(NamedTuple):
    """The state of a command; its exit code once it is known (negative: the signal that ended it),
    and what the engine says of it, in words.
    """

    state: State
    code: int | None = None
    why: str = ""
