"""What a cell is: the records that say everything about one compiled program and its replicas.

A study gives points; points that differ in nothing but their name and learning rate share a
compiled program and become one cell, whose replicas are (point, seed) pairs. `Cell` is written to
`config.json` as it is and read back by `lm.config.build`: what is not in it cannot change a result.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

from lm import tasks
from lm.config import UserError, build, fingerprint, positive, to_dict, within
from lm.data.pair_readers import PairsConfig
from lm.data.sources import SourceConfig
from lm.data.tokenizer import TokenizerConfig
from lm.models import Config
from lm.sharding import Strategy
from lm.sizes import ladder
from lm.train.objective import PAIRS, TEXT, Objective, check_objective
from lm.train.optim import OptimConfig, schedule
from lm.train.population import Mode

Axis = Literal["init", "data", "dropout"]
LAST_DOUBLED = 512  # steps; checkpoints that are kept are at powers of two up to here


@dataclasses.dataclass(frozen=True)
class MixtureConfig:
    """One source of a batch: `rows` of it, its weight in the loss, and for an ability how many
    examples are drawn once, and in how many prompt formats it is trained and tested.
    """

    task: str
    rows: int
    level: str = ""
    weight: float = 1.0
    examples: int = 20_000
    formats: int = 1

    def __post_init__(self) -> None:
        positive("rows", self.rows)
        within("weight", self.weight, 0)
        positive("examples", self.examples)
        within("formats", self.formats, 1, tasks.FORMATS)
        if self.task not in (TEXT, PAIRS):
            tasks.task(self.task, self.level)


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The text, its tokenizer, and the batch: `mixture` rows of `length` tokens."""

    mixture: dict[str, MixtureConfig]
    length: int
    source: SourceConfig = SourceConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    # Where the mixture's task "pairs" comes from; tokenizers are then trained on it.
    pairs: PairsConfig | None = dataclasses.field(default=None, metadata={"omit": True})

    def __post_init__(self) -> None:
        positive("length", self.length)
        if not self.mixture:
            raise UserError("mixture is empty; give it at least one source")
        sources = [(m.task, m.level) for m in self.mixture.values()]
        if len(set(sources)) < len(sources):
            raise UserError(
                f"mixture names {max(sources, key=sources.count)} twice; merge their rows"
            )

    @property
    def rows(self) -> int:
        """Rows of a batch."""
        return sum(m.rows for m in self.mixture.values())


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The budget and how it is spent; `chunk` steps are one dispatch. Beside the two newest, the
    checkpoints of `Cell.kept_steps` stay on the disk if `keep_every` is not 0.
    """

    tokens: int
    chunk: int = 50
    checkpoint_every: int = 500  # steps
    replicas: Mode = "auto"
    strategy: Strategy = "replicated"
    replica_devices: int = 1  # how many devices replicas are spread over
    # Left out of configs where it is 0, which all studies were before there was a choice.
    keep_every: int = dataclasses.field(default=0, metadata={"omit": True})  # steps
    # How many devices share a product, and the tokens of a row; 0 is the strategy's own.
    tensor_devices: int = dataclasses.field(default=0, metadata={"omit": True})
    sequence_devices: int = dataclasses.field(default=0, metadata={"omit": True})
    # What is minimised (lm/objectives.py), and the settings of those that have any.
    objective: Objective = dataclasses.field(default="causal", metadata={"omit": True})
    mask_rate: float = dataclasses.field(default=0.15, metadata={"omit": True})
    mask_unit: Literal["tokens", "words"] = dataclasses.field(
        default="tokens", metadata={"omit": True}
    )
    span_length: float = dataclasses.field(default=3.0, metadata={"omit": True})
    label_smoothing: float = dataclasses.field(default=0.0, metadata={"omit": True})

    def __post_init__(self) -> None:
        within("label_smoothing", self.label_smoothing, 0, 0.9)
        within("mask_rate", self.mask_rate, 0.001, 0.9)
        within("span_length", self.span_length, 1)
        for name in ("tokens", "chunk", "checkpoint_every", "replica_devices"):
            positive(name, getattr(self, name))
        for name in ("keep_every", "tensor_devices", "sequence_devices"):
            within(name, getattr(self, name), 0)
        if self.replicas == "sequential" and self.replica_devices > 1:
            raise UserError(
                f"replica_devices is {self.replica_devices} with replicas 'sequential'; replicas"
                " that are spread over devices run side by side, use 'vmap' or 'auto'"
            )


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """What is measured at `first`, 2 `first`, 4 `first`, … steps (rounded up to whole dispatches)
    and at the end.
    """

    items: int = 1000  # of each task; fewer where a task has fewer distinct ones
    text_rows: int = 512
    first: int = 50
    batch: int = 128  # rows of one dispatch

    def __post_init__(self) -> None:
        for name in ("items", "text_rows", "first", "batch"):
            positive(name, getattr(self, name))


@dataclasses.dataclass(frozen=True)
class SeedConfig:
    """`replicas` seeds from `first` on; an axis that does not vary keeps `first` in all of them."""

    replicas: int = 3
    first: int = 0
    vary: tuple[Axis, ...] = ("init", "data", "dropout")
    eval: int = 0  # draws the test items: the same for every replica, so that they can be compared

    def __post_init__(self) -> None:
        positive("replicas", self.replicas)
        within("first", self.first, 0, 2**31)
        within("eval", self.eval, 0, 2**31)


@dataclasses.dataclass(frozen=True)
class Point:
    """One setting of the axes; `role` "control" is reported and never fitted."""

    name: str
    model: Config
    optim: OptimConfig
    data: DataConfig
    train: TrainConfig
    eval: EvalConfig = EvalConfig()
    seeds: SeedConfig = SeedConfig()
    role: Literal["ladder", "control"] = "ladder"

    def __post_init__(self) -> None:
        if (
            not self.name
            or len(self.name) > 60
            or not all(c.isascii() and (c.isalnum() or c in "-_.+") for c in self.name)
        ):
            raise UserError(
                f"name {self.name!r} is not fit for a folder; use up to 60 letters, digits, - _ . +"
            )
        if self.name[0] in "-." or self.name in ("data", "figures"):
            raise UserError(
                f"name {self.name!r} is taken or begins with - or a dot; choose another"
            )
        if self.data.tokenizer.vocab_size > self.model.vocab_size:
            raise UserError(
                f"tokenizer.vocab_size {self.data.tokenizer.vocab_size} is larger than the model's"
                f" embedding of {self.model.vocab_size} rows; raise it or lower the tokenizer's"
            )
        check_objective(self)


@dataclasses.dataclass(frozen=True)
class Replica:
    """One seed of one point: four seed axes, kept apart, and the peak learning rate."""

    point: str
    role: str
    index: int
    init: int
    data: int
    dropout: int
    eval: int
    learning_rate: float


@dataclasses.dataclass(frozen=True)
class Cell:
    """All replicas that share one compiled program."""

    study: str
    name: str
    model: Config
    optim: OptimConfig  # its learning_rate is that of the first point; each replica has its own
    data: DataConfig
    train: TrainConfig
    eval: EvalConfig
    replicas: tuple[Replica, ...]

    def __post_init__(self) -> None:
        schedule(self.optim, self.steps * self.tokens_per_step)  # the warm-up must fit the budget

    @property
    def tokens_per_step(self) -> int:
        """Input tokens of one batch of one replica."""
        return self.data.rows * self.data.length

    @property
    def steps(self) -> int:
        """The budget in steps, rounded up to whole dispatches."""
        per_chunk = self.tokens_per_step * self.train.chunk
        return math.ceil(self.train.tokens / per_chunk) * self.train.chunk

    @property
    def eval_steps(self) -> tuple[int, ...]:
        """Log-spaced steps at which the replicas are evaluated, the last one included."""
        step, found = self.eval.first, {self.steps}
        while step < self.steps:
            found.add(min(math.ceil(step / self.train.chunk) * self.train.chunk, self.steps))
            step *= 2
        return tuple(sorted(found))

    @property
    def kept_steps(self) -> tuple[int, ...]:
        """Steps whose checkpoints stay: 0, 1, 2, 4, … 512, then every `keep_every`, and the last
        (Pythia, arXiv:2304.01373); empty if that is 0.

        A dispatch ends where it ends: a step inside one is rounded up to its end.
        """
        every, chunk = self.train.keep_every, self.train.chunk
        if not every:
            return ()
        doubled = [1 << i for i in range(LAST_DOUBLED.bit_length())]
        later = range((LAST_DOUBLED // every + 1) * every, self.steps, every)
        ends = {math.ceil(step / chunk) * chunk for step in (0, *doubled, *later)}
        return tuple(sorted({step for step in ends if step < self.steps} | {self.steps}))


def build_point(mapping: Mapping[str, Any], where: str = "config") -> Point:
    """A point from a study's settings; `model.size` such as "2x16" or "7b" is resolved by
    `lm.sizes`.

    Raises UserError with the key, the limit and the remedy.
    """
    model = mapping.get("model")
    if isinstance(model, Mapping) and "size" in model:
        mapping = {**mapping, "model": _sized(model, f"{where}.model")}
    return build(Point, mapping, where)


def _sized(model: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The settings of a model with what its `size` stands for."""
    size, settings = model["size"], {k: v for k, v in model.items() if k != "size"}
    if not isinstance(size, str):
        raise UserError(f"{where}.size is {size!r}; it must be a text such as '2x16' or '7b'")
    for key in ("layers", "width"):
        if key in settings:
            raise UserError(f"{where}.{key} is {settings[key]!r} beside size {size!r}; give one")
    try:
        return to_dict(ladder(size, **settings))
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    except TypeError:  # an unknown key or a wrong type: the strict builder says which
        return to_dict(ladder(size)) | settings


