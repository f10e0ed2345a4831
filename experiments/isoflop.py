"""Which size is best for a given number of FLOPs?

Command   lm run experiments/isoflop.py --workdir=runs/isoflop
Cost      about four minutes on two cores (--config.scale=smoke: half a minute)
Expected  at every budget the held-out loss against size is a valley; its floor moves to larger
          models as FLOPs to a power near 1/2 (Hoffmann et al. 2022, approach 2). The power is not
          the same with and without the embedding in the count: at these sizes the embedding is
          most of the model, which is what the literature's disagreement was mostly about (Pearce
          and Song 2024).

Text only, characters, three seeds a point. The tokens of a point are its budget over the exact
FLOPs of a token; `lm.emergence.isoflop` analyses the table.
"""

from ml_collections import ConfigDict

from experiments import desk
from lm.sizes import flops_per_token, ladder

BUDGETS = {"3e10": 3e10, "1e11": 1e11, "3e11": 3e11, "1e12": 1e12}  # FLOPs of one replica
# Width: learning rate. Two layers each, so that the shape is not a second variable.
RATES = {
    **{4: 8e-3, 6: 8e-3, 8: 8e-3, 12: 8e-3, 16: 8e-3},
    **{24: 6e-3, 32: 5e-3, 48: 4e-3, 64: 3e-3, 96: 2e-3},
}
# Widths on both sides of the best one.
WIDTHS = {
    "3e10": (4, 6, 8, 12, 16, 24),
    "1e11": (6, 8, 12, 16, 24, 32),
    "3e11": (12, 16, 24, 32, 48, 64),
    "1e12": (16, 24, 32, 48, 64, 96),
}


def get_config() -> ConfigDict:
    """Text alone, in rows of 64."""
    c = desk.get_config()
    c.data.length = 64
    c.data.mixture = ConfigDict({"text": {"task": "text", "level": "", "rows": 32, "weight": 1.0}})
    c.seeds.replicas = 3
    c.train.chunk = 10  # steps come in whole dispatches, and a budget should be met
    c.eval.first = 1_000_000  # the end only: a schedule is over there, and nowhere else
    return c


def points(config: ConfigDict) -> list[dict]:
    """Every width of every budget; "smoke" keeps three of the smallest budget, a tenth of it."""
    if config.scale not in ("full", "smoke"):
        raise ValueError(f"scale is {config.scale!r}; use 'full' or 'smoke'")
    smoke = config.scale == "smoke"
    found = []
    for name, budget in BUDGETS.items():
        for width in WIDTHS[name]:
            model = ladder(f"2x{width}", vocab_size=config.model.vocab_size)
            tokens = budget / flops_per_token(model, config.data.length) / (10 if smoke else 1)
            found.append(
                {
                    "name": f"{name}-2x{width}",
                    "model.size": f"2x{width}",
                    "optim.learning_rate": RATES[width],
                    "train.tokens": round(tokens),
                    # A tenth of the run, but never more than the desk study's.
                    "optim.warmup_tokens": round(min(tokens / 10, 200_000)),
                }
            )
    return found[1:4] if smoke else found
