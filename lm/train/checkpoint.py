"""Checkpoints: Orbax writes the arrays, a manifest of SHA-256 hashes seals them, and only what is
sealed and whole counts.

Orbax loads a flipped bit in silence, so `STEP.manifest.json` is written beside `STEP/` once all its
files are on the disk. A folder without a manifest is a write that was cut short and is removed; one
that fails its manifest is renamed to `STEP.bad` and kept, and the one before it is used. Writing is
asynchronous: `save` copies and returns, a thread waits for the disk and seals.
"""

import errno
import logging
import shutil
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from lm.config import UserError
from lm.rundir import check_manifest, make_manifest, read_json, write_json

KEEP = 2
BAD = ".bad"


class Checkpoints:
    """The checkpoints of one cell; the caller holds the cell's lock."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder = folder.absolute()  # Orbax takes no other
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise disk_error(error, folder) from error
        self._pending: Future[None] | None = None
        self._thread = ThreadPoolExecutor(1, "seal")
        logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax logs every save at WARNING
        self._orbax = ocp.AsyncCheckpointer(ocp.StandardCheckpointHandler())
        for path in folder.iterdir():
            ours = path.is_dir() and path.name[0].isdigit() and not path.name.endswith(BAD)
            if ours and ("." in path.name or not self._manifest(int(path.name)).exists()):
                shutil.rmtree(path)

    def steps(self) -> list[int]:
        """Sealed steps, oldest first; whether they are whole is known after `restore`."""
        return sorted(int(p.name) for p in self.folder.iterdir() if p.is_dir() and p.name.isdigit())

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
        """Waits until `step` is written, writes its manifest and removes those beyond `KEEP`."""
        try:
            self._orbax.wait_until_finished()
            write_json(
                self._manifest(step),
                make_manifest(self.folder / str(step)) | {"step": step, **extra},
            )
        except (OSError, ValueError) as error:
            self._abandon(step)
            raise disk_error(error, self.folder) from error
        for old in self.steps()[:-KEEP]:
            # The manifest first: a half-deleted folder is never taken for a checkpoint.
            self._manifest(old).unlink()
            shutil.rmtree(self.folder / str(old))

    def restore(self, state: Any) -> tuple[int, Any, dict[str, Any], list[str]]:
        """The newest whole checkpoint: (step, state, extra, problems with newer ones); step -1 if
        none was ever sealed.

        `state` gives shapes and shardings. Raises UserError if there are checkpoints and all are
        damaged.
        """
        problems: list[str] = []
        for step in reversed(self.steps()):
            manifest = self._read_manifest(step)
            found = check_manifest(self.folder / str(step), manifest)
            if not found:
                restored = self._orbax.restore(
                    self.folder / str(step), args=ocp.args.StandardRestore(state)
                )
                return step, restored, manifest, problems
            problems += found
            self._quarantine(step)
        if bad := sorted(p.name for p in self.folder.glob("*" + BAD)):
            raise UserError(
                f"every checkpoint of {self.folder.parent} is damaged ({', '.join(bad)}); "
                "restore one from a backup, or remove the cell's folder to train it from the start"
            )
        return -1, state, {}, problems

    def close(self) -> None:
        """Seals what is pending and ends Orbax's threads."""
        try:
            self.seal()
        finally:
            self._thread.shutdown()
            self._orbax.close()

    def _manifest(self, step: int) -> Path:
        return self.folder / f"{step}.manifest.json"

    def _read_manifest(self, step: int) -> dict[str, Any]:
        try:
            manifest = read_json(self._manifest(step))
        except UserError:
            return {}
        return manifest if isinstance(manifest, dict) else {}

    def _quarantine(self, step: int) -> None:
        target = self.folder / f"{step}{BAD}"
        if target.exists():
            target = self.folder / f"{step}.{time.time_ns()}{BAD}"
        (self.folder / str(step)).rename(target)
        self._manifest(step).rename(target.with_name(target.name + ".json"))

    def _abandon(self, step: int) -> None:
        """Gives back the space of a write that failed, so that a retry can succeed."""
        for path in (self.folder / str(step), *self.folder.glob(f"{step}.orbax*")):
            shutil.rmtree(path, ignore_errors=True)
        self._manifest(step).unlink(missing_ok=True)


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
