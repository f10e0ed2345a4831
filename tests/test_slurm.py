"""The Slurm engine without a Slurm: submit, status and cancel with small programs in the places of
sbatch, squeue, sacct, scancel and scontrol. S1, S2 … are the traps that a real one showed.
"""

import re
import time
from pathlib import Path

import pytest

from launch import Command, slurm
from lm.config import UserError

# One program under five names: it notes how it was called and gives the answer that lies ready.
FAKE = """#!/bin/sh
here={here}
me=${{0##*/}}
{{ printf '%s' "$me"; printf '\\t%s' "$@"; printf '\\n'; }} >>"$here/calls"
env >"$here/$me.env"
[ -e "$here/$me.sleep" ] && exec sleep 60
[ -e "$here/$me.out" ] && cat "$here/$me.out"
[ -e "$here/$me.err" ] && {{ cat "$here/$me.err" >&2; exit 1; }}
exit 0
"""
PROGRAMS = ("sbatch", "squeue", "sacct", "scancel", "scontrol")


class Fakes:
    """What the programs answer, and how they were called."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        for name in PROGRAMS:
            (folder / name).write_text(FAKE.format(here=folder))
            (folder / name).chmod(0o755)
        self.says("scontrol", "MaxArraySize            = 1001\n")
        self.says("sbatch", "4711\n")

    def says(self, program: str, out: str) -> None:
        (self.folder / f"{program}.err").unlink(missing_ok=True)
        (self.folder / f"{program}.out").write_text(out)

    def fails(self, program: str, message: str) -> None:
        (self.folder / f"{program}.out").unlink(missing_ok=True)
        (self.folder / f"{program}.err").write_text(message + "\n")

    def queue(self, ids: list[str], *jobs: str) -> None:
        """`INDEX STATE CODE REASON` of every job, all of the submission of the first id."""
        name = ids[0].rpartition("/")[2]
        rows = [job.split(maxsplit=3) for job in jobs]
        self.says("squeue", "".join(f"{name}|{i}|{s}|{c}|{r}|\n" for i, s, c, r in rows))

    def calls(self, program: str) -> list[list[str]]:
        file = self.folder / "calls"
        lines = [x.split("\t") for x in file.read_text().splitlines()] if file.exists() else []
        return [x[1:] for x in lines if x[0] == program]


@pytest.fixture
def fakes(tmp_path, monkeypatch):
    made = Fakes(tmp_path / "bin")
    monkeypatch.setenv("PATH", f"{made.folder}:/usr/bin:/bin")
    return made


def command(tmp_path: Path, *argv: str, processes: int = 1, **env: str) -> Command:
    return Command(argv or ("true",), tmp_path / "logs" / "a.log", env, "cell", processes)


def submitted(fakes, tmp_path, count: int = 1) -> list[str]:
    return slurm.submit([command(tmp_path)] * count, slurm.Settings())


def code(identity: str, text: str) -> None:
    job, _, folder = identity.partition("@")
    Path(folder, job.rpartition("_")[2] + ".code").write_text(text)


def states(ids: list[str]) -> list[str]:
    return [s.state for s in slurm.status(ids, slurm.Settings())]


def test_commands_are_refused_in_a_sentence(tmp_path, fakes):
    """Catches a name or a path that would leave its quotes; nothing is written or submitted."""
    cases = [
        (command(tmp_path, "a\0b"), "NUL"),
        (command(tmp_path, **{"A;id": "x"}), "environment variable"),
        (Command(("true",), tmp_path / "100%" / "a.log"), "--workdir"),
        (command(tmp_path, processes=3), "divide"),
    ]
    for bad, word in cases:
        with pytest.raises(UserError, match=word):
            slurm.submit([command(tmp_path, processes=2), bad], slurm.Settings(nodes=2))
    assert not (tmp_path / "logs").exists() and not fakes.calls("sbatch")


def test_submit(tmp_path, fakes, monkeypatch):
    """Catches options that the surroundings change behind the script's back, and a second folder
    that has the name of the first (S10).
    """
    monkeypatch.setenv("SBATCH_NO_REQUEUE", "1")
    monkeypatch.setenv("SBATCH_PARTITION", "mine")
    monkeypatch.setenv("SBATCH_ACCOUNT", "mine")
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    monkeypatch.setenv("SLURM_CONF", "/etc/x")
    fakes.says("sbatch", "4711;cluster\n")
    settings = slurm.Settings(account="lab")
    ids = slurm.submit([command(tmp_path), command(tmp_path)], settings)
    pattern = re.escape(str(tmp_path / "logs")) + "/onset-[0-9a-f]{12}"
    assert [re.fullmatch(f"4711_{i}@{pattern}", x) is not None for i, x in enumerate(ids)] == [
        True,
        True,
    ]
    (call,) = fakes.calls("sbatch")
    folder = ids[0].partition("@")[2]
    assert call == ["--parsable", f"--output={folder}/%a.log", f"{folder}/batch.sh"]
    seen = (fakes.folder / "sbatch.env").read_text().splitlines()
    kept = {x.split("=")[0] for x in seen if x.startswith(("SLURM", "SBATCH", "SRUN"))}
    assert kept == {"SLURM_CONF", "SBATCH_PARTITION"}
    assert submitted(fakes, tmp_path)[0].partition("@")[2] != folder


def test_more_commands_than_an_array_takes(tmp_path, fakes):
    """Catches an index that is not below MaxArraySize, ids in another order than the commands, and
    arrays that together run more than `at_once`.
    """
    fakes.says("scontrol", "x = 1\nMaxArraySize            = 4\nMaxJobCount = 9\n")
    commands = [command(tmp_path, str(i), processes=1 + (i == 3)) for i in range(10)]
    ids = slurm.submit(commands, slurm.Settings(at_once=2))
    scripts = [Path(call[-1]).read_text() for call in fakes.calls("sbatch")]
    found = [re.search("--array=(.*)", text).group(1) for text in scripts]
    assert found == ["0-3%2", "0-3%2", "0-0%2", "0-0%2"]
    assert ["--dependency=afterany:4711" in call for call in fakes.calls("sbatch")] == [0, 1, 1, 1]
    for i, identity in enumerate(ids):
        task, _, folder = identity.partition("@")
        index = task.partition("_")[2]
        text = Path(folder, "batch.sh").read_text()
        line = re.search(rf"^{index}\)\n.*\n  exec (.*) ;;", text, re.MULTILINE).group(1)
        assert line.split()[-1] == str(i)
    fakes.fails("scontrol", "Unable to contact slurm controller")
    assert len(submitted(fakes, tmp_path, 1002)) == 1002  # Slurm's default: 1001 in one
    sizes = [re.search("--array=0-(.*)", Path(c[-1]).read_text()) for c in fakes.calls("sbatch")]
    assert [m.group(1) for m in sizes][-2:] == ["1000", "0"]


def test_a_refusal_is_a_sentence_and_leaves_nothing(tmp_path, fakes):
    """Catches a traceback of sbatch, and a first array that runs when the second was refused."""
    fakes.fails("sbatch", "sbatch: error: invalid partition specified: x\nsbatch: error: Batch job"
                " submission failed: Invalid partition name specified")  # fmt: skip
    with pytest.raises(UserError, match="Invalid partition name.*sinfo -s") as error:
        submitted(fakes, tmp_path)
    assert "\n" not in str(error.value) and not list((tmp_path / "logs").glob("onset-*"))
    fakes.says("scontrol", "MaxArraySize = 1\n")
    fakes.says("sbatch", "4711\n")
    once = f"""[ -e '{tmp_path}/once' ] && {{ echo 'Job violates accounting/QOS policy'
    exit 1; }} >&2\ntouch '{tmp_path}/once'\nexit 0\n"""
    program = fakes.folder / "sbatch"
    program.write_text(FAKE.format(here=fakes.folder).replace("exit 0\n", once))
    with pytest.raises(UserError, match="policy.*fewer"):
        submitted(fakes, tmp_path, 2)
    (call,) = fakes.calls("scancel")[-1:]
    assert call[-1] == "4711_[0]" and call[0].startswith("--name=onset-")


def test_a_lost_answer_of_sbatch_is_not_a_lost_job(tmp_path, fakes, monkeypatch):
    """Catches a job that runs unknown, and beside it the same cells submitted again."""
    monkeypatch.setattr(slurm, "SECONDS", 0.3)
    (fakes.folder / "sbatch.sleep").touch()
    fakes.says("squeue", "4712|\n")
    began = time.monotonic()
    (identity,) = submitted(fakes, tmp_path)
    assert identity.startswith("4712_0@") and time.monotonic() - began < 20
    name = fakes.calls("squeue")[0][1]
    assert name == "--name=" + identity.rpartition("/")[2]
    fakes.says("squeue", "")
    with pytest.raises(UserError, match="did not answer"):
        submitted(fakes, tmp_path)
    assert (
        len(list((tmp_path / "logs").glob("onset-*"))) == 1
    )  # a late job finds no folder and ends


def test_states(tmp_path, fakes):
    """Catches a state that is read as another one; S2's held job, which would wait for ever; S7:
    PREEMPTED is no way to be done.
    """
    ids = submitted(fakes, tmp_path, 13)
    fakes.queue(
        ids,
        "0 PENDING 0 Resources",
        "1 RUNNING 0 None",
        "2 COMPLETED 0 None",
        "3 FAILED 768 NonZeroExitCode",
        "4 TIMEOUT 0 TimeLimit",
        "5 PREEMPTED 0 None",
        "6 NODE_FAIL 0 NodeDown",
        "7 CANCELLED 15 None",
        "8 OUT_OF_MEMORY 9 OutOfMemory",
        "9 PENDING 0 launch_failed_requeued_held",
        "10 COMPLETING 0 None",
        "11 SOMETHING_NEW 0 None",
        "12 COMPLETING 0 None",
    )
    found = slurm.status(ids, slurm.Settings())
    assert [s.state[0] for s in found] == list("wrdfffffffrrr")
    assert [s.code for s in found[2:9]] == [0, 3, 75, 75, 75, None, -9]
    assert found[9].code == 75 and "held" in found[9].why and "Resources" in found[0].why
    assert "OUT OF MEMORY" in found[8].why
    assert len(fakes.calls("squeue")) == 1 and not fakes.calls("sacct")  # S5: no second question
    code(ids[7], "75\n")
    code(ids[4], "0\n")
    code(ids[10], "137\n")
    code(ids[12], "75\n")  # it may be on its way back into the queue
    found = slurm.status(ids, slurm.Settings())
    assert (found[7].state, found[7].code) == ("failed", None)  # it was somebody's wish
    assert found[4].state == "done" and found[10].code == -9
    assert found[12].state == "running"


def test_what_slurm_forgot(tmp_path, fakes):
    """Catches S4, S9: without accounting a job that is forgotten must not be waited for; one that
    left its code is known all the same.
    """
    ids = submitted(fakes, tmp_path, 5)
    for i, text in enumerate(["0\n", "75\n", "junk\n", "137\n"]):
        code(ids[i], text)
    fakes.says("squeue", "")
    fakes.fails("sacct", "Slurm accounting storage is disabled")
    found = slurm.status(ids, slurm.Settings())
    assert [s.state for s in found] == ["done", "failed", "gone", "failed", "gone"]
    assert [s.code for s in found] == [0, 75, None, -9, None]
    (fakes.folder / "sacct").unlink()
    assert states(ids) == ["done", "failed", "gone", "failed", "gone"]
    assert slurm.status([], slurm.Settings()) == []


def test_accounting_is_asked_for_what_is_lost(tmp_path, fakes):
    """Catches a row of a stranger (S10), a runaway job that is RUNNING in the books for ever (S9),
    and default dates of sacct, which show today only.
    """
    ids = submitted(fakes, tmp_path, 5)
    name = ids[0].rpartition("/")[2]
    fakes.says("squeue", "")
    rows = ["0|COMPLETED|0:0", "1|FAILED|3:0", "2|RUNNING|0:0", "3|CANCELLED by 1000|0:15"]
    lines = [f"4711_{x.partition('|')[0]}|{name}|{x.partition('|')[2]}" for x in rows]
    fakes.says("sacct", "\n".join([*lines, "4711_4|onset-000000000000|COMPLETED|0:0", "junk", ""]))
    found = slurm.status(ids, slurm.Settings())
    assert [s.state for s in found] == ["done", "failed", "gone", "failed", "gone"]
    assert [s.code for s in found] == [0, 3, None, None, None]
    (call,) = fakes.calls("sacct")
    assert "--jobs=4711" in call  # with jobs and no dates, sacct looks at all times


def test_the_surroundings_do_not_change_a_question(tmp_path, fakes, monkeypatch):
    """Catches a user's own column list for squeue, and a scancel that asks back."""
    ids = submitted(fakes, tmp_path)
    for name in ("SQUEUE_FORMAT", "SQUEUE_STATES", "SACCT_FORMAT", "SCANCEL_INTERACTIVE"):
        monkeypatch.setenv(name, "1")
    slurm.cancel(ids, slurm.Settings(), grace=0)
    slurm.status(ids, slurm.Settings())
    for program in ("squeue", "scancel"):
        seen = (fakes.folder / f"{program}.env").read_text()
        assert "SQUEUE_" not in seen and "SCANCEL_" not in seen and "PATH=" in seen


