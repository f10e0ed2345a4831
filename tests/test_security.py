"""What a file, a name or an archive from somebody else can do: nothing but be refused.

Cases 26 and 27 of the fault battery. No load path unpickles, nothing goes through a shell, names
become folders only if they are on the allow-list, and JSON is bounded in depth and size. YAML is
written (`launch.kubernetes.render`) and never read, so there is no YAML bomb to defuse. Names in
manifests and scripts: tests/test_kubernetes.py, tests/test_slurm_script.py.
"""

import ast
import json
import os
import resource
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest

from lm import cli, rundir
from lm.config import UserError

ROOT = Path(__file__).parents[1]
FILES = sorted(p for top in ("lm", "experiments", "launch") for p in (ROOT / top).rglob("*.py"))

# Modules that run what they read, or unpack what they are given to wherever it wants to go.
MODULES = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
MODULES |= {"tarfile", "zipfile", "imp", "code", "codeop", "pty", "commands", "popen2"}
CALLS = {"eval", "exec", "compile", "__import__", "execfile"}
METHODS = {"system", "popen", "getoutput", "getstatusoutput", "unpack_archive", "read_pickle"}
METHODS |= {"to_pickle", "exec_module", "run_path", "run_module", "spawnl", "spawnv", "execl"}
METHODS |= {"full_load", "unsafe_load", "load_all", "safe_load", "safe_load_all"}
# What is meant: a study is a Python file that its user names on the command line; the programs of
# a jail run in it, and nowhere else.
MEANT = {("experiments.study", "exec_module")}
MEANT |= {("lm.eval.pair", "exec"), ("lm.eval.pair", "compile")}
# jax.jit(...).lower().compile() and the like are methods, `re.compile` is one as well.


def offences(source: str) -> list[str]:
    """Everything in a source that could run, or unpack, what it is given."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [a.name for a in node.names if a.name.split(".")[0] in MODULES]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in MODULES:
            found.append(str(node.module))
        elif isinstance(node, ast.Call):
            found += _call(node)
    return found


def _call(node: ast.Call) -> list[str]:
    keywords = {k.arg: k.value for k in node.keywords}
    found = []
    if "shell" in keywords:
        found.append("shell")
    if isinstance(node.func, ast.Name) and node.func.id in CALLS:
        found.append(node.func.id)
    if isinstance(node.func, ast.Attribute):
        owner = node.func.value.id if isinstance(node.func.value, ast.Name) else ""
        if node.func.attr in METHODS:
            found.append(node.func.attr)
        if node.func.attr == "load" and owner in ("torch", "yaml", "dill", "joblib"):
            found.append(f"{owner}.load")
        if node.func.attr in ("load", "save", "savez", "savez_compressed") and owner == "np":
            allowed = keywords.get("allow_pickle")
            if not isinstance(allowed, ast.Constant) or allowed.value is not False:
                found.append(f"np.{node.func.attr} without allow_pickle=False")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_code_runs_what_it_reads(path):
    """Catches a pickle, a shell, an eval or an archive that comes into any file of the project."""
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    assert [what for what in offences(path.read_text()) if (module, what) not in MEANT] == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from tarfile import open",
        "import torch\ntorch.load(f)",
        "np.load(f)",
        "np.load(f, allow_pickle=True)",
        "np.load(f, allow_pickle=flag)",
        "np.save(f, a)",
        "subprocess.run(c, shell=True)",
        "subprocess.run(c, shell=chosen)",
        "os.system(c)",
        "eval(text)",
        "exec(text)",
        "def f():\n    from cloudpickle import loads",
        "shutil.unpack_archive(f)",
        "pd.read_pickle(f)",
        "yaml.load(f, Loader=yaml.SafeLoader)",
        "yaml.safe_load(f)",
        "runpy.run_path(f)",
    ],
)
def test_the_search_finds(source):
    """Catches a search that finds nothing."""
    assert offences(source)
    assert not offences("re.compile(t); jitted.lower(x).compile(); json.load(f); np.loadtxt(f)")


class Rude:
    """Unpickled, it makes a folder."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self):
        return os.mkdir, (str(self.place),)


