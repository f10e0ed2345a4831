"""Our C++ kernels for CPUs: compiled for this machine on first use, called by XLA on its threads.

A compiled kernel lies in a cache whose key covers the source, the compiler, its flags, XLA's
headers and the processor, so that nothing stale or foreign is ever loaded. Where there is no C++
compiler, `library` says so in a sentence, and the caller has another way.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import threading
from pathlib import Path

import jax

HERE = Path(__file__).parent
COMPILERS = ("g++", "clang++", "c++")  # the environment variable CXX comes first
# No -ffast-math: linked into a shared library it makes the whole process flush subnormals to zero.
FLAGS = (
    "-O3",
    "-march=native",
    "-std=c++17",
    "-shared",
    "-fPIC",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
)


_one_at_a_time = threading.Lock()  # a cell may be compiled beside the one that trains


def library(source: Path, handlers: tuple[tuple[str, str], ...], defines: tuple[str, ...]) -> str:
    """Compiles a kernel and registers its handlers, (symbol, target of `jax.ffi.ffi_call`), once.

    Returns "" or why that cannot be: no compiler, or its first error.
    """
    with _one_at_a_time:
        return _library(source, handlers, defines)


@functools.cache
def _library(source: Path, handlers: tuple[tuple[str, str], ...], defines: tuple[str, ...]) -> str:
    try:
        loaded = ctypes.CDLL(str(build(source, defines)))
    except (OSError, subprocess.SubprocessError) as error:
        return _reason(source, error)
    for symbol, target in handlers:
        capsule = jax.ffi.pycapsule(getattr(loaded, symbol))
        jax.ffi.register_ffi_target(target, capsule, platform="cpu")
    return ""


def build(source: Path, defines: tuple[str, ...] = (), flags: tuple[str, ...] = FLAGS) -> Path:
    """The shared library of a source file, from the cache or compiled into it (seconds).

    Raises OSError or SubprocessError if there is no compiler or it fails.
    """
    compiler = find_compiler()
    options = [*flags, *(f"-D{name}" for name in defines)]
    path = _cache() / f"{source.stem}-{_key(source, compiler, options)}.so"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        # Under another name first: several processes may compile it at once, none may load half.
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            made = Path(folder) / path.name
            command = [compiler, *options, f"-I{HERE}", "-isystem", jax.ffi.include_dir()]
            command += [str(source), "-o", str(made)]
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
            made.replace(path)
    return path


def find_compiler() -> str:
    """The C++ compiler's path; raises FileNotFoundError if there is none."""
    names = (os.environ["CXX"],) if os.environ.get("CXX") else COMPILERS
    for name in names:
        if found := shutil.which(name):
            return found
    raise FileNotFoundError(f"no C++ compiler ({', '.join(names)}) on the PATH; install one")


def _reason(source: Path, error: Exception) -> str:
    if isinstance(error, subprocess.CalledProcessError):
        lines = [line for line in error.stderr.splitlines() if "error" in line] or ["no message"]
        return f"{error.cmd[0]} cannot compile {source.name}: {lines[0].strip()}"
    return str(error)


def _cache() -> Path:
    return Path(os.environ.get("ONSET_CACHE", "~/.cache/onset")).expanduser() / "kernels"


def _key(source: Path, compiler: str, options: list[str]) -> str:
    headers = [*HERE.glob("*.h"), *Path(jax.ffi.include_dir()).glob("xla/ffi/api/*.h")]
    texts = [path.read_text() for path in (source, *sorted(headers))]
    parts = *texts, _version(compiler), *options, _processor()
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


@functools.cache
def _version(compiler: str) -> str:
    done = subprocess.run([compiler, "--version"], check=True, capture_output=True, text=True)
    return done.stdout


@functools.cache
def _processor() -> str:
    """What -march=native depends on; machines of several kinds may share a cache."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() + platform.machine()
    fields = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(fields)}))
