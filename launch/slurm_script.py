"""What a job of Slurm asks for, and the batch script that carries out the commands of one array.

The script is a pure function of commands and settings. Every word that comes from outside is quoted
for the shell or has passed an allow-list; Slurm stops reading options at the first line that is no
comment, so nothing in a command can become one.
"""

import dataclasses
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from launch import Command
from lm.config import UserError, divides, within

AGAIN = 75  # a command's exit code for "stopped after a checkpoint, start me again"

NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.@,-]{0,127}")
CONSTRAINT = re.compile(r"[A-Za-z0-9_(\[][A-Za-z0-9_.:=&|*()\[\],-]{0,255}")
MEMORY = re.compile(r"[1-9][0-9]{0,11}[KMGT]?")
VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the user may say of a job. Empty, and 0 for `time` and `gpus`: the cluster's default."""

    partition: str = ""
    account: str = ""
    qos: str = ""
    constraint: str = ""
    memory: str = ""  # of a node, such as "16G"
    time: int = 0  # minutes
    lead: int = 120  # seconds before the time limit at which a command is asked to stop
    cpus: int = 1  # of each process
    gpus: int = 0  # of each node
    nodes: int = 1
    # That carry out one cell together; 0: one on each node.
    processes: int = dataclasses.field(default=0, metadata={"omit": True})
    at_once: int = 0  # commands that run at the same time; 0: as many as fit
    requeues: int = 1000  # how often a job is put back without being submitted anew
    setup: str = ""  # a shell file that is read before the command, such as one that loads modules

    def __post_init__(self) -> None:
        """Raises UserError on what a scheduler would refuse later, or read as something else."""
        for name in ("partition", "account", "qos"):
            _allowed(name, getattr(self, name), NAME, "letters, digits and _.@,-")
        _allowed("constraint", self.constraint, CONSTRAINT, "names joined by &|,()[]*")
        _allowed("memory", self.memory, MEMORY, "a whole number with K, M, G or T, such as 16G")
        for name in ("time", "gpus", "at_once", "requeues"):
            within(name, getattr(self, name), 0)
        within("lead", self.lead, 1, 65535)  # sbatch keeps it in 16 bits
        within("cpus", self.cpus, 1)
        within("nodes", self.nodes, 1)
        within("processes", self.processes, 0)
        if self.processes:
            divides("nodes", self.nodes, "processes", self.processes)
        # The warning may come up to a minute early: a shorter job would be told when it begins.
        if self.time and self.time * 60 <= self.lead + 60:
            raise UserError(
                f"time {self.time} min leaves nothing to work in before the warning, which comes"
                f" up to {self.lead + 60} s before the limit; raise time or lower lead"
            )
        if self.setup and not Path(self.setup).is_file():
            raise UserError(f"setup {self.setup} is not a file; give a shell file or leave it out")


def script(commands: Sequence[Command], settings: Settings, folder: Path) -> str:
    """The batch script of one array: which command each task runs, how it is asked to stop, and
    what becomes of its exit code. All of `commands` have the same number of processes; `folder`
    bears the job's name.
    """
    processes = commands[0].processes
    limit = f"%{settings.at_once}" if settings.at_once else ""
    options = {
        "job-name": folder.name,
        "array": f"0-{len(commands) - 1}{limit}",
        "nodes": settings.nodes,
        "ntasks": processes,
        "ntasks-per-node": processes // settings.nodes,
        "cpus-per-task": settings.cpus,
        "gpus-per-node": settings.gpus,
        "mem": settings.memory,
        "time": settings.time,
        "partition": settings.partition,
        "account": settings.account,
        "qos": settings.qos,
        "constraint": settings.constraint,
        "signal": f"B:USR1@{settings.lead}",
        "open-mode": "append",
    }
    lines = [f"#SBATCH --{key}={value}" for key, value in options.items() if value]
    lines.append("#SBATCH --requeue" if settings.requeues else "#SBATCH --no-requeue")
    together = (
        # Since 22.05 srun no longer takes cpus-per-task from the job. One rank that dies ends all:
        # the others would sit in a collective until their heartbeat fails.
        f"srun --kill-on-bad-exit=1 --nodes={settings.nodes} --ntasks={processes}"
        f" --cpus-per-task={settings.cpus} "
        if processes > 1
        else ""
    )
    return SCRIPT.format(
        options="\n".join(lines),
        folder=shlex.quote(str(folder)),
        setup=f". {shlex.quote(str(Path(settings.setup).resolve()))}" if settings.setup else "",
        cases="\n".join(_case(i, command, together) for i, command in enumerate(commands)),
        again=AGAIN,
        requeues=settings.requeues,
    )


