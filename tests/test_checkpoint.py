"""Checkpoints: the same bits come back, and nothing damaged or half-written is ever used."""

import errno
import os
import shutil
import subprocess
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lm.config import UserError
from lm.rundir import read_json
from lm.sharding import make_mesh
from lm.train.cell import build_point, cells
from lm.train.checkpoint import Checkpoints, load, sealed_steps
from lm.train.program import make_cell_population
from lm.train.step import TrainState, new_state

EXTRA = {"seconds": {"train": 1.5}}
POWERS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


def state(seed=0, size=8):
    """A training state with every type of leaf that one may have; values no decimal can hold."""
    rng = np.random.default_rng(seed)
    params = {
        "embed": jnp.asarray(rng.normal(size=(size, 4)), jnp.float32),
        "layers": {"qkv": jnp.asarray(rng.normal(size=(2, 4, 4)), jnp.bfloat16)},
        "odd": jnp.asarray([np.nan, -np.inf, -0.0, 1e-45, 3e38], jnp.float32),
    }
    made = new_state(params, optax.adam(1e-3), 0.1 * (seed + 1), 2**32 - 1 - seed)
    return made._replace(step=made.step + seed)


def shapes(tree):
    """What `restore` is given: no values."""
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=one), tree)


def assert_same_bits(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True
    ):
        name = jax.tree_util.keystr(path)
        assert (a.dtype, a.shape) == (b.dtype, b.shape), name
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), name


@pytest.fixture
def opened():
    """`Checkpoints` of a folder, closed at the end whatever happens."""
    made = []

    def opener(folder):
        made.append(Checkpoints(Path(folder)))
        return made[-1]

    yield opener
    for checkpoints in made:
        checkpoints.close()


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """A folder into which steps 1, 2 and 3 were saved; not to be written to."""
    folder = tmp_path_factory.mktemp("three") / "checkpoints"
    checkpoints = Checkpoints(folder)
    for step in (1, 2, 3):
        checkpoints.save(step, state(step), {**EXTRA, "note": step})
    checkpoints.close()
    return folder


@pytest.fixture
def copy(three, tmp_path):
    return Path(shutil.copytree(three, tmp_path / "cell" / "checkpoints"))


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_state_comes_back_bit_by_bit(three, opened):
    """Catches a type that is widened, a NaN that is lost, and a tree that comes back as a dict."""
    step, found, extra, problems = opened(three).restore(shapes(state()))
    assert (step, problems, extra["note"], extra["seconds"]) == (3, [], 3, EXTRA["seconds"])
    assert isinstance(found, TrainState)
    assert_same_bits(found, state(3))


def test_the_last_two_are_kept_and_sealed(three, opened):
    """Catches a disk that fills up with checkpoints, and one left without its manifest."""
    assert names(three) == ["2", "2.manifest.json", "3", "3.manifest.json"]
    manifest = read_json(three / "2.manifest.json")
    files = {p.relative_to(three / "2").as_posix() for p in (three / "2").rglob("*") if p.is_file()}
    assert set(manifest["files"]) == files and manifest["step"] == 2
    assert opened(three).steps() == [2, 3]


def on_mesh(strategy, devices):
    """The shapes of a population's states under a strategy on so many devices."""
    mesh = make_mesh(strategy, jax.devices()[:devices])
    train = {"strategy": strategy, "replicas": "vmap"}
    return make_cell_population(cell(4, size="1x8", rows=8, **train), mesh).states


def test_another_mesh_and_another_strategy_get_the_same_bits(tmp_path, opened):
    """Catches a checkpoint that only the mesh that wrote it can read, and one that comes back cut
    in the way of the writer.
    """
    wide = on_mesh("fsdp", 8)
    rng = np.random.default_rng(0)
    values = jax.tree.map(lambda s: (100 * rng.normal(size=s.shape)).astype(s.dtype), wide)
    checkpoints = opened(tmp_path / "c")
    written = jax.tree.map(lambda v, s: jax.device_put(v, s.sharding), values, wide)
    checkpoints.save(1, written, EXTRA)
    checkpoints.seal()
    for strategy, devices in (("fsdp_tp", 4), ("replicated", 2), ("fsdp", 2), ("replicated", 1)):
        shape = on_mesh(strategy, devices)
        step, found, _, problems = checkpoints.restore(shape)
        assert (step, problems) == (1, [])
        assert_same_bits(found, values)
        for a, s in zip(jax.tree.leaves(found), jax.tree.leaves(shape), strict=True):
            assert a.sharding.is_equivalent_to(s.sharding, a.ndim)


def test_steps_that_are_to_stay_stay(tmp_path, opened):
    """Catches a kept step that is removed with the old ones, and one that is kept by mistake."""
    folder = tmp_path / "c"
    for steps in ((0, 2, 5, 7), (8, 9)):  # a resume knows them as well
        checkpoints = Checkpoints(folder, (0, 5))
        for step in steps:
            checkpoints.save(step, state(step), EXTRA)
        checkpoints.close()
    assert sealed_steps(folder) == [0, 5, 8, 9]
    for step in (0, 5, 9):
        assert_same_bits(load(folder, step, shapes(state())), state(step))
    assert opened(folder).restore(shapes(state()))[0] == 9


