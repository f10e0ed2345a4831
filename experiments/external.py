"""Where do other people's models stand on our abilities, and where do theirs begin?

Command   lm run experiments/external.py --workdir=runs/others --config.models=MODELS.tsv
Cost      a minute and a half of two cores for 135M parameters (SmolLM2, 8 tasks, 100 items each)
Expected  one curve a task over the parameters of the models, in the same page as a study of ours

Trains nothing. MODELS is a table, one model a line, or names with commas between:

    CHECKPOINT  TOKENS  [NAME]      a Hugging Face folder, a GGUF file or WORKDIR/CELL[:REPLICA]
    pythia-14m  3e11                FLOPs are 6 N D: N of the weights, embeddings left out, and D
    pythia-70m  3e11    seventy     the tokens it was trained on, which only their makers know

Tasks are those of `lm tasks`, and BIG-Bench-Hard where `--config.eval.files` names its folder. A
model is asked as a text goes on, `Q: ...`, `A: ...`, after a few answered questions from the
training split; one of our own cells, which was trained on the bare prompts, is asked those. An
answer counts as exact if greedy decoding gives it *and* ends the line (a cell's: gives it).
"""

import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from ml_collections import ConfigDict

from experiments.own import Plan, Record
from experiments.study import SAFE_NAME
from lm import tasks
from lm.config import UserError, build, nearest, positive, within
from lm.emergence.metrics import PAD, Answers, Measure
from lm.emergence.metrics import score as metrics
from lm.eval.continuations import LENGTH, Likelihood, Request, refuse, score
from lm.generate import context
from lm.models import abstract
from lm.pretrained import load, sources
from lm.pretrained.gguf import open_gguf
from lm.pretrained.tensors import open_json
from lm.rundir import read_json
from lm.tasks.files import WRAPPERS, file_chance, read_folder
from lm.train.cell import Cell, Replica
from lm.train.record import params_sha256

SUITE = (
    *("recall/5", "rule/9", "hop/2", "boolean/2", "addition/2", "program/2"),
    *("dyck/2", "random_labels/4"),
)
# Of what `lm.emergence.metrics` knows, what needs no more than log p and the argmax of a token.
MEASURED = (
    *("exact_match", "token_accuracy", "independent_match", "nll", "log_likelihood"),
    *("answer_probability", "choice_accuracy", "choice_brier"),
)
TABLES = ("embed", "position_embed", "type_embed", "head")
SECONDS = 7e-9  # of a parameter and an item, on two cores


def get_config() -> ConfigDict:
    """Everything that all points share."""
    c = ConfigDict()
    c.models = ""  # a table of models, or A,B
    c.tokens = ""  # that each was trained on, 3e11,3e11, where models are not a table
    c.model = ConfigDict({"path": "", "tokens": 0.0})  # of a point
    c.eval = ConfigDict(
        {"tasks": SUITE, "items": 100, "shots": 8, "seed": 0, "files": "", "file_shots": 3}
    )
    return c


@dataclass(frozen=True)
class EvalSettings:
    """What every model is asked: `items` of each task, after `shots` answered ones; and of each
    file of the folder `files`, after `file_shots`.
    """

    tasks: tuple[str, ...]
    items: int
    shots: int
    seed: int
    files: str
    file_shots: int

    def __post_init__(self) -> None:
        positive("eval.items", self.items)
        within("eval.shots", self.shots, 0, 64)
        within("eval.file_shots", self.file_shots, 0, 64)
        known = [f"{name}/{level}" for name, level in tasks.TASKS]
        for word in self.tasks:
            if word not in known:
                raise UserError(f"eval.tasks has {word!r}; {nearest(word, known)}")
        if not self.tasks and not self.files:
            raise UserError(
                "eval.tasks and eval.files are empty; name a task, or a folder of files"
            )


@dataclass(frozen=True)
class Item:
    """A question as text: its answer and the choices follow the context; `tail` ends an answer."""

    context: str
    answer: str
    choices: tuple[str, ...]
    tail: str


def points(config: ConfigDict) -> list[dict]:
    """One point a model; without any, one that `plan` refuses, for workers read this file without
    the overrides of the command line.
    """
    if not config.models:
        return [{"name": "none"}]
    entries = read_models(config.models, config.tokens)
    found = [
        {"name": name, "model.path": path, "model.tokens": float(seen)}
        for path, seen, name in entries
    ]
    names = [point["name"] for point in found]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"models has {twice[0]!r} twice; give one of them a name of its own")
    return found