def test_a_number_that_is_used_again(tmp_path, fakes):
    """Catches S10: after a wipe another job has our number; only the name tells."""
    ids = submitted(fakes, tmp_path)
    fakes.says("squeue", "onset-000000000000|0|RUNNING|0|None|\nother|0|RUNNING|0|None|\n")
    assert states(ids) == ["gone"]
    slurm.cancel(ids, slurm.Settings(), grace=0)
    assert states(ids) == ["failed"]  # nobody knows it, and it was our wish
    assert all("--name=" + ids[0].rpartition("/")[2] in x for x in fakes.calls("scancel"))


@pytest.mark.parametrize("how", ["refuses", "hangs"])
def test_a_controller_that_does_not_answer(tmp_path, fakes, monkeypatch, how):
    """Catches `gone`, or a hang, while slurmctld is away (S4)."""
    ids = submitted(fakes, tmp_path, 3)
    code(ids[0], "0\n")
    code(ids[1], "75\n")  # it may have been put back
    if how == "hangs":
        (fakes.folder / "squeue.sleep").touch()
        monkeypatch.setattr(slurm, "SECONDS", 0.3)
    else:
        fakes.fails("squeue", "slurm_load_jobs error: Unable to contact slurm controller")
    began = time.monotonic()
    found = slurm.status(ids, slurm.Settings())
    assert [s.state for s in found] == ["done", "running", "running"]
    assert "squeue" in found[2].why and time.monotonic() - began < 20


