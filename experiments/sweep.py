"""The algebra of sweeps: lists of override dicts, put together by three functions.

An override dict maps dotted keys of a config to values, with an optional `name`. Where two of them
are merged, their names are joined by a dash; two values for one key are refused.
"""

from collections.abc import Iterable, Mapping
from itertools import product as _product
from typing import Any

from lm.config import UserError

type Overrides = list[dict[str, Any]]


def axis(key: str, values: Iterable[Any]) -> Overrides:
    """One dict for each value of one key.

    >>> axis("train.rate", [0.1, 0.2])
    [{'train.rate': 0.1}, {'train.rate': 0.2}]
    """
    return [{key: value} for value in values]


def product(*axes: Overrides) -> Overrides:
    """Every combination, the last axis fastest.

    >>> product([{"name": "a", "x": 1}, {"name": "b", "x": 2}], [{"name": "c", "y": 3}])
    [{'name': 'a-c', 'x': 1, 'y': 3}, {'name': 'b-c', 'x': 2, 'y': 3}]
    """
    return [merge(*combination) for combination in _product(*axes)]


def zip_(*axes: Overrides) -> Overrides:
    """First with first, second with second; the axes must be of one length.

    >>> zip_(axis("x", [1, 2]), axis("y", [3, 4]))
    [{'x': 1, 'y': 3}, {'x': 2, 'y': 4}]
    """
    if len({len(a) for a in axes}) > 1:
        lengths = ", ".join(str(len(a)) for a in axes)
        raise UserError(f"zip_ of axes with {lengths} entries; they must have the same number")
    return [merge(*row) for row in zip(*axes, strict=True)]


def chain(*axes: Overrides) -> Overrides:
    """One after the other.

    >>> chain(axis("x", [1]), axis("y", [2]))
    [{'x': 1}, {'y': 2}]
    """
    return [dict(overrides) for a in axes for overrides in a]


def merge(*parts: Mapping[str, Any]) -> dict[str, Any]:
    """One dict out of several that share no key but `name`.

    >>> merge({"x": 1}, {"x": 2})
    Traceback (most recent call last):
    lm.config.UserError: 'x' is set twice, to 1 and 2; take it out of one axis
    """
    merged: dict[str, Any] = {}
    for part in parts:
        for key, value in part.items():
            if key == "name" and key in merged:
                value = f"{merged[key]}-{value}"
            elif key in merged:
                raise UserError(
                    f"{key!r} is set twice, to {merged[key]!r} and {value!r}; "
                    "take it out of one axis"
                )
            merged[key] = value
    return merged