def test_stored_arrays_never_unpickle(tmp_path):
    """Catches np.load with allow_pickle, in answers and in prepared data."""
    from lm.data import prepare
    from lm.emergence import metrics

    proof = tmp_path / "proof"
    rude = np.array([Rude(proof)], dtype=object)
    np.savez(tmp_path / "a.npz", **{f"t.1.0.{name}": rude for name in metrics.DTYPES})
    with pytest.raises(ValueError, match="allow_pickle|[Pp]ickle"):
        metrics.load(tmp_path / "a.npz")
    folder = tmp_path / "data"
    folder.mkdir()
    for name in prepare.ARRAYS:
        np.save(folder / f"{name}.npy", rude)
    rundir.write_json(folder / "about.json", {"layout": "packed", "length": 8})
    rundir.write_json(folder / rundir.MANIFEST, rundir.make_manifest(folder))
    with pytest.raises(ValueError, match="[Pp]ython objects|allow_pickle"):
        prepare.load(folder)
    assert not proof.exists()
    np.load(tmp_path / "a.npz", allow_pickle=True)[f"t.1.0.{next(iter(metrics.DTYPES))}"]
    assert proof.exists()  # it would have worked


NAMES = ["../x", "..", ".", "/etc/passwd", "a/b", "", "a\0b", "a\nb", "a\n", "x" * 300, "-rf"]
NAMES += [".git", "CON", "con.txt", "Lpt1", "nul", "аdmin", "ﬁle", "é", "a b", "a;b", "$(id)"]
NAMES += ["a‮b", "a.", "~", "*", "a\\b", "\ud800", "lock", "study.json", "logs", "data"]


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_a_study_cannot_name_its_points_so(name, tmp_path):
    """Catches a name that leaves the workdir, is an option, a device, a part of every workdir, or
    looks like another (the а of `аdmin` is Cyrillic, ﬁ one letter).
    """
    from experiments import study

    path = tmp_path / "named.py"
    path.write_text(
        '"""Named."""\nfrom ml_collections import ConfigDict\n'
        "def get_config():\n    return ConfigDict({'a': 1})\n"
        f"def points(config):\n    return [{{'name': {ascii(name)}}}]\n"
    )
    with pytest.raises(UserError) as raised:
        study.load(path, [])
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 400 + len(str(tmp_path))
    assert sorted(p.name for p in tmp_path.iterdir() if p.name != "__pycache__") == ["named.py"]


def test_ordinary_names_are_not_refused():
    """Catches an allow-list that allows nothing."""
    from experiments import study

    for name in ("2x8", "conx", "a.b-c_d", "0", "x" * 64, "nullo", "com", "lock2"):
        study._check_name(name, "it")
        assert name not in study.TAKEN


def run(*args: object) -> tuple[int, str]:
    """The exit code and stderr of a command line, in 4 GiB of address space."""
    done = subprocess.run(
        [sys.executable, "-m", "lm.cli", *map(str, args)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30)),
    )
    return done.returncode, done.stderr


DEEP = {
    "lists": b"[" * 1_000_000,
    "objects": b'{"a":' * 1_000_000,
    "closed": b"[" * 200_000 + b"]" * 200_000,
    "a number": b"1" * 1_000_000,
    "a list": b"[]",
    "null": b"null",
    "nothing": b"",
    "no UTF-8": b'{"name": "\xff"}',
}


