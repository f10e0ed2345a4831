"""Which abilities begin within a ladder from four hundred to a hundred thousand parameters?

Command   lm run experiments/abilities.py --workdir=runs/abilities
Cost      about an hour on two cores, no accelerator (--config.scale=smoke: two minutes;
          --config.groups=logic,code: those alone)
Expected  emergent: recall in context, following one and then two edges of a graph (the second needs
          a third layer), looking a variable up in a program, adding three digits. Smooth: bigrams
          and text. Flat at chance: random labels and sparse parity. The rest is what the study is
          for (docs/results has what came).

A model learns one group of abilities at once, beside text in characters. A group has an easy level
of what it asks, since a little of it decides whether a plateau is left at all (experiments/LOG.md,
experiments/mixture.py); that a group cannot do is then a matter of its size and not of its luck.
Sizes are those whose threshold is in the depth as well as in the width.
"""

from ml_collections import ConfigDict

from experiments import desk
from lm.sizes import ladder

# size, learning rate, seeds
LADDER = (
    ("1x4", 8e-3, 5),
    ("2x4", 8e-3, 5),
    ("1x6", 8e-3, 5),
    ("1x8", 8e-3, 5),
    ("2x6", 8e-3, 5),
    ("2x8", 8e-3, 5),
    ("2x12", 8e-3, 5),
    ("2x16", 8e-3, 5),
    ("2x24", 6e-3, 4),
    ("2x32", 5e-3, 4),
    ("3x32", 5e-3, 3),
    ("4x32", 5e-3, 3),
)
LARGE = (("4x48", 4e-3, 3),)  # for the groups that are still rising at 4x32
SMOKE = ("2x4", "2x8")

# Task, level, rows of a batch of 64; text has the rest.
GROUPS = {
    "context": (("recall", "3", 12), ("recall", "5", 18), ("rule", "9", 12), ("rule", "11", 10)),
    "logic": (("recall", "3", 14), ("hop", "1", 12), ("hop", "2", 28)),
    "formulae": (
        *(("boolean", "1", 4), ("boolean", "2", 10), ("boolean", "3", 12)),
        *(("syllogism", "1", 12), ("syllogism", "2", 10), ("listops", "1", 6)),
    ),
    "commonsense": (
        *(("taxonomy", "1", 14), ("taxonomy", "2", 12), ("taxonomy", "3", 10)),
        *(("taxonomy", "exception", 8), ("taxonomy", "place", 8)),
    ),
    "code": (("recall", "3", 12), ("program", "0", 14), ("program", "1", 26)),
    "chains": (("recall", "3", 12), ("alias", "2", 22), ("program", "2", 20)),
    "arithmetic": (
        *(("reversed_addition", "1", 6), ("reversed_addition", "2", 16)),
        *(("reversed_addition", "3", 16), ("addition", "2", 6), ("modular", "23", 8)),
    ),
    "controls": (
        *(("random_labels", "4", 10), ("bigram", "1", 8), ("parity", "10", 10)),
        *(("dyck", "2", 10), ("unscramble", "4", 12)),
    ),
}
WITH_LARGE = ("logic", "chains")
# In a program a name stands two places before its value. With one head and the ladder's rates, half
# of the seeds of every width below 32 never leave the plateau (experiments/LOG.md).
CODE_RATE = 3e-3
CODE_HEADS = {"1x8": 2, "2x8": 2, "2x12": 2, "2x16": 2, "2x24": 2}


def get_config() -> ConfigDict:
    """What all groups share; the rest is the desk study's."""
    c = desk.get_config()
    c.groups = ",".join(GROUPS)
    c.optim.warmup_tokens = 400_000
    c.train.tokens = 16_000_000
    c.model.heads = 1  # every point has its own
    c.data.length = 64
    c.data.mixture = ConfigDict()
    c.eval.first = 250
    c.eval.text_rows = 256
    return c


def points(config: ConfigDict) -> list[dict]:
    """One point per group and size; "smoke" keeps two small sizes, two seeds, a twentieth of the
    tokens.
    """
    if config.scale not in ("full", "smoke"):
        raise ValueError(f"scale is {config.scale!r}; use 'full' or 'smoke'")
    found = []
    for group in config.groups.split(","):
        if group not in GROUPS:
            raise ValueError(f"group {group!r} is not one of {', '.join(GROUPS)}")
        for size, rate, seeds in LADDER + LARGE * (group in WITH_LARGE):
            heads = ladder(size).heads
            if group == "code":
                rate, heads = min(rate, CODE_RATE), CODE_HEADS.get(size, heads)
            point = {
                "name": f"{group}-{size}",
                "model.size": size,
                "model.heads": heads,
                "optim.learning_rate": rate,
                "seeds.replicas": seeds,
                "data.mixture": mixture(group),
            }
            if config.scale == "full":
                found.append(point)
            elif size in SMOKE:
                less = {"seeds.replicas": 2, "train.tokens": config.train.tokens // 20}
                found.append(point | less)
    return found


def mixture(group: str) -> dict[str, dict]:
    """The rows of a batch; answers weigh one, characters of text and of bigrams a quarter."""
    rows = {
        f"{task}-{level}": {
            **{"task": task, "level": level, "rows": count, "examples": 40_000},
            "weight": 0.25 if task == "bigram" else 1.0,
        }
        for task, level, count in GROUPS[group]
    }
    text = 64 - sum(count for _, _, count in GROUPS[group])
    return rows | {"text": {"task": "text", "level": "", "rows": text, "weight": 0.25}}
