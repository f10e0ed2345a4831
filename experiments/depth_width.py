"""Does in-context recall need parameters, or depth?

Command   lm run experiments/depth_width.py --workdir=runs/depth_width
Cost      about four minutes on two cores (--config.scale=smoke: half a minute)
Expected  one layer never learns it, however wide (Olsson et al. 2022: an induction head takes two
          layers); from two layers on the threshold is in the width, between 6 and 12, and further
          layers move it little. Text loss follows the number of parameters whatever their shape.

A grid of layers and widths under the desk study's mixture and budget. The one-layer points are
controls, so that verdicts are those of models that can do it.
"""

from ml_collections import ConfigDict

from experiments import desk
from experiments.sweep import product

# Width and its learning rate, as in the desk study.
WIDTHS = ((4, 8e-3), (6, 8e-3), (8, 8e-3), (12, 8e-3), (16, 8e-3), (24, 6e-3), (32, 5e-3))
LAYERS = (1, 2, 3, 4)


def get_config() -> ConfigDict:
    """The desk study with three seeds a shape."""
    return desk.get_config()


def points(config: ConfigDict) -> list[dict]:
    """Every shape; "smoke" keeps four of them, two seeds and a tenth of the tokens."""
    if config.scale not in ("full", "smoke"):
        raise ValueError(f"scale is {config.scale!r}; use 'full' or 'smoke'")
    smoke = config.scale == "smoke"
    shapes = product(
        [{"layers": n} for n in (LAYERS[:2] if smoke else LAYERS)],
        [{"width": w, "rate": r} for w, r in (WIDTHS[:2] if smoke else WIDTHS)],
    )
    less = {"seeds.replicas": 2, "train.tokens": config.train.tokens // 10} if smoke else {}
    return [
        {
            "name": f"{s['layers']}x{s['width']}",
            "model.size": f"{s['layers']}x{s['width']}",
            "role": "control" if s["layers"] == 1 else "ladder",
            "optim.learning_rate": s["rate"],
        }
        | less
        for s in shapes
    ]