def test_cancel(tmp_path, fakes):
    """Catches a job that is killed without having been asked, that is put back afterwards, and a
    wait that outlasts what it waits for.
    """
    ids = submitted(fakes, tmp_path, 3)
    fakes.queue(ids, "0 FAILED 19200 None", "2 CANCELLED 0 None")
    slurm.cancel([ids[0], ids[2]], slurm.Settings(), grace=60)
    name = "--name=" + ids[0].rpartition("/")[2]
    calls = fakes.calls("scancel")
    assert calls == [
        [name, "--state=PENDING", "4711_[0,2]"],
        [name, "--batch", "--signal=USR1", "4711_[0,2]"],
    ]
    folder = Path(ids[0].partition("@")[2])
    assert sorted(p.name for p in folder.glob("*.cancelled")) == ["0.cancelled", "2.cancelled"]
    fakes.queue(ids, "0 RUNNING 0 None")
    slurm.cancel(ids[:1], slurm.Settings(), grace=0.2)
    assert fakes.calls("scancel")[-1] == [name, "4711_[0]"]
    gone = "scancel: error: Kill job error on job id 4711_0: Invalid job id specified"
    fakes.fails("scancel", f"{gone}\n{gone}")
    slurm.cancel(ids[:1], slurm.Settings(), grace=0)
    fakes.fails("scancel", f"scancel: error: Access denied\n{gone}")
    with pytest.raises(UserError, match="cancel"):
        slurm.cancel(ids[:1], slurm.Settings(), grace=0)


