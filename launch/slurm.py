"""Runs commands as job arrays of Slurm.

    commands -> one batch script an array -> sbatch -> ids -> squeue, code files, sacct -> states

Slurm restarts a job by itself after a preemption, a lost node, or when the batch script asks for
it; it forgets jobs soon after they ended, and all of them when its own state is lost. So the script
writes the exit code of every command to a file beside itself, and an id names that folder besides
the number: numbers begin again after a wipe, and only a job that has the folder's name is ours.
Works without accounting; every call of a program of Slurm is bounded in time.
"""

import itertools
import os
import re
import secrets
import shutil
import subprocess
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from launch import Command, State, Status
from launch.slurm_script import AGAIN, Settings, check, script
from lm.config import UserError

SECONDS = 30.0  # what a program of Slurm may take; its own timeout for one message is 10
LAST_RESORT = 1001  # Slurm's default MaxArraySize, where the cluster's cannot be read

ID = re.compile(r"([1-9][0-9]{0,11})_([0-9]{1,9})@(/.*/(onset-[0-9a-f]{12}))", re.DOTALL)

# What Slurm calls a job, and what that is for us. `None`: it ended, and its code says how.
STATES: dict[str, State | None] = {
    **dict.fromkeys(("PENDING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD"), "waiting"),
    **dict.fromkeys(("RUNNING", "CONFIGURING", "COMPLETING", "STAGE_OUT", "SIGNALING"), "running"),
    **dict.fromkeys(("SUSPENDED", "STOPPED", "RESIZING"), "running"),
    **dict.fromkeys(("COMPLETED", "FAILED", "CANCELLED", "DEADLINE", "OUT_OF_MEMORY"), None),
    **dict.fromkeys(("TIMEOUT", "PREEMPTED", "NODE_FAIL", "BOOT_FAIL", "SPECIAL_EXIT"), None),
}
# The code of a job that Slurm ended before its script could write one: what the place did to a
# command says nothing against it.
ENDED = {
    "COMPLETED": 0,
    "TIMEOUT": AGAIN,
    "PREEMPTED": AGAIN,
    "NODE_FAIL": AGAIN,
    "BOOT_FAIL": AGAIN,
    "OUT_OF_MEMORY": -9,
}
FOREIGN = ("SLURM", "SBATCH_", "SRUN_", "SQUEUE_", "SACCT_", "SCANCEL_", "SCONTROL_")
FORGOTTEN = "Slurm does not know the job"
REMEDIES = {
    "policy": "wait until some of your jobs have ended, or run fewer cells at once",
    "partition": "`sinfo -s` lists the partitions, --where.partition=NAME chooses one",
    "account": "`sacctmgr show assoc user=$USER` lists yours, --where.account=NAME chooses one",
    "qos": "`sacctmgr show qos` lists them, --where.qos=NAME chooses one",
    "time limit": "lower --where.time",
    "node configuration": "lower --where.cpus, memory, gpus or nodes; `sinfo -Nel` shows the nodes",
    "feature": "`sinfo -o %f` lists what --where.constraint may say",
    "contact": "the controller does not answer; `scontrol ping` shows when it does again",
}


def ready(settings: Settings) -> None:
    """Raises UserError where the programs of Slurm are not there."""
    for program in ("sbatch", "squeue", "scancel", "scontrol"):
        if not shutil.which(program):
            raise _missing(program)


def processes(settings: Settings) -> int:
    """How many processes carry out one cell together."""
    return settings.processes or settings.nodes


def submit(commands: Sequence[Command], settings: Settings) -> list[str]:
    """Submits every command as a task of an array, in arrays as large as the cluster takes; the ids
    in the order of `commands`. Raises UserError, with nothing left in the queue, if one is refused.
    """
    for command in commands:
        check(command, settings)
    ids = [""] * len(commands)
    limit = _max_array() if len(commands) > 1 else 1
    after = ""
    done: list[str] = []
    try:
        for chunk in _chunks([c.processes for c in commands], limit):
            job, folder = _submit([commands[i] for i in chunk], settings, after)
            for index, place in enumerate(chunk):
                ids[place] = f"{job}_{index}@{folder}"
            done += [ids[place] for place in chunk]
            # `%` bounds one array; several are bounded together by running one after another.
            after = job if settings.at_once else ""
    except UserError:
        if done:
            cancel(done, settings, grace=0)
        raise
    return ids


def status(ids: Sequence[str], settings: Settings) -> list[Status]:
    """The state of each id, without waiting for it: one `squeue` for all, then the code files, then
    one `sacct` for those of which nothing is known. What nobody knows is `gone`, but while the
    controller does not answer nothing is.
    """
    tasks = [_parse(text) for text in ids]
    if not tasks:
        return []
    try:
        known = _queue({task.name for task in tasks})
    except _Silent as error:
        return [_unanswered(task, str(error)) for task in tasks]
    found = [_state(task, known.get((task.name, task.number))) for task in tasks]
    lost = [task for task, state in zip(tasks, found, strict=True) if state.state == "gone"]
    told = _accounts(lost) if lost else {}
    return [
        _state(task, told[task.name, task.number]) if (task.name, task.number) in told else state
        for task, state in zip(tasks, found, strict=True)
    ]


