"""Small models that learn pairs of texts: what the studies `translation` and `summarization` share.

A model reads `source \\n` and writes the target; only the target is in the loss. What it writes for
the held-out sources is scored as text, and beside every score stands that of a baseline
which writes the source, or its lead. A held-out source has no near copy in training
(`lm.data.pairs`). A point's folder gets, for every replica, `outputs-REPLICA.jsonl`, which `lm
score` reads, and `model-REPLICA`, which `lm translate` and `lm summarize` load.

`python -m experiments.seq2seq WORKDIR [BEAMS]` prints every replica's scores beside the baseline's;
with BEAMS, of what its model writes now by a search of so many beams.
"""

import dataclasses
import json
import math
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import jax
import numpy as np
from ml_collections import ConfigDict

from experiments.own import Plan, Record
from experiments.pair_data import DataConfig, Prepared, prepared
from lm import models, objectives, rundir, sizes
from lm.config import UserError, build, nearest, positive, to_dict
from lm.data.loader import Batch, Loader, MixtureItem
from lm.emergence.metrics import Measure
from lm.eval import text
from lm.models import TransformerConfig, fused
from lm.pretrained import Loaded
from lm.pretrained.export import export
from lm.pretrained.tokenizer import from_ours
from lm.sharding import make_mesh
from lm.train import optim
from lm.train.cell import Axis, Replica, SeedConfig
from lm.train.population import make_population, replica
from lm.train.record import params_sha256
from lm.train.step import ALIVE, TrainState, make_chunk, make_step
from lm.translate import TOKENIZER, answers, open_model

# Size, learning rate, seeds; `smoke` keeps the first, with a tenth of the tokens.
LADDER = (("2x16", 6e-3, 2), ("2x32", 5e-3, 2), ("4x32", 5e-3, 2), ("4x64", 3e-3, 2))
APT = ("synopses", "descriptions")  # kinds of pairs that come from `config.lists`
RATE = 4e10  # FLOPs a second of one core of a 2025 server, for guesses
EVAL_SECONDS = 20.0  # of one replica
METRICS = text.METRICS[:-1]  # of `summary`


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The budget in tokens of rows, rows of a batch, and steps of a dispatch."""

    tokens: int
    rows: int = 32
    chunk: int = 20

    def __post_init__(self) -> None:
        for name in ("tokens", "rows", "chunk"):
            positive(name, getattr(self, name))


@dataclasses.dataclass(frozen=True)
class Settings:
    """A point's config."""

    data: DataConfig
    model: TransformerConfig
    optim: optim.OptimConfig
    train: TrainConfig
    seeds: SeedConfig

    @property
    def per_step(self) -> int:
        """Tokens of a batch."""
        return self.train.rows * self.data.length

    @property
    def steps(self) -> int:
        """The budget in steps, rounded up to whole dispatches."""
        chunk = self.train.chunk
        return math.ceil(self.train.tokens / (self.per_step * chunk)) * chunk


def points(config: ConfigDict, asked: str, known: Mapping[str, Mapping[str, Any]]) -> list[dict]:
    """A point for each size and each of the names in `asked`, a list with commas; `known` has what
    a name changes in the config, its tokens included, in whose place `train.tokens` stands if it is
    not 0. Raises `UserError` for other names and scales.
    """
    if config.scale not in ("full", "smoke"):
        raise UserError(f"scale is {config.scale!r}; use 'full' or 'smoke'")
    full, found = config.scale == "full", []
    for name in asked.split(","):
        if name not in known:
            raise UserError(f"no pairs {name!r}; {nearest(name, list(known))}")
        change = dict(known[name])
        tokens = config.train.tokens or change["train.tokens"]
        change["train.tokens"] = tokens if full else tokens // 10
        if change["data.pairs.kind"] in APT:
            change["data.pairs.path"] = config.lists
        for size, rate, seeds in LADDER if full else LADDER[:1]:
            own = {"optim.learning_rate": rate, "seeds.replicas": seeds}
            found.append({"name": f"{name}-{size}", "model.size": size, **change, **own})
    return found


