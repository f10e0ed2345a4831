"""How many hidden words does a small model of English restore, and is it more than counting does?

Command   lm run experiments/masked.py --workdir=runs/masked
Cost      half an hour of one busy core (--config.scale=smoke: a minute, one cell)
Expected  masked accuracy on 2,488 held-out tokens is 19 % at 2x16, 23 % at 2x32 and 25 % (standard
          error 1) at 2x64; a trigram's, on the same masked tokens, from the same rows with the same
          masks, is 19 % (the `chance` of those rows). Pseudo-perplexity falls from 720 to 229.
          Then: lm fill runs/masked/2x64 "Return the [MASK] of the file."

The text is the prose of the standard library's docstrings, 1.1 million characters of English that
every Python has, split by file. The model is an encoder with rotary positions; masks are drawn anew
for every batch, 80/10/10, whole words, one in seven.

The trigram guesses the commonest token between the two visible neighbours, else after the two
tokens before, else after one, before one, or of all (`lm/eval/trigram.py`); it is counted in the
whole training text.
"""

from ml_collections import ConfigDict

# size, learning rate, seeds
LADDER = (("2x16", 8e-3, 2), ("2x32", 5e-3, 2), ("2x64", 4e-3, 2))


def get_config() -> ConfigDict:
    """Everything that all points share."""
    c = ConfigDict()
    c.scale = "full"  # or "smoke"
    c.model = ConfigDict(
        {
            "size": "2x32",
            "vocab_size": 1504,  # the last id is [MASK]
            "activation": "gelu",
            "rope_base": 100.0,
            "layer_loop": "unroll",
            "direction": "both",
        }
    )
    c.optim = ConfigDict(
        {
            "name": "adamw",
            "learning_rate": 5e-3,
            "b2": 0.98,
            "weight_decay": 0.05,
            "warmup_tokens": 100_000,
        }
    )
    c.train = ConfigDict(
        {
            "tokens": 1_500_000,
            "chunk": 50,
            "checkpoint_every": 500,
            "replicas": "auto",
            "strategy": "replicated",
            "objective": "masked",
            "mask_unit": "words",
            "mask_rate": 0.15,
        }
    )
    c.data = ConfigDict(
        {
            "length": 64,
            "source": {"kind": "docstrings", "path": ""},
            "tokenizer": {"kind": "bpe", "vocab_size": 1500},
            "mixture": {"text": {"task": "text", "level": "", "rows": 16, "weight": 1.0}},
        }
    )
    c.eval = ConfigDict({"items": 100, "text_rows": 256, "first": 200, "batch": 128})
    c.seeds = ConfigDict(
        {"replicas": 2, "first": 0, "vary": ("init", "data", "dropout"), "eval": 0}
    )
    return c


def points(config: ConfigDict) -> list[dict]:
    """One point per size; `scale` "smoke" keeps the smallest, a tenth of the tokens."""
    if config.scale not in ("full", "smoke"):
        raise ValueError(f"scale is {config.scale!r}; use 'full' or 'smoke'")
    found = [
        {"name": s, "model.size": s, "optim.learning_rate": rate, "seeds.replicas": seeds}
        for s, rate, seeds in LADDER
    ]
    if config.scale == "smoke":
        return [found[0] | {"train.tokens": config.train.tokens // 10}]
    return found
