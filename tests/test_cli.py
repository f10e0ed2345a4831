"""The command line: exit codes, sentences, and what starting it costs."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from lm import cli

ROOT = Path(__file__).parents[1]


def lm(*args: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "lm.cli", *args]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


def test_help_lists_every_verb():
    for args in ([], ["--help"], ["-h"]):
        done = lm(*args)
        assert done.returncode == 0 and done.stderr == ""
        for verb in cli.VERBS:
            assert f"\n  {verb} " in done.stdout


def test_help_imports_no_library():
    """What makes a command line slow is what it imports; time itself depends on the machine."""
    code = "import sys; from lm.cli import main; main(['--help']); print(sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    loaded = eval(done.stdout.splitlines()[-1])
    heavy = {"jax", "numpy", "pandas", "scipy", "rich", "flax", "ml_collections", "argparse"}
    assert not heavy & set(loaded)
    assert [name for name in loaded if name.startswith("lm")] == ["lm", "lm.cli", "lm.config"]


def test_misspelt_verb_is_one_sentence_with_the_nearest():
    done = lm("statsu")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "lm: error: 'statsu' is not a verb; did you mean 'status'? (lm --help)\n"


def test_version():
    done = lm("--version")
    assert done.returncode == 0 and done.stdout.startswith("lm ")


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_verb_is_there(verb):
    module, function = cli.VERBS[verb][0].split(":")
    assert callable(getattr(importlib.import_module(module), function))


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_verb_has_help_with_an_example(verb):
    done = lm(verb, "--help")
    assert done.returncode == 0 and f"lm {verb}" in done.stdout and "example" in done.stdout


@pytest.mark.parametrize(
    ("body", "code", "stderr"),
    [
        ("return 0", 0, ""),
        ("return 3", 3, ""),
        ("raise cli.UserError('width is -1')", 2, "lm: error: width is -1\n"),
        ("raise KeyboardInterrupt", 130, "lm: interrupted\n"),
        ("raise OSError(28, 'x', 'runs/rows')", 2, "lm: error: runs/rows: the disk is full;"),
        ("raise OSError(30, 'x', 'runs')", 2, "lm: error: runs: the file system is read-only;"),
        ("raise OSError(5, 'input/output error')", 1, "Traceback"),
        ("raise RuntimeError('a defect')", 1, "Traceback"),
    ],
)
def test_exit_codes(body, code, stderr):
    program = (
        "import sys, types\nfrom lm import cli\n"
        f"def main(argv): {body}\n"
        "sys.modules['verb'] = types.SimpleNamespace(main=main)\n"
        "cli.VERBS['verb'] = ('verb:main', '')\n"
        "sys.exit(cli.main(['verb']))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == code and done.stderr.startswith(stderr)
    assert ("Traceback" in done.stderr) == (code == 1)


def test_a_closed_pipe_is_no_traceback():
    program = (
        "import sys, types\nfrom lm import cli\n"
        "def main(argv): sys.stdin.readline(); print('x')\n"
        "sys.modules['verb'] = types.SimpleNamespace(main=main)\n"
        "cli.VERBS['verb'] = ('verb:main', '')\n"
        "sys.exit(cli.main(['verb']))\n"
    )
    command = [sys.executable, "-c", program]
    pipes = dict.fromkeys(["stdin", "stdout", "stderr"], subprocess.PIPE)
    with subprocess.Popen(command, cwd=ROOT, **pipes) as child:
        child.stdout.close()
        child.stdin.write(b"\n")
        child.stdin.flush()
        assert child.stderr.read() == b"" and child.wait() == 1