def read_models(text: str, tokens: str) -> list[tuple[str, float, str]]:
    """(path, tokens, name) of every model of a table or a list; 0 tokens where nothing says."""
    path = Path(text)
    if path.is_file() and path.suffix in (".tsv", ".txt"):
        if tokens:
            raise UserError("config.tokens is for a list of models; a table has them in its lines")
        lines = [line.split("#")[0].split() for line in path.read_text().splitlines()]
        entries = [(number, line) for number, line in enumerate(lines, 1) if line]
        if not entries:
            raise UserError(f"{path} has no models; give a checkpoint and its tokens a line")
        return [_entry(f"{path} line {number}", line, path.parent) for number, line in entries]
    names = [name.strip() for name in text.split(",") if name.strip()]
    seen = [word.strip() for word in tokens.split(",")] if tokens else ["0"] * len(names)
    if len(seen) != len(names):
        raise UserError(f"config.tokens has {len(seen)} numbers for {len(names)} models")
    pairs = zip(names, seen, strict=True)
    return [_entry("config.tokens", [name, count], Path()) for name, count in pairs]


def _entry(where: str, words: Sequence[str], base: Path) -> tuple[str, float, str]:
    if len(words) > 3:
        raise UserError(f"{where} has {len(words)} words; give CHECKPOINT TOKENS [NAME]")
    try:
        seen = float(words[1]) if len(words) > 1 else 0.0
    except ValueError:
        seen = -1.0
    if not 0 <= seen < 1e18:
        raise UserError(f"{where}: tokens are {words[1]!r}; give a number such as 3e11")
    path = str(base / words[0])
    name = words[2] if len(words) > 2 else re.sub(r"[^A-Za-z0-9._-]+", "-", Path(path).stem)
    if not SAFE_NAME.fullmatch(name):
        raise UserError(f"{where}: {name!r} cannot name a point; give a name of letters and digits")
    return path, seen, name


def count(config: Any) -> tuple[int, int]:
    """Parameters, all of them and those of tables: of tokens, positions, types, an untied head."""
    sizes = dict.fromkeys(TABLES, 0)
    total = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(nn.unbox(abstract(config))):
        total += leaf.size
        if path[-1].key in sizes:
            sizes[path[-1].key] += leaf.size
    return total, sum(sizes.values())


def cell_of(path: str) -> Cell | None:
    """The cell of ours at WORKDIR/CELL[:REPLICA]; None of anything else."""
    name, _, number = path.rpartition(":")
    file = Path(name if name and number.isdigit() else path) / "config.json"
    about = read_json(file) if file.is_file() else None
    if not isinstance(about, dict) or "replicas" not in about:
        return None
    return build(Cell, about, str(file))


def read_config(path: str) -> Any:
    """The config of a model, without its weights; raises UserError where there is none."""
    cell, place = cell_of(path), Path(path)
    if cell:
        return cell.model
    if place.is_file():
        return sources.gguf(place, open_gguf(place), "float32").config
    if not (place / "config.json").is_file():
        raise UserError(
            f"{path} is no model; give a Hugging Face folder, a GGUF file or WORKDIR/CELL[:REPLICA]"
        )
    return sources.folder(place, open_json(place / "config.json", 1 << 20), "float32").config


def plan(config: ConfigDict, point: Mapping[str, Any]) -> Plan:
    """What a model is, from its config, before its weights are read."""
    settings = build(EvalSettings, config.eval.to_dict(), "config.eval")
    path, seen = config.model.path, config.model.tokens
    if not path:
        raise UserError("config.models is empty; give a table, or checkpoints such as a.gguf,b")
    about, own = read_config(path), cell_of(path)
    if own and not seen:
        seen = own.steps * own.tokens_per_step
    if not seen:
        raise UserError(
            f"nothing says on how many tokens {path} was trained; give it in the table, or by"
            " --config.tokens"
        )
    total, embedding = count(about)
    name, role = point["name"], point.get("role", "ladder")
    replica = Replica(name, role, 0, 0, 0, 0, settings.seed, 0.0)
    asked = ask(settings, own is not None)
    questions = sum(len(items) for _, _, _, items in asked)
    return Plan(
        *(name, role, about.layers, about.width, total - embedding, total, 1, int(seen)),
        flops_per_token=6.0 * (total - embedding),
        seconds=5 + SECONDS * total * questions,
        replicas=(replica,),
        tasks=tuple(
            {"task": task, "level": level, "format": 0, "chance": chance}
            for task, level, chance, _ in asked
        ),
    )


def train(config: ConfigDict, plan: Plan, record: Record) -> list[str | None]:
    """Asks the model of a point everything; the SHA-256 of its parameters."""
    settings = build(EvalSettings, config.eval.to_dict(), "config.eval")
    tick = time.monotonic()
    loaded = load(config.model.path)
    refuse(loaded, config.model.path)
    for task, level, chance, items in ask(settings, cell_of(config.model.path) is not None):
        record.progress(0, 0.0)
        found, short = measure(loaded, items)
        record.measure(plan.replicas[0], 1, task, level, found, chance)
        if short:
            record.event("truncated", task=task, level=level, requests=short)
    record.seconds["eval"] = time.monotonic() - tick
    return [params_sha256(loaded.params)]


