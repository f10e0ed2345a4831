"""Study files: one Python file, one question.

A study file has a docstring (question, command, cost, expected result), `get_config() ->
ConfigDict`, and `points(config) -> list[dict]`, where each dict has a `name`, may have a `role`
("ladder" or "control"), and otherwise maps dotted keys of the config to values. On the command
line `--config.train.tokens=5e6` changes the config before the points are made.
"""

import ast
import dataclasses
import importlib.util
import math
import re
import reprlib
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from ml_collections import ConfigDict

from lm.config import UserError, nearest

FLAG = "--config."
RESERVED = ("name", "role")
# Names become folders and parts of file names, so only what is safe in both.
SAFE_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,62}[A-Za-z0-9_-])?")
# Windows takes these for devices, whatever their ending, and a workdir may be copied there.
DEVICE = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?", re.IGNORECASE)
# What a workdir holds beside the folders of its cells.
TAKEN = {
    *("study.json", "lock", "pins.json", "launch.json", "table.parquet", "analysis.json"),
    *("report.html", "logs", "data", "figures", "predictions", "launch"),
}


@dataclasses.dataclass(frozen=True)
class Study:
    """A study file after its overrides: `points` are dicts of dotted overrides with a `name`;
    `plan` and `train` are None unless the file trains by itself.
    """

    name: str
    docstring: str
    config: ConfigDict
    points: list[dict[str, Any]]
    path: Path = Path()
    plan: Callable[..., Any] | None = None
    train: Callable[..., Any] | None = None


def load(path: str | Path, overrides: Sequence[str] = ()) -> Study:
    """Runs the study file at `path` under overrides such as `--config.train.tokens=5e6`.

    Raises `UserError` naming file and line where the file is absent, fails or is incomplete.
    """
    path = Path(path)
    _check_name(path.stem, f"the name of {path}")
    module = _execute(path)
    config = _call(path, module, "get_config")
    if not isinstance(config, ConfigDict):
        raise UserError(f"{path}: get_config() returned {_type(config)}; it must be a ConfigDict")
    config = with_overrides(config, dict(_parse(text) for text in overrides), read=True)
    points = _call(path, module, "points", config)
    _check_points(path, config, points)
    docstring = (module.__doc__ or "").strip()
    own = [getattr(module, name, None) for name in ("plan", "train")]
    if (own[0] is None) != (own[1] is None):
        raise UserError(f"{path} has one of plan and train; a study that trains itself needs both")
    return Study(path.stem, docstring, config, [dict(point) for point in points], path, *own)


