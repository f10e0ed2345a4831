"""The rows of a study: schema, replays, duplicates and the hash of the table."""

import numpy as np
import pandas as pd
import pytest

from lm.config import UserError
from lm.emergence import table
from lm.rundir import read_lines, write_json

ROW = {
    **{"study": "s", "cell": "c", "point": "p", "replica": 0, "role": "ladder"},
    **{"layers": 2, "width": 8, "params": 1568, "params_total": 2592},
    **{"seed_init": 0, "seed_data": 0, "seed_dropout": 0, "seed_eval": 0},
    **{"learning_rate": 0.006, "step": 10, "tokens": 20480, "flops": 1.5e9},
    **{
        "task": "recall",
        "level": "5",
        "format": 0,
        "metric": "nll",
        "value": 0.1 + 0.2,
        "stderr": 0.01,
    },
    **{"n": 1000, "chance": None, "status": "ok", "attempt": 1, "seconds": 0.5},
}


@pytest.fixture
def study(tmp_path):
    """A run directory with one empty cell."""
    (tmp_path / "c").mkdir()
    write_json(tmp_path / "c" / "config.json", {})
    return tmp_path


def write(study, *rows, cell="c"):
    with table.RowWriter(study / cell / "rows.jsonl") as writer:
        return writer.append(rows)


def test_a_row_comes_back_with_its_bits_and_types(study):
    """Fails if floats are rounded on the way, None is not NaN, or NumPy scalars are refused."""
    write(study, ROW | {"step": np.int64(10), "value": np.float64(0.1 + 0.2), "stderr": np.nan})
    frame = table.load(study)
    assert list(frame) == list(table.COLUMNS)
    assert frame.loc[0, "value"].hex() == (0.1 + 0.2).hex()
    assert np.isnan(frame.loc[0, "stderr"]) and np.isnan(frame.loc[0, "chance"])
    assert (frame["step"].dtype, frame["flops"].dtype) == (np.int64, np.float64)
    assert read_lines(study / "c" / "rows.jsonl")[0][0]["stderr"] is None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"metrik": "nll"}, "metrik (did you mean 'metric'?)"),
        ({"step": 1.5}, "step is 1.5; it must be int"),
        ({"step": True}, "step is True"),
        ({"level": 5}, "level is 5; it must be str"),
        ({"flops": float("nan")}, "flops is nan; it must be finite"),
        ({"role": "boss"}, "role is 'boss'; it must be one of"),
    ],
)
def test_a_row_off_the_schema_is_refused_before_anything_is_written(study, change, said):
    """Fails if a wrong row is written, or if the rows before it in the same call are."""
    with pytest.raises(ValueError, match="row") as error:
        write(study, ROW, ROW | change)
    assert said in str(error.value)
    assert table.load(study).empty


def test_a_missing_column_is_named():
    with pytest.raises(ValueError, match=r"lacks \['chance'\]"):
        table.check({name: value for name, value in ROW.items() if name != "chance"})


def test_a_replay_with_the_same_bits_is_not_written_again(study):
    """Fails if attempt or seconds count as part of what was measured."""
    assert write(study, ROW) == []
    assert write(study, ROW | {"attempt": 2, "seconds": 9.0}) == []
    assert len(read_lines(study / "c" / "rows.jsonl")[0]) == 1


def test_a_replay_with_other_bits_is_written_and_told(study):
    """Fails if a difference in the last bit of a float, or in the sign of zero, goes unseen."""
    write(study, ROW, ROW | {"step": 20, "value": 0.0})
    told = write(study, ROW | {"value": 0.3, "attempt": 2}, ROW | {"step": 20, "value": -0.0})
    assert [m.after["value"] for m in told] == [0.3, -0.0]
    assert str(told[0]) == "p/0/10/recall/5/0/nll: value 0.30000000000000004 -> 0.3"
    frame = table.load(study)
    assert list(frame["value"]) == [0.3, -0.0]  # the last attempt counts
    assert any("measured with 2 different results" in line for line in table.problems(study))


def test_a_damaged_line_is_named_and_the_rest_is_read(study):
    """Fails if a flipped byte is believed, or hides the rows around it."""
    write(study, ROW, ROW | {"step": 20}, ROW | {"step": 30})
    path = study / "c" / "rows.jsonl"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert list(table.load(study)["step"]) == [10, 30]
    assert len(table.problems(study)) == 1 and "line 2" in table.problems(study)[0]


def test_the_hash_sees_bits_and_neither_order_nor_timing(study):
    """Fails if the hash rounds floats, depends on the order of rows, or covers timing."""
    write(study, ROW, ROW | {"step": 20})
    frame = table.load(study)
    before = table.table_sha256(frame)
    assert table.table_sha256(frame[::-1]) == before
    assert table.table_sha256(frame.assign(attempt=7, seconds=1.0)) == before
    nudged = frame.assign(value=np.nextafter(frame["value"], 1))
    assert table.table_sha256(nudged) != before
    assert table.table_sha256(frame.assign(level="6")) != before


def test_the_cache_is_the_table(study):
    """Fails if parquet changes a value or a type."""
    write(study, ROW, ROW | {"step": 20, "value": None, "status": "diverged"})
    cached = pd.read_parquet(table.write_cache(study))
    assert table.table_sha256(cached) == table.table_sha256(table.load(study))


def test_a_folder_that_is_not_there_is_the_users_mistake(tmp_path):
    with pytest.raises(UserError, match="is not a folder"):
        table.load(tmp_path / "nowhere")
    assert table.load(tmp_path).empty