def test_what_is_no_id_is_refused(tmp_path, fakes):
    """Catches an id out of a damaged file that becomes an argument or a path."""
    good = submitted(fakes, tmp_path)[0]
    for bad in (
        "4711",
        "-1_0@/x",
        good + "/..",
        good.replace("@", "@relative"),
        "4711_0@/x",
        "",
        "\0",
    ):
        with pytest.raises(UserError, match="id of a Slurm job"):
            slurm.status([bad], slurm.Settings())


def test_without_slurm(tmp_path, monkeypatch):
    """Catches a traceback on a machine that has no Slurm."""
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="sbatch was not found.*login node"):
        slurm.submit([command(tmp_path)], slurm.Settings())
    assert not list((tmp_path / "logs").glob("onset-*"))


def test_the_code_file_is_bounded_text(tmp_path, fakes):
    """Catches S11: whoever may write into the folder can lie about a code, and nothing more."""
    ids = submitted(fakes, tmp_path)
    fakes.says("squeue", "")
    folder = Path(ids[0].partition("@")[2])
    for text in (b"\x80\x04pickle", b"1" * 10_000_000, b"-1\n", b"0", b"99999\n", b"\xff\n"):
        (folder / "0.code").write_bytes(text)
        assert states(ids) == ["gone"]
    (folder / "0.code").unlink()
    (folder / "0.code").mkdir()
    assert states(ids) == ["gone"]


def test_the_test_cluster_avoids_what_was_found():
    """Catches S1, S2, S10 in the script that starts a cluster: no accounting to wait for, a short
    wait before a job starts again that is still longer than KillWait, and numbers from the clock.
    """
    text = (Path(__file__).parents[1] / "launch" / "slurm_test_cluster.sh").read_text()
    assert "AccountingStorage" not in text
    expire = int(re.search(r"cred_expire=([0-9]+)", text).group(1))
    wait = int(re.search(r"KillWait=([0-9]+)", text).group(1))
    assert 3 * wait < expire < 30 and "FirstJobId=$(( ($(date" in text