# The traps come first: a warning may be there before anything else is. Slurm warns this shell alone
# (B:), so USR1 is passed on, once; TERM it sends to every process of the job. A wait that a signal
# interrupts is no way to an exit code: when the command ends at the same moment, bash 5.2 answers
# -1 from then on, in one case of three. So a second shell waits, in the foreground and deaf, and
# writes the code down; `wait` is asked only where that was impossible, such as on a full disk. A
# command that died of a signal it was sent had not installed its handlers yet, or was taken along
# by another rank. `scontrol requeue` puts a cancelled job back, too, so only a warning leads there.
# It ends what runs in the job, hence the ignored TERM, which scontrol inherits (`timeout` would
# not: it listens again). The last task of an array has the array's own number: only JOB_INDEX names
# one task. A folder that is gone is a submission that was given up.
SCRIPT = """#!/bin/bash
{options}

asked= told= ended= started= code= pid=
ask() {{
  [ -n "$started" ] && [ -z "$told" ] || return 0
  told=1
  for _ in {{1..100}}; do
    [ ! -s "$folder/$index.end" ] || return 0
    if [ -s "$folder/$index.pid" ]; then
      read -r pid <"$folder/$index.pid"
      kill -s USR1 "$pid"
      return 0
    fi
    sleep 0.1
  done
}}
trap 'asked=1; ask' USR1
trap 'ended=1' TERM
{setup}
folder={folder}
index=$SLURM_ARRAY_TASK_ID
[ -d "$folder" ] || exit 2
rm -f -- "$folder/$index".{{pid,end,code}}

run() {{
echo "$BASHPID" >"$folder/$index.pid"
case $index in
{cases}
*) exit 2 ;;
esac
}}
(
  trap : USR1 TERM
  (run)
  code=$?
  echo "$code" >"$folder/$index.end"
  exit "$code"
) </dev/null &
started=1
[ -z "$asked" ] || ask
while kill -0 "$!" 2>/dev/null && [ ! -s "$folder/$index.end" ]; do
  wait "$!"
  code=$?
done
[ ! -s "$folder/$index.end" ] || read -r code <"$folder/$index.end"
if [ -n "$asked$ended" ]; then
  case $code in 137 | 138 | 143) code={again} ;; esac
fi
rm -f -- "$folder/$index".{{pid,end}}
echo "$code" >"$folder/$index.new" && mv -f -- "$folder/$index.new" "$folder/$index.code"

if [ "$code" = {again} ] && [ -n "$asked" ] && [ -z "$ended" ] &&
  [ ! -e "$folder/$index.cancelled" ] && [ "${{SLURM_RESTART_COUNT:-0}}" -lt {requeues} ]; then
  trap '' TERM USR1
  for pause in 1 5 0; do
    scontrol requeue "${{SLURM_ARRAY_JOB_ID}}_$index" && break
    sleep "$pause"
  done
fi
exit "$code"
"""


def _case(index: int, command: Command, together: str) -> str:
    output = f"  exec >>{shlex.quote(str(command.log.resolve()))} 2>&1"
    export = [f"  export {key}={shlex.quote(value)}" for key, value in command.env.items()]
    run = f"  exec {together}{shlex.join(command.argv)} ;;"
    return "\n".join([f"{index})", output, *export, run])


def check(command: Command, settings: Settings) -> None:
    """Raises UserError on a command that no shell or no path pattern of Slurm can hold."""
    texts = [*command.argv, *command.env.values(), str(command.log)]
    if not command.argv or any("\0" in text for text in texts):
        raise UserError(f"command {command.name!r} is empty or has a NUL; no shell can run it")
    for name in command.env:
        if not VARIABLE.fullmatch(name):
            raise UserError(f"{name!r} is not the name of an environment variable; rename it")
    folder = str(command.log.parent.resolve())
    if re.search(r"[%\\\x00-\x1f\x7f]", folder):
        raise UserError(
            f"the path {folder!r} has a %, a backslash or a control character, which Slurm would"
            " read as a pattern; choose another --workdir"
        )
    divides("where.nodes", settings.nodes, "processes", command.processes)


def _allowed(name: str, value: str, pattern: re.Pattern[str], what: str) -> None:
    if value and not pattern.fullmatch(value):
        raise UserError(f"{name} {value!r} is not allowed; it must be {what}")