@pytest.mark.parametrize("kind", DEEP)
@pytest.mark.parametrize("verb", ["status", "verify"])
def test_a_hostile_study_file_is_one_sentence(kind, verb, tmp_path, capsys):
    """Catches a stack that overflows, and a traceback for what is in a file."""
    (tmp_path / "study.json").write_bytes(DEEP[kind])
    assert cli.main([verb, str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert err.startswith("lm: error: ") and err.count("\n") == 1 and "study.json" in err


def test_a_huge_study_file_is_one_sentence(tmp_path):
    """Catches a file that is read whole before anybody looks at its size."""
    (tmp_path / "study.json").write_bytes(b"{}")
    os.truncate(tmp_path / "study.json", 1 << 40)  # takes no room on the disk
    code, err = run("status", tmp_path)
    assert code == 2 and err.count("\n") == 1 and "study.json" in err, err[-300:]


def test_a_deep_line_is_a_problem_and_no_crash(tmp_path):
    """Catches rows whose checksum is right and whose nesting is not."""
    body = b'{"a":' + b"[" * 300_000 + b"]" * 300_000 + b"}"
    line = body[:-1] + b',"crc":"%08x"}\n' % zlib.crc32(body)
    (tmp_path / "rows.jsonl").write_bytes(rundir.encode_line({"a": 1}) + line)
    records, problems = rundir.read_lines(tmp_path / "rows.jsonl")
    assert records == [{"a": 1}] and len(problems) == 1 and "nested" in problems[0]


def test_a_hostile_lock_file_names_nobody(tmp_path):
    """Catches a lock whose text is deep, huge or no object, and is believed or fatal."""
    for text in (b"[" * 100_000, b"[" * 2000 + b"]" * 2000, b"null", b"\xff", b'{"pid": 1'):
        (tmp_path / "lock").write_bytes(text)
        fd = os.open(tmp_path / "lock", os.O_RDONLY)
        try:
            owner = rundir.read_owner(fd)
        finally:
            os.close(fd)
        assert "pid" in owner and isinstance(owner, dict)


def test_task_files_are_bounded(tmp_path, monkeypatch):
    """Catches a file of answers that is read whole before anybody looks at its size."""
    from lm.tasks import files

    path = tmp_path / "t.json"
    path.write_text("[]")
    os.truncate(path, 1 << 40)
    with pytest.raises(UserError, match="has 1099511627776 bytes, at most"):
        files.read(path)
    path.write_bytes(b"[" * 1_000_000)
    with pytest.raises(UserError, match="nested too deeply"):
        files.read(path)


@pytest.mark.parametrize("verb", ["status", "verify"])
def test_a_path_that_cannot_be_is_one_sentence(verb, capsys):
    """Catches a traceback for a name that is too long for the file system."""
    assert cli.main([verb, "x" * 300]) == 2
    err = capsys.readouterr().err
    assert err.startswith("lm: error: ") and err.count("\n") == 1, err


def test_an_override_may_be_nested_or_long(capsys):
    """Catches a stack that overflows in what the command line says, and a page of it in return."""
    from ml_collections import ConfigDict

    from experiments import study

    for text in ("[" * 100_000, "9" * 100_000, "(" * 5000 + ")" * 5000):
        with pytest.raises(UserError) as raised:
            study.with_overrides(ConfigDict({"a": {"b": 1}}), {"a.b": text}, read=True)
        assert len(str(raised.value)) < 200


@pytest.mark.parametrize("name", ["../evil", "a/../../evil", "linked"])
def test_a_worker_stays_in_its_workdir(name, tmp_path):
    """Catches a study.json that was changed by hand, and a cell that is a link to elsewhere."""
    from experiments import worker

    workdir, evil = tmp_path / "run", tmp_path / "evil"
    (workdir / "a").mkdir(parents=True)
    (tmp_path / "target").mkdir()
    (workdir / "linked").symlink_to(tmp_path / "target")
    carried = []
    code = worker.through(workdir, iter([name]), lambda *a: carried.append(a) or 0, lambda: False)
    assert code == 2 and not carried and not evil.exists()
    assert not list((tmp_path / "target").iterdir())


@pytest.mark.parametrize("name", ["аdmin", "é", "x٣"])
def test_cells_have_ascii_names(name):
    """Catches two folders that look the same (the а is Cyrillic, the ٣ a digit to Python)."""
    import dataclasses

    from lm.train.cell import Point

    bare = object.__new__(Point)
    values = {f.name: None for f in dataclasses.fields(Point)} | {"name": name, "role": "ladder"}
    for key, value in values.items():
        object.__setattr__(bare, key, value)
    with pytest.raises(UserError, match="not fit for a folder"):
        bare.__post_init__()


def test_a_manifest_cannot_speak_for_what_lies_outside(tmp_path):
    """Catches a sealed folder whose files are elsewhere."""
    folder = tmp_path / "sealed"
    folder.mkdir()
    (folder / "a").write_text("a")
    (tmp_path / "outside").write_text("b")
    manifest = rundir.make_manifest(folder)
    entry = {"bytes": 1, "sha256": rundir.sha256(tmp_path / "outside")}
    for name in ("../outside", str(tmp_path / "outside")):
        assert rundir.check_manifest(folder, {"files": {**manifest["files"], name: entry}}), name


def test_json_goes_out_as_it_came(tmp_path):
    """Catches a writer whose own files its reader refuses."""
    value = {"a": [[[1]]], "b": "x" * 100}
    rundir.write_json(tmp_path / "x.json", value)
    assert rundir.read_json(tmp_path / "x.json") == value == json.loads(json.dumps(value))
