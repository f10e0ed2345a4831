"""C++ kernels on any machine: the compiler that is not there, the cache that is damaged, read-only
or shared, and vectors of another width.
"""

import os
import re
import stat
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import pytest
from attention_cases import STRUCTURES, Case, assert_close, quick, with_gradients
from test_fused import narrow, skip_unless_it_runs

from lm import native
from lm.attention import Mask, attention, choose, cpu, explain

SOURCE = 'extern "C" int answer() { return 42; }\n'


@pytest.fixture
def source(tmp_path, monkeypatch):
    """A source file that compiles at once, and an empty cache."""
    monkeypatch.setenv("ONSET_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "kernel" / "one.cc"
    path.parent.mkdir()
    path.write_text(SOURCE)
    return path


def cached(tmp_path):
    return sorted((tmp_path / "cache" / "kernels").glob("*"))


def script(path, text):
    """A compiler of our own."""
    path.write_text("#!/bin/sh\n" + textwrap.dedent(text))
    path.chmod(path.stat().st_mode | stat.S_IEXEC)
    return str(path)


def counting(tmp_path, before=""):
    """A compiler that writes a line for every file that it compiles, after doing `before`."""
    real = native.find_compiler()
    log = tmp_path / "compiled"
    log.touch()
    text = f"""
        if [ "$1" != --version ]; then {before or ":"}; echo >> {log}; fi
        exec {real} "$@"
    """
    return script(tmp_path / "counting", text), lambda: len(log.read_text())


def test_a_kernel_is_compiled_once(source, tmp_path, monkeypatch):
    """Breaks if every process compiles, or leaves something beside the library."""
    compiler, count = counting(tmp_path)
    monkeypatch.setenv("CXX", compiler)
    for _ in range(2):
        assert native.load(source).answer() == 42
    assert count() == 1 and len(cached(tmp_path)) == 1


def test_no_compiler_is_a_sentence(monkeypatch):
    """Breaks if attention fails on a machine without a C++ compiler, or does not say why it is
    slow there.
    """
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    q = jnp.ones((1, 4, 2, 255))  # a head size that no other test has
    reason = "no C++ compiler (g++, clang++, c++) on the PATH; install one"
    assert cpu.supports(q, q, q, Mask()) == reason
    assert re.search(r"cpu +" + re.escape(reason), explain(q, q, q, Mask()))
    assert choose(q, q, q, Mask()) == "reference"
    run = jax.grad(lambda q: attention(q, q, q, Mask(causal=True)).sum())
    assert jnp.isfinite(run(q)).all()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "no C++ compiler (CXX) on the PATH; install one"),
        ("exit 1", "CXX cannot compile one.cc: no message"),
        (
            '[ "$1" = --version ] || { echo "In file\none.cc:1: error: bad" >&2; exit 1; }',
            "CXX cannot compile one.cc: one.cc:1: error: bad",
        ),
        ('[ "$1" = --version ] || echo nonsense > "${@: -1}"', "CXX"),
    ],
    ids=["absent", "fails at once", "fails", "makes nothing"],
)
def test_a_compiler_that_fails_is_a_sentence(source, tmp_path, monkeypatch, text, words):
    """Breaks if a bad CXX ends a run with a traceback, or its reason has many lines."""
    path = tmp_path / "bad"
    monkeypatch.setenv("CXX", script(path, text) if text else str(path))
    reason = native.library(source, (("answer", "onset_answer"),), ())
    assert reason and "\n" not in reason and not cached(tmp_path)
    if words != "CXX":
        assert reason == words.replace("CXX", str(path))


def test_the_key_covers_what_the_code_depends_on(source, tmp_path, monkeypatch):
    """Breaks if a library is loaded that was made from another text, header, flag, compiler or for
    another processor.
    """
    compiler = native.find_compiler()
    keys = [native._key(source, compiler, ["-O3"])]

    def another():
        keys.append(native._key(source, compiler, ["-O3"]))
        assert keys[-1] not in keys[:-1]

    source.write_text(SOURCE + "//")
    another()
    (source.parent / "beside.h").write_text("")
    another()
    monkeypatch.setattr(native, "HERE", tmp_path)
    (tmp_path / "simd.h").write_text("// new")
    another()
    monkeypatch.setattr(native, "_version", lambda compiler: "g++ 99")
    another()
    monkeypatch.setattr(native, "_processor", lambda: "another")
    another()
    assert native._key(source, compiler, ["-O2"]) not in keys
    assert native._key(source, compiler, ["-O3"]) == keys[-1]


@pytest.mark.parametrize("size", [0, 10, 5000])
def test_a_damaged_library_is_made_again(source, tmp_path, monkeypatch, size):
    """Breaks if a torn file in the cache is loaded, which can end the process, or is refused until
    someone deletes it.
    """
    compiler, count = counting(tmp_path)
    monkeypatch.setenv("CXX", compiler)
    native.load(source)
    (path,) = cached(tmp_path)
    whole = path.read_bytes()
    # A new file: what is loaded is mapped from the old one.
    path.unlink()
    path.write_bytes(whole[:size])
    for _ in range(2):
        assert native.load(source).answer() == 42
    assert count() == 2 and path.read_bytes() == whole


@pytest.mark.parametrize("cache", ["a file", "full", "~nobody-is-called-this"])
def test_a_cache_that_cannot_be_written_is_done_without(source, tmp_path, monkeypatch, cache):
    """Breaks if a full disk, a folder of someone else or a user without a home has no kernel."""
    if cache == "full":

        def no_space(path, data):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(native, "write_bytes", no_space)
    else:
        monkeypatch.setenv("ONSET_CACHE", str(source) if cache == "a file" else cache)
    monkeypatch.chdir(tmp_path)
    assert native.load(source).answer() == 42
    assert not list(tmp_path.rglob("*.so")) and not list(tmp_path.glob("~*"))


def test_two_processes_compile_one_library(source, tmp_path):
    """Breaks if one of two processes that compile at once loads half of what the other writes."""
    compiler, count = counting(tmp_path, before="sleep 1")
    code = f"import pathlib; from lm import native; p = pathlib.Path({str(source)!r});"
    command = [sys.executable, "-c", code + "print(native.load(p).answer())"]
    env = os.environ | {"CXX": compiler}
    processes = [subprocess.Popen(command, env=env, stdout=subprocess.PIPE) for _ in range(2)]
    assert [p.communicate(timeout=60)[0] for p in processes] == [b"42\n"] * 2
    assert count() in (1, 2) and len(cached(tmp_path)) == 1
    assert native.load(source).answer() == 42


# Head sizes that no other test has, for a kernel is registered once by its head size.
WIDTHS = [("haswell", 20), ("x86-64", 12)]


@pytest.mark.parametrize(("march", "H"), WIDTHS)
def test_attention_with_narrower_vectors(march, H, monkeypatch):
    """Breaks if the kernel leans on vectors of 16 lanes or on this machine's instructions; with
    tiles taller than a vector is wide, keys were left hidden that some query sees.
    """
    skip_unless_it_runs(march)
    narrow(monkeypatch, march)
    cases = [
        (STRUCTURES["everything"]._replace(H=H), "float32"),
        (STRUCTURES["window on both sides"]._replace(H=H), "bfloat16"),
        (Case(1, 70, 70, 4, 2, H, causal=True), "float32"),
    ]
    for case, dtype in cases:
        found, answers = quick(with_gradients("cpu", case.scale), case, dtype)
        assert_close(found, case, answers, dtype)
