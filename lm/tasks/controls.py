"""Two controls: one that nobody can learn, and one that everybody learns smoothly.

Random labels: `#3fa=W`, a fixed random label for each of 4,096 keys. Test keys are held out, so
every accuracy above chance is a false positive of the pipeline. Bigram: characters of a fixed
Markov chain. The answer follows from the last character, the best negative log-likelihood is the
chain's entropy rate, and the road there is smooth: a verdict "emergent" would be a false alarm.
"""

import dataclasses
import functools

import numpy as np

from lm.tasks.task import Example, Task, split_of

KEYS = 4096
LABELS = "WXYZ"
LABEL_FORMATS = ("#{k:03x}=", "{k:03x}: ", "[{k:03X}]", "label of {k:04d} is ", "<{k:012b}>")
HELD_OUT = 0.25  # about 1,000 distinct test keys
STATES = "klmnopqrst"
WORLD = 20260101  # the seed of the fixed tables: one world for every study


@dataclasses.dataclass(frozen=True)
class Chain:
    """One way to write a chain: what stands before it, and between its characters."""

    before: str
    between: str


CHAIN_FORMATS = (
    Chain("", ""),
    Chain("", " "),
    Chain("~", ""),
    Chain("chain:", ""),
    Chain("", "-"),
)


@functools.cache
def _labels() -> tuple[str, ...]:
    """A label per key, balanced inside every split: else a majority guess beats 1/4 by chance."""
    rng = np.random.default_rng(WORLD)
    labels = [""] * KEYS
    for split in ("train", "validation", "test"):
        keys = [k for k in range(KEYS) if split_of(f"random_labels:{k}", HELD_OUT) == split]
        order = rng.permutation(len(keys))
        for place, k in zip(order, keys, strict=True):
            labels[k] = LABELS[place % len(LABELS)]
    return tuple(labels)


def random_labels(format: int = 0) -> Task:
    """A random label for each key; must stay at chance on held-out keys."""
    labels, form = _labels(), LABEL_FORMATS[format]

    def generate(rng: np.random.Generator, n: int, turns: int) -> list[Example]:
        return [
            Example(form.format(k=k), labels[k], tuple(LABELS), f"random_labels:{k}")
            for k in rng.integers(0, KEYS, n).tolist()
        ]

    return Task("random_labels", str(len(LABELS)), generate, "control", format, held_out=HELD_OUT)


def transitions() -> np.ndarray:
    """[S, S] transition probabilities of the bigram chain, row = current state."""
    return np.random.default_rng(WORLD).dirichlet(np.full(len(STATES), 0.9), len(STATES))


def stationary(matrix: np.ndarray) -> np.ndarray:
    """[S] stationary distribution of a transition matrix."""
    return np.linalg.matrix_power(matrix, 1 << 10)[0]


def entropy_rate(matrix: np.ndarray) -> float:
    """Nats per character: the lowest negative log-likelihood a model can reach on the chain."""
    return float(-np.sum(stationary(matrix)[:, None] * matrix * np.log(matrix)))


def bigram(length: int = 29, format: int = 0) -> Task:
    """Next character of the chain; a training example is a chain with every character an answer."""
    cumulative = transitions().cumsum(axis=1)
    start = stationary(transitions()).cumsum()
    form = CHAIN_FORMATS[format]

    def generate(rng: np.random.Generator, n: int, turns: int) -> list[Example]:
        chain = np.empty((n, length), np.int64)
        noise = rng.random((n, length))
        chain[:, 0] = np.searchsorted(start[:-1], noise[:, 0])
        for t in range(1, length):
            chain[:, t] = (noise[:, t, None] > cumulative[chain[:, t - 1], :-1]).sum(axis=1)
        prefix = np.full(n, length - turns) if turns > 1 else rng.integers(1, length, n)
        return [
            _chain_example(form, "".join(STATES[i] for i in c), p, turns)
            for c, p in zip(chain, prefix, strict=True)
        ]

    return Task("bigram", "1", generate, "control", format, turns=length - 1, prompt_rules=False)


def _chain_example(form: Chain, text: str, prefix: int, turns: int) -> Example:
    rest = text[prefix : prefix + turns]
    more = tuple((form.between, character) for character in rest[1:])
    prompt = form.before + "".join(character + form.between for character in text[:prefix])
    return Example(prompt, rest[0], tuple(STATES), f"bigram:{text}", more)