def settings(config: ConfigDict) -> Settings:
    """The groups of a point's config as strict records; raises `UserError`."""
    groups = {k: v for k, v in config.to_dict().items() if isinstance(v, Mapping)}
    model = dict(groups["model"]) | {"context": groups["data"]["length"]}
    size = model.pop("size")
    groups["model"] = to_dict(sizes.ladder(size, **model))
    return build(Settings, groups)


def plan(config: ConfigDict, point: Mapping[str, Any], task: str) -> Plan:
    """What a point will be and cost."""
    s = settings(config)
    replicas = []
    for index in range(s.seeds.replicas):
        seeds: dict[str, Any] = {
            axis: s.seeds.first + index * (axis in s.seeds.vary) for axis in get_args(Axis)
        }
        seeds |= {"eval": s.seeds.eval, "learning_rate": s.optim.learning_rate}
        replicas.append(Replica(point["name"], point.get("role", "ladder"), index, **seeds))
    count, flops = sizes.parameters(s.model), sizes.flops_per_token(s.model, s.data.length)
    return Plan(
        *(point["name"], point.get("role", "ladder"), s.model.layers, s.model.width),
        *(count.non_embedding, count.total, s.steps, s.per_step),
        flops_per_token=flops,
        seconds=len(replicas) * (s.steps * s.per_step * flops / RATE + EVAL_SECONDS),
        replicas=tuple(replicas),
        tasks=({"task": task, "level": level(s.data), "format": 0, "chance": None},),
    )


def level(data: DataConfig) -> str:
    """The level of a study's rows: the kind of pairs, and their language if it is not English."""
    return data.pairs.kind + ("" if data.lang == "en" else f"-{data.lang}")


def train(config: ConfigDict, plan: Plan, record: Record, metrics: Sequence[str]) -> list:
    """Trains and scores all replicas of a point; the SHA-256 of each one's parameters."""
    s = settings(config)
    data = prepared(s.data, record.folder.parent / "data")
    loaders = [
        Loader((MixtureItem("pairs", data.train, s.train.rows),), s.data.length, who.data)
        for who in plan.replicas
    ]
    tick = time.monotonic()
    mesh = make_mesh("replicated", jax.devices()[:1])
    population = make(s, len(plan.replicas), mesh)
    numbers = [np.array([getattr(w, axis) for w in plan.replicas]) for axis in ("init", "dropout")]
    rates = np.array([who.learning_rate for who in plan.replicas], np.float32)
    with jax.set_mesh(mesh):
        states = population.init(numbers[0].astype(np.uint32), rates, numbers[1].astype(np.uint32))
        record.seconds["compile"] = time.monotonic() - tick
        for first in range(0, s.steps, s.train.chunk):
            tick = time.monotonic()
            chunks = [each.chunk(first, s.train.chunk) for each in loaders]
            states, losses = population.run(
                states, Batch(*map(np.stack, zip(*chunks, strict=True)))
            )
            found = np.asarray(losses, np.float64).mean(axis=1)
            record.seconds["train"] += time.monotonic() - tick
            record.progress(first + s.train.chunk, float(np.nanmean(found)))
            if _due(first + s.train.chunk, s):
                for who, loss in zip(plan.replicas, found, strict=True):
                    measured = {"loss": Measure(float(loss), math.nan, s.train.chunk)}
                    record.measure(who, first + s.train.chunk, "train", "mixture", measured)
        tick = time.monotonic()
        score(s, states, data, record, metrics)
        record.seconds["eval"] = time.monotonic() - tick
    return [
        params_sha256(replica(states.params, i)) if int(states.diverged_at[i]) == ALIVE else None
        for i in range(len(plan.replicas))
    ]


def make(s: Settings, replicas: int, mesh: Any) -> Any:
    """The population of a point, by the fused kernel where it has one."""
    kernel = not fused.supports(s.model, s.data.length)
    tx = optim.direction(s.optim, models.mup_multipliers(s.model))
    step = make_step(
        models.build(s.model),
        objectives.fused if kernel else objectives.causal,
        tx,
        optim.schedule(s.optim, s.steps * s.per_step),
        tokens_per_step=s.per_step,
        random=s.model.dropout > 0,
    )
    return make_population(
        s.model,
        make_chunk(step),
        tx,
        replicas=replicas,
        rows=s.train.rows,
        mesh=mesh,
        mode="fused" if kernel else "sequential",
    )


