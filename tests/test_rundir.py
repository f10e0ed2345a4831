"""The run directory under faults: kills, torn and flipped bytes, two lockers, a full disk."""

import errno
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path

import pytest

from lm import rundir
from lm.config import UserError
from lm.rundir import JsonLines, check_manifest, make_manifest, read_lines

ROOT = Path(__file__).parents[1]


def python(code: str, *args: object) -> subprocess.Popen:
    """A child process that runs `code` from the root of the project."""
    command = [sys.executable, "-c", code, *map(str, args)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def write(path: Path, records: list[dict]) -> bytes:
    with JsonLines(path) as lines:
        for record in records:
            lines.append(record)
    return path.read_bytes()


def test_lines_round_trip_and_floats_keep_their_bits(tmp_path):
    records = [
        {"value": 0.1 + 0.2, "tiny": 5e-324, "n": 2**60, "text": "é\u2028\n\ud800", "none": None},
        {"nested": {"list": [1, 2.5, "x"]}},
    ]
    write(tmp_path / "rows.jsonl", records)
    assert read_lines(tmp_path / "rows.jsonl") == (records, [])


def test_line_has_the_documented_form(tmp_path):
    """CRC-32 of the line as it would be without the field: other readers rely on it."""
    data = write(tmp_path / "rows.jsonl", [{"a": 1, "b": "x"}])
    crc = f"{zlib.crc32(b'{"a":1,"b":"x"}'):08x}"
    assert data.decode() == '{"a":1,"b":"x","crc":"' + crc + '"}\n'


def test_nan_and_infinity_become_null_at_any_depth(tmp_path):
    write(tmp_path / "r", [{"loss": math.nan, "deep": [{"x": -math.inf}]}])
    assert read_lines(tmp_path / "r")[0] == [{"loss": None, "deep": [{"x": None}]}]


@pytest.mark.parametrize("record", [{}, {"crc": 1}, {"x": object()}])
def test_a_record_that_cannot_be_written_leaves_the_file_alone(tmp_path, record):
    with JsonLines(tmp_path / "r") as lines:
        lines.append({"a": 1})
        with pytest.raises((ValueError, TypeError)):
            lines.append(record)
    assert read_lines(tmp_path / "r") == ([{"a": 1}], [])


@pytest.mark.parametrize("keep", [0, 1, 7, -1])
def test_torn_tail_is_ignored_then_dropped_and_appending_goes_on(tmp_path, keep):
    path = tmp_path / "rows.jsonl"
    first = write(path, [{"step": 1}])
    torn = rundir.encode_line({"step": 2})[:keep]
    path.write_bytes(first + torn)
    assert read_lines(path) == ([{"step": 1}], [])
    with JsonLines(path) as lines:
        assert lines.torn == len(torn)
        lines.append({"step": 3})
    assert read_lines(path) == ([{"step": 1}, {"step": 3}], [])


def test_torn_tail_longer_than_one_read(tmp_path):
    path = tmp_path / "rows.jsonl"
    first = write(path, [{"step": 1}])
    path.write_bytes(first + b"x" * 200_000)
    with JsonLines(path) as lines:
        assert lines.torn == 200_000
    assert path.read_bytes() == first


def test_every_flipped_byte_is_reported_with_its_line(tmp_path):
    """The last newline is the one exception: without it the last line is torn, by definition."""
    path = tmp_path / "rows.jsonl"
    records = [{"step": i, "value": i / 7} for i in range(3)]
    data = write(path, records)
    for at in range(len(data) - 1):
        for bit in (0x01, 0x10, data[at] ^ 0x0A):
            if bit == 0:
                continue
            broken = bytearray(data)
            broken[at] ^= bit
            path.write_bytes(broken)
            good, problems = read_lines(path)
            assert problems, (at, bit)
            number = data[:at].count(b"\n") + 1
            assert f"line {number} fails" in problems[0]
            assert all(record in records for record in good)


def test_missing_file_has_no_lines(tmp_path):
    assert read_lines(tmp_path / "none") == ([], [])


def test_kill_9_while_appending_keeps_every_acknowledged_record(tmp_path):
    path = tmp_path / "rows.jsonl"
    code = (
        "import sys; from lm.rundir import JsonLines\n"
        "lines = JsonLines(sys.argv[1]); i = int(sys.argv[2])\n"
        "while True:\n"
        "    lines.append({'i': i, 'pad': 'x' * 5000}); print(i, flush=True); i += 1\n"
    )
    start = 0
    for attempt in range(4):
        child = python(code, path, start)
        first = child.stdout.readline()
        time.sleep(0.02 * attempt)
        child.send_signal(signal.SIGKILL)
        acknowledged = [int(line) for line in [first, *child.communicate()[0].splitlines()]]
        JsonLines(path).close()
        records, problems = read_lines(path)
        assert problems == [] and [r["i"] for r in records] == list(range(len(records)))
        assert len(records) > max(acknowledged)
        start = len(records)


def test_write_json_is_atomic_and_leaves_no_temporary_file(tmp_path):
    path = tmp_path / "config.json"
    rundir.write_json(path, {"a": 1, "nan": math.nan})
    assert rundir.read_json(path) == {"a": 1, "nan": None}
    with pytest.raises(TypeError):
        rundir.write_json(path, {"a": object()})
    assert rundir.read_json(path)["a"] == 1
    assert os.listdir(tmp_path) == ["config.json"]


def test_write_bytes_removes_its_temporary_file_when_the_rename_fails(tmp_path):
    (tmp_path / "taken").mkdir()
    with pytest.raises(OSError):
        rundir.write_bytes(tmp_path / "taken", b"x")
    assert os.listdir(tmp_path) == ["taken"]


@pytest.mark.parametrize("data", [b"", b"{", b"\xff\xfe", b"[" * 200_000])
def test_read_json_names_a_damaged_file(tmp_path, data):
    (tmp_path / "x.json").write_bytes(data)
    with pytest.raises(UserError, match="x.json is damaged"):
        rundir.read_json(tmp_path / "x.json")


@pytest.fixture
def sealed(tmp_path):
    folder = tmp_path / "step"
    (folder / "deep").mkdir(parents=True)
    (folder / "a.bin").write_bytes(bytes(range(256)))
    (folder / "deep" / "b.bin").write_bytes(b"b" * 1000)
    return folder, make_manifest(folder)


def test_manifest_of_an_untouched_folder_is_clean(sealed):
    folder, manifest = sealed
    assert sorted(manifest["files"]) == ["a.bin", "deep/b.bin"]
    rundir.write_json(folder / "manifest.json", manifest)
    assert make_manifest(folder) == manifest  # its own manifest is no part of it
    assert check_manifest(folder, json.loads(json.dumps(manifest))) == []


def test_manifest_names_each_kind_of_damage(sealed):
    folder, manifest = sealed
    target = folder / "deep" / "b.bin"
    for data, word in [
        (b"b" * 999, "truncated"),
        (b"", "truncated"),
        (b"b" * 1001, "longer"),
        (b"b" * 500 + b"c" + b"b" * 499, "changed"),
    ]:
        target.write_bytes(data)
        problems = check_manifest(folder, manifest)
        assert len(problems) == 1 and word in problems[0] and str(target) in problems[0]
    target.unlink()
    assert check_manifest(folder, manifest) == [f"{target} is missing"]


@pytest.mark.parametrize(
    "manifest", [{}, {"files": {}}, {"files": []}, [], {"files": {"a.bin": 3}}]
)
def test_a_manifest_that_proves_nothing_is_a_problem(sealed, manifest):
    assert check_manifest(sealed[0], manifest)


def test_second_locker_in_another_process_is_told_who_holds_it(tmp_path):
    path = tmp_path / "lock"
    child = python(
        "import sys, time; from lm.rundir import lock\n"
        "with lock(sys.argv[1], 'lm run x'): print('held', flush=True); time.sleep(60)\n",
        path,
    )
    assert child.stdout.readline() == "held\n"
    owner = rundir.holder(path)
    assert owner["pid"] == child.pid and owner["what"] == "lm run x"
    with pytest.raises(rundir.Held) as caught, rundir.lock(path, "second"):
        pass
    for word in (str(child.pid), owner["host"], owner["started"], "lm run x", "wait"):
        assert word in str(caught.value)
    assert rundir.holder(path) == owner  # the loser has not touched the owner's name
    child.kill()
    child.communicate()
    assert rundir.holder(path) is None
    with rundir.lock(path, "second"):  # the lock has died with its process
        assert rundir.holder(path)["pid"] == os.getpid()
    assert rundir.holder(path) is None


def test_exactly_one_of_many_lockers_wins(tmp_path):
    code = (
        "import sys, time; from lm.rundir import lock, Held\n"
        "sys.stdin.readline()\n"
        "try:\n"
        "    with lock(sys.argv[1], 'race'): print('won', flush=True); time.sleep(3)\n"
        "except Held: print('held', flush=True)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "lock")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    children = [subprocess.Popen(command, cwd=ROOT, **pipes) for _ in range(4)]
    for child in children:
        child.stdin.write("\n")
        child.stdin.flush()
    assert sorted(child.communicate()[0] for child in children) == ["held\n"] * 3 + ["won\n"]


def test_a_lock_file_with_rubbish_is_still_a_lock(tmp_path):
    path = tmp_path / "lock"
    path.write_bytes(b"\xff not json")
    with rundir.lock(path, "first"):
        assert rundir.holder(path)["what"] == "first"


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 64 KiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    try:
        done = subprocess.run(mount, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("there is no mount command")
    if done.returncode:
        pytest.skip(f"a small tmpfs cannot be mounted: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_full_disk_leaves_no_half_line(small_disk):
    path = small_disk / "rows.jsonl"
    written = 0
    with JsonLines(path) as lines:
        with pytest.raises(OSError) as caught:
            for written in range(1000):
                lines.append({"i": written, "pad": "x" * 700})
        assert caught.value.errno == errno.ENOSPC and caught.value.filename == str(path)
    assert path.read_bytes().endswith(b"\n")
    records, problems = read_lines(path)
    assert problems == [] and [r["i"] for r in records] == list(range(written)) and written > 10


def test_full_disk_keeps_the_old_file_and_no_temporary_one(small_disk):
    path = small_disk / "result.json"
    rundir.write_json(path, {"ok": True})
    with pytest.raises(OSError) as caught:
        rundir.write_bytes(path, b"x" * 200_000)
    assert caught.value.errno == errno.ENOSPC
    assert os.listdir(small_disk) == ["result.json"] and rundir.read_json(path) == {"ok": True}


def test_environment_names_versions_without_importing_them():
    child = python(
        "import sys, json; from lm.rundir import environment\n"
        "e = environment(); e['loaded'] = [m for m in ('jax', 'numpy') if m in sys.modules]\n"
        "print(json.dumps(e))\n"
    )
    found = json.loads(child.communicate()[0])
    assert found["loaded"] == [] and found["versions"]["jax"].startswith("0.")
    assert {"python", "platform", "host", "nproc", "git_commit", "git_dirty"} <= found.keys()


@pytest.mark.skipif(shutil.which("git") is None, reason="there is no git")
def test_environment_ignores_a_checkout_that_is_not_the_package_s_own(tmp_path):
    """Installed below somebody's project, the package must not claim that project's commit."""
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "x"], check=True)
    inner = tmp_path / "inner"
    inner.mkdir()
    assert rundir._git(inner) == {"git_commit": None, "git_dirty": None}
    found = rundir._git(tmp_path)
    assert len(found["git_commit"]) == 40 and found["git_dirty"] is False
    (inner / "new").touch()
    assert rundir._git(tmp_path)["git_dirty"] is True
