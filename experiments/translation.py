"""From which size does a model translate better than by copying the source?

Command   lm run experiments/translation.py --workdir=runs/translation --config.lists=LISTS
Cost      de 12 minutes of two cores, kjv 15 (--config.scale=smoke: the smallest size, a tenth
          of the tokens)
Expected  de, BLEU of both seeds, where the copy has 8.5 [6.9, 10.3]: 7 and 8 at 2x16, 16 at 2x32,
          19 and 21 at 4x32, 23 at 4x64. kjv, copy 46.1 [44.2, 47.8]: 19 and 20, 51 and 53, 55 and
          55, 46 and 47 at 4x64, which knows 9,000 verses by heart. zh is at the copy's
          level: 3 and 4 at 4x32 against 3.6 [1.2, 6.4]; 4x64 has not been measured

Package descriptions in English and German, with few words in common, or (`--config.languages=zh`)
Chinese; and verses of the King James Version and of the World English Bible (`kjv`, the extra
`texts`), where most words stay and a copy is nearly right.
LISTS is a folder of apt's lists of descriptions; docs/text.md has the commands that fetch them.
"""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from experiments import seq2seq
from experiments.own import Plan, Record
from lm.data.pair_readers import APT_LISTS

METRICS = ("bleu", "chrf")
# Changes of the config for each pair of languages. Chinese needs a third of the characters, so it
# has no limit of the ratio, and a larger vocabulary, since 900 characters are in it by themselves;
# its 2,300 pairs are learned by heart in more than a few passes.
LANGUAGES: dict[str, dict[str, Any]] = {
    "kjv": {"data.pairs.kind": "bible", "train.tokens": 20_000_000},
    "de": {
        "data.pairs.kind": "descriptions",
        "data.pairs.target": "de",
        "data.lang": "de",
        "train.tokens": 20_000_000,
    },
    "zh": {
        "data.pairs.kind": "descriptions",
        "data.pairs.target": "zh_CN",
        "data.pairs.ratio": 0.0,
        "data.tokenizer.vocab_size": 3072,
        "model.vocab_size": 3072,
        "data.lang": "zh",
        "train.tokens": 5_000_000,
    },
}


def get_config() -> ConfigDict:
    """Everything that all points share."""
    c = ConfigDict()
    c.scale = "full"  # or "smoke"
    c.languages = "de"
    c.lists = APT_LISTS
    c.model = ConfigDict(
        {
            "size": "4x64",
            "vocab_size": 1024,
            "activation": "swiglu",
            "rope_base": 1000.0,
            "layer_loop": "unroll",
        }
    )
    c.optim = ConfigDict(
        {"learning_rate": 3e-3, "b2": 0.98, "weight_decay": 0.05, "warmup_tokens": 250_000}
    )
    # No tokens: as many as the pairs say.
    c.train = ConfigDict({"tokens": 0, "rows": 8, "chunk": 50})
    c.data = ConfigDict(
        {
            "pairs": {
                "kind": "bible",
                "path": "",
                "target": "",
                "longest": 100,
                "ratio": 1.8,
            },
            "tokenizer": {"kind": "bpe", "vocab_size": 1024},
            "length": 128,
            "answer": 64,
            "lang": "en",
            "baseline": "copy",
            "items": 800,
        }
    )
    c.seeds = ConfigDict({"replicas": 2, "first": 0, "vary": ("init", "data"), "eval": 0})
    return c


def points(config: ConfigDict) -> list[dict]:
    """One point per pair of languages and size; "smoke" keeps the smallest with a tenth of the
    tokens.
    """
    return seq2seq.points(config, config.languages, LANGUAGES)


def plan(config: ConfigDict, point: Mapping[str, Any]) -> Plan:
    """What a point will be and cost."""
    return seq2seq.plan(config, point, "translation")


def train(config: ConfigDict, plan: Plan, record: Record) -> list[str | None]:
    """Trains and scores all replicas of a point; the SHA-256 of each one's parameters."""
    return seq2seq.train(config, plan, record, METRICS)
