"""Strict configuration: plain mappings in, frozen dataclasses out.

Every part of the library is configured by one small frozen dataclass that lives next to the code
it configures. `build` is the only door: it takes what a study file or a JSON file says and either
returns the dataclass or raises a `UserError` that names the key, the value and the remedy. Nothing
else in the library checks types again.

Standard library only.
"""

import dataclasses
import difflib
import functools
import hashlib
import json
import math
import numbers
import reprlib
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal

PLAIN = (str, int, float, bool, types.NoneType)


class UserError(ValueError):
    """The user's mistake, as one sentence: the value, the limit and the remedy."""


def build[T](cls: type[T], mapping: Mapping[str, Any], where: str = "config") -> T:
    """The dataclass `cls` made from `mapping`; `where` is the key path used in messages.

    Knows nested dataclasses, unions (of dataclasses by their field `kind`, where they have one),
    `Literal`, `tuple`, `dict[str, X]`, int, float, str and bool. An int may be written as an
    integral float (5e6). Raises `UserError` on an unknown key, a
    missing one, a wrong type, NaN or an infinity, and passes on what `__post_init__` refuses.
    """
    if not isinstance(mapping, Mapping):
        raise UserError(f"{where} is {_show(mapping)}; it must be a mapping of settings")
    hints, fields = _settings(cls)  # type: ignore[arg-type]
    for key in mapping:
        if key not in fields:
            raise UserError(f"{where}.{key} is not a setting; {nearest(str(key), list(fields))}")
    for name, field in fields.items():
        if name not in mapping and not _has_default(field):
            raise UserError(f"{where}.{name} is missing; it has no default, so give it a value")
    kwargs = {key: _convert(hints[key], value, f"{where}.{key}") for key, value in mapping.items()}
    try:
        return cls(**kwargs)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


@functools.cache
def _settings(cls: type) -> tuple[dict[str, Any], dict[str, dataclasses.Field[Any]]]:
    """The types and the fields of a dataclass that may be set; asked for at every point."""
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}
    return typing.get_type_hints(cls), fields


def to_dict(obj: Any) -> Any:
    """The JSON-ready form of a dataclass or of plain values; `build` reads it back."""
    if type(obj) in PLAIN:  # nearly all there are; asking for abstract classes takes longer
        return obj
    if dataclasses.is_dataclass(obj) and not isinstance(obj, type):
        kept = (f for f in dataclasses.fields(obj) if f.init and not _omitted(f, obj))
        return {f.name: to_dict(getattr(obj, f.name)) for f in kept}
    if isinstance(obj, Mapping):
        return {str(key): to_dict(value) for key, value in obj.items()}
    if isinstance(obj, list | tuple):
        return [to_dict(value) for value in obj]
    if obj is None or isinstance(obj, bool | int | float | str):
        return obj
    raise TypeError(f"{type(obj).__name__} has no place in a config: {_show(obj)}")


def _omitted(field: "dataclasses.Field[Any]", obj: Any) -> bool:
    """Whether a setting is newer than finished studies, and says what they did without it."""
    return "omit" in field.metadata and bool(getattr(obj, field.name) == field.default)


def diff(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """What changed from `a` to `b`, one line a key: `train.tokens: 5000000 -> 6000000`."""
    old, new = _flatten(a), _flatten(b)
    absent = "(absent)"
    lines = []
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key, absent), new.get(key, absent)
        if before != after:
            lines.append(f"{key}: {before} -> {after}")
    return lines


