"""The long table: one row for every measured value of a study.

`COLUMNS` is the schema, and the only place that spells it. A row is identified by `IDENTITY`
within its cell; `TIMING` columns say when and in which attempt it was measured, and are no part of
what was measured. The worker writes rows through `RowWriter`, which makes a replay after a resume
harmless: the same bits are not written twice, other bits are written and told. Readers get all
cells as one frame (`load`), with every line that could not be trusted named (`problems`).

Two tables are equal when their `table_sha256` is: rows in canonical order, floats by their bits.
"""

import hashlib
import io
import math
import numbers
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lm.config import UserError, nearest
from lm.rundir import AnyPath, JsonLines, good_lines, read_lines, write_bytes

# The worker needs the writer only, and pandas costs it a second and 60 MB: imported where used.
if TYPE_CHECKING:
    import pandas as pd

COLUMNS: dict[str, type] = {
    **{"study": str, "cell": str, "point": str, "replica": int, "role": str},
    **{"layers": int, "width": int, "params": int, "params_total": int},
    **{"seed_init": int, "seed_data": int, "seed_dropout": int, "seed_eval": int},
    **{"learning_rate": float, "step": int, "tokens": int, "flops": float},
    **{"task": str, "level": str, "format": int, "metric": str},
    **{"value": float, "stderr": float, "n": int, "chance": float},
    **{"status": str, "attempt": int, "seconds": float},
}
IDENTITY = ("point", "replica", "step", "task", "level", "format", "metric")
TIMING = ("attempt", "seconds")
NULLABLE = ("value", "stderr", "chance")
CHOICES = {"role": ("ladder", "control"), "status": ("ok", "diverged")}
MEASURED = tuple(name for name in COLUMNS if name not in TIMING)


class Mismatch(NamedTuple):
    """A replayed row whose bits differ from those written before."""

    identity: tuple[Any, ...]
    before: dict[str, Any]
    after: dict[str, Any]

    def __str__(self) -> str:
        where = "/".join(str(part) for part in self.identity)
        changed = [name for name in MEASURED if not _same(self.before[name], self.after[name])]
        pairs = [f"{name} {self.before[name]!r} -> {self.after[name]!r}" for name in changed]
        return f"{where}: {', '.join(pairs)}"


class RowWriter:
    """Appends rows to one `rows.jsonl`, knowing what is there already."""

    def __init__(self, path: AnyPath) -> None:
        self._file = JsonLines(path)
        records, self.problems = read_lines(path)
        self._seen = {_identity(record): record for record in records}

    def append(self, rows: Iterable[Mapping[str, Any]]) -> list[Mismatch]:
        """Writes the rows that are new; returns those that contradict what was written before.

        A row with the bits of an earlier one is skipped; one with other bits is written as well.
        Raises `ValueError` on a missing or unknown column or a wrong type, before it writes any.
        """
        mismatches = []
        for row in [check(row) for row in rows]:
            identity = _identity(row)
            before = self._seen.get(identity)
            if before is not None and all(_same(before[name], row[name]) for name in MEASURED):
                continue
            if before is not None:
                mismatches.append(Mismatch(identity, before, row))
            self._file.append(row)
            self._seen[identity] = row
        return mismatches

    def sync(self) -> None:
        """Returns when every row is on the disk."""
        self._file.sync()

    def close(self) -> None:
        """Syncs and closes the file."""
        self._file.close()

    def __enter__(self) -> "RowWriter":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def check(row: Mapping[str, Any]) -> dict[str, Any]:
    """`row` in the order and the types of `COLUMNS`; NaN and infinity become None.

    Raises `ValueError` naming the column, the value and what it must be.
    """
    if row.keys() != COLUMNS.keys():
        missing = [name for name in COLUMNS if name not in row]
        unknown = [f"{name} ({nearest(name, list(COLUMNS))})" for name in row.keys() - COLUMNS]
        raise ValueError(f"a row lacks {missing or 'nothing'} and has unknown {unknown or 'none'}")
    return {name: _cast(name, kind, row[name]) for name, kind in COLUMNS.items()}


def load(workdir: AnyPath) -> "pd.DataFrame":
    """Every row of every cell, one per identity, sorted; None is NaN.

    Where a row was measured again with other bits the last attempt counts (see `problems`).
    """
    return read(workdir)[0]


def problems(workdir: AnyPath) -> list[str]:
    """One sentence for each damaged line and for each row that was measured twice, differently."""
    return read(workdir)[1]


def table_sha256(frame: "pd.DataFrame") -> str:
    """Hex SHA-256 over all columns but `TIMING`, in canonical order, floats by their bits."""
    frame = _sort(frame)
    digest = hashlib.sha256()
    for name in MEASURED:
        column = frame[name]
        digest.update(f"{name}:{len(column)}\n".encode())
        if COLUMNS[name] is str:
            digest.update("\x1f".join(column.tolist()).encode())
        elif COLUMNS[name] is int:
            digest.update(column.to_numpy("<i8").tobytes())
        else:
            bits = column.to_numpy("<f8").copy()
            bits[bits != bits] = math.nan  # one NaN, whatever its payload
            digest.update(bits.tobytes())
    return digest.hexdigest()


