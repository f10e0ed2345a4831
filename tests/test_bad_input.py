"""What a user or a disk can do to `lm run`: one sentence, exit code 2, and nothing half-written.

Every refusal names the value, the limit and the remedy; what it must say is listed beside it. A
refused workdir is absent, or as it was.
"""

import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tiny

from lm.data import tokenizer
from lm.rundir import holder, read_json


@pytest.fixture
def mount(tmp_path) -> Iterator[Callable[..., Path]]:
    """`mount(options) -> Path`: a small file system; given again, it changes the options."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(options: str) -> Path:
        again = ["-o", f"remount,{options}"] if folder.is_mount() else ["-o", options]
        command = ["mount", "-t", "tmpfs", *again, "tmpfs", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
        return folder

    yield mount
    if folder.is_mount():
        subprocess.run(["umount", "-l", str(folder)], check=True)


def assert_says(sentence: str, *words: str) -> None:
    for word in words:
        assert word in sentence, f"{word!r} is not in: {sentence}"


def damage(path: Path, kind: str) -> Path:
    """Flips one bit in the middle of a file, or cuts its second half off."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data if kind == "flip" else data[: len(data) // 2])
    return path


def largest(folder: Path) -> Path:
    """The largest file below a folder: in a checkpoint, the arrays."""
    return max((p for p in folder.rglob("*") if p.is_file()), key=tiny.size)


SETTINGS = {
    "an unknown key": (["train.tokns=5"], "config.train.tokns", "did you mean 'tokens'?"),
    "an unknown group": (["trian.tokens=5"], "config.trian", "did you mean 'train'?"),
    "a word for a number": (["train.tokens=many"], "config.train.tokens", "'many'", "int"),
    "a fraction for a count": (["train.chunk=1.5"], "config.train.chunk", "1.5", "int"),
    "an unknown choice": (["train.strategy=fdsp"], "strategy", "'fdsp'", "'fsdp'"),
    "an unknown mode": (["train.replicas=3"], "replicas", "'3'", "'vmap'"),
    "a negative budget": (["train.tokens=-5"], "tokens is -5", "greater than 0"),
    "zero steps": (["train.chunk=0"], "chunk is 0", "greater than 0"),
    "a NaN": (["train.tokens=nan"], "config.train.tokens", "nan", "int"),
    "an infinity": (["optim.learning_rate=1e999"], "learning_rate is inf", "finite"),
    "a negative rate": (["optim.learning_rate=-1"], "learning_rate is -1", "greater than 0"),
    "zero heads": (["model.heads=0"], "heads is 0", "greater than 0"),
    "heads that do not divide": (["model.heads=3"], "heads 3", "width 4", "use 2 or 4"),
    "zero layers": (["scale=hot", "model.size=0x4"], "'0x4'", "1 layer or more"),
    "a negative width": (["scale=hot", "model.size=2x-4"], "'2x-4'", "LAYERSxWIDTH"),
    "a NaN width": (["scale=hot", "model.size=2xnan"], "'2xnan'", "LAYERSxWIDTH"),
    "zero rows": (["data.mixture.text.rows=0"], "rows is 0", "greater than 0"),
    "an unknown level": (["data.mixture.recall.level=0"], "recall", "0"),
    "a small embedding": (["model.vocab_size=50"], "112", "50", "raise it or lower"),
    "zero replicas": (["seeds.replicas=0"], "replicas is 0", "greater than 0"),
    "a long example": (["data.length=8"], "8", "raise the length or make the example shorter"),
    "a small vocabulary": (["data.tokenizer.vocab_size=20"], "vocab_size", "20"),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_a_bad_setting_is_refused(study, tmp_path, lm, case):
    """Fails if a check is lost, or comes only when something is on the disk."""
    settings, *words = SETTINGS[case]
    workdir = tmp_path / "run"
    done = lm("run", study, f"--workdir={workdir}", *(f"--config.{s}" for s in settings))
    assert_says(done.refusal, *words)
    assert not workdir.exists()


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('"chunk": 5', '"chnk": 5', ["1x4", "config.train.chnk", "did you mean 'chunk'?"]),
        ('"chunk": 5', '"chunk": float("nan")', ["config.train.chunk", "nan", "finite"]),
        ('"level": "3"', '"level": 3', ["mixture.recall.level", "3 (int)", "str"]),
        ("c = ConfigDict()", "c = ConfgDict()", ["tiny.py line 13", "ConfgDict"]),
        ("def points", "def pionts", ["defines no points", "points(config)"]),
        ("def get_config():", "def get_config(:", ["tiny.py line 12", "SyntaxError"]),
    ],
)
def test_a_bad_study_file_is_refused(study, tmp_path, lm, old, new, words):
    """Fails if what is in the file is checked less than what is on the command line."""
    text = study.read_text()
    assert old in text
    (tmp_path / "tiny.py").write_text(text.replace(old, new, 1))
    done = lm("run", tmp_path / "tiny.py", f"--workdir={tmp_path / 'run'}")
    assert_says(done.refusal, *words)
    assert not (tmp_path / "run").exists()


