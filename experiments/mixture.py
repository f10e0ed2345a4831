"""Does the share of an ability in the data decide more than the size of the model?

Command   lm run experiments/mixture.py --workdir=runs/mixture
Cost      about six minutes on two cores (--config.scale=smoke: half a minute)
Expected  with a third of the rows recall begins between 2x6 and 2x12; with an eighth of them it
          begins later, or not at all within the budget: more size does not make up for less data
          of the kind, since leaving the plateau is a matter of waiting (time to emergence says
          which it is). Text loss improves with its own share.

Rows of recall against rows of text, at each size; controls and addition of the desk study keep
their rows, and a share of the recall is the easier one with three edges, as there.
"""

from ml_collections import ConfigDict

from experiments import desk
from experiments.sweep import product

SIZES = (("2x6", 8e-3), ("2x8", 8e-3), ("2x12", 8e-3), ("2x16", 8e-3), ("2x32", 5e-3))
# Rows of recall with five edges and with three; text has the rest of 50.
SHARES = {"r06": (2, 1), "r12": (4, 2), "r24": (7, 5), "r38": (11, 8), "r48": (14, 10)}


def get_config() -> ConfigDict:
    """The desk study with four seeds a point."""
    c = desk.get_config()
    c.seeds.replicas = 4
    return c


def points(config: ConfigDict) -> list[dict]:
    """Every size with every share; "smoke" keeps two of each, two seeds, a tenth of the tokens."""
    if config.scale not in ("full", "smoke"):
        raise ValueError(f"scale is {config.scale!r}; use 'full' or 'smoke'")
    smoke = config.scale == "smoke"
    sizes = [
        {"name": size, "model.size": size, "optim.learning_rate": rate} for size, rate in SIZES
    ]
    shares = [
        {
            "name": name,
            "data.mixture.recall.rows": five,
            "data.mixture.recall_easy.rows": three,
            "data.mixture.text.rows": 50 - five - three,
            # The ladder of verdicts is that of the largest share; the others are compared with it.
            "role": "ladder" if name == "r48" else "control",
        }
        for name, (five, three) in SHARES.items()
    ]
    if smoke:
        less = {"seeds.replicas": 2, "train.tokens": config.train.tokens // 10}
        return [point | less for point in product(sizes[:2], shares[-2:])]
    return product(sizes, shares)