def fingerprint(obj: Any) -> str:
    """12 hex digits of the SHA-256 of the canonical JSON of a dataclass or mapping."""
    text = json.dumps(to_dict(obj), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def nearest(name: str, known: Sequence[str]) -> str:
    """The remedy for a misspelt name: the nearest known one, or all of them."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if close:
        return f"did you mean {close[0]!r}?"
    return f"known: {', '.join(sorted(known)) or 'none'}"


def positive(name: str, value: float) -> None:
    """Refuses zero, negative numbers and NaN."""
    if not value > 0:
        raise UserError(f"{name} is {value}; it must be greater than 0")


def within(name: str, value: float, low: float, high: float = math.inf) -> None:
    """Refuses what is not in the closed interval [low, high], NaN included."""
    if not low <= value <= high:
        limit = f"at least {low}" if high == math.inf else f"between {low} and {high}"
        raise UserError(f"{name} is {value}; it must be {limit}")


def divides(name: str, divisor: int, other: str, value: int) -> None:
    """Refuses a divisor that leaves a remainder, and offers those nearest to it that do not."""
    positive(name, divisor)
    if value % divisor == 0:
        return
    options = [d for d in range(1, value + 1) if value % d == 0]
    below = [d for d in options if d < divisor][-1:]
    above = [d for d in options if d > divisor][:1]
    use = " or ".join(str(d) for d in below + above)
    raise UserError(f"{name} {divisor} does not divide {other} {value}; use {use}")


def _has_default(field: dataclasses.Field[Any]) -> bool:
    missing = dataclasses.MISSING
    return field.default is not missing or field.default_factory is not missing


def _convert(kind: Any, value: Any, where: str) -> Any:
    """`value` as the annotated type `kind`, or a `UserError` at `where`."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return _union(args, value, where)
    if origin is Literal:
        return _literal(args, value, where)
    if origin is tuple:
        return _tuple(args, value, where)
    if origin is dict:
        if not isinstance(value, Mapping):
            raise _wrong(kind, value, where)
        return {str(k): _convert(args[1], v, f"{where}.{k}") for k, v in value.items()}
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return value if isinstance(value, kind) else build(kind, value, where)
    return _scalar(kind, value, where)


def _scalar(kind: Any, value: Any, where: str) -> Any:
    if kind is types.NoneType and value is None:
        return None
    if kind in (bool, str) and isinstance(value, kind):
        return value
    if kind in (int, float) and type(value) is not bool and isinstance(value, numbers.Real):
        if not _finite(value):
            raise UserError(f"{where} is {value}; it must be a finite number")
        number: Any = value  # numbers.Real covers NumPy's scalars and knows no int()
        if kind is float:
            return float(number)
        if number == int(number):
            return int(number)
    raise _wrong(kind, value, where)


def _finite(value: numbers.Real) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an int that no float can hold
        return False


def _literal(args: tuple[Any, ...], value: Any, where: str) -> Any:
    for arg in args:
        # 1 == True and 0 == False, so equality alone would let a bool through.
        if type(arg) is type(value) and arg == value:
            return arg
    raise UserError(f"{where} is {_show(value)}; use one of {', '.join(map(repr, args))}")


def _tuple(args: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise UserError(f"{where} is {_show(value)}; it must be a list")
    if len(args) == 2 and args[1] is Ellipsis:
        kinds: tuple[Any, ...] = (args[0],) * len(value)
    else:
        kinds = args
    if len(kinds) != len(value):
        raise UserError(f"{where} has {len(value)} entries; it must have {len(kinds)}")
    pairs = zip(kinds, value, strict=True)
    return tuple(_convert(kind, item, f"{where}[{i}]") for i, (kind, item) in enumerate(pairs))


def _union(args: tuple[Any, ...], value: Any, where: str) -> Any:
    for kind in args:  # an exact match first, so that 1.0 stays a float in `int | float`
        if type(value) is kind:
            return _convert(kind, value, where)
    real = [kind for kind in args if kind is not types.NoneType]
    if value is not None and len(real) == 1:
        return _convert(real[0], value, where)
    if value is not None and all("kind" in _hints(kind) for kind in real):
        named = _named(real, value, where) if isinstance(value, Mapping) else real[0]
        return _convert(named, value, where)
    errors = []
    for kind in args:
        try:
            return _convert(kind, value, where)
        except UserError as error:
            errors.append(str(error))
    # A mapping was meant as a dataclass: what that one says helps more than a list of types.
    if isinstance(value, Mapping):
        raise UserError(errors[0])
    raise _wrong(typing.Union[args], value, where)  # noqa: UP007 - made at run time


def _hints(kind: Any) -> dict[str, Any]:
    is_record = isinstance(kind, type) and dataclasses.is_dataclass(kind)
    return _settings(kind)[0] if is_record else {}


def _named(classes: Sequence[type], value: Mapping[str, Any], where: str) -> type:
    """Of several dataclasses the one whose `kind`, a Literal, is the mapping's, which by default is
    the first's.
    """
    kinds = {typing.get_args(_hints(cls)["kind"])[0]: cls for cls in classes}
    return kinds[_literal(tuple(kinds), value.get("kind", next(iter(kinds))), f"{where}.kind")]


def _wrong(kind: Any, value: Any, where: str) -> UserError:
    actual = type(value).__name__
    return UserError(f"{where} is {_show(value)} ({actual}); it must be {_name(kind)}")


def _name(kind: Any) -> str:
    if kind is types.NoneType:
        return "None"
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return " or ".join(_name(arg) for arg in typing.get_args(kind))
    if kind in (int, float):
        return {int: "a whole number", float: "a number"}[kind]
    return kind.__name__ if isinstance(kind, type) and not typing.get_args(kind) else str(kind)


def _show(value: Any) -> str:
    return reprlib.repr(value)


def _flatten(mapping: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in mapping.items():
        if isinstance(value, Mapping) and value:
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = list(value) if isinstance(value, tuple) else value
    return flat