def test_a_study_that_is_not_there_is_refused(study, tmp_path, lm):
    done = lm("run", study.with_name("tinny.py"), f"--workdir={tmp_path / 'run'}")
    assert_says(done.refusal, "tinny.py does not exist", "did you mean", "/tiny.py'")
    assert list(tmp_path.iterdir()) == []


def test_arguments_that_are_missing_or_senseless_are_refused(study, tmp_path, lm):
    assert_says(lm("run", study).refusal, "--workdir is missing", "--workdir=runs/desk")
    done = lm("run", study, f"--workdir={tmp_path / 'run'}", "--workers=0")
    assert_says(done.refusal, "--workers is 0", "at least 1")
    for argument in ("--workers=two", "--wokrers=2"):
        sentence = lm("run", study, f"--workdir={tmp_path / 'run'}", argument).refusal
        assert_says(sentence, *argument.split("="), "lm run --help")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["train.strategy=fsdp"], ["embed", "4 is not divisible by the 8 devices", "use 8"]),
        (["data.mixture.text.rows=6"], ["batch 10", "8 devices", "'data'", "use 8 or 16"]),
        (["train.replica_devices=3"], ["'replica' of 3", "8 devices", "use one of [1, 2, 4, 8]"]),
    ],
)
def test_what_does_not_divide_the_devices_is_refused(
    study, tmp_path, lm, monkeypatch, settings, words
):
    """Fails if a worker finds it, after the data were prepared, or if nobody does."""
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
    changes = [f"--config.{setting}" for setting in settings]
    done = lm("run", study, f"--workdir={tmp_path / 'run'}", *changes)
    assert_says(done.refusal, "cell ", *words)
    assert not (tmp_path / "run").exists()


def test_a_workdir_that_is_a_file_is_refused(study, tmp_path, lm):
    (tmp_path / "file").write_text("mine")
    for workdir in (tmp_path / "file", tmp_path / "file" / "run"):
        sentence = lm("run", study, f"--workdir={workdir}").refusal
        assert_says(sentence, f"{tmp_path / 'file'} is a file", "give --workdir a folder")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_workdir_that_is_read_only_is_refused(study, mount, lm):
    """A mount, for root may write whatever the modes say."""
    disk = mount("ro")
    for workdir in (disk, disk / "run"):
        sentence = lm("run", study, f"--workdir={workdir}").refusal
        assert_says(sentence, str(workdir), "read-only", "choose another place")


def test_a_workdir_of_another_study_is_refused(study, finished, tmp_path, lm):
    """Fails if one study can write into the folder of another, or among somebody's files."""
    before = tiny.snapshot(finished)
    other = shutil.copy(study, tmp_path / "other.py")
    sentence = lm("run", other, f"--workdir={finished}").refusal
    assert_says(sentence, "belongs to study 'tiny', not 'other'", "choose another --workdir")
    assert tiny.snapshot(finished) == before
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("mine")
    sentence = lm("run", study, f"--workdir={tmp_path / 'run'}").refusal
    assert_says(sentence, "'thesis.tex' and no study", "choose an empty --workdir")
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["thesis.tex"]


def test_a_damaged_study_json_is_refused(study, tmp_path, lm):
    (tmp_path / "run").mkdir()
    for content in ("{", "[]", "{}"):
        (tmp_path / "run" / "study.json").write_text(content)
        sentence = lm("run", study, f"--workdir={tmp_path / 'run'}").refusal
        assert_says(sentence, str(tmp_path / "run" / "study.json"), "is damaged", "restore it")
        assert (tmp_path / "run" / "study.json").read_text() == content


