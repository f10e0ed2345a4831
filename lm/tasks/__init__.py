"""Generated abilities, as data: every task is a record with a seeded generator, a leak-proof split
and a computed chance.
"""

from collections.abc import Callable

from lm.config import UserError
from lm.tasks.arithmetic import addition
from lm.tasks.controls import bigram, random_labels
from lm.tasks.recall import recall
from lm.tasks.task import (
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
TASKS: dict[tuple[str, str], Callable[[], Task]] = {
    ("recall", "3"): lambda: recall(3),
    ("recall", "5"): lambda: recall(5),
    ("addition", "1"): lambda: addition(1),
    ("addition", "2"): lambda: addition(2),
    ("addition", "3"): lambda: addition(3),
    ("random_labels", "4"): random_labels,
    ("bigram", "1"): bigram,
}

# What the generators write: a tokenizer that covers it can spell every task.
ALPHABET = "".join(chr(c) for c in range(0x20, 0x7F))


def task(name: str, level: str) -> Task:
    """The task of that name and level; raises UserError naming those there are."""
    if (name, level) not in TASKS:
        known = ", ".join(f"{n}/{v}" for n, v in TASKS)
        raise UserError(f"task {name}/{level} is not known; choose one of {known}")
    return TASKS[name, level]()


__all__ = [
    "ALPHABET",
    "TASKS",
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