def cancel(ids: Sequence[str], settings: Settings, grace: float = 30.0) -> None:
    """Removes what waits, asks what runs to stop (SIGUSR1), and after `grace` seconds ends the rest
    (SIGTERM, then SIGKILL after the cluster's KillWait). Cancelled commands are not put back.
    """
    tasks = [_parse(text) for text in ids]
    for task in tasks:
        if task.folder.is_dir():
            (task.folder / f"{task.number}.cancelled").touch()
    _scancel(tasks, "--state=PENDING")
    if grace > 0:
        _scancel(tasks, "--batch", "--signal=USR1")
        deadline = time.monotonic() + grace
        while time.monotonic() < deadline:
            states = [state.state for state in status(ids, settings)]
            if not {"waiting", "running"} & set(states):
                return
            time.sleep(min(1.0, grace / 10))
    _scancel(tasks)


class _Task(NamedTuple):
    job: str
    number: int
    folder: Path
    name: str


class _Job(NamedTuple):
    """What Slurm says of a task; `code` is that of the batch script, as `wait` gives it."""

    state: str
    code: int | None = None
    reason: str = ""


class _Silent(Exception):
    """A program of Slurm that failed, in words; `said` is what it wrote, a line each."""

    said: Sequence[str] = ()


def _chunks(processes: Sequence[int], limit: int) -> Iterator[Sequence[int]]:
    """Places of commands that make one array: the same number of processes, at most `limit`."""
    order = sorted(range(len(processes)), key=lambda i: (processes[i], i))
    for _, group in itertools.groupby(order, key=lambda i: processes[i]):
        yield from itertools.batched(group, limit)


def _submit(commands: Sequence[Command], settings: Settings, after: str) -> tuple[str, Path]:
    """Submits one array; its number and its folder."""
    folder = commands[0].log.parent.resolve() / f"onset-{secrets.token_hex(6)}"
    for parent in {command.log.parent for command in commands}:
        parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir()
    batch = folder / "batch.sh"
    batch.write_text(script(commands, settings, folder))
    options = [f"--output={folder}/%a.log"]
    if after:
        options.append(f"--dependency=afterany:{after}")
    names = ("partition", "account", "qos")
    defaults = [f"SBATCH_{name.upper()}" for name in names if not getattr(settings, name)]
    try:
        answer = _call("sbatch", "--parsable", *options, str(batch), env=_environment(defaults))
        job = answer.strip().partition(";")[0]  # NUMBER, or NUMBER;CLUSTER
        if job.isdecimal():
            return job, folder
        problem = f"sbatch answered {answer.strip()!r}"
    except UserError:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    except _Silent as error:
        problem = str(error)
    # The answer may have been lost and not the job: it is known by its name.
    try:
        for line in _lines("squeue", f"--name={folder.name}", "--states=all", "-O", "ArrayJobID:|"):
            if (job := line.strip("| ")).isdecimal():
                return job, folder
    except _Silent as error:
        problem = f"{problem}; {error}"
    shutil.rmtree(folder, ignore_errors=True)
    remedy = (text for word, text in REMEDIES.items() if word in problem.lower())
    raise UserError(
        f"Slurm took no job: {problem}; {next(remedy, 'mend the --where settings and try again')}"
    )


def _environment(keep: Collection[str] = ()) -> dict[str, str]:
    """That of this process without what changes the meaning of a call, such as SBATCH_NO_REQUEUE,
    SQUEUE_FORMAT or SCANCEL_INTERACTIVE, or comes from a job that this process is part of.
    """
    kept = {"SLURM_CONF", "SLURM_CLUSTERS", *keep}
    return {k: v for k, v in os.environ.items() if k in kept or not k.startswith(FOREIGN)}


def _max_array() -> int:
    """The most tasks an array may have."""
    try:
        answer = _call("scontrol", "show", "config")
    except _Silent:
        return LAST_RESORT
    found = re.search(r"^MaxArraySize\s*=\s*([0-9]+)", answer, re.MULTILINE)
    return max(1, int(found.group(1))) if found else LAST_RESORT


def _queue(names: Collection[str]) -> dict[tuple[str, int], _Job]:
    """(name, index) -> what the controller still knows."""
    columns = "Name:|,ArrayTaskID:|,State:|,exit_code:|,Reason:|"
    wanted = ("--name=" + ",".join(sorted(names)), "--states=all", "--array", "-O", columns)
    jobs = {}
    for line in _lines("squeue", *wanted):
        name, index, state, code, reason, *_ = [*line.split("|"), *[""] * 5]
        if index.isdecimal():
            ended = os.waitstatus_to_exitcode(int(code)) if code.isdecimal() else None
            jobs[name, int(index)] = _Job(state, ended, reason)
    return jobs