def test_what_a_killed_writer_left_is_not_somebody_s_file(study, tmp_path, lm):
    """Fails if a kill at the wrong instant makes the same command refuse its own workdir."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".study.json.0badcafe.tmp").write_text("{")
    # Refused later, for its corpus: no need to train.
    args = [f"--workdir={tmp_path / 'run'}", f"--config.data.source.path={tmp_path / 'none'}"]
    assert_says(lm("run", study, *args).refusal, "none does not exist")


CORPORA: dict[str, tuple[dict[str, bytes], tuple[str, ...]]] = {
    "no file": ({}, ("holds no file", "give a folder or a glob of text files")),
    "empty files": ({f"{i}.txt": b" \n" for i in range(5)}, ("0 documents", "at least 3")),
    "too few": ({"a.txt": b"alpha", "b.txt": b"beta"}, ("2 documents", "at least 3", "give more")),
    "binary": (
        {f"{i}.txt": bytes([i, 0, 200]) for i in range(5)},
        ("none of the 5 files", "0.txt is binary", "give text files"),
    ),
    "not UTF-8": (
        {f"{i}.txt": b"caf\xe9 " * i for i in range(1, 6)},
        ("none of the 5 files", "1.txt is not UTF-8", "give text files"),
    ),
}


@pytest.mark.parametrize("case", CORPORA)
@pytest.mark.parametrize("there", [False, True], ids=["new workdir", "empty workdir"])
def test_a_bad_corpus_is_refused(study, tmp_path, lm, case, there):
    """Fails if the workdir keeps anything of a study that could not begin."""
    files, words = CORPORA[case]
    (tmp_path / "corpus").mkdir()
    for name, content in files.items():
        (tmp_path / "corpus" / name).write_bytes(content)
    workdir = tmp_path / "run"
    if there:
        workdir.mkdir()
    source = f"--config.data.source.path={tmp_path / 'corpus'}"
    assert_says(lm("run", study, f"--workdir={workdir}", source).refusal, "corpus", *words)
    assert list(workdir.iterdir()) == [] if there else not workdir.exists()


def test_another_tokenizer_than_that_of_the_data_is_refused(study, finished, tmp_path, lm):
    """Fails if ids are read with a vocabulary that did not make them."""
    workdir = tiny.unfinished(finished, tmp_path / "run", "2x4")
    (folder,) = workdir.glob("data/*/tokenizer")
    made_with = tokenizer.load(folder)
    other = tokenizer.train(["another text"], made_with.config, tokenizer.ASCII)
    assert other.sha256 != made_with.sha256
    shutil.rmtree(folder)
    other.save(folder)
    before = tiny.snapshot(workdir)
    sentence = lm("run", study, f"--workdir={workdir}").refusal
    assert_says(sentence, made_with.sha256, other.sha256, "use that tokenizer")
    assert tiny.snapshot(workdir) == before


@pytest.mark.parametrize("kind", ["flip", "cut"])
@pytest.mark.parametrize("name", ["text-train/tokens.npy", "tokenizer/tokenizer.model"])
def test_damaged_data_are_named_and_never_trained_on(study, finished, tmp_path, lm, name, kind):
    """Fails if a changed byte of the prepared data goes into training, or takes its blame to
    another file.
    """
    workdir = tiny.unfinished(finished, tmp_path / "run", "2x4")
    (path,) = workdir.glob(f"data/*/{name}")
    damage(path, kind)
    before = tiny.snapshot(workdir)
    assert_says(lm("run", study, f"--workdir={workdir}").refusal, str(path.parent), "again")
    assert tiny.snapshot(workdir) == before
    done = lm("verify", workdir, "--json")
    assert done.code == 1 and str(path) in done.out


def test_a_flipped_bit_in_the_rows_is_named(study, finished, tmp_path, lm):
    """Fails if a damaged line is left out in silence, by `verify` or by the report."""
    workdir = shutil.copytree(finished, tmp_path / "run")
    damage(workdir / "2x4" / "rows.jsonl", "flip")
    done = lm("verify", workdir)
    assert done.code == 1
    assert_says(done.out, f"{workdir / '2x4' / 'rows.jsonl'} line ", "fails its checksum")
    done = lm("run", study, f"--workdir={workdir}")
    assert_says(" ".join(done.out.split()), "rows.jsonl line ", "fails its checksum")


def test_a_damaged_checkpoint_and_a_torn_row_are_survived(study, finished, tmp_path, lm):
    """One cell has a flipped bit in its newest checkpoint; the other one's is cut short, and a row
    as well. Fails if Orbax's silence about the bit is believed, if the damage is deleted, or if
    the end is another one.
    """
    workdir = tiny.unfinished(finished, tmp_path / "run")
    torn = workdir / "1x4" / "rows.jsonl"
    for cell, kind in (("2x4", "flip"), ("1x4", "cut")):
        (workdir / cell / "result.json").unlink()
        damage(largest(workdir / cell / "checkpoints" / "30"), kind)
    torn.write_bytes(torn.read_bytes()[:-100])
    done = lm("run", study, f"--workdir={workdir}")
    assert (done.code, done.err) == (0, "")
    for cell, word in (("2x4", "has changed"), ("1x4", "truncated")):
        (event,) = tiny.events(workdir / cell, "checkpoint_quarantined")
        assert_says(event["what"], str(workdir / cell / "checkpoints" / "30"), word)
        assert [e["step"] for e in tiny.events(workdir / cell, "resume")] == [20]
        assert (workdir / cell / "checkpoints" / "30.bad").is_dir()
        assert tiny.rows(workdir / cell) == tiny.rows(finished / cell)
        assert tiny.params(workdir / cell) == tiny.params(finished / cell)
    assert lm("verify", workdir, "--json").json == lm("verify", finished, "--json").json
    assert "1 resume, 1 quarantined" in lm("status", workdir).out


def test_when_all_checkpoints_are_damaged_nothing_is_trained(study, finished, tmp_path, lm):
    """Fails if a cell that lost its checkpoints begins anew over the rows of its first life."""
    workdir = tiny.unfinished(finished, tmp_path / "run")
    cell = workdir / "2x4"
    (cell / "result.json").unlink()
    (cell / "checkpoints" / "20.manifest.json").write_text("{}")
    damage(largest(cell / "checkpoints" / "30"), "cut")
    damage(cell / "rows.jsonl", "flip")
    rows = (cell / "rows.jsonl").read_bytes()
    for _ in range(2):  # and it stays refused
        sentence = lm("run", study, f"--workdir={workdir}").refusal
        assert_says(sentence, str(cell), "20.bad, 30.bad", "is damaged", "remove the cell's folder")
        assert (cell / "rows.jsonl").read_bytes() == rows and not (cell / "result.json").exists()
    assert "fails its checksum" in tiny.events(cell, "rows_damaged")[0]["what"]
    assert "failed" in lm("status", workdir).out


def test_a_second_runner_is_told_who_holds_the_workdir(study, finished, tmp_path, lm):
    """Fails if two runners share a workdir, or if the second does not say where the first is."""
    workdir = tiny.unfinished(finished, tmp_path / "run", "2x4")
    with tiny.start("run", study, f"--workdir={workdir}") as first:
        tiny.until(lambda: (holder(workdir / "lock") or {}).get("pid") == first.pid)
        sentence = lm("run", study, f"--workdir={workdir}").refusal
        assert_says(lm("status", workdir).out, f"held by pid {first.pid}")
        first.send_signal(signal.SIGTERM)
        first.communicate(timeout=60)
    words = (str(workdir / "lock"), f"pid {first.pid} on {socket.gethostname()}", "wait until")
    assert_says(sentence, *words)
    assert holder(workdir / "lock") is None


def test_a_full_disk_is_one_sentence_and_no_loss(study, finished, mount, lm):
    """Fails if a write that failed leaves half a file that counts, keeps the space that the next
    try needs, or changes the end.
    """
    disk = mount("size=200k")
    workdir = disk / "run"
    sentence = lm("run", study, f"--workdir={workdir}").refusal  # no room for the data
    assert_says(sentence, "disk full", str(workdir), "free some space", "the same command again")
    assert not workdir.exists()

    mount("size=20m")
    tiny.unfinished(finished, workdir, "2x4")
    used = shutil.disk_usage(disk).used
    cell = sum(os.path.getsize(p) for p in (finished / "2x4").rglob("*") if p.is_file())
    for room in (8_192, cell // 2):  # not even a line of a log; some of the checkpoints
        mount(f"size={used + room}")
        sentence = lm("run", study, f"--workdir={workdir}").refusal
        assert_says(sentence, "disk full", str(workdir), "free some space")
    mount("size=20m")
    done = lm("run", study, f"--workdir={workdir}")
    assert (done.code, done.err) == (0, "")
    assert read_json(workdir / "2x4" / "result.json")["attempts"] > 1
    assert tiny.rows(workdir / "2x4") == tiny.rows(finished / "2x4")
    assert lm("verify", workdir, "--json").json == lm("verify", finished, "--json").json
