"""At which size does a Transformer begin to look things up in its context?

Command   make demo, or: lm run experiments/desk.py --workdir=runs/desk
Cost      about three minutes on two cores, no accelerator (--config.scale=smoke: half a minute,
          two cells)
Expected  recall is at its chance of 1/4 below 1.6k non-embedding parameters and solved from 3.5k
          on, where there are two layers; 1x32 has 12k parameters in one layer and fails. 2x8 is
          the threshold: some seeds break through, others do not. Random labels stay at chance,
          the bigram control improves smoothly, text loss falls with size from 2x8 up.

One model learns everything at once from a mixture: half of the loss is the Python standard library,
character by character, a third recall (some of it with three edges, which is easier and brings five
edges forward), the rest addition and two controls. Rows are 32 tokens. The two larger sizes are
there for the text law.
"""

from ml_collections import ConfigDict

# size, learning rate, seeds, role
LADDER = (
    ("2x4", 8e-3, 3, "ladder"),
    ("1x8", 8e-3, 3, "ladder"),
    ("2x6", 8e-3, 3, "ladder"),
    ("2x8", 8e-3, 10, "ladder"),
    ("2x12", 8e-3, 5, "ladder"),
    ("2x16", 8e-3, 5, "ladder"),
    ("1x32", 5e-3, 3, "control"),
    ("2x32", 5e-3, 3, "ladder"),
    ("2x48", 4e-3, 3, "ladder"),
)
SMOKE = ("2x4", "1x8")


def get_config() -> ConfigDict:
    """Everything that all points share."""
    c = ConfigDict()
    c.scale = "full"  # or "smoke"
    c.model = ConfigDict(
        {
            "size": "2x16",
            "vocab_size": 128,
            "activation": "gelu",
            "rope_base": 100.0,
            "layer_loop": "unroll",
        }
    )
    c.optim = ConfigDict(
        {
            "name": "adamw",
            "learning_rate": 8e-3,
            "b2": 0.98,
            "weight_decay": 0.05,
            "warmup_tokens": 200_000,
        }
    )
    c.train = ConfigDict(
        {
            "tokens": 3_000_000,
            "chunk": 50,
            "checkpoint_every": 500,
            "replicas": "auto",
            "strategy": "replicated",
        }
    )
    c.data = ConfigDict(
        {
            "length": 32,
            "source": {"kind": "python_stdlib", "path": ""},
            "tokenizer": {"kind": "char", "vocab_size": 128},
            "mixture": {
                "text": {"task": "text", "level": "", "rows": 26, "weight": 0.25},
                "recall": {
                    "task": "recall",
                    "level": "5",
                    "rows": 14,
                    "weight": 1.0,
                    "examples": 40_000,
                },
                "recall_easy": {
                    "task": "recall",
                    "level": "3",
                    "rows": 10,
                    "weight": 1.0,
                    "examples": 30_000,
                },
                "bigram": {
                    "task": "bigram",
                    "level": "1",
                    "rows": 4,
                    "weight": 0.25,
                    "examples": 10_000,
                },
                "labels": {
                    "task": "random_labels",
                    "level": "4",
                    "rows": 4,
                    "weight": 1.0,
                    "examples": 30_000,
                },
                "add1": {
                    "task": "addition",
                    "level": "1",
                    "rows": 2,
                    "weight": 1.0,
                    "examples": 20_000,
                },
                "add2": {
                    "task": "addition",
                    "level": "2",
                    "rows": 2,
                    "weight": 1.0,
                    "examples": 20_000,
                },
                "add3": {
                    "task": "addition",
                    "level": "3",
                    "rows": 2,
                    "weight": 1.0,
                    "examples": 20_000,
                },
            },
        }
    )
    c.eval = ConfigDict({"items": 1000, "text_rows": 512, "first": 50, "batch": 128})
    c.seeds = ConfigDict(
        {"replicas": 3, "first": 0, "vary": ("init", "data", "dropout"), "eval": 0}
    )
    return c


def points(config: ConfigDict) -> list[dict]:
    """One point per size; `scale` "smoke" keeps two small ones with two seeds and a tenth of the
    tokens.
    """
    found = []
    for size, rate, seeds, role in LADDER:
        point = {
            "name": size,
            "role": role,
            "model.size": size,
            "optim.learning_rate": rate,
            "seeds.replicas": seeds,
        }
        if config.scale == "full":
            found.append(point)
        elif config.scale == "smoke":
            if size in SMOKE:
                found.append(
                    point | {"seeds.replicas": 2, "train.tokens": config.train.tokens // 10}
                )
        else:
            raise ValueError(f"scale is {config.scale!r}; use 'full' or 'smoke'")
    return found
