"""Every file of a real checkpoint, damaged in every way (5): each is noticed before anything is
trained, and the step before is used.
"""

import contextlib
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

from lm.config import build
from lm.rundir import read_json
from lm.sharding import make_mesh
from lm.train import checkpoint
from lm.train.cell import Cell
from lm.train.checkpoint import Checkpoints
from lm.train.program import make_cell_population


def damages(data: bytes, rng: random.Random) -> Iterator[bytes]:
    """One bit flipped (the first, the last, three others), cut short three times, zeros."""
    if not data:
        yield b"x"
        return
    for bit in (0, 8 * len(data) - 1, *(rng.randrange(8 * len(data)) for _ in range(3))):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        yield bytes(changed)
    yield from {data[:-1], data[: len(data) // 2], b"", bytes(len(data))} - {data}


@pytest.mark.slow
def test_all_damage_to_all_files_is_noticed(finished, tmp_path):
    """Catches one bit, in any file, that would be trained on."""
    cell = build(Cell, read_json(finished / "study.json")["cell_configs"]["2x4"], "2x4")
    mesh = make_mesh("replicated", jax.devices()[:1])
    shapes = make_cell_population(cell, mesh).states
    whole = finished / "2x4" / "checkpoints"
    wanted = jax.tree.leaves(checkpoint.load(whole, 20, shapes))
    files = sorted(p.relative_to(whole) for p in (whole / "30").rglob("*") if p.is_file())
    rng, cases = random.Random(0), 0
    for file in files:
        for changed in damages((whole / file).read_bytes(), rng):
            folder = Path(shutil.copytree(whole, tmp_path / "checkpoints"))
            (folder / file).write_bytes(changed)
            with contextlib.closing(Checkpoints(folder)) as opened:
                step, found, _, problems = opened.restore(shapes)
            assert (step, len(problems)) == (20, 1) and str(file) in problems[0], file
            same = zip(jax.tree.leaves(found), wanted, strict=True)
            assert all((a == b).all() for a, b in same)
            assert (folder / "30.bad").is_dir()
            shutil.rmtree(folder)
            cases += 1
    assert cases >= 100
    print(cases, "cases")