def cells(study: str, points: Sequence[Point]) -> list[Cell]:
    """Points grouped into cells, in the order of the points; raises UserError if two points have
    one name.
    """
    names = [p.name for p in points]
    if len(set(names)) < len(names):
        raise UserError(f"two points are called {max(names, key=names.count)!r}; names must differ")
    groups: dict[tuple[Any, ...], list[Point]] = {}
    marks: dict[int, str] = {}  # parts that points share are looked at once
    for point in points:
        same: list[Any] = [point.seeds.eval]
        for part in (point.model, point.data, point.train, point.eval):
            if id(part) not in marks:
                marks[id(part)] = fingerprint(part)
            same.append(marks[id(part)])
        same.append(fingerprint(dataclasses.replace(point.optim, learning_rate=1.0)))
        groups.setdefault(tuple(same), []).append(point)
    return [_cell(study, group) for group in groups.values()]


def _cell(study: str, group: Sequence[Point]) -> Cell:
    first = group[0]
    return Cell(
        study,
        first.name if len(group) == 1 else f"{first.name}+{len(group) - 1}",
        first.model,
        first.optim,
        first.data,
        first.train,
        first.eval,
        tuple(replica for point in group for replica in replicas(point)),
    )


def replicas(point: Point) -> list[Replica]:
    """The replicas of a point, one per seed."""
    s = point.seeds
    return [
        Replica(
            point.name,
            point.role,
            index,
            **{axis: s.first + index if axis in s.vary else s.first for axis in get_args(Axis)},
            eval=s.eval,
            learning_rate=point.optim.learning_rate,
        )
        for index in range(s.replicas)
    ]
