"""Files and settings that are not what they should be, beside tests/test_bad_input.py (15, 16, 28,
29).
"""

import json
import resource
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tiny

from experiments import cost, machine
from lm.config import UserError
from lm.data import sources, tokenizer
from lm.data.sources import SourceConfig
from lm.tasks import files


@pytest.mark.parametrize("kind", ["missing", "empty", "replaced"])
def test_data_that_are_gone_or_others_are_never_trained_on(study, finished, tmp_path, lm, kind):
    """Catches prepared data that are absent, empty, or others of the same size (15)."""
    workdir = tiny.unfinished(finished, tmp_path / "run", "2x4")
    (path,) = workdir.glob("data/*/recall-3-train/tokens.npy")
    if kind == "missing":
        path.unlink()
    elif kind == "empty":
        path.write_bytes(b"")
    else:
        other = np.load(path, allow_pickle=False)
        np.save(path, other[::-1].copy(), allow_pickle=False)
    size = tiny.size(path)
    before = tiny.snapshot(workdir)
    sentence = lm("run", study, f"--workdir={workdir}").refusal
    assert str(path.parent) in sentence and "again" in sentence
    assert tiny.snapshot(workdir) == before
    assert kind != "replaced" or size == tiny.size(
        next(finished.glob(f"data/*/{path.parent.name}/{path.name}"))
    )


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.json"])
def test_a_tokenizer_that_is_gone_is_refused(study, finished, tmp_path, lm, name):
    """Catches a new tokenizer, trained in the place of the one that made the ids (16)."""
    workdir = tiny.unfinished(finished, tmp_path / "run", "2x4")
    (path,) = workdir.glob(f"data/*/tokenizer/{name}")
    path.unlink()
    before = tiny.snapshot(workdir)
    sentence = lm("run", study, f"--workdir={workdir}").refusal
    assert str(path.parent) in sentence
    assert tiny.snapshot(workdir) == before


def test_a_model_that_no_machine_holds_is_refused(study, tmp_path, lm):
    """Catches a job that could only run out of memory, or a refusal without the estimate (28)."""
    settings = ("--config.scale=hot", "--config.model.size=200x20000")
    sentence = lm("run", study, f"--workdir={tmp_path / 'run'}", *settings).refusal
    for words in ("GiB for 960,010,260,000 parameters", "this machine has", "a smaller size"):
        assert words in sentence
    assert not (tmp_path / "run").exists()
    assert "960,010,260,000" in lm("run", study, *settings, "--dry_run").out
    assert 2**28 < machine.memory() < 2**50
    cost.check_memory([], 0)


ODD = {
    "nul": "a\0b",
    "special": "<pad><bos><eos><unk>",
    "spaces": " \n\t ",
    "marks": "\ufeff\u202e\u0301",
    "astral": "\U0001f600" * 3,
}


@pytest.mark.parametrize("kind", ["char", "bpe"])
@pytest.mark.parametrize("case", ODD)
def test_odd_text_has_a_defined_end(kind, case):
    """Catches a special token that a text can write, a character that is lost uncounted, and a
    crash (29).
    """
    made = trained(kind)
    ids = made.encode(ODD[case])
    assert ids.dtype == np.int32 and (ids < made.vocab_size).all()
    specials = {0, 1, 2}  # <pad> <bos> <eos>; what has no token of its own is <unk>
    assert not specials & set(ids.tolist())
    assert made.token_bytes(ids, ODD[case]).sum() == len(ODD[case].encode())
    assert made.encode("").shape == (0,)


def trained(kind: str) -> tokenizer.Tokenizer:
    size = {"char": 112, "bpe": 380}[kind]
    config = tokenizer.TokenizerConfig(kind, size)
    return tokenizer.train(["the quick brown fox reads a text\n" * 20], config, tokenizer.ASCII)


def test_half_a_surrogate_pair_is_no_text(tmp_path):
    """Catches a record whose escape JSON allows and no tokenizer takes (29)."""
    for record in ({"input": "a\ud800b", "target": "c"}, {"input": "a", "target": "\udfff"}):
        (tmp_path / "t.json").write_text(json.dumps([record]))
        with pytest.raises(UserError, match="record 0 has half a surrogate pair"):
            files.read(tmp_path / "t.json")
    (tmp_path / "t.json").write_text(json.dumps([{"input": "\U0001f600", "target": "c"}]))
    assert files.read(tmp_path / "t.json")[0].answer == "c"


def test_documents_of_all_kinds_are_kept_or_named(tmp_path):
    """Catches a sweep that one bad file ends, and a file that is left out in silence (29)."""
    (tmp_path / "in").mkdir()
    good = {f"{i}.txt": f"text {i}\n".encode() for i in range(9)}
    bad = {"nul": b"a\0b", "latin": b"caf\xe9", "half": b"\xed\xa0\x80", "empty": b""}
    long = {"long": b"a line without an end " * 50_000}
    for name, content in (good | bad | long).items():
        (tmp_path / "in" / name).write_bytes(content)
    corpus = sources.scan(SourceConfig("folder", str(tmp_path / "in")))
    assert {f.path for f in corpus.files} == good.keys() | long.keys()
    assert dict(corpus.skipped).keys() == {"nul", "latin", "half"} and corpus.empty == 1


@pytest.mark.slow
def test_a_line_of_a_hundred_megabytes(tmp_path):
    """Catches memory that grows faster than the text: 3 GiB do for 100 MB in one line (29)."""
    (tmp_path / "in").mkdir()
    for i in range(4):
        (tmp_path / "in" / f"{i}.txt").write_text(f"text {i}\n" * 50)
    with open(tmp_path / "in" / "long.txt", "w") as file:
        for _ in range(1000):
            file.write("a line without an end, " * 4348)
    code = (
        "import sys; from lm.data import sources, tokenizer as t\n"
        "from lm.data.sources import SourceConfig\n"
        "corpus = sources.scan(SourceConfig('folder', sys.argv[1]))\n"
        "texts = [x for s in ('train', 'valid', 'test') if s in corpus.splits\n"
        "         for x in sources.texts(corpus, s, sys.argv[2])]\n"
        "made = t.train(texts, t.TokenizerConfig('char', 112), t.ASCII)\n"
        "print(sum(len(made.encode(x)) for x in texts))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "in", tmp_path / "cache"],
        cwd=tiny.ROOT,
        env=tiny.environment(),
        capture_output=True,
        text=True,
        timeout=300,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (3 << 30, 3 << 30)),
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) > 100_000_000
    shutil.rmtree(tmp_path / "in")
