"""Generated abilities, as data: every task is a record with a seeded generator, a leak-proof split
and a computed chance.
"""

import functools
from collections.abc import Callable

from lm.config import UserError
from lm.tasks.arithmetic import addition, modular, reversed_addition
from lm.tasks.code import alias, program
from lm.tasks.commonsense import taxonomy
from lm.tasks.controls import bigram, random_labels
from lm.tasks.logic import boolean, hop, syllogism
from lm.tasks.puzzles import dyck, listops, parity, unscramble
from lm.tasks.recall import recall, rule
from lm.tasks.task import (
    FORMATS,
    Ability,
    Chance,
    Example,
    Task,
    assert_disjoint,
    chance,
    examples,
    items,
    split_of,
    tokens,
)

# Every ability, by name and level.
TASKS: dict[tuple[str, str], Callable[[int], Task]] = {
    ("recall", "3"): lambda format: recall(3, format),
    ("recall", "5"): lambda format: recall(5, format),
    ("rule", "9"): lambda format: rule(9, format),
    ("rule", "11"): lambda format: rule(11, format),
    ("rule", "13"): lambda format: rule(13, format),
    ("hop", "1"): lambda format: hop(1, format),
    ("hop", "2"): lambda format: hop(2, format),
    ("hop", "3"): lambda format: hop(3, format),
    ("hop", "4"): lambda format: hop(4, format),
    ("boolean", "1"): lambda format: boolean(1, format),
    ("boolean", "2"): lambda format: boolean(2, format),
    ("boolean", "3"): lambda format: boolean(3, format),
    ("boolean", "4"): lambda format: boolean(4, format),
    ("syllogism", "1"): lambda format: syllogism(1, format),
    ("syllogism", "2"): lambda format: syllogism(2, format),
    ("listops", "1"): lambda format: listops(1, format),
    ("listops", "2"): lambda format: listops(2, format),
    ("listops", "3"): lambda format: listops(3, format),
    ("taxonomy", "1"): lambda format: taxonomy("1", format),
    ("taxonomy", "2"): lambda format: taxonomy("2", format),
    ("taxonomy", "3"): lambda format: taxonomy("3", format),
    ("taxonomy", "exception"): lambda format: taxonomy("exception", format),
    ("taxonomy", "place"): lambda format: taxonomy("place", format),
    ("program", "0"): lambda format: program(0, format),
    ("program", "1"): lambda format: program(1, format),
    ("program", "2"): lambda format: program(2, format),
    ("program", "3"): lambda format: program(3, format),
    ("program", "4"): lambda format: program(4, format),
    ("program", "6"): lambda format: program(6, format),
    ("alias", "2"): lambda format: alias(2, format),
    ("alias", "3"): lambda format: alias(3, format),
    ("addition", "1"): lambda format: addition(1, format),
    ("addition", "2"): lambda format: addition(2, format),
    ("addition", "3"): lambda format: addition(3, format),
    ("addition", "4"): lambda format: addition(4, format),
    ("reversed_addition", "1"): lambda format: reversed_addition(1, format),
    ("reversed_addition", "2"): lambda format: reversed_addition(2, format),
    ("reversed_addition", "3"): lambda format: reversed_addition(3, format),
    ("reversed_addition", "4"): lambda format: reversed_addition(4, format),
    ("modular", "10"): lambda format: modular(10, format),
    ("modular", "23"): lambda format: modular(23, format),
    ("modular", "59"): lambda format: modular(59, format),
    ("modular", "97"): lambda format: modular(97, format),
    ("parity", "10"): lambda format: parity(10, format),
    ("dyck", "2"): lambda format: dyck(2, format),
    ("dyck", "3"): lambda format: dyck(3, format),
    ("unscramble", "4"): lambda format: unscramble(4, format),
    ("random_labels", "4"): random_labels,
    ("bigram", "1"): lambda format: bigram(format=format),
}

# What the generators write: a tokenizer that covers it can spell every task.
ALPHABET = "".join(chr(c) for c in range(0x20, 0x7F))


@functools.cache
def task(name: str, level: str, format: int = 0) -> Task:
    """The task of that name and level in one prompt format; raises UserError naming what there
    is.
    """
    if (name, level) not in TASKS:
        known = ", ".join(f"{n}/{v}" for n, v in TASKS)
        raise UserError(f"task {name}/{level} is not known; choose one of {known}")
    if not 0 <= format < FORMATS:
        raise UserError(f"format of {name}/{level} is {format}; it must be 0 to {FORMATS - 1}")
    return TASKS[name, level](format)


__all__ = [
    "ALPHABET",
    "FORMATS",
    "TASKS",
    "Ability",
    "Chance",
    "Example",
    "Task",
    "assert_disjoint",
    "chance",
    "examples",
    "items",
    "split_of",
    "task",
    "tokens",
]