def split_overrides(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """The `--config.` arguments of a command line, and the others."""
    ours = [arg for arg in argv if arg.startswith(FLAG)]
    return ours, [arg for arg in argv if not arg.startswith(FLAG)]


def with_overrides(
    config: ConfigDict, overrides: Mapping[str, Any], read: bool = False
) -> ConfigDict:
    """A copy of `config` with dotted keys replaced, as `overridden` does."""
    return ConfigDict(overridden(config.to_dict(), overrides, read))


def overridden(
    config: Mapping[str, Any], overrides: Mapping[str, Any], read: bool = False
) -> dict[str, Any]:
    """A config as plain groups with dotted keys replaced; `name` and `role` of a point are passed
    over. Groups that nothing changes are shared: a study may have ten thousand points.

    With `read`, values are text from a command line. Raises `UserError` on a key that is not there
    or a value of another type.
    """
    changed = dict(config)
    for key, value in overrides.items():
        if key in RESERVED and not read:
            continue
        node, last = _find(changed, key)
        old = node[last]
        new = _literal(value, old) if read else value
        node[last] = _like(old, new, f"config.{key}")
    return changed


def _find(config: dict[str, Any], key: str) -> tuple[dict[str, Any], str]:
    """The innermost group and the last part of a dotted key that exists; the groups on the way
    there become copies.
    """
    node: Any = config
    parts = key.split(".")
    for i, part in enumerate(parts):
        where = ".".join(["config", *parts[:i]])
        if not isinstance(node, dict):
            raise UserError(f"{where} is a value and not a group; {where}.{part} cannot be set")
        if part not in node:
            raise UserError(f"{where}.{part} is not a setting; {nearest(part, list(node))}")
        if i < len(parts) - 1:
            if isinstance(node[part], dict):
                node[part] = dict(node[part])
            node = node[part]
    return node, parts[-1]


def _parse(text: str) -> tuple[str, str]:
    key, equals, value = text.removeprefix(FLAG).partition("=")
    if not equals or not key:
        raise UserError(f"{text} sets nothing; write {FLAG}{key or 'train.tokens'}=VALUE")
    return key, value


def _literal(text: str, old: Any) -> Any:
    """The Python literal that the text is, else the text; a string setting takes the text."""
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words and not isinstance(old, str):
        return words[text.lower()]
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text
    return text if isinstance(old, str) and not isinstance(value, str) else value


def _like(old: Any, new: Any, where: str) -> Any:
    """`new` in the type of `old`: 5e6 is an int where an int was; None may become anything."""
    number = isinstance(new, int | float) and not isinstance(new, bool)
    if number and not math.isfinite(new):
        raise UserError(f"{where} is {new}; it must be a finite number")
    if isinstance(old, dict):
        if isinstance(new, Mapping | ConfigDict):  # a point may replace a whole group: a mixture
            return ConfigDict(new).to_dict()
        raise UserError(f"{where} is a group; set one of {', '.join(sorted(old))} in it")
    if old is None or type(old) is type(new):
        return new
    if isinstance(old, float) and number:
        return float(new)
    if type(old) is int and number and new == int(new):
        return int(new)
    if isinstance(old, tuple | list) and isinstance(new, tuple | list):
        return type(old)(new)
    shown = reprlib.repr(new)
    raise UserError(f"{where} is {shown} ({_type(new)}); it must be like {old!r} ({_type(old)})")


def _execute(path: Path) -> ModuleType:
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        others = [str(p) for p in sorted(path.parent.glob("*.py")) if p.stem != "__init__"]
        raise UserError(f"the study {path} {what}; {nearest(str(path), others)}")
    name = f"study_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UserError(f"the study {path} is no Python file; its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # a dataclass in the file looks for its module there
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise _failure(path, error) from error
    return module


def _call(path: Path, module: ModuleType, name: str, *args: Any) -> Any:
    function = getattr(module, name, None)
    if not callable(function):
        signature = {"get_config": "get_config() -> ConfigDict", "points": "points(config) -> list"}
        raise UserError(f"{path} defines no {name}; a study file needs {signature[name]}")
    try:
        return function(*args)
    except (Exception, SystemExit) as error:
        raise _failure(path, error) from error


def _failure(path: Path, error: BaseException) -> UserError:
    """One sentence with the last line of the study file that was running."""
    where = str(path.absolute())  # what the import system makes of a relative path
    if isinstance(error, SyntaxError) and error.filename in (str(path), where):
        line = error.lineno
    else:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename in (str(path), where)]
        line = lines[-1] if lines else None
    text = " ".join(str(error).replace("\\n", " ").split())  # AttributeError shows a repr
    what = text if isinstance(error, UserError) else f"{type(error).__name__}: {text}"
    return UserError(f"{path} line {line or '?'}: {what}")


def _check_points(path: Path, config: ConfigDict, points: Any) -> None:
    if not isinstance(points, list | tuple) or not points:
        raise UserError(f"{path}: points(config) gave {points!r}; it must be a list of dicts")
    seen, plain = set(), config.to_dict()
    for i, point in enumerate(points):
        name = point.get("name") if isinstance(point, Mapping) else None
        if not isinstance(name, str):
            raise UserError(f"{path}: point {i} is {point!r}; it must be a dict with a 'name'")
        _check_name(name, f"{path}: the name of point {i}")
        if name in TAKEN:
            raise UserError(
                f"{path}: point {i} is called {name!r}, as a part of every workdir; choose another"
            )
        if name in seen:
            raise UserError(f"{path}: two points are called {name!r}; names must be unique")
        seen.add(name)
        if point.get("role", "ladder") not in ("ladder", "control"):
            raise UserError(
                f"{path}: the role of point {name} is {point['role']!r}; use 'ladder' or 'control'"
            )
        try:
            overridden(plain, point)
        except UserError as error:
            raise UserError(f"{path}: point {name}: {error}") from error


def _check_name(name: str, what: str) -> None:
    if not SAFE_NAME.fullmatch(name):
        shown = reprlib.repr(name)
        raise UserError(f"{what} is {shown}; use at most 64 letters, digits, '.', '_' and '-'")
    if DEVICE.fullmatch(name):
        raise UserError(f"{what} is {name!r}, which is a device on Windows; choose another")


def _type(value: Any) -> str:
    return type(value).__name__