def _due(step: int, s: Settings) -> bool:
    """At powers of two of dispatches, and at the end."""
    dispatches = step // s.train.chunk
    return step == s.steps or dispatches & (dispatches - 1) == 0


def score(
    s: Settings, states: TrainState, data: Prepared, record: Record, metrics: Sequence[str]
) -> None:
    """Writes, stores and scores what every replica says of the held-out sources."""
    sources, references = (list(texts) for texts in zip(*data.heldout, strict=True))
    base = text.statistics(data.baseline, references, metrics, s.data.lang)
    task = record.plan.tasks[0]
    for index, who in enumerate(record.plan.replicas):
        loaded = keep(s, replica(states.params, index), data, record.folder / f"model-{index}")
        written = answers(loaded, sources, tokens=s.data.answer, beams=s.data.beams)
        lines = [
            {"source": a, "text": b, "reference": c, "baseline": d}
            for a, b, c, d in zip(sources, written, references, data.baseline, strict=True)
        ]
        content = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        rundir.write_bytes(record.folder / f"outputs-{index}.jsonl", content.encode())
        measured = {}
        ours = text.statistics(written, references, metrics, s.data.lang)
        for result in text.compare(ours, base):
            assert result.against is not None
            for name, found in (("", result.score), (f"{s.data.baseline}_", result.against.other)):
                measured[name + result.metric] = Measure(found.value, found.stderr, len(lines))
        record.measure(who, s.steps, task["task"], task["level"], measured)


def keep(s: Settings, params: Any, data: Prepared, folder: Path) -> Loaded:
    """Writes a replica as a folder that transformers loads, with our tokenizer beside it."""
    loaded = Loaded(models.build(s.model), params, from_ours(data.tokenizer), s.model)
    shutil.rmtree(folder, ignore_errors=True)  # of an attempt that was killed
    export(loaded, folder)
    data.tokenizer.save(folder / TOKENIZER)
    return loaded


def summary(folder: Path, beams: int = 0) -> list[dict[str, Any]]:
    """Every replica of a run directory beside its baseline, from the stored outputs, or from what
    the stored models write by a search of so many beams.
    """
    study, found = rundir.read_json(folder / "study.json"), []
    for point in study["points"]:
        data = study["cell_configs"][point["name"]]["config"]["data"]
        for path in sorted((folder / point["name"]).glob("outputs-*.jsonl")):
            lines = [json.loads(line) for line in path.read_text().split("\n") if line]
            texts = {key: [line[key] for line in lines] for key in lines[0]}
            if beams:
                model = open_model(str(path.parent / path.stem.replace("outputs", "model")))
                tokens = data["answer"]
                texts["text"] = answers(model, texts["source"], tokens=tokens, beams=beams)
            ours, base = (
                text.statistics(texts[key], texts["reference"], METRICS, data["lang"])
                for key in ("text", "baseline")
            )
            for result in text.compare(ours, base):
                found.append({"point": point["name"], "replica": path.stem[8:], "result": result})
    return found


def main(argv: Sequence[str]) -> int:
    """Prints `summary` of the run directory `argv[0]`, by `argv[1]` beams if that is there."""
    for row in summary(Path(argv[0]), int(argv[1]) if argv[1:] else 0):
        result = row["result"]
        ours, base = result.score, result.against.other
        apart = (
            "above"
            if ours.ci.low > base.ci.high
            else "below"
            if ours.ci.high < base.ci.low
            else "overlap"
        )
        print(
            f"{row['point']:16} {row['replica']:2} {result.metric:7}"
            f" {ours.value:6.2f} [{ours.ci.low:.2f}, {ours.ci.high:.2f}]"
            f"   baseline {base.value:6.2f} [{base.ci.low:.2f}, {base.ci.high:.2f}]  {apart}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
