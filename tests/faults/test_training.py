"""Attempts that end in the middle of training, in this process (19, 33, 34, 35)."""

import ast
import subprocess
import sys
from pathlib import Path

import jax
import pytest
import tiny

from lm.config import build
from lm.rundir import read_json
from lm.train import loop
from lm.train.cell import Cell
from lm.train.loop import Interrupted

CELL = "1x4"


def train(finished: Path, folder: Path, devices: int = 1, steps: int = 0) -> Path:
    """The tiny cell on so many devices, stopped after so many dispatches (0: not)."""
    cell = build(Cell, read_json(finished / "study.json")["cell_configs"][CELL], CELL)
    asked: list[int] = []

    def stop() -> bool:
        asked.append(1)
        return len(asked) == steps

    used = jax.devices()[:devices]
    loop.train(cell, folder, finished / "data", stop=stop, devices=used)
    return folder


def losses(cell: Path) -> dict[tuple, float]:
    return {k: float.fromhex(v[0]) for k, v in tiny.rows(cell).items() if k[3] == "train"}


@pytest.fixture(scope="module")
def undisturbed(finished, tmp_path_factory) -> Path:
    """The cell on one device of this process."""
    return train(finished, tmp_path_factory.mktemp("undisturbed") / CELL)


def test_one_device_then_two_then_one(finished, undisturbed, tmp_path):
    """Catches a resume on other devices that is refused, sees other rows of data, is not marked, or
    leaves the curve by more than sums in another order do (19).
    """
    for devices, steps in ((1, 2), (2, 2)):
        with pytest.raises(Interrupted):
            train(finished, tmp_path / CELL, devices, steps)
    train(finished, tmp_path / CELL)
    marks = [e["what"] for e in tiny.events(tmp_path / CELL, "not_bit_exact")]
    assert ["1 -> 2" in marks[0], "2 -> 1" in marks[1], len(marks)] == [True, True, 2]
    got, want = losses(tmp_path / CELL), losses(undisturbed)
    assert got.keys() == want.keys()
    assert max(abs(got[key] - want[key]) for key in want) < 1e-5


def test_an_evaluation_that_crashes_is_made_again(finished, undisturbed, tmp_path, monkeypatch):
    """Catches a hole in the curve: an evaluation that crashed after the step was trained, and that
    a resume passes by because its checkpoint is there (34).
    """
    made, real = [], loop.evaluate

    def evaluate(*args):
        made.append(1)
        if len(made) == 5:  # of two replicas each: the third evaluation, half of it
            raise RuntimeError("the evaluation crashed")
        return real(*args)

    monkeypatch.setattr(loop, "evaluate", evaluate)
    with pytest.raises(RuntimeError, match="crashed"):
        train(finished, tmp_path / CELL)
    assert tiny.rows(tmp_path / CELL).keys() != tiny.rows(undisturbed).keys()
    train(finished, tmp_path / CELL)
    assert tiny.rows(tmp_path / CELL) == tiny.rows(undisturbed)
    assert tiny.params(tmp_path / CELL) == tiny.params(undisturbed)
    assert tiny.events(tmp_path / CELL, "resume") and len(made) > 8


CODE = """
import jax, jax.numpy as jnp
x = jnp.arange(64.0).reshape(8, 8) / 7
print(jax.jit(lambda x: jnp.tanh(x @ x.T).sum())(x).item().hex())
"""


def cached(folder: Path) -> subprocess.Popen[str]:
    settings = {
        "JAX_COMPILATION_CACHE_DIR": str(folder),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "JAX_PLATFORMS": "cpu",
    }
    return subprocess.Popen(
        [sys.executable, "-c", CODE],
        cwd=tiny.ROOT,
        env=tiny.environment(**settings),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def answers(*processes: subprocess.Popen[str]) -> list[str]:
    found = [process.communicate(timeout=120) for process in processes]
    assert [p.returncode for p in processes] == [0] * len(processes), found
    return [out for out, _ in found]


def test_a_damaged_compile_cache_is_done_without(tmp_path):
    """Catches a program that is loaded from rubbish, and an end because of it: entries that are
    cut, flipped or empty, and two processes that fill one cache at the same time (33).
    """
    cache = tmp_path / "cache"
    first, second = answers(cached(cache), cached(cache))
    entries = [p for p in cache.rglob("*") if p.is_file() and p.stat().st_size > 64]
    assert first == second and entries
    for number, path in enumerate(sorted(entries)):
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes((data, data[: len(data) // 2], b"")[number % 3])
    assert answers(cached(cache)) == [first]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["flip", "cut", "empty"])
def test_a_cell_with_a_damaged_compile_cache(finished, tmp_path, how):
    """Catches the same with all programs of a cell; every entry is damaged (33)."""
    cache, wanted = tmp_path / "cache", finished / CELL
    for trial in range(2):
        workdir = tiny.unfinished(finished, tmp_path / str(trial), CELL)
        command = [sys.executable, "-m", "experiments.worker", str(workdir), "--cells", CELL]
        env = tiny.environment(JAX_COMPILATION_CACHE_DIR=str(cache), JAX_PLATFORMS="cpu")
        subprocess.run(command, cwd=tiny.ROOT, env=env, check=True, timeout=300)
        assert tiny.rows(workdir / CELL) == tiny.rows(wanted)
        assert tiny.params(workdir / CELL) == tiny.params(wanted)
        for path in (p for p in cache.rglob("*") if p.is_file() and p.stat().st_size):
            data = bytearray(path.read_bytes())
            data[len(data) // 2] ^= 1
            path.write_bytes({"flip": data, "cut": data[: len(data) // 2], "empty": b""}[how])


TRACKERS = {"wandb", "mlflow", "tensorboard", "tensorboardX", "aim", "neptune", "comet_ml", "clu"}


def test_nothing_is_told_to_a_tracker():
    """Catches a tracker that comes into the training processes, where it could raise, block or fill
    a disk: the only record is the run directory (35).
    """
    for path in (
        p for top in ("lm", "experiments", "launch") for p in Path(tiny.ROOT, top).rglob("*.py")
    ):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not TRACKERS & {name.partition(".")[0] for name in names}, path
