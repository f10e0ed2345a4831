"""What do twenty seeds look like just below, at and just above an onset?

Command   lm run experiments/seeds.py --workdir=runs/seeds
Cost      about four minutes on two cores (--config.scale=smoke: half a minute)
Expected  in-context recall begins between 2x6 and 2x10. Below, all seeds sit at chance; above, all
          sit at 1; between, seeds are split in two groups, few of them in the middle, so that a
          mean with a normal interval describes none of them. The share that broke through rises
          with size, and its interval says how well twenty seeds know it.

The mixture, the budget and the recipe are those of the desk study.
"""

from ml_collections import ConfigDict

from experiments import desk

SIZES = ("2x4", "2x6", "2x8", "2x10", "2x12", "2x14", "2x16")
SEEDS = 20


def get_config() -> ConfigDict:
    """The desk study with twenty seeds a size."""
    c = desk.get_config()
    c.seeds.replicas = SEEDS
    return c


def points(config: ConfigDict) -> list[dict]:
    """One point per size; "smoke" keeps three sizes, three seeds and a tenth of the tokens."""
    found = [{"name": size, "model.size": size} for size in SIZES]
    if config.scale == "smoke":
        small = {"seeds.replicas": 3, "train.tokens": config.train.tokens // 10}
        return [point | small for point in found[1:4]]
    if config.scale != "full":
        raise ValueError(f"scale is {config.scale!r}; use 'full' or 'smoke'")
    return found