def test_looking_at_a_damaged_checkpoint_changes_nothing(copy):
    """Catches a later evaluation of a flipped bit, and one that takes a checkpoint away."""
    damage(next(p for p in (copy / "2").rglob("*") if p.is_file()), "flip")
    (copy / "3.manifest.json").write_text("{}")
    before = names(copy)
    for step in (2, 3):
        with pytest.raises(UserError, match=f"restore the checkpoint .* leave out step {step}"):
            load(copy, step, shapes(state()))
    assert names(copy) == before
    assert sealed_steps(copy / "none") == []


def cell(steps, size="1x4", rows=1, **train):
    """A cell of that many steps of `rows` rows of 32 tokens."""
    settings = {
        "name": "cell",
        "model": {"size": size, "heads": 2, "kv_heads": 2},
        "optim": {"learning_rate": 1e-2, "warmup_tokens": 0},
        "data": {"length": 32, "mixture": {"text": {"task": "text", "rows": rows}}},
        "train": {"tokens": 32 * rows * steps, **train},
    }
    return cells("study", [build_point(settings)])[0]


@pytest.mark.parametrize(
    ("steps", "train", "kept"),
    [
        (1000, {"chunk": 1}, ()),
        (4, {"chunk": 1, "keep_every": 1000}, (0, 1, 2, 4)),
        (2100, {"chunk": 1, "keep_every": 1000}, (0, *POWERS, 1000, 2000, 2100)),
        (2000, {"chunk": 1, "keep_every": 1000}, (0, *POWERS, 1000, 2000)),
        (1000, {"chunk": 1, "keep_every": 128}, (0, *POWERS, 640, 768, 896, 1000)),
        (700, {"chunk": 50, "keep_every": 130}, (0, 50, 100, 150, 300, 550, 650, 700)),
    ],
)
def test_kept_steps_are_those_of_pythia(steps, train, kept):
    """Catches a step that is no end of a dispatch, one after the last, and a last that is not
    there; without the option, anything.
    """
    assert cell(steps, **train).kept_steps == kept


def test_an_empty_folder_has_no_checkpoint(tmp_path, opened):
    """Catches a first start that is taken for damage."""
    fresh = state()
    step, found, extra, problems = opened(tmp_path / "new").restore(fresh)
    assert (step, extra, problems) == (-1, {}, []) and found is fresh


def test_what_is_not_sealed_is_removed(copy, opened):
    """Catches a write cut short by a kill that is taken for a checkpoint."""
    (copy / "3.manifest.json").unlink()
    (copy / "4.orbax-checkpoint-tmp").mkdir()
    (copy / "4.orbax-checkpoint-tmp" / "part").write_bytes(b"x")
    checkpoints = opened(copy)
    assert names(copy) == ["2", "2.manifest.json"]
    step, found, _, problems = checkpoints.restore(shapes(state()))
    assert (step, problems) == (2, [])
    assert_same_bits(found, state(2))


