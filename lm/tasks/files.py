"""Abilities from files: BIG-Bench-Hard, any folder of {"input", "target"} records, and the result
files of BIG-bench.

`read` takes one file: a JSON object with "examples" (BIG-Bench-Hard: suzgunm/BIG-Bench-Hard), a
JSON list, or JSON lines; `read_folder` all files of a folder. Five wrappers stand for the prompt
formats of generated tasks. With `shots`, the first records of the file are answered in every prompt
and are not asked themselves, so the same items remain whatever the format.

`read_results` makes one record for each metric of each score of a BIG-bench result file (Srivastava
et al. 2022): normalised = 100 (raw - low) / (high - low). For multiple choice, low is exact chance.
"""

import collections
import dataclasses
import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lm.config import UserError, nearest
from lm.tasks.task import FORMATS, Chance, Example


@dataclasses.dataclass(frozen=True)
class Wrapper:
    """One way to ask: what stands before the input and before the target, and between records."""

    before: str
    answer: str
    between: str


WRAPPERS = (
    Wrapper("Q: ", "\nA: ", "\n\n"),
    Wrapper("Question: ", "\nAnswer: ", "\n\n"),
    Wrapper("", "\n", "\n\n"),
    Wrapper("Input: ", "\nOutput: ", "\n###\n"),
    Wrapper("", " => ", "\n"),
)
SUFFIXES = (".json", ".jsonl")
LARGEST = 1 << 28  # bytes of a file that is read; as Python objects it takes several times that
MULTIPLE_CHOICE = "multiple_choice"  # in the names of metrics whose low score is chance


def read(path: Path, format: int = 0, shots: int = 0) -> list[Example]:
    """The records of a file as test items; the key is the file's name and the record's number.

    An input that ends in options, `(A) ..` or `- ..` a line, gives the choices. Raises UserError
    naming the file and the record that is malformed, and where `shots` leave nothing to ask.
    """
    if not 0 <= format < FORMATS:
        raise UserError(f"format of {path} is {format}; it must be 0 to {FORMATS - 1}")
    records = _records(path)
    if not 0 <= shots < len(records):
        raise UserError(
            f"{path} has {len(records)} records, so shots cannot be {shots}; "
            f"give 0 to {len(records) - 1}"
        )
    form = WRAPPERS[format]
    asked = [form.before + question + form.answer for question, _ in records]
    shown = "".join(
        prompt + target + form.between
        for prompt, (_, target) in zip(asked[:shots], records, strict=False)
    )
    return [
        Example(
            prompt=shown + asked[i],
            answer=records[i][1],
            choices=_options(*records[i]),
            key=f"{path.stem}:{i}",
        )
        for i in range(shots, len(records))
    ]


def read_folder(folder: Path, format: int = 0, shots: int = 0) -> dict[str, list[Example]]:
    """The items of every JSON file of a folder, by file name without suffix.

    Raises UserError where there is no such file, where two have one name, and as `read` does.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; give one that holds .json or .jsonl files")
    paths = sorted(p for p in folder.iterdir() if p.suffix in SUFFIXES)
    if not paths:
        raise UserError(f"{folder} holds no .json or .jsonl file; give a folder that does")
    found: dict[str, list[Example]] = {}
    for path in paths:
        if path.stem in found:
            raise UserError(f"{folder} holds {path.stem} twice; keep one of .json and .jsonl")
        found[path.stem] = read(path, format, shots)
    return found


def file_chance(items: Sequence[Example]) -> Chance:
    """Exact match of two guessers that see the format only: among the listed choices, and the
    commonest target of the *other* items; raises UserError without items.

    Leaving an item out of its own vote keeps targets that occur once from counting as guessed.
    """
    if not items:
        raise UserError("there are no items to compute a chance of; give at least one")
    counts = collections.Counter(e.answer for e in items)
    right = 0.0
    for answer, count in counts.items():
        others = counts - collections.Counter([answer])
        best = max(others.values(), default=0)
        if best and others[answer] == best:
            right += count / sum(votes == best for votes in others.values())
    listed = sum(1 / len(e.choices) for e in items if e.answer in e.choices)
    baselines = {"majority": right / len(items), "choices": listed / len(items)}
    return Chance(max(baselines.values()), baselines)


def _options(question: str, target: str) -> tuple[str, ...]:
    """The choices an input lists, or none: where the target is not among them it is open."""
    lettered = re.findall(r"^(\([A-Z]\)) ", question, re.MULTILINE)
    options = lettered or re.findall(r"^- (.+?)\s*$", question, re.MULTILINE)
    return tuple(options) if target in options and len(set(options)) == len(options) > 1 else ()


def _records(path: Path) -> list[tuple[str, str]]:
    """Input and target of every record."""
    text = _text(path)
    try:
        content = _json(text)
    except ValueError as error:
        content = list(_lines(path, text, str(error)))
    if isinstance(content, dict) and "examples" in content:
        content = content["examples"]
    elif isinstance(content, dict):
        content = [content]  # JSON lines of one line
    if not isinstance(content, list):
        raise UserError(
            f'{path} holds {_kind(content)}; it must hold a list of records, or one in "examples"'
        )
    if not content:
        raise UserError(f"{path} holds no records; give a file with at least one")
    found = []
    for i, record in enumerate(content):
        where = f"{path}: record {i}"
        question, target = (_get(record, key, str, where) for key in ("input", "target"))
        if not target:
            raise UserError(f"{where}: target is empty; give the answer, or leave the record out")
        if re.search("[\ud800-\udfff]", question + target):
            raise UserError(f"{where} has half a surrogate pair, which is no text; repair it")
        found.append((question, target))
    return found


def _lines(path: Path, text: str, whole: str) -> Iterator[Any]:
    """The values of JSON lines; `whole` says why the text is not one value."""
    first = True
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                yield _json(line)
            except ValueError as error:
                # If not even the first line parses, the file was never JSON lines.
                what = whole if first else f"{error} of line {number}"
                raise UserError(f"{path} is not JSON: {what}; repair the file") from error
            first = False


def _json(text: str) -> Any:
    """The value; raises ValueError saying what is wrong."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _text(path: Path) -> str:
    try:
        if (size := path.stat().st_size) > LARGEST:
            raise UserError(f"{path} has {size} bytes, at most {LARGEST} are read; split the file")
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise UserError(f"{path} cannot be read: {reason}; give a JSON file") from error
    if not text.strip():
        raise UserError(f"{path} is empty; give a JSON file")
    return text


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a Boolean"}
    return "null" if value is None else names.get(type(value), "a number")