def _accounts(tasks: Sequence[_Task]) -> dict[tuple[str, int], _Job]:
    """The same from accounting, if there is any, of jobs that have ended: a job that the controller
    has lost is `RUNNING` there for ever.
    """
    if not shutil.which("sacct"):
        return {}
    jobs = ",".join(sorted({task.job for task in tasks}))
    wanted = (
        "--allocations",
        "--parsable2",
        f"--jobs={jobs}",
        "--format=JobID,JobName,State,ExitCode",
    )
    try:
        lines = _lines("sacct", *wanted)
    except _Silent:
        return {}
    found = {}
    for line in lines:
        match = re.fullmatch(r"[0-9]+_([0-9]+)\|([^|]*)\|([A-Z_]+)[^|]*\|([0-9]+):([0-9]+)", line)
        if match and STATES.get(match.group(3), "running") is None:
            index, name, state, code, number = match.groups()
            found[name, int(index)] = _Job(state, -int(number) or int(code))
    return found


def _state(task: _Task, job: _Job | None) -> Status:
    """What the queue and the code file say together."""
    code = _code(task)
    if job is None and code is not None:
        return _ended(code)
    if job is None:  # what is cancelled before it begins leaves no trace in an array
        wish = (task.folder / f"{task.number}.cancelled").exists()
        return Status("failed", why="cancelled") if wish else Status("gone", why=FORGOTTEN)
    why = f"Slurm says {job.state.replace('_', ' ')}"  # "OUT OF MEMORY" is what a runner looks for
    why += f" ({job.reason})" if job.reason not in ("", "None") else ""
    kind = STATES.get(job.state, "running")
    if job.state == "COMPLETING" and code not in (None, AGAIN):
        kind = None  # a node may take its time to clean up
    if kind == "waiting" and "launch failed" in job.reason.lower().replace("_", " "):
        return Status("failed", AGAIN, f"{why}: the job is held, it never starts by itself")
    if kind:
        return Status(kind, why=why)
    if job.state == "CANCELLED" and code != 0:
        code = None  # somebody's wish, whatever the command managed to say before it ended
    elif code is None:
        code = ENDED.get(job.state, job.code if job.state == "FAILED" else None)
    return Status("failed", None, why) if code is None else _ended(code, why)


def _unanswered(task: _Task, problem: str) -> Status:
    code = _code(task)  # with 75 the job may have been put back
    return Status("running", why=problem) if code in (None, AGAIN) else _ended(code)


def _ended(code: int, why: str = "") -> Status:
    return Status("failed" if code else "done", code, why)


def _code(task: _Task) -> int | None:
    """What the batch script wrote; a shell's 128 + N is signal N."""
    try:
        with open(task.folder / f"{task.number}.code") as file:
            text = file.read(16)
    except (OSError, UnicodeDecodeError):
        return None
    if not re.fullmatch(r"[0-9]{1,3}\n", text):
        return None
    code = int(text)
    return 128 - code if code > 128 else code


def _scancel(tasks: Iterable[_Task], *options: str) -> None:
    """Signals tasks that have our name besides the number; what has ended is no error."""
    groups: dict[tuple[str, str], list[int]] = {}
    for task in tasks:
        groups.setdefault((task.name, task.job), []).append(task.number)
    for (name, job), numbers in groups.items():
        chosen = f"{job}_[{','.join(map(str, sorted(numbers)))}]"
        try:
            _call("scancel", f"--name={name}", *options, chosen)
        except _Silent as error:
            # What a filter leaves out is an invalid id, too.
            over = ("invalid job id", "already completing or completed")
            if not error.said or not all(any(x in y.lower() for x in over) for y in error.said):
                raise UserError(f"could not cancel job {job}: {error}; try again") from error


def _lines(program: str, *arguments: str) -> list[str]:
    return _call(program, "--noheader", *arguments).splitlines()


def _call(program: str, *arguments: str, env: Mapping[str, str] | None = None) -> str:
    """What a program of Slurm prints. Raises UserError if it is not there, _Silent if it fails."""
    try:
        done = subprocess.run(
            [program, *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=SECONDS,
            env=_environment() if env is None else env,
        )
    except FileNotFoundError:
        raise _missing(program) from None
    except subprocess.TimeoutExpired:
        raise _Silent(f"{program} did not answer within {SECONDS:.0f} s") from None
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        problem = _Silent(f"{program} failed ({said[-1].removeprefix(program + ': ').strip()})")
        problem.said = said
        raise problem
    return done.stdout


def _missing(program: str) -> UserError:
    return UserError(
        f"{program} was not found; --where=slurm needs the programs of Slurm, so start it on a"
        " login node"
    )


def _parse(text: str) -> _Task:
    match = ID.fullmatch(text)
    if not match:
        raise UserError(f"{text!r} is not the id of a Slurm job; ids are JOB_INDEX@FOLDER")
    job, index, folder, name = match.groups()
    return _Task(job, int(index), Path(folder), name)
