"""From which size does a model summarize better than the lead of the text does?

Command   lm run experiments/summarization.py --workdir=runs/summarization
Cost      26 minutes of two cores for synopses, 3 for docstrings when searched greedily
          (--config.scale=smoke: the smallest size, a tenth of the tokens)
Expected  synopses, ROUGE-1 of both seeds, where the lead has 37.2 [36.0, 38.2]: 17 at 2x16, 35 and
          37 at 2x32, 41 at 4x32, 42 at 4x64, the last two with intervals apart from the lead's, in
          ROUGE-2 and ROUGE-L too; greedily 38 and 39 at 4x64. Docstrings: 11 against 20

The body of a docstring and its first line, from the standard library of the running interpreter
(`--config.texts=docstrings`), and the description of a Debian package and its synopsis (`synopses`;
`--config.lists` is a folder of apt's lists of descriptions, docs/text.md has the commands that
fetch them). The baseline is the first sentence, cut where that is best on the training pairs.
"""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from experiments import seq2seq, translation
from experiments.own import Plan, Record

METRICS = ("rouge1", "rouge2", "rougeL", "bleu")
# 1,300 docstrings are known by heart after a few passes; the 24,000 synopses take 25 passes, in
# which a model learns to copy rare words.
TEXTS = {
    "docstrings": {"data.pairs.kind": "docstrings", "train.tokens": 5_000_000},
    "synopses": {"data.pairs.kind": "synopses", "train.tokens": 40_000_000},
}


def get_config() -> ConfigDict:
    """What all points share; the rest is the translation study's."""
    c = translation.get_config()
    del c.languages
    c.texts = "docstrings"
    c.data.update({"answer": 32, "beams": 4, "baseline": "lead", "items": 2000})
    c.data.pairs.update({"kind": "docstrings", "longest": 250, "ratio": 0.0})
    return c


def points(config: ConfigDict) -> list[dict]:
    """One point per kind of text and size; "smoke" keeps the smallest with a tenth of the
    tokens.
    """
    return seq2seq.points(config, config.texts, TEXTS)


def plan(config: ConfigDict, point: Mapping[str, Any]) -> Plan:
    """What a point will be and cost."""
    return seq2seq.plan(config, point, "summarization")


def train(config: ConfigDict, plan: Plan, record: Record) -> list[str | None]:
    """Trains and scores all replicas of a point; the SHA-256 of each one's parameters."""
    return seq2seq.train(config, plan, record, METRICS)
