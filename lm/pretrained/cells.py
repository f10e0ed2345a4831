"""Models of ours: a replica of a trained cell, at its newest whole checkpoint.

Of a checkpoint only the parameters are read, not the optimiser's state, and nothing on the disk is
changed: a damaged one is passed over, not put aside as the trainer would.
"""

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import linen as nn

from lm import models, rundir
from lm.config import UserError, build, nearest, within
from lm.data import tokenizer as ours
from lm.pretrained.loaded import Loaded
from lm.pretrained.tokenizer import from_ours
from lm.train import mixture
from lm.train.cell import Cell
from lm.train.checkpoint import read_manifest, sealed_steps
from lm.train.objective import masking


def load(text: str, dtype: str) -> Loaded:
    """The model of `WORKDIR/CELL` or `WORKDIR/CELL:REPLICA`, the first replica unless said."""
    folder, index = _place(text)
    cell = build(Cell, rundir.read_json(folder / "config.json"), folder.name)
    within("the replica", index, 0, len(cell.replicas) - 1)
    config = dataclasses.replace(cell.model, dtype=dtype, param_dtype=dtype)  # type: ignore[arg-type]
    stored = nn.unbox(models.abstract(cell.model))
    params = _params(folder, newest(folder), stored, len(cell.replicas))
    params = jax.tree.map(lambda a: jax.device_put(a[index].astype(dtype)), params)
    where = mixture.folder(cell, folder.parent / "data") / "tokenizer"
    text_tokenizer = from_ours(ours.load(where)) if where.is_dir() else None
    if text_tokenizer and cell.train.objective == "masked":
        text_tokenizer = dataclasses.replace(text_tokenizer, mask_id=masking(cell).mask)
    return Loaded(models.build(config), params, text_tokenizer, config)


def newest(folder: Path) -> int:
    """The step of a cell's newest checkpoint that is whole; raises `UserError` without one."""
    checkpoints = folder / "checkpoints"
    for step in reversed(sealed_steps(checkpoints)):
        if not rundir.check_manifest(checkpoints / str(step), read_manifest(checkpoints, step)):
            return step
    raise UserError(f"{folder} has no whole checkpoint; `lm run` writes one, train the cell first")


def _place(text: str) -> tuple[Path, int]:
    """The folder of a cell and the number of a replica in it."""
    name, colon, number = text.rpartition(":")
    numbered = bool(colon) and number.isascii() and number.isdigit() and len(number) < 10
    folder, index = (Path(name), int(number)) if numbered else (Path(text), 0)
    if (folder / "config.json").is_file() and (folder / "checkpoints").is_dir():
        return folder, index
    for workdir in (folder, folder.parent):
        if (workdir / "study.json").is_file():
            cells = sorted(p.parent.name for p in workdir.glob("*/config.json"))
            wanted = "" if workdir == folder else folder.name
            raise UserError(
                f"{text} is no trained cell of {workdir}; {nearest(wanted, cells)}"
                " (WORKDIR/CELL or WORKDIR/CELL:REPLICA)"
            )
    raise UserError(
        f"{text} is no model; give a folder with config.json and safetensors, a GGUF file, or"
        " WORKDIR/CELL of an `lm run`"
    )


def _params(folder: Path, step: int, shapes: Any, replicas: int) -> Any:
    """The parameters of all replicas, stacked, as NumPy arrays."""
    item = jax.tree.map(lambda s: jax.ShapeDtypeStruct((replicas, *s.shape), s.dtype), shapes)
    plain = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item)
    args = ocp.args.PyTreeRestore({"params": item}, {"params": plain}, partial_restore=True)
    path = (folder / "checkpoints" / str(step)).absolute()
    with contextlib.closing(ocp.Checkpointer(ocp.PyTreeCheckpointHandler())) as orbax:
        found = orbax.restore(path, args=args)["params"]
    wrong = [
        "/".join(step.key for step in where)
        for (where, leaf), want in zip(
            jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(item), strict=True
        )
        if np.shape(leaf) != want.shape
    ]
    if wrong:
        raise UserError(f"{path} has {wrong[0]} of another shape than {folder}/config.json says")
    return found
