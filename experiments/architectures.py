"""Does an LSTM learn to look things up in its context, and from which size, beside a Transformer?

Command   lm run experiments/architectures.py --workdir=runs/transformer
          lm run experiments/architectures.py --workdir=runs/lstm --config.kind=lstm
Cost      two and a half and three minutes of one core (--config.scale=smoke: one size)
Expected  recall: the Transformer's is `emergent` from 1.7k non-embedding parameters; every LSTM is
          at its chance of 1/4 up to 16.6k, so `flat`. Text: the LSTM is behind from 1.5k on, by
          .05 nats a character at 2.4k and more later: its loss falls as parameters to the power
          -.063, the Transformer's as -.094.

The two runs differ in the kind of model and the learning rate: the same text and examples, tokens,
rows, seeds and sizes (layers x width). A layer of an LSTM has 8 D^2 + 4 D parameters, one of the
Transformer 12 D^2 + 2 D, so points lie at other parameters. They are two runs and not one, so that
each has its own onset and text law.
"""

from ml_collections import ConfigDict

SIZES = ("2x4", "1x8", "2x6", "2x8", "2x12", "2x16", "2x32")
RATES = {"transformer": 8e-3, "lstm": 1e-2}
LARGE_RATES = {"transformer": 5e-3, "lstm": 8e-3}  # at width 32


def get_config() -> ConfigDict:
    """Everything that all points share."""
    c = ConfigDict()
    c.scale = "full"  # or "smoke"
    c.kind = "transformer"  # or "lstm"
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
            "tokens": 2_000_000,
            "chunk": 50,
            "checkpoint_every": 500,
            "replicas": "auto",
            "strategy": "replicated",
        }
    )
    recall = {"task": "recall", "weight": 1.0, "examples": 40_000}
    c.data = ConfigDict(
        {
            "length": 32,
            "source": {"kind": "python_stdlib", "path": ""},
            "tokenizer": {"kind": "char", "vocab_size": 128},
            "mixture": {
                "text": {"task": "text", "level": "", "rows": 32, "weight": 0.25},
                "recall": recall | {"level": "5", "rows": 18},
                "recall_easy": recall | {"level": "3", "rows": 14},
            },
        }
    )
    c.eval = ConfigDict({"items": 1000, "text_rows": 512, "first": 100, "batch": 128})
    c.seeds = ConfigDict(
        {"replicas": 3, "first": 0, "vary": ("init", "data", "dropout"), "eval": 0}
    )
    return c


def points(config: ConfigDict) -> list[dict]:
    """One point per size; `scale` "smoke" keeps one size, a tenth of the tokens."""
    if config.scale not in ("full", "smoke"):
        raise ValueError(f"scale is {config.scale!r}; use 'full' or 'smoke'")
    if config.kind not in RATES:
        raise ValueError(f"kind is {config.kind!r}; use 'transformer' or 'lstm'")
    found = []
    for size in SIZES if config.scale == "full" else ("2x16",):
        model = {**config.model.to_dict(), "size": size}
        if config.kind == "lstm":
            model = {"kind": "lstm", "size": size, "vocab_size": config.model.vocab_size}
        rates = LARGE_RATES if size == "2x32" else RATES
        point = {"name": size, "model": model, "optim.learning_rate": rates[config.kind]}
        if config.scale == "smoke":
            point["train.tokens"] = config.train.tokens // 10
        found.append(point)
    return found