def _get(record: Any, key: str, kind: type, where: str) -> Any:
    """`record[key]`, a `kind`."""
    if not isinstance(record, dict):
        raise UserError(f"{where} is {_kind(record)}; it must be an object")
    if key not in record:
        raise UserError(f"{where} has no {key!r}; it needs one")
    value = record[key]
    if type(value) is not kind:
        wanted = "a string" if kind is str else "an object" if kind is dict else "a list"
        raise UserError(f"{where}: {key} is {_kind(value)}; it must be {wanted}")
    return value


def _number(record: Any, key: str, where: str) -> float:
    """`record[key]`, finite."""
    if key not in record:
        raise UserError(f"{where} has no {key!r}; it needs one")
    value = record[key]
    if type(value) not in (int, float) or not abs(value) <= sys.float_info.max:
        said = repr(value) if type(value) is float else _kind(value)
        raise UserError(f"{where}: {key} is {said}; it must be a finite number")
    return float(value)


def read_results(path: Path, metric: str | None = None) -> list[dict[str, Any]]:
    """One record for every score and metric of a BIG-bench result file; with `metric`, of that one.

    Columns: task, subtask, model_family, model_name, non_embedding_params,
    flop_matched_non_embedding_params, total_params, shots, metric, preferred (bool), raw, low,
    high, normalised (percent of the way from low to high) and chance (low / high for multiple
    choice, else None). Low and high belong to the preferred metric; of the others low, high,
    normalised and chance are None. Raises UserError naming the file and the entry.
    """
    text = _text(path)
    try:
        content = _json(text)
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}; repair the file") from error
    model = _get(content, "model", dict, str(path))
    sizes = ("non_embedding_params", "flop_matched_non_embedding_params", "total_params")
    about: dict[str, Any] = {"task": _task_name(path, content)}
    for key in ("model_family", "model_name"):
        about[key] = _get(model, key, str, f"{path}: model")
    for key in sizes:
        about[key] = _number(model, key, f"{path}: model")
    scores = _get(content, "scores", list, str(path))
    if not scores:
        raise UserError(f"{path} holds no scores; give a file with at least one")
    found: list[dict[str, Any]] = []
    for i, score in enumerate(scores):
        found += _score(score, about, metric, f"{path}: score {i}")
    return found


def _task_name(path: Path, content: dict[str, Any]) -> str:
    """As the file says it, else the task's folder: TASK/results/scores_MODEL.json."""
    task = content.get("task")
    name = task.get("task_name") if isinstance(task, dict) else task
    if isinstance(name, str):
        return name
    return path.parent.parent.name if path.parent.name == "results" else path.parent.name


def _score(
    score: Any, about: dict[str, Any], metric: str | None, where: str
) -> Iterator[dict[str, Any]]:
    values = _get(score, "score_dict", dict, where)
    preferred = _get(score, "preferred_score", str, where)
    low, high = (_number(score, key, where) for key in ("low_score", "high_score"))
    if low >= high:
        raise UserError(
            f"{where}: low_score is {low} and high_score {high}; low must be below high"
        )
    for name in (preferred, metric):
        if name is not None and name not in values:
            raise UserError(
                f"{where}: metric {name!r} is not in score_dict; {nearest(name, list(values))}"
            )
    shots = score.get("number_of_shots")
    if type(shots) is not int or shots < 0:
        raise UserError(f"{where}: number_of_shots is {shots!r}; it must be an integer from 0 on")
    subtask = _get(score, "subtask_description", str, where)
    for name in values if metric is None else (metric,):
        raw = _number(values, name, f"{where}: score_dict")
        own = name == preferred
        yield {
            **about,
            "subtask": subtask,
            "shots": shots,
            "metric": name,
            "preferred": own,
            "raw": raw,
            "low": low if own else None,
            "high": high if own else None,
            "normalised": 100 * (raw - low) / (high - low) if own else None,
            "chance": low / high if own and low >= 0 and MULTIPLE_CHOICE in name else None,
        }