@cache
def ask(settings: EvalSettings, bare: bool) -> list[tuple[str, str, float, list[Item]]]:
    """Every task: its name, level, chance and items; `bare` without examples and wrapping, and
    without the files.
    """
    return list(_ask(settings, bare))


def _ask(settings: EvalSettings, bare: bool) -> Iterator[tuple[str, str, float, list[Item]]]:
    form = WRAPPERS[0]
    for word in settings.tasks:
        name, _, level = word.partition("/")
        task = tasks.task(name, level)
        test = tasks.items(task, "test", settings.seed, settings.items)
        shown = tasks.items(task, "train", settings.seed, settings.shots)
        wrapped = [form.before + e.prompt + form.answer for e in shown]
        head = "".join(p + e.answer + form.between for p, e in zip(wrapped, shown, strict=True))
        items = [
            Item(e.prompt, e.answer, _choices(e), "")
            if bare
            else _item(head + form.before + e.prompt + form.answer, e)
            for e in test
        ]
        yield name, level, tasks.chance(task).value, items
    if settings.files and not bare:
        folder = read_folder(Path(settings.files), 0, settings.file_shots)
        for name, examples in folder.items():
            some = examples[: settings.items]
            yield "bbh", name, file_chance(examples).value, [_item(e.prompt, e) for e in some]


def _item(context: str, example: tasks.Example) -> Item:
    """The item of a wrapped prompt; a space at its end belongs to what follows, for a token is a
    word with the space before it.
    """
    bare, form = context.rstrip(" "), WRAPPERS[0]
    space = context[len(bare) :]
    choices = tuple(space + choice for choice in _choices(example))
    return Item(bare, space + example.answer, choices, form.between + form.before)


def _choices(example: tasks.Example) -> tuple[str, ...]:
    """The choices, the right one first."""
    others = tuple(choice for choice in example.choices if choice != example.answer)
    return (example.answer, *others) if others else ()


def measure(loaded: Any, items: Sequence[Item]) -> tuple[dict[str, Measure], int]:
    """The metrics of the answers, and how many requests lost the left of their context."""

    def encode(text: str) -> list[int]:
        return loaded.tokenizer.begin(text).tolist()

    several = all(item.choices for item in items)
    requests: list[Request] = []
    for item in items:
        before, answer = encode(item.context), encode(item.context + item.answer)
        whole = encode(item.context + item.answer + item.tail)
        # With the token that ends the answer, unless it is in the answer's last one.
        end = len(answer) + (whole[: len(answer)] == answer and bool(item.tail))
        requests.append(_request(before, whole[:end]))
        for choice in item.choices if several else ():
            requests.append(_request(before, encode(item.context + choice)))
    found, short = score(loaded.model, loaded.params, requests, context(loaded) or LENGTH)
    answers, choices, at = [], [], 0
    for item in items:
        size = len(item.choices) if several else 0
        answers.append(found[at])
        choices.append([f.total for f in found[at + 1 : at + 1 + size]])
        at += 1 + size
    return measures(answers, choices), short


def _request(context: Sequence[int], whole: Sequence[int]) -> Request:
    """What is new in the ids of a text that goes on: also where its first token swallowed the last
    of the context.
    """
    n = 0
    while n < min(len(context), len(whole) - 1) and context[n] == whole[n]:
        n += 1
    return Request(np.array(whole[:n], np.int32), np.array(whole[n:], np.int32))


def measures(
    answers: Sequence[Likelihood], choices: Sequence[Sequence[float]]
) -> dict[str, Measure]:
    """`MEASURED` of answers and of the log-probabilities of their choices, the right one first."""
    lengths = [len(a.logprob) for a in answers]
    real = np.arange(max(lengths)) < np.array(lengths)[:, None]
    logprob, hit = np.zeros(real.shape, np.float32), np.zeros(real.shape, bool)
    logprob[real] = np.concatenate([a.logprob for a in answers])
    hit[real] = np.concatenate([a.greedy for a in answers])
    target = np.where(real, 1, PAD).astype(np.int32)
    listed = np.full((len(choices), max(map(len, choices))), -np.inf, np.float32)
    for row, values in zip(listed, choices, strict=True):
        row[: len(values)] = values
    none = np.zeros(real.shape, np.float32)
    stored = Answers(target, logprob, np.where(hit, 1, 0), none, none, target, listed)
    found = metrics(stored)
    return {name: found[name] for name in MEASURED if name in found}