def damage(path, how):
    content = path.read_bytes()
    if how == "delete":
        path.unlink()
    elif how == "truncate":
        path.write_bytes(content[: len(content) // 2])
    else:
        place = len(content) // 2
        path.write_bytes(content[:place] + bytes([content[place] ^ 0x10]) + content[place + 1 :])


@pytest.mark.parametrize("how", ["flip", "truncate", "delete"])
def test_damage_to_any_file_is_found_and_the_one_before_is_used(three, tmp_path, opened, how):
    """Catches a file that the manifest does not cover: a flipped bit would be loaded in silence."""
    files = [p.relative_to(three) for p in (three / "3").rglob("*") if p.is_file()]
    assert len(files) > 3
    for number, file in enumerate(files):
        copy = Path(shutil.copytree(three, tmp_path / str(number)))
        damage(copy / file, how)
        checkpoints = opened(copy)
        step, found, extra, problems = checkpoints.restore(shapes(state()))
        assert (step, extra["note"], len(problems)) == (2, 2, 1), file
        assert str(copy / file) in problems[0]
        assert_same_bits(found, state(2))
        assert names(copy) == ["2", "2.manifest.json", "3.bad", "3.bad.json"]
        assert (copy / "3.bad" / file.relative_to("3")).exists() == (how != "delete")


@pytest.mark.parametrize("how", ["flip", "truncate"])
def test_damage_to_the_manifest_is_found(copy, opened, how):
    """Catches a manifest that cannot be read ending the run with a traceback."""
    damage(copy / "3.manifest.json", how)
    step, found, _, problems = opened(copy).restore(shapes(state()))
    assert step == 2 and len(problems) == 1 and "3" in problems[0]
    assert_same_bits(found, state(2))


def test_quarantine_does_not_stop_training(copy, opened):
    """Catches a step that cannot be written again because its damaged copy lies there."""
    for _ in range(2):
        damage(next(p for p in (copy / "3").rglob("*") if p.is_file()), "flip")
        checkpoints = opened(copy)
        assert checkpoints.restore(shapes(state()))[0] == 2
        checkpoints.save(3, state(7), EXTRA)
        checkpoints.seal()
    step, found, _, problems = checkpoints.restore(shapes(state()))
    assert (step, problems) == (3, [])
    assert_same_bits(found, state(7))
    assert sum(name.endswith(".bad") for name in names(copy)) == 2


def test_all_damaged_is_refused_again_and_again(copy, opened):
    """Catches a second try that finds nothing, and trains from the start over what was saved."""
    for step in ("2", "3"):
        damage(next(p for p in (copy / step).rglob("*") if p.is_file()), "truncate")
    for _ in range(2):
        with pytest.raises(UserError) as error:
            opened(copy).restore(shapes(state()))
        sentence = str(error.value)
        assert f"every checkpoint of {copy.parent} is damaged (2.bad, 3.bad)" in sentence
        assert "restore one from a backup, or remove" in sentence


def test_a_save_does_not_see_what_happens_to_the_state(tmp_path, opened):
    """Catches a write that shares memory with the state, which the next dispatch overwrites."""
    size = 1 << 18
    overwrite = jax.jit(lambda tree: jax.tree.map(lambda a: a * 0 + 1, tree), donate_argnums=0)
    checkpoints = opened(tmp_path / "c")
    overwrite(state(1, size))  # compiled now, so that it runs while the files are written
    given = state(1, size)
    checkpoints.save(1, given, EXTRA)
    jax.block_until_ready(overwrite(given))
    assert given.params["embed"].is_deleted()
    checkpoints.seal()
    _, found, _, _ = checkpoints.restore(shapes(state(1, size)))
    assert_same_bits(found, state(1, size))


def test_steps_that_begin_alike_are_told_apart(copy, opened):
    """Catches a clean-up of step 3 that takes step 30 with it."""
    checkpoints = opened(copy)
    checkpoints.save(30, state(30), EXTRA)
    checkpoints.seal()
    checkpoints._abandon(3)
    assert names(copy) == ["30", "30.manifest.json"]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 4 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("only root can mount a small tmpfs")
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"a tmpfs cannot be mounted here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


# What was being written when the disk ran full is dropped by Orbax's thread, not without a word.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_full_disk_is_a_sentence_and_harms_nothing(small_disk, opened):
    """Catches a traceback, an older checkpoint that is lost, and a disk left full of parts."""
    folder, size = (
        small_disk / "cell" / "checkpoints",
        150_000,
    )  # 2.4 MB of noise; the moments are zeros
    checkpoints = opened(folder)
    checkpoints.save(1, state(1), EXTRA)
    checkpoints.seal()
    before = names(folder)
    used = shutil.disk_usage(folder).used
    (small_disk / "other").write_bytes(b"x" * 3_000_000)
    with pytest.raises(UserError, match="disk full: .* bytes are left below .*; free some space"):
        checkpoints.save(2, state(2, size), EXTRA)
        checkpoints.seal()
    assert names(folder) == before
    assert shutil.disk_usage(folder).used < used + 3_000_000 + 100_000
    step, found, _, problems = checkpoints.restore(shapes(state()))
    assert (step, problems) == (1, [])
    assert_same_bits(found, state(1))

    (small_disk / "other").unlink()  # what the sentence asks for
    checkpoints = opened(folder)
    checkpoints.save(2, state(2, size), EXTRA)
    checkpoints.seal()
    step, found, _, _ = checkpoints.restore(shapes(state(2, size)))
    assert step == 2
    assert_same_bits(found, state(2, size))


def test_no_room_for_the_manifest_is_a_sentence_too(copy, opened, monkeypatch):
    """Catches a checkpoint whose arrays are there and whose seal is not: it must be given up."""

    def full(path, obj):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    before = names(copy)
    checkpoints = opened(copy)
    checkpoints.save(4, state(4), EXTRA)
    monkeypatch.setattr("lm.train.checkpoint.write_json", full)
    with pytest.raises(UserError, match="disk full"):
        checkpoints.seal()
    assert names(copy) == before and checkpoints.steps() == [2, 3]


def test_a_folder_that_cannot_be_written_is_a_sentence(copy, opened, monkeypatch):
    """Catches a traceback where the disk is read-only."""

    def denied(path, obj):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    checkpoints = opened(copy)
    checkpoints.save(4, state(4), EXTRA)
    monkeypatch.setattr("lm.train.checkpoint.write_json", denied)
    with pytest.raises(UserError, match="cannot be written .*choose another --workdir"):
        checkpoints.seal()
