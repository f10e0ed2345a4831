"""`make venv` finds a Python that runs; the interpreters here are scripts that act as one."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Answers the version check with 0, makes a virtual environment that does nothing, and says so.
GOOD = """#!/bin/sh
case "$1 $2" in
"-m venv") mkdir -p .venv/bin; ln -s /bin/true .venv/bin/python; echo "$0" > made_by ;;
esac
"""
# What a version manager's shim does when no version is chosen.
SHIM = "#!/bin/sh\necho 'command not found' >&2\nexit 127\n"
OLD = "#!/bin/sh\nexit 1\n"

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")


@pytest.fixture
def make(tmp_path):
    """Runs make in a folder of its own, where the PATH holds nothing but what is written there."""
    for name in ("Makefile", "setup.cfg", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "bin").mkdir()
    for tool in ("sh", "make", "ls", "sort", "mkdir", "ln", "touch", "true"):
        (tmp_path / "bin" / tool).symlink_to(shutil.which(tool))

    def make(*args: str, **interpreters: str) -> subprocess.CompletedProcess:
        for name, text in interpreters.items():
            path = tmp_path / name.replace("__", "/").replace("_", ".")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
            path.chmod(0o755)
        env = {"PATH": str(tmp_path / "bin"), "HOME": str(tmp_path)}
        command = [shutil.which("make"), "venv", *args]
        return subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)

    return make


def made_by(tmp_path: Path) -> str:
    return str((tmp_path / (tmp_path / "made_by").read_text().strip()).relative_to(tmp_path))


def test_a_shim_that_does_not_run_and_an_old_one_are_passed_over(make, tmp_path):
    done = make(bin__python3_13=SHIM, bin__python3_12=OLD, bin__python3=GOOD)
    assert done.returncode == 0, done.stderr
    assert made_by(tmp_path) == "bin/python3"


def test_pyenv_is_searched_last_and_newest_first(make, tmp_path):
    folder = tmp_path / ".pyenv" / "versions"
    for version, text in (("3.9.1", OLD), ("3.12.1", GOOD), ("3.13.0", GOOD)):
        path = folder / version / "bin" / "python3"
        path.parent.mkdir(parents=True)
        path.write_text(text)
        path.chmod(0o755)
    assert make(bin__python3=SHIM).returncode == 0
    assert made_by(tmp_path) == ".pyenv/versions/3.13.0/bin/python3"


def test_none_is_one_sentence(make):
    done = make(bin__python3_13=SHIM, bin__python3=OLD)
    assert done.returncode == 2
    assert "no Python >= 3.12" in done.stderr and "make PYTHON=" in done.stderr


def test_a_named_interpreter_is_the_only_candidate(make, tmp_path):
    assert make("PYTHON=./bin/mine", bin__python3=GOOD, bin__mine=OLD).returncode == 2
    assert make("PYTHON=./bin/mine", bin__mine=GOOD).returncode == 0
    assert made_by(tmp_path) == "bin/mine"


def test_the_environment_is_made_once(make, tmp_path):
    assert make(bin__python3=GOOD).returncode == 0
    (tmp_path / "made_by").unlink()
    assert "Nothing to be done" in make().stdout
    os.utime(tmp_path / "setup.cfg", (2**32, 2**32))  # new requirements: install, do not make anew
    assert make().returncode == 0 and not (tmp_path / "made_by").exists()
