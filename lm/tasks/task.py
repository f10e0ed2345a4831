"""What an ability is: a seeded generator of examples, a split that cannot leak, and a chance level
that is computed.

An example is text: a prompt, its answer, and perhaps further turns in the same context. Its `key`
is canonical: two examples that give away each other's answer have one key, and the split is a hash
of the key, so no key can be in two splits. Chance is the accuracy of the strongest guesser that
sees only the format: the majority answer, the answers that the format allows, and the best rule
that looks at one character of the prompt. Guessers are fitted on training examples, the best is
chosen on other training examples, and it is scored on fresh test examples, so the maximum over
guessers is not biased upwards.
"""

import collections
import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

from lm.config import UserError

Split = Literal["train", "validation", "test"]
Ability = Literal["in-context", "logic", "commonsense", "code", "arithmetic", "control"]
ROW = 63  # characters of a training example at most: 65 tokens less <bos> and <eos>
FORMATS = 5  # every task can be asked in so many ways


@dataclasses.dataclass(frozen=True)
class Example:
    """One item: `choices` are the answers that the format allows (empty: open), `more` further
    (prompt, answer) turns.
    """

    prompt: str
    answer: str
    choices: tuple[str, ...]
    key: str
    more: tuple[tuple[str, str], ...] = ()


@dataclasses.dataclass(frozen=True)
class Task:
    """A generated ability at one level in one prompt format, 0 being the canonical one;
    `generate(rng, n, turns)` gives `n` examples of any split with up to `turns` turns.

    The formats of a task ask the same questions in other words: answers and keys are the same.
    """

    name: str
    level: str
    generate: Callable[[np.random.Generator, int, int], list[Example]]
    ability: Ability
    format: int = 0
    turns: int = 1  # of a training example; a test item has one, so that items are independent
    held_out: float = 0.05  # share of keys in the test split, and again in the validation split
    # False where one character of the prompt is the answer's true cause and not its format.
    prompt_rules: bool = True


@dataclasses.dataclass(frozen=True)
class Chance:
    """Accuracy of the strongest format-only guesser, and of each of them."""

    value: float
    baselines: dict[str, float]


def split_of(key: str, held_out: float = 0.05) -> Split:
    """The split of a key: BLAKE2b(key) mod 1000, test at the top, validation next to it."""
    place = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big") % 1000
    test = 1000 - round(1000 * held_out)
    validation = 2 * test - 1000
    return "test" if place >= test else "validation" if place >= validation else "train"


def examples(task: Task, split: Split, seed: int, n: int, turns: int = 1) -> list[Example]:
    """`n` independent examples of a split, a pure function of its arguments."""
    code = ("train", "validation", "test").index(split)
    rng = np.random.default_rng((seed, code))
    share = 1 - 2 * task.held_out if split == "train" else task.held_out
    found: list[Example] = []
    for _ in range(100):
        drawn = task.generate(rng, int(1.1 * (n - len(found)) / share) + 16, turns)
        found += [e for e in drawn if split_of(e.key, task.held_out) == split]
        if len(found) >= n:
            return found[:n]
    raise UserError(
        f"{task.name}/{task.level} gave {len(found)} of {n} {split} examples in 100 draws; "
        "raise its held_out"
    )


def items(task: Task, split: Split, seed: int, n: int) -> list[Example]:
    """At most `n` test items with distinct prompts: fewer where the task has fewer, so that
    intervals are honest.
    """
    distinct: dict[str, Example] = {}
    for attempt in range(8):
        for e in examples(task, split, seed + 7919 * attempt, n):
            distinct.setdefault(e.prompt, e)
        if len(distinct) >= n:
            break
    return list(distinct.values())[:n]


def assert_disjoint(task: Task, train: Sequence[Example], test: Sequence[Example]) -> None:
    """Raises AssertionError, which stops the run, if a key is both in train and in test."""
    shared = {e.key for e in train} & {e.key for e in test}
    if shared:
        raise AssertionError(
            f"{task.name}/{task.level}: key {min(shared)!r} is in train and in test"
        )


def turns_in_row(two: Example) -> int:
    """How many turns fill a row, given an example of two."""
    prompt, answer = two.more[0]
    return 1 + (ROW - len(two.prompt + two.answer)) // len(prompt + answer)


def tokens(example: Example, encode: Callable[[str], np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Ids of an example [n] and, beside them, 1 on the tokens of answers and 0 on prompts."""
    ids: list[np.ndarray] = []
    answer: list[np.ndarray] = []
    for prompt, reply in ((example.prompt, example.answer), *example.more):
        for text, weight in ((prompt, 0.0), (reply, 1.0)):
            if text:
                ids.append(encode(text))
                answer.append(np.full(len(ids[-1]), weight, np.float32))
    return np.concatenate(ids), np.concatenate(answer)


# A guesser maps a prompt to answers with probabilities; it sees the format, never the meaning.
Guesser = Callable[[Example], dict[str, float]]


def chance(task: Task, n: int = 8000, seed: int = 0) -> Chance:
    """The strongest format-only baseline of exact match: fitted on `n` training examples, chosen on
    `n` others, scored on test.

    Test keys that repeat are fine: the score is over the distribution that the evaluation draws
    from.
    """
    fit = examples(task, "train", seed + 1, n)
    choose = examples(task, "train", seed + 2, n)
    score = examples(task, "test", seed + 3, n)
    guessers: dict[str, Guesser] = {
        "uniform": _uniform(fit),
        "majority": _majority(fit, _nothing),
        "choices": _choices,
    }
    plain = tuple(guessers)
    if task.prompt_rules:
        places = (*range(16), *range(-8, 0))
        guessers |= {f"character {i}": _majority(fit, _character(i)) for i in places}
    best = max(guessers, key=lambda name: _accuracy(guessers[name], choose))
    baselines = {name: _accuracy(guessers[name], score) for name in dict.fromkeys((*plain, best))}
    return Chance(max(baselines.values()), baselines)


def _nothing(example: Example) -> str:
    return ""


def _character(place: int) -> Callable[[Example], str]:
    return lambda e: e.prompt[place] if -len(e.prompt) <= place < len(e.prompt) else ""


def _choices(example: Example) -> dict[str, float]:
    return dict.fromkeys(example.choices, 1 / len(example.choices)) if example.choices else {}


def _uniform(fit: Sequence[Example]) -> Guesser:
    answers = sorted({e.answer for e in fit})
    return lambda e: dict.fromkeys(answers, 1 / len(answers))


def _majority(fit: Sequence[Example], look: Callable[[Example], str]) -> Guesser:
    counts: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for e in fit:
        counts[look(e)][e.answer] += 1
    answer = {seen: c.most_common(1)[0][0] for seen, c in counts.items()}
    return lambda e: {answer[look(e)]: 1.0} if look(e) in answer else {}


def _accuracy(guess: Guesser, on: Sequence[Example]) -> float:
    return float(np.mean([guess(e).get(e.answer, 0.0) for e in on]))