def write_cache(workdir: AnyPath, frame: "pd.DataFrame | None" = None) -> Path:
    """Writes `table.parquet`, the rebuildable cache of `load`, and returns its path."""
    path = Path(workdir) / "table.parquet"
    buffer = io.BytesIO()
    (load(workdir) if frame is None else frame).to_parquet(buffer, index=False)
    write_bytes(path, buffer.getvalue())
    return path


def cells(workdir: AnyPath) -> list[Path]:
    """The folders of the cells that have begun, by name; `UserError` if it is no folder."""
    workdir = Path(workdir)
    if not workdir.is_dir():
        raise UserError(f"{workdir} is not a folder; give the workdir of a study")
    return sorted(path.parent for path in workdir.glob("*/config.json"))


def read(workdir: AnyPath) -> tuple["pd.DataFrame", list[str]]:
    """The rows as `load` gives them and the sentences of `problems`, in one pass."""
    import pandas as pd

    frames, found = [_frame([])], []
    for cell in cells(workdir):
        lines, damaged = good_lines(cell / "rows.jsonl")
        frame, doubled = _deduplicate(_frame(lines))
        frames.append(frame)
        found += damaged + [f"{cell.name}: {sentence}" for sentence in doubled]
    return _sort(pd.concat([f for f in frames if len(f)] or frames[:1])), found


def _frame(lines: list[bytes]) -> "pd.DataFrame":
    """Lines of JSON as rows. Arrow parses a million in 5 s, where Python's json takes 12."""
    import pyarrow as pa
    import pyarrow.json

    kinds = {str: pa.string(), int: pa.int64(), float: pa.float64()}
    schema = pa.schema([(name, kinds[kind]) for name, kind in COLUMNS.items()])
    if not lines:
        return schema.empty_table().to_pandas()
    parse = pyarrow.json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore")
    blocks = pyarrow.json.ReadOptions(block_size=1 << 22)
    return pyarrow.json.read_json(io.BytesIO(b"\n".join(lines)), blocks, parse).to_pandas()


def _deduplicate(frame: "pd.DataFrame") -> tuple["pd.DataFrame", list[str]]:
    """One row per identity of one cell, the last attempt's, and a sentence where they differ."""
    if not frame.duplicated(list(IDENTITY)).any():
        return frame, []
    frame = frame.drop_duplicates(list(MEASURED), keep="last")
    frame = frame.sort_values("attempt", kind="stable")
    differ = frame[frame.duplicated(list(IDENTITY), keep=False)]
    sentences = [
        f"{'/'.join(map(str, identity))} was measured with {len(group)} different results; "
        f"attempt {group['attempt'].iloc[-1]} counts"
        for identity, group in differ.groupby(list(IDENTITY), sort=True)
    ]
    return frame.drop_duplicates(list(IDENTITY), keep="last"), sentences


def _sort(frame: "pd.DataFrame") -> "pd.DataFrame":
    """By study, cell and identity; a text counts by its rank, so that each is compared once."""
    import numpy as np
    import pandas as pd

    keys = []
    for name in ("study", "cell", *IDENTITY):
        if COLUMNS[name] is str:
            codes, texts = pd.factorize(frame[name])
            rank = np.empty(len(texts), np.int64)
            rank[np.argsort(np.asarray(texts, dtype=object))] = np.arange(len(texts))
            keys.append(rank[codes])
        else:
            keys.append(frame[name].to_numpy())
    return frame.iloc[np.lexsort(keys[::-1])].reset_index(drop=True)


def _identity(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in IDENTITY)


def _cast(name: str, kind: type, value: Any) -> Any:
    """One value in the type of its column; NumPy's scalars are welcome."""
    if name in NULLABLE and value is None:
        return None
    expected = {str: str, int: numbers.Integral, float: numbers.Real}[kind]
    if not isinstance(value, expected) or isinstance(value, bool):
        raise ValueError(f"row column {name} is {value!r}; it must be {kind.__name__}")
    if kind is float and not math.isfinite(value):
        if name in NULLABLE:
            return None
        raise ValueError(f"row column {name} is {value!r}; it must be finite")
    if name in CHOICES and value not in CHOICES[name]:
        raise ValueError(f"row column {name} is {value!r}; it must be one of {CHOICES[name]}")
    return kind(value)


def _same(a: Any, b: Any) -> bool:
    """Equality by bits: 0.0 is not -0.0."""
    if isinstance(a, float) and isinstance(b, float):
        return struct.pack("<d", a) == struct.pack("<d", b)
    return type(a) is type(b) and a == b
