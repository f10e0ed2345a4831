"""Tensors into parameters and back, by the tables of `lm.pretrained.families`.

Names and shapes are compared first, all of them, and a mismatch lists both sides. Then one
parameter after another is made, filled tensor by tensor and handed to JAX without a copy where the
device is the CPU: there is one copy of the weights, and one tensor.
"""

import functools
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import linen as nn

from lm import models
from lm.config import UserError
from lm.pretrained.families import Family
from lm.pretrained.layouts import Layout
from lm.pretrained.tensors import Entry, read, readable, show

LISTED = 10  # names of a mismatch that a message has


class Slot(NamedTuple):
    """Where a tensor goes: our parameter, the layer in it or None, and how it lies there."""

    ours: str
    layer: int | None
    layout: Layout
    shape: tuple[int, ...]


def slots(family: Family, config: Any) -> dict[str, Slot]:
    """The tensors that a model of this config has in a file, by name."""
    shapes = parameters(config)
    found: dict[str, Slot] = {}
    for row in family.rows:
        part = side(config, row.ours)
        if row.ours not in shapes or row.gated not in (None, part.gated):
            continue
        leaf = shapes[row.ours]
        deep = "{}" in row.theirs
        shape = leaf.shape[1:] if deep else leaf.shape
        # No memory is touched: one number, repeated.
        theirs = row.layout(_hollow(shape), part).shape
        for layer in range(leaf.shape[0]) if deep else [None]:
            found[row.theirs.format(layer)] = Slot(row.ours, layer, row.layout, theirs)
    return found


def side(config: Any, ours: str) -> Any:
    """The config of the stack in which a parameter is; of an encoder-decoder, one of two."""
    if not isinstance(config, models.EncoderDecoderConfig):
        return config
    return config.decoder if ours.startswith("decoder/") else config.encoder


@functools.cache
def parameters(config: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of our parameters by path, such as `layers/qkv`."""
    leaves = jax.tree_util.tree_leaves_with_path(nn.unbox(models.abstract(config)))
    return {"/".join(step.key for step in path): leaf for path, leaf in leaves}


def assemble(path: Path, family: Family, config: Any, entries: Mapping[str, Entry]) -> Any:
    """The parameters of a model of this config from the tensors of a file or folder.

    Raises `UserError`, with both sides, where they do not fit.
    """
    wanted = slots(family, config)
    named = canonical(path, family, wanted, entries)
    check(path, family, wanted, named)
    _check_twins(path, family, wanted, named)
    of: dict[str, list[tuple[str, Slot]]] = {}
    for name, slot in wanted.items():
        of.setdefault(slot.ours, []).append((name, slot))
    tree: dict[str, Any] = {}
    for ours, leaf in parameters(config).items():
        array = _aligned(leaf.shape, leaf.dtype)
        for name, slot in of[ours]:
            part = array if slot.layer is None else array[slot.layer]
            view = slot.layout(part, side(config, ours)).array
            view[...] = read(named[name]).reshape(view.shape)
        _put(tree, ours, jax.device_put(array))
    return tree


def take_apart(family: Family, config: Any, params: Any) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors of a model of ours as the family has them, in the order of `slots`."""
    leaves = {
        "/".join(step.key for step in path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    for name, slot in slots(family, config).items():
        array = np.asarray(leaves[slot.ours])
        part = array if slot.layer is None else array[slot.layer]
        view = slot.layout(part, side(config, slot.ours)).array
        yield name, np.ascontiguousarray(view).reshape(slot.shape)


def canonical(
    path: Path, family: Family, wanted: Iterable[str], entries: Mapping[str, Entry]
) -> dict[str, Entry]:
    """The tensors by the names of the table, whatever the age of the file and with its prefix."""
    twins = dict(family.twins)
    known = {*wanted, *twins}
    found: dict[str, Entry] = {}
    for name, entry in entries.items():
        for old, new in family.older:
            if name.endswith(old):
                name = name.removesuffix(old) + new
        longer = family.prefix + name
        if name not in known and (longer in known or re.fullmatch(family.spare, longer)):
            name = longer
        if name in found:
            raise UserError(f"{path} has {show(name)} twice, in an old and a new spelling")
        found[name] = entry
    return found


def check(
    path: Path, family: Family, wanted: Mapping[str, Slot], found: Mapping[str, Entry]
) -> None:
    """Refuses tensors that are missing, that nothing knows, or of other shapes; lists them all."""
    twins = dict(family.twins)
    missing = [name for name in wanted if name not in found]
    extra = [
        name
        for name in found
        if name not in wanted and name not in twins and not re.fullmatch(family.spare, name)
    ]
    wrong = [
        f"{name} {list(found[name].shape)} instead of {list(slot.shape)}"
        for name, slot in wanted.items()
        if name in found and found[name].shape != slot.shape
    ]
    odd = [name for name in wanted if name in found and not readable(found[name].kind)]
    parts = [
        f"{sign} {what} ({len(names):,}): {', '.join(_short(names))}"
        for sign, what, names in (
            ("-", "missing", missing),
            ("+", "not known", extra),
            ("~", "of another shape", wrong),
            ("~", "of a kind that holds no floating numbers", odd),
        )
        if names
    ]
    if parts:
        raise UserError(
            f"the tensors of {path} are not those of a {family.name} of its config: "
            + "; ".join(parts)
            + "; give the config that belongs to the weights"
        )


def _short(names: list[str]) -> list[str]:
    shown = [name if len(name) <= 120 else show(name) for name in map(_printable, names[:LISTED])]
    return [*shown, "..."] if len(names) > LISTED else shown


def _printable(name: str) -> str:
    return name if name.isprintable() else repr(name)


def _check_twins(
    path: Path, family: Family, wanted: Mapping[str, Slot], found: Mapping[str, Entry]
) -> None:
    """Refuses a second copy of a tied tensor that is not a copy."""
    for twin, original in family.twins:
        if twin in wanted or twin not in found:
            continue
        shapes = found[twin].shape, found[original].shape
        if shapes[0] != shapes[1] or not np.array_equal(read(found[twin]), read(found[original])):
            raise UserError(
                f"{path} ties {twin} to {original} but has other numbers in it; set"
                " tie_word_embeddings to false in its config"
            )


def _aligned(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An array at an address that JAX on a CPU takes over without a copy."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)


def _hollow(shape: tuple[int, ...]) -> np.ndarray:
    return np.broadcast_to(np.zeros((), np.uint8), shape)


def _put(tree: dict[str, Any], path: str, leaf: Any) -> None:
    *parents, name = path.split("/")
    for parent in parents:
        tree = tree.setdefault(parent, {})
    tree[name] = leaf
