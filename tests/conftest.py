"""What every test process needs before JAX is imported."""

import os
import shutil
from pathlib import Path

import pytest
import tiny

from lm import cli

os.environ["JAX_PLATFORMS"] = "cpu"
# The number of devices is fixed at the first use of JAX, so a test that needs eight of them would
# otherwise need a process of its own; a test that needs one takes `jax.devices()[:1]`.
os.environ["XLA_FLAGS"] = " ".join(
    [os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=8"]
).strip()

collect_ignore_glob = ["data/make_*.py"]  # what made the fixtures wants PyTorch

# Compiling is nearly all the time of these tests: the cache outlives the process.
CACHE = Path(os.environ.get("ONSET_TEST_CACHE", "~/.cache/onset/tests")).expanduser()
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")


@pytest.fixture(scope="session")
def shared(tmp_path_factory) -> Path:
    """A folder that all processes of this test session see."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session")
def study(shared) -> Path:
    """The file of the tiny study."""
    with tiny.alone(shared / "study.lock"):
        path = shared / "study" / "tiny.py"
        return path if path.exists() else tiny.write_study(path.parent)


@pytest.fixture(scope="session")
def finished(shared, study) -> Path:
    """The workdir of the tiny study, done by two workers without interruption; read only."""
    workdir = shared / "finished"
    with tiny.alone(shared / "finished.lock"):
        if not (workdir / "report.html").exists():
            shutil.rmtree(workdir, ignore_errors=True)
            # A relative path, as `make demo` gives it: some libraries want absolute ones.
            command = ["run", study, "--workdir=finished", "--workers=2"]
            with tiny.start(*command, cwd=shared) as process:
                out, err = process.communicate(timeout=400)
            assert process.returncode == 0, out + err
    return workdir


@pytest.fixture
def lm(capsys, monkeypatch):
    """`lm(*args) -> Done`: the command line in this process, which saves seconds of imports, in the
    environment of a user with one CPU device. Workers are processes of their own all the same.
    """
    import jax

    jax.devices()  # eight for this process, before the flag for them goes
    for name, value in tiny.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("XLA_FLAGS")

    def lm(*args: object) -> tiny.Done:
        capsys.readouterr()
        code = cli.main([str(a) for a in args])
        return tiny.Done(code, *capsys.readouterr())

    return lm
