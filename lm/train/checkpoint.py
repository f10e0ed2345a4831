"""Checkpoints: Orbax writes the arrays, a manifest of SHA-256 hashes seals them, and only what is
sealed and whole counts.

Orbax loads a flipped bit in silence, so `STEP.manifest.json` is written beside `STEP/` once all its
files are on the disk. A folder without a manifest is a write that was cut short and is removed; one
that fails its manifest is renamed to `STEP.bad` and kept, and the one before it is used. Writing is
asynchronous: `save` copies and returns, a thread waits for the disk and seals. The two newest stay,
and those whose steps the cell says are to be kept, for later evaluations (`load`). Where several
processes share a state each writes its part; the first one seals, removes, and says from which step
to go on.
"""

import contextlib
import errno
import logging
import shutil
import time
from collections.abc import Callable, Collection
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from lm.config import UserError
from lm.rundir import check_manifest, make_manifest, read_json, write_json

KEEP = 2
BAD = ".bad"
NONE_WHOLE = -2


class Checkpoints:
    """The checkpoints of one cell, of which those of the steps `keep` are never removed; the caller
    holds the cell's lock.
    """

    def __init__(
        self,
        folder: Path,
        keep: Collection[int] = (),
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self.folder = folder = folder.absolute()  # Orbax takes no other
        self.check = check  # raises when the cell is not the caller's any more
        self.keep = frozenset(keep)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise disk_error(error, folder) from error
        self._pending: Future[None] | None = None
        self._thread = ThreadPoolExecutor(1, "seal")
        logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax logs every save at WARNING
        self._orbax = ocp.AsyncCheckpointer(ocp.StandardCheckpointHandler())
        self.first = jax.process_index() == 0  # the process that seals, removes and decides
        if self.first:
            for path in folder.iterdir():
                if path.name[0] == "." and path.suffix == ".tmp":  # a manifest, half-written
                    path.unlink()
                ours = path.is_dir() and path.name[0].isdigit() and not path.name.endswith(BAD)
                if ours and ("." in path.name or not self._manifest(int(path.name)).exists()):
                    shutil.rmtree(path)
        _agree(0)

    def steps(self) -> list[int]:
        """Sealed steps, oldest first; whether they are whole is known after `restore`."""
        return sealed_steps(self.folder)

    def save(self, step: int, state: Any, extra: dict[str, Any]) -> None:
        """Starts to write `state`; `extra` is kept, readable, in the manifest. Raises UserError
        when the disk is full.
        """
        self.seal()
        # The train step donates the state: without a copy it would overwrite what is being written.
        state = jax.tree.map(jnp.copy, state)
        try:
            self._orbax.save(self.folder / str(step), args=ocp.args.StandardSave(state), force=True)
        except (OSError, ValueError) as error:
            self._abandon(step)
            raise disk_error(error, self.folder) from error
        self._pending = self._thread.submit(self._seal, step, extra)

    def seal(self) -> None:
        """Returns when the last `save` is on the disk and sealed; raises what went wrong there."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _seal(self, step: int, extra: dict[str, Any]) -> None:
        """Waits until `step` is written, writes its manifest and removes those beyond `KEEP` that
        are not to stay.
        """
        try:
            self._orbax.wait_until_finished()
            if not self.first:  # Orbax's own barrier was passed: all have written
                return
            self.check()
            write_json(
                self._manifest(step),
                make_manifest(self.folder / str(step)) | {"step": step, **extra},
            )
        except (OSError, ValueError) as error:
            self._abandon(step)
            raise disk_error(error, self.folder) from error
        for old in set(self.steps()[:-KEEP]) - self.keep:
            # The manifest first: a half-deleted folder is never taken for a checkpoint.
            self._manifest(old).unlink()
            shutil.rmtree(self.folder / str(old))

    def restore(self, state: Any) -> tuple[int, Any, dict[str, Any], list[str]]:
        """The newest whole checkpoint: (step, state, extra, problems with newer ones); step -1 if
        none was ever sealed.

        `state` gives shapes and shardings, which may be those of another mesh, strategy or number
        of processes than wrote it. Raises UserError if there are checkpoints and all are damaged.
        """
        problems: list[str] = []
        # What is there is looked at once: a second look could find something else.
        step = _agree(self._newest_whole(problems) if self.first else 0)
        if step == NONE_WHOLE:
            bad = sorted(p.name for p in self.folder.glob("*" + BAD))
            raise UserError(
                f"every checkpoint of {self.folder.parent} is damaged ({', '.join(bad)}); "
                "restore one from a backup, or remove the cell's folder to train it from the start"
            )
        if step < 0:
            return -1, state, {}, problems
        restored = self._orbax.restore(
            self.folder / str(step), args=ocp.args.StandardRestore(state)
        )
        return step, restored, read_manifest(self.folder, step), problems

    def _newest_whole(self, problems: list[str]) -> int:
        """The newest whole step, -1 if there was none ever, NONE_WHOLE if all are damaged; those
        that are damaged are put aside and added to `problems`.
        """
        for step in reversed(self.steps()):
            found = check_manifest(self.folder / str(step), read_manifest(self.folder, step))
            if not found:
                return step
            problems += found
            self._quarantine(step)
        return NONE_WHOLE if any(self.folder.glob("*" + BAD)) else -1

    def close(self) -> None:
        """Seals what is pending and ends Orbax's threads."""
        try:
            self.seal()
        finally:
            self._thread.shutdown()
            self._orbax.close()

    def _manifest(self, step: int) -> Path:
        return manifest_path(self.folder, step)

    def _quarantine(self, step: int) -> None:
        target = self.folder / f"{step}{BAD}"
        if target.exists():
            target = self.folder / f"{step}.{time.time_ns()}{BAD}"
        (self.folder / str(step)).rename(target)
        self._manifest(step).rename(target.with_name(target.name + ".json"))

    def _abandon(self, step: int) -> None:
        """Gives back the space of a write that failed, so that a retry can succeed; not if the cell
        has been taken over: the step may be the other's.
        """
        self.check()
        if not self.first:
            return
        for path in (self.folder / str(step), *self.folder.glob(f"{step}.orbax*")):
            shutil.rmtree(path, ignore_errors=True)
        self._manifest(step).unlink(missing_ok=True)


def _agree(number: int) -> int:
    """The number of the first process, once all have come here."""
    if jax.process_count() == 1:
        return number
    return int(multihost_utils.broadcast_one_to_all(np.int32(number)))


def manifest_path(folder: Path, step: int) -> Path:
    """Where the seal of a step is."""
    return folder / f"{step}.manifest.json"


def read_manifest(folder: Path, step: int) -> dict[str, Any]:
    """The seal of a step; empty where it is not there or no JSON object."""
    try:
        manifest = read_json(manifest_path(folder, step))
    except (FileNotFoundError, UserError):
        return {}
    return manifest if isinstance(manifest, dict) else {}


def sealed_steps(folder: Path) -> list[int]:
    """The steps that have a folder and a seal, oldest first; none where `folder` is not there."""
    found = [int(p.name) for p in folder.glob("[0-9]*") if p.name.isdigit() and p.is_dir()]
    return sorted(step for step in found if manifest_path(folder, step).exists())


def load(folder: Path, step: int, state: Any) -> Any:
    """The state of a sealed step; changes nothing on the disk, whatever it finds there.

    `state` gives shapes and shardings. Raises UserError where the checkpoint is damaged.
    """
    folder = folder.absolute()
    if problems := check_manifest(folder / str(step), read_manifest(folder, step)):
        raise UserError(
            f"{problems[0]}; restore the checkpoint from a backup, or leave out step {step}"
        )
    with contextlib.closing(ocp.Checkpointer(ocp.StandardCheckpointHandler())) as orbax:
        return orbax.restore(folder / str(step), args=ocp.args.StandardRestore(state))


def disk_error(error: Exception, folder: Path) -> Exception:
    """The user's sentence for a full or read-only disk; any other error as it is."""
    number, text = getattr(error, "errno", None), str(error)
    if number in (errno.ENOSPC, errno.EDQUOT) or "No space left" in text:
        free = shutil.disk_usage(folder).free
        return UserError(
            f"disk full: {free:,} bytes are left below {folder}; free some space and give the same"
            " command again, training goes on from the last checkpoint"
        )
    if number in (errno.EROFS, errno.EACCES):
        return UserError(f"{folder} cannot be written ({error}); choose another --workdir")
    return error
