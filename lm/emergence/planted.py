"""Tables with a planted truth: what the statistics are measured on.

A ladder of sizes x = log10(parameters) over some decades, seeds at each, and a value of every
metric drawn around a known curve. With u the logistic of a 10-90% width w around x50, chance c and
height h, the mean exact match and the mean loss (nats per token) are

    sharp     c + h u, w in 0.2 .. 0.6;  2 - 1.8 u           begins at x50 in both
    induced   c + h u, w in 0.2 .. 0.6;  2.2 - 1.6 share      the metric jumps, the loss is a line
    mirage    c + (1 - c) p^K;  -ln p                         p a line in x up to 0.99, K tokens
    smooth    c + h u, w in 1.3 .. 3;  the same, or a line    the smooth null
    line      c + 0.02 + h share;  2 - 1.5 share              share of the ladder climbed
    power     c + h N^s, s in 0.3 .. 0.9;  2 N^-0.4           rises from chance, never levels off
    flat      c;  1.5 - 0.1 share                             its loss falls all the same
    inverse   c + h (1 - 0.9 share);  1.5 + 0.8 share

`mirage` is the model of Schaeffer et al. (2023): the accuracy p of a token rises steadily, and
exact match is its K-th power for an answer of K tokens. `split` plants a transition in seeds that
do not slide: each has the ability with probability u or has none of it.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

import numpy as np

from lm.emergence.shapes import logistic
from lm.emergence.table import COLUMNS

if TYPE_CHECKING:
    import pandas as pd

Kind = Literal["sharp", "induced", "mirage", "smooth", "line", "power", "flat", "inverse"]
KINDS: tuple[Kind, ...] = get_args(Kind)
TOP_TOKEN = 0.99  # the best per-token accuracy of a mirage
SCATTER, LOSS_SCATTER = 0.01, 0.02  # of a seed around its size's mean


class Planted(NamedTuple):
    """Rows in the columns of `lm.emergence.table`, and the truth: x50 in parameters (NaN where
    nothing begins) and the 10-90% width in decades (NaN where there is none).
    """

    rows: "pd.DataFrame"
    kind: Kind
    onset: float
    width: float


def table(
    metrics: Mapping[str, Mapping[int, Sequence[float]]],
    *,
    chance: float = 0.25,
    n: int = 1000,
    task: str = "planted",
) -> "pd.DataFrame":
    """Final rows of a ladder from {metric: {params: one value per seed}}; NaN is a missing seed.

    Only exact match has a chance, as in the rows of a study.
    """
    import pandas as pd

    fixed = {
        **{"study": "planted", "role": "ladder", "layers": 2, "width": 8, "status": "ok"},
        **{"seed_init": 0, "seed_data": 0, "seed_dropout": 0, "seed_eval": 0, "attempt": 0},
        **{"learning_rate": 1e-3, "step": 100, "tokens": 1000, "flops": 1e9, "seconds": 1.0},
        **{"task": task, "level": "1", "format": 0, "n": n},
    }
    rows = [
        {
            **{"cell": f"p{params}", "point": f"p{params}", "replica": replica, "params": params},
            **{"params_total": params, "metric": metric, "value": float(value)},
            **{"stderr": LOSS_SCATTER, "chance": chance if metric == "exact_match" else np.nan},
        }
        for metric, values in metrics.items()
        for params, seeds in values.items()
        for replica, value in enumerate(seeds)
        if np.isfinite(value)
    ]
    frame = pd.DataFrame(rows, columns=list(rows[0]) if rows else list(COLUMNS)).assign(**fixed)
    return frame[list(COLUMNS)]


def plant(
    kind: Kind,
    seed: int,
    *,
    sizes: int = 9,
    seeds: int = 5,
    items: int = 1000,
    chance: float = 0.25,
    span: float = 3.0,
    missing: float = 0.0,
    split: bool = False,
    width: float | None = None,
) -> Planted:
    """One synthetic ladder of `sizes` over `span` decades, `seeds` at each.

    `width` (decades) replaces the one that would be drawn; `missing` is the probability that a
    seed is not there (one of each size always is).
    """
    rng = np.random.default_rng([KINDS.index(kind), seed])
    step = span / (sizes - 1)
    x = 2.6 + step * (np.arange(sizes) + np.r_[0, rng.uniform(-0.15, 0.15, sizes - 2), 0])
    share = (x - x[0]) / span
    height = rng.uniform(0.4, 0.97 - chance)
    steep = rng.uniform(0.3, 0.9)
    length = int(rng.integers(8, 21))
    drawn = rng.uniform(1.3, 3.0) if kind == "smooth" else rng.uniform(0.2, 0.6)
    width = drawn if width is None else width
    first = max(x[3] + 0.1, x[2] + 1.6 * width) if kind != "smooth" else x[2]
    x50 = rng.uniform(min(first, x[-2] - 0.2), x[-2] - 0.2)
    u = logistic(np.array([[x50, np.log10(width)]]), x)[0]
    wide = u if rng.uniform() < 0.5 else share
    # A token's accuracy climbs over so much of the ladder that it ends before the last sizes.
    start, climb = rng.uniform(0, 0.15), rng.uniform(0.6, 0.75)
    token = 0.1 + (TOP_TOKEN - 0.1) * np.clip((share - start) / climb, 0, 1)
    exact, loss = {
        "sharp": (chance + height * u, 2 - 1.8 * u),
        "induced": (chance + height * u, 2.2 - 1.6 * share),
        "mirage": (chance + (1 - chance) * token**length, -np.log(token)),
        "smooth": (chance + height * u, 2 - 1.6 * wide),
        "line": (chance + 0.02 + (height - 0.02) * share, 2 - 1.5 * share),
        "power": (chance + height * 10 ** (steep * (x - x[-1])), 2 * 10 ** (-0.4 * span * share)),
        "flat": (chance + 0 * x, 1.5 - 0.1 * share),
        "inverse": (chance + height * (1 - 0.9 * share), 1.5 + 0.8 * share),
    }[kind]
    if kind == "mirage":
        half = (TOP_TOKEN * 0.5 ** (1 / length) - 0.1) / (TOP_TOKEN - 0.1)
        x50, width = x[0] + span * (start + climb * half), np.nan
    means, losses = (np.repeat(part[:, None], seeds, 1) for part in (exact, loss))
    if split and kind in ("sharp", "induced", "smooth"):
        through = rng.uniform(size=means.shape) < u[:, None]
        means = chance + height * through
        losses = 2 - 1.8 * through if kind != "induced" else losses
    scatter = SCATTER * rng.normal(size=means.shape) * (kind != "flat")
    hits = rng.binomial(items, np.clip(means + scatter, 0, 1)) / items
    losses = losses + LOSS_SCATTER * rng.normal(size=means.shape)
    gone = rng.uniform(size=means.shape) < missing
    gone[np.arange(sizes), rng.integers(seeds, size=sizes)] = False
    params = np.round(10**x).astype(int).tolist()
    metrics = {"exact_match": hits, "nll": losses}
    if kind == "mirage":
        draws = rng.binomial(items * length, np.repeat(token[:, None], seeds, 1))
        metrics["token_accuracy"] = draws / (items * length)
    values = {
        name: dict(zip(params, np.where(gone, np.nan, drawn_values), strict=True))
        for name, drawn_values in metrics.items()
    }
    known = kind in ("sharp", "induced", "mirage")
    rows = table(values, chance=chance, n=items)
    return Planted(
        rows, kind, float(10**x50) if known else np.nan, float(width) if known else np.nan
    )


def draw(kind: Kind, seed: int, split: bool = False) -> Planted:
    """A random ladder: 8-12 sizes over 2.5-3.5 decades, 5-20 seeds of which a fifth may be missing
    in every other table, 1,000 items, chance 0.01 to 0.3.
    """
    rng = np.random.default_rng([seed, KINDS.index(kind)])
    return plant(
        *(kind, seed),
        sizes=int(rng.integers(8, 13)),
        seeds=int(rng.integers(5, 21)),
        span=rng.uniform(2.5, 3.5),
        chance=float(rng.choice([0.01, 0.1, 0.25, 0.3])),
        missing=0.2 * rng.integers(2),
        split=split,
    )


def rung(seed: int, share: float | None, seeds: int = 20, items: int = 1000) -> np.ndarray:
    """The rates of the seeds of one size: [seeds].

    With a `share` each seed is at 0.25 or, that often, at 1; without, they are one group of any
    mean, whose items are correlated by 0.001 to 0.15.
    """
    rng = np.random.default_rng([seed, seeds, items])
    if share is not None:
        mean = np.where(rng.uniform(size=seeds) < share, 1.0, 0.25) + rng.normal(0, SCATTER, seeds)
    else:
        size = 1 / 10 ** rng.uniform(-3, np.log10(0.15)) - 1
        center = rng.uniform(0.05, 0.95)
        mean = rng.beta(center * size, (1 - center) * size, seeds)
    return rng.binomial(items, np.clip(mean, 0, 1)) / items
