"""Our C++ kernels for CPUs: compiled for this machine on first use, called by XLA on its threads.

A compiled kernel lies in a cache whose key covers the source, the headers, the compiler, its flags
and the processor, so that nothing stale or foreign is ever loaded; its name ends in the hash of its
bytes, so that nothing damaged is. Where there is no C++ compiler, `library` says so in a sentence,
and the caller has another way.
"""

import contextlib
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

from lm.rundir import cache_folder, write_bytes

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
        loaded = load(source, defines)
    except (OSError, subprocess.SubprocessError) as error:
        return _reason(source, error)
    for symbol, target in handlers:
        capsule = jax.ffi.pycapsule(getattr(loaded, symbol))
        jax.ffi.register_ffi_target(target, capsule, platform="cpu")
    return ""


def load(source: Path, defines: tuple[str, ...] = ()) -> ctypes.CDLL:
    """The shared library of a source file, from the cache or compiled (seconds) and put there.

    Raises OSError or SubprocessError if there is no compiler or it fails.
    """
    compiler = find_compiler()
    options = [*FLAGS, *(f"-D{name}" for name in defines)]
    name = f"{source.stem}-{_key(source, compiler, options)}"
    for path in sorted(cache_folder("kernels").glob(f"{name}-*.so")):
        if _is_whole(path):
            return ctypes.CDLL(str(path))
    with tempfile.TemporaryDirectory(prefix="onset-") as folder:
        made = Path(folder) / f"{name}.so"
        command = [compiler, *options, f"-I{HERE}", "-isystem", jax.ffi.include_dir()]
        command += [str(source), "-o", str(made)]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
        data = made.read_bytes()
        path = cache_folder("kernels") / f"{name}-{_hash(data)}.so"
        with contextlib.suppress(OSError):  # read-only or full: then for this process only
            path.parent.mkdir(parents=True, exist_ok=True)
            write_bytes(path, data)
        return ctypes.CDLL(str(path if _is_whole(path) else made))


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def _is_whole(path: Path) -> bool:
    """Whether the bytes are those of the name; loading half a library may end the process."""
    try:
        return path.stem.endswith(_hash(path.read_bytes()))
    except OSError:
        return False


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


def _key(source: Path, compiler: str, options: list[str]) -> str:
    headers = [*HERE.glob("*.h"), *source.parent.glob("*.h")]
    headers += [*Path(jax.ffi.include_dir()).glob("xla/ffi/api/*.h")]
    texts = [path.read_text() for path in (source, *sorted(headers))]
    parts = *texts, _version(compiler), *options, _processor()
    return _hash("\0".join(parts).encode())


@functools.cache
def _version(compiler: str) -> str:
    command = [compiler, "--version"]
    return subprocess.run(
        command, check=True, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=60
    ).stdout


@functools.cache
def _processor() -> str:
    """What -march=native depends on; machines of several kinds may share a cache."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() + platform.machine()
    fields = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(fields)}))
