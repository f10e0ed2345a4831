"""Where do abilities begin between 125 million and 7 billion parameters?

Command   lm plan experiments/ladder_7b.py --topology=v5e:16x16
          lm run experiments/ladder_7b.py --workdir=runs/ladder_7b --config.data.source.path=TEXTS
Cost      planned, never run: docs/plan.md has the figures for TPUs and GPUs
          (--config.scale=smoke: two tiny sizes of the same program in a minute or two; on eight
          simulated devices with XLA_FLAGS=--xla_force_host_platform_device_count=8)
Expected  recall and addition are at chance at smoke scale; nothing is claimed of the full one

Every size sees 20 tokens per parameter (Hoffmann et al. 2022) under one peak learning rate, which
muP carries from the width of the smallest to the others. Weights, optimiser and batch are cut over
all devices (fsdp); the smallest, whose 768 columns 512 devices do not divide, is whole on each.
Layers are recomputed in the backward pass. TEXTS is a folder of your own: the largest size takes
140 billion tokens.
"""

from ml_collections import ConfigDict

from lm.sizes import ladder, parameters

TOKENS_PER_PARAMETER = 20
# size, seeds, strategy, rows of text and of each ability
LADDER = (
    ("125m", 3, "replicated", 448, 32),
    ("350m", 3, "fsdp", 448, 32),
    ("1b", 2, "fsdp", 448, 32),
    ("3b", 1, "fsdp", 448, 32),
    ("7b", 1, "fsdp", 896, 64),
)
SMOKE = (("2x16", 2, "replicated", 8, 4), ("2x32", 1, "fsdp", 8, 4))
SMOKE_SETTINGS = {
    "model.vocab_size": 128,
    "model.base_width": 16,
    "optim.warmup_tokens": 2000,
    "train.tokens": 40_000,
    "train.chunk": 10,
    "train.checkpoint_every": 20,
    "data.length": 64,
    "data.source": {"kind": "python_stdlib", "path": ""},
    "data.tokenizer": {"kind": "char", "vocab_size": 128},
    "eval.items": 64,
    "eval.text_rows": 32,
    "eval.first": 10,
    "eval.batch": 32,
}


def get_config() -> ConfigDict:
    """Everything that all points share."""
    c = ConfigDict()
    c.scale = "full"  # or "smoke"
    c.model = ConfigDict(
        {
            "size": "125m",
            "vocab_size": 32_000,
            "activation": "swiglu",
            "head": "untied",
            "dtype": "bfloat16",
            "base_width": 768,
            "remat": "full",
            "attention": "auto",
        }
    )
    c.optim = ConfigDict(
        {
            "name": "adamw",
            "learning_rate": 4e-3,
            "b2": 0.95,
            "weight_decay": 0.1,
            "warmup_tokens": 500_000_000,
        }
    )
    c.train = ConfigDict(
        {
            "tokens": 2_500_000_000,
            "chunk": 10,
            "checkpoint_every": 500,
            "replicas": "auto",
            "strategy": "fsdp",
            "replica_devices": 1,
        }
    )
    c.data = ConfigDict(
        {
            "length": 2048,
            "source": {"kind": "folder", "path": "texts"},
            "tokenizer": {"kind": "bpe", "vocab_size": 32_000},
            "mixture": {
                "text": {"task": "text", "level": "", "rows": 448, "weight": 1.0},
                "recall": {
                    "task": "recall",
                    "level": "5",
                    "rows": 32,
                    "weight": 1.0,
                    "examples": 40_000,
                },
                "addition": {
                    "task": "addition",
                    "level": "2",
                    "rows": 32,
                    "weight": 1.0,
                    "examples": 20_000,
                },
            },
        }
    )
    c.eval = ConfigDict({"items": 1000, "text_rows": 512, "first": 50, "batch": 512})
    c.seeds = ConfigDict(
        {"replicas": 1, "first": 0, "vary": ("init", "data", "dropout"), "eval": 0}
    )
    return c


def points(config: ConfigDict) -> list[dict]:
    """One point per size; `scale` "smoke" takes two tiny sizes through the same program."""
    if config.scale not in ("full", "smoke"):
        raise ValueError(f"scale is {config.scale!r}; use 'full' or 'smoke'")
    found = []
    for size, seeds, strategy, text, ability in LADDER if config.scale == "full" else SMOKE:
        point = {
            "name": size,
            "model.size": size,
            "seeds.replicas": seeds,
            "train.strategy": strategy,
            "data.mixture.text.rows": text,
            "data.mixture.recall.rows": ability,
            "data.mixture.addition.rows": ability,
        }
        if config.scale == "smoke":
            found.append(point | SMOKE_SETTINGS)
        else:
            model = ladder(size, vocab_size=config.model.vocab_size)
            found.append(point | {"train.tokens": TOKENS_PER_PARAMETER * parameters(model).total})
    return found
