"""What one attempt writes into its cell's folder: rows, events, stored answers, progress, the
result.
"""

import dataclasses
import hashlib
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lm.data.loader import Batch
from lm.emergence import metrics
from lm.emergence.metrics import Answers, Measure
from lm.emergence.table import RowWriter
from lm.eval.perplexity import masked_metrics, restored, text_metrics
from lm.eval.score import Scores
from lm.eval.suite import Key, TestSet
from lm.rundir import JsonLines, now, sha256, write_json
from lm.sizes import flops_per_sequence, parameters
from lm.train.cell import Cell, Replica
from lm.train.objective import held_out
from lm.train.step import ALIVE

BASELINED = ("exact_match", "masked_accuracy")  # metrics of which a row says the chance

type Answered = dict[Key, Answers]


@dataclasses.dataclass
class Clock:
    """Seconds spent, by kind, over all attempts."""

    compile: float = 0.0  # waited for programs; they may have been made beside another cell
    train: float = 0.0
    eval: float = 0.0
    total: float = 0.0


class Recorder:
    """Everything that one attempt writes into the cell's folder."""

    def __init__(self, cell: Cell, folder: Path, attempt: int, chances: dict[Key, float]) -> None:
        self.cell, self.folder, self.attempt, self.chances = cell, folder, attempt, chances
        counts = parameters(cell.model)
        self.size = {
            "layers": cell.model.layers,
            "width": cell.model.width,
            "params": counts.non_embedding,
            "params_total": counts.total,
        }
        per_row = flops_per_sequence(cell.model, cell.data.length)
        self.flops_per_step = float(per_row) * cell.data.rows
        self.rows = RowWriter(folder / "rows.jsonl")
        self.events = JsonLines(folder / "events.jsonl")
        self._progress: dict[str, Any] = {}
        self._progress_at = 0.0
        self._useful: float | None = None
        for problem in self.rows.problems:
            self.event("rows_damaged", what=problem)

    def event(self, kind: str, **fields: Any) -> None:
        self.events.append({"event": kind, "time": now(), "attempt": self.attempt, **fields})

    def measure(
        self,
        who: Replica,
        step: int,
        where: Key,
        found: dict[str, Measure],
        ok: bool,
        seconds: float,
    ) -> None:
        """Rows of one replica at one step for one task, level and format."""
        task, level, format = where
        rows = [
            {
                **{
                    "study": self.cell.study,
                    "cell": self.cell.name,
                    "point": who.point,
                    "replica": who.index,
                },
                "role": who.role,
                **self.size,
                **{
                    "seed_init": who.init,
                    "seed_data": who.data,
                    "seed_dropout": who.dropout,
                    "seed_eval": who.eval,
                },
                "learning_rate": who.learning_rate,
                "step": step,
                "tokens": step * self.cell.tokens_per_step,
                "flops": step * self.flops_per_step,
                **{"task": task, "level": level, "format": format, "metric": name},
                **{"value": m.value if ok else None, "stderr": m.stderr if ok else None, "n": m.n},
                "chance": self.chances.get(where) if name in BASELINED else None,
                "status": "ok" if ok else "diverged",
                **{"attempt": self.attempt, "seconds": round(seconds, 3)},
            }
            for name, m in found.items()
        ]
        for mismatch in self.rows.append(rows):
            self.event("replay_mismatch", what=str(mismatch))

    def progress(self, step: int, loss: float, seconds: float) -> None:
        """For whoever looks: on the disk at most once a second, and at every `sync`."""
        steps, seconds = self.cell.steps, round(seconds, 1)
        self._progress = {"step": step, "steps": steps, "loss": loss, "seconds": seconds}
        self._progress |= {"useful": self._useful} if self._useful else {}
        if time.monotonic() - self._progress_at > 1:
            self._write_progress()

    def _write_progress(self) -> None:
        self._progress_at = time.monotonic()
        write_json(self.folder / "progress.json", self._progress)

    def losses(
        self, step: int, losses: np.ndarray, diverged_at: np.ndarray, seconds: float
    ) -> None:
        """Rows of the mean loss of the dispatch that ended at `step`, losses [R, n]; an event for
        each replica lost in it.
        """
        n = losses.shape[1]
        for who, loss, at in zip(self.cell.replicas, losses, diverged_at.tolist(), strict=True):
            ok = at == ALIVE
            mean = {"loss": Measure(float(loss.mean()), float("nan"), n)}
            self.measure(who, step, ("train", "mixture", 0), mean, ok, seconds)
            if not ok and at >= step - n:
                self.event("diverged", point=who.point, replica=who.index, step=at)
        alive = losses[diverged_at == ALIVE]
        loss_now = float(alive.mean()) if len(alive) else float("nan")
        self.progress(step, loss_now, seconds)

    def evaluation(
        self,
        who: Replica,
        step: int,
        answers: Answered,
        text: Scores,
        test: TestSet,
        ok: bool,
        seconds: float,
    ) -> None:
        """The stored answers of one replica and the rows of every metric that follows from them."""
        name = f"answers/{step:08d}-{who.point}-{who.index}.npz"
        (self.folder / "answers").mkdir(exist_ok=True)
        metrics.save(self.folder / name, {f"{t}.{v}.{f}": a for (t, v, f), a in answers.items()})
        self.event("answers", file=name, sha256=sha256(self.folder / name))
        for where, found in answers.items():
            self.measure(who, step, where, metrics.score(found), ok, seconds)
        length = self.cell.data.length
        rows = Batch(*(a.reshape(-1, length)[test.text_rows] for a in test.batches))
        self.measure(
            who, step, (held_out(self.cell), "test", 0), self.text(text, rows, test), ok, seconds
        )

    def text(self, text: Scores, rows: Batch, test: TestSet) -> dict[str, Measure]:
        """What is measured on held-out rows: it depends on what they are to the model."""
        objective = self.cell.train.objective
        if objective == "masked":
            return masked_metrics(text, rows)
        if objective == "span":
            return {f"span_{name}": m for name, m in restored(text, rows).items()}
        found = text_metrics(np.asarray(text.logprob), rows.weights, test.text_bytes)
        if objective == "seq2seq":
            found["token_accuracy"] = restored(text, rows)["accuracy"]
        return found

    def sync(self, clock: Clock | None = None) -> None:
        """Returns when everything written so far is on the disk; `clock` says how many seconds of
        work that is worth.
        """
        self.rows.sync()
        self.events.sync()
        if clock:
            self._useful = round(clock.train + clock.eval, 3)
        if self._progress:
            self._write_progress()

    def close(self) -> None:
        self.rows.close()
        self.events.close()


def params_sha256(params: Any) -> str:
    """The hex SHA-256 of a parameter tree: names, types, shapes and bytes, in the order of the
    names.
    """
    digest = hashlib.sha256()
    for path, leaf in sorted(
        jax.tree_util.tree_leaves_with_path(params), key=lambda item: str(item[0])
    ):
        array = np.asarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
