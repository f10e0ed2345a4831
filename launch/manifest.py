"""What Kubernetes is told: a command as an Indexed Job (one host) or a JobSet (several).

Pure functions from `Command` and `Settings` to plain mappings; nothing here speaks to a cluster.
Every value is a value of its own, argument by argument: no shell, no template text, and `$(NAME)`
in an argument reaches the process as it stands. Names go through an allow-list.

The failure policy follows the worker's exit codes: 2 and 78 end the job; 75 (stopped after a
checkpoint) and a disruption (preemption, drained node) start it again and count for nothing; the
rest is tried again `retries` times. Of several hosts, all start again together: the others cannot
go on without the one that is gone.

The name of an object is made from the command alone, so that whoever submits a command a second
time meets the object of the first.
"""

import dataclasses
import hashlib
import json
import math
import re
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

from launch import Command
from lm.config import UserError, nearest, positive, within

FINAL, AGAIN = (2, 78), 75  # exit codes: never retry; stopped after a checkpoint, start again
MANAGER = "app.kubernetes.io/managed-by"
INSTANCE = "app.kubernetes.io/instance"
IDENTITY = "onset/command"  # SHA-256 of name and arguments: tells ours from another's
HOST = "host"  # the replicated job of a JobSet
PORT = 55527  # of the process that the others meet at; the one JAX itself takes on Kubernetes
MEETING = ("ONSET_COORDINATOR", "ONSET_PROCESSES", "ONSET_PROCESS")  # experiments.processes.join

# Name -> label of the nodes and, per topology, chips on each host (machine types of GKE, 2026).
# Up to 2x4, v5e and v6e are one host; there is a pool of two hosts of 4 chips, too, for 2x4.
FLAT = {"1x1": 1, "2x2": 4, "2x4": 8, "4x4": 4, "4x8": 4, "8x8": 4, "8x16": 4, "16x16": 4}
CUBES = dict.fromkeys(
    (
        *("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x4x12", "4x8x8", "4x8x12"),
        *("8x8x8", "8x8x12", "8x8x16", "8x16x16", "12x12x12", "12x16x16", "16x16x16"),
        *("16x16x20", "16x16x24", "16x20x28"),
    ),
    4,
)
TPUS = {
    "v4": ("tpu-v4-podslice", CUBES),
    "v5e": ("tpu-v5-lite-podslice", FLAT),
    "v5p": ("tpu-v5p-slice", CUBES),
    "v6e": ("tpu-v6e-slice", FLAT),
    "tpu7x": ("tpu7x", CUBES),
}

_LABEL = r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?"  # DNS-1123
_PATH = r"(/[A-Za-z0-9_+-][A-Za-z0-9._+-]*)+"  # absolute, and no part begins with a dot
_KEY = r"([a-z0-9][a-z0-9.-]{0,252}/)?[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?"
_WORD = r"([A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?)"
_QUANTITY = r"[1-9][0-9]{0,11}(m|k|M|G|T|Ki|Mi|Gi|Ti)?"
# Setting -> what it must match as a whole, and how that is said.
ALLOWED = {
    "image": (r"[a-z0-9][A-Za-z0-9._:/@-]{0,254}", "an image such as registry/name:tag"),
    "claim": (rf"{_LABEL}(\.{_LABEL})*", "lower-case letters, digits and - (DNS-1123)"),
    "mount": (_PATH, "an absolute path below / of letters, digits, _ + - and ."),
    "namespace": (_LABEL, "lower-case letters, digits and - (DNS-1123)"),
    "service_account": (rf"({_LABEL}(\.{_LABEL})*)?", "lower-case letters, digits and -"),
    "queue": (f"({_LABEL})?", "lower-case letters, digits and - (DNS-1123)"),
    "cpu": (_QUANTITY, "a quantity such as 4 or 500m"),
    "memory": (_QUANTITY, "a quantity such as 16Gi"),
    "nodes": (rf"({_KEY}={_WORD}?(,{_KEY}={_WORD}?)*)?", "labels of nodes, KEY=VALUE,KEY=VALUE"),
    "python": (r"[A-Za-z0-9._/+-]{1,255}", "the interpreter's name or path in the image"),
}
NAME = r"[A-Za-z0-9][A-Za-z0-9._+=,@-]{0,199}"
ENV = r"[A-Za-z_][A-Za-z0-9_]*"


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the cluster must know: the image with Onset in it, the volume claim that holds the
    workdir and the path it has both here and in the pods; the rest has a default.

    `accelerator` is `cpu`, `gpu:N` (N on each host) or a TPU slice such as `v5e:4x4`, `slices` how
    many of those; `processes` hosts carry out one cell (0: those of the slices, or one); `grace`
    seconds are left to a worker for its last checkpoint, `hours` (0: no limit) to a job, and
    `keep_hours` to what has ended. `nodes` selects nodes by their labels.
    """

    image: str
    claim: str
    mount: str
    namespace: str = "default"
    service_account: str = ""
    context: str = ""
    accelerator: str = "cpu"
    slices: int = 1
    processes: int = dataclasses.field(default=0, metadata={"omit": True})
    queue: str = ""
    cpu: str = "4"
    memory: str = "16Gi"
    nodes: str = ""
    python: str = "python"
    retries: int = 3
    grace: int = 120
    hours: float = 0.0
    keep_hours: float = 168.0

    def __post_init__(self) -> None:
        for name, (pattern, what) in ALLOWED.items():
            value = getattr(self, name)
            if not re.fullmatch(pattern, value):
                raise UserError(f"{name} is {value[:80]!r}; it must be {what}")
        positive("slices", self.slices)
        within("retries", self.retries, 0, 1000)
        within("grace", self.grace, 1, 3600)
        for name in ("hours", "keep_hours"):
            within(name, getattr(self, name), 0, 24 * 365)
        shape = _shape(self.accelerator)
        if self.slices > 1 and not shape.topology:
            raise UserError(f"slices is {self.slices}; {self.accelerator} has none, so leave it 1")
        within("processes", self.processes, 0)
        if shape.hosts and self.processes not in (0, total := shape.hosts * self.slices):
            raise UserError(f"processes is {self.processes}; the slices have {total} hosts")


class _Shape(NamedTuple):
    """Of one slice: what is asked for on each host, and how many hosts (0: the command says)."""

    resource: str = ""
    chips: int = 0
    label: str = ""
    topology: str = ""
    hosts: int = 0


def manifest(command: Command, settings: Settings) -> dict[str, Any]:
    """The Job or JobSet of a command.

    Raises `UserError` on a name, an argument or a variable that is not fit for a cluster, on a log
    outside the mounted volume, and where the command's processes are not the hosts of the slice.
    """
    _check(command, settings)
    shape, name = _shape(settings.accelerator), object_name(command)
    total = hosts(command, settings)
    job = _job(command, settings, total // settings.slices, alone=total == 1)
    queue = {"kueue.x-k8s.io/queue-name": settings.queue} if settings.queue else {}
    metadata: dict[str, Any] = {
        "name": name,
        "namespace": settings.namespace,
        "labels": {**_labels(name), **queue},
        "annotations": {
            IDENTITY: _identity(command),
            "onset/name": command.name,
            "onset/log": str(command.log),
        },
    }
    ttl = {"ttlSecondsAfterFinished": round(settings.keep_hours * 3600)}
    # Kueue lets a job begin; until then it must not, whichever of the two sees it first.
    start = {"suspend": True} if settings.queue else {}
    if total == 1:
        spec: dict[str, Any] = {**start, **ttl, **job}
        return {"apiVersion": "batch/v1", "kind": "Job", "metadata": metadata, "spec": spec}
    if shape.topology:  # a slice is a node pool, and no two jobs share one
        metadata["annotations"]["alpha.jobset.sigs.k8s.io/exclusive-topology"] = (
            "cloud.google.com/gke-nodepool"
        )
    spec = {
        **start,
        **ttl,
        "network": {"enableDNSHostnames": True, "subdomain": name},
        "failurePolicy": _set_policy(settings),
        "replicatedJobs": [{"name": HOST, "replicas": settings.slices, "template": {"spec": job}}],
    }
    version = "jobset.x-k8s.io/v1alpha2"
    return {"apiVersion": version, "kind": "JobSet", "metadata": metadata, "spec": spec}


def manifests(commands: Sequence[Command], settings: Settings) -> list[dict[str, Any]]:
    """The manifest of each; raises `UserError` where two commands are the same."""
    bodies = [manifest(command, settings) for command in commands]
    names = [body["metadata"]["name"] for body in bodies]
    for command, name in zip(commands, names, strict=True):
        if names.count(name) > 1:
            raise UserError(f"{command.name!r} is given twice; submit each command once")
    return bodies


def object_name(command: Command) -> str:
    """A label of at most 40 characters: the command's name as far as it goes, and eight hex digits
    of the SHA-256 of name and arguments, among them the workdir.

    40, because a pod is called NAME-host-SLICE-INDEX-RANDOM, which must be a label (63) as well. It
    begins with a letter, because a JobSet's service bears it, too (DNS-1035).
    """
    text = re.sub(r"[^a-z0-9]+", "-", command.name.lower()).removeprefix("onset-")[:25].strip("-")
    return "-".join(filter(None, ("onset", text, _identity(command)[:8])))


def hosts(command: Command, settings: Settings) -> int:
    """How many hosts carry out a command together."""
    return _shape(settings.accelerator).hosts * settings.slices or command.processes


def _check(command: Command, settings: Settings) -> None:
    if not re.fullmatch(NAME, command.name):
        raise UserError(
            f"the name {command.name[:80]!r} is not fit for a cluster; use up to 200 letters,"
            " digits, . _ + = , @ - and begin with a letter or digit"
        )
    if not command.argv:
        raise UserError(f"{command.name} has no arguments; a command needs a program at least")
    for text in (*command.argv, *command.env.values(), str(command.log)):
        # Neither reaches a process: execve ends an argument at NUL, and the API takes UTF-8, which
        # has no lone surrogates (an undecodable file name in Python).
        if re.search("[\0\ud800-\udfff]", text):
            raise UserError(f"{command.name} has {text[:80]!r}; use text without NUL, in UTF-8")
    for key in command.env:
        if not re.fullmatch(ENV, key):
            raise UserError(f"{command.name} sets {key[:80]!r}; use letters, digits and _")
    if not command.log.is_relative_to(settings.mount) or ".." in command.log.parts:
        raise UserError(
            f"{command.log} is not below {settings.mount}, where the claim {settings.claim} is"
            " mounted; put the workdir there, or change mount"
        )
    positive("processes", command.processes)
    if command.processes not in (1, total := hosts(command, settings)):
        raise UserError(
            f"{command.name} has {command.processes} processes, but {settings.slices} x"
            f" {settings.accelerator} has {total} hosts; make them equal"
        )


def _shape(accelerator: str) -> _Shape:
    """`cpu`, `gpu:8` or `v5e:4x4`, looked up; raises `UserError` on another."""
    name, _, size = accelerator.partition(":")
    if accelerator == "cpu":
        return _Shape()
    if name == "gpu":
        if not re.fullmatch(r"[1-9][0-9]?", size):
            raise UserError(f"accelerator is {accelerator[:80]!r}; write gpu:N, such as gpu:8")
        return _Shape("nvidia.com/gpu", int(size))
    if name not in TPUS:
        known = nearest(name[:80], ["cpu", "gpu", *TPUS])
        raise UserError(f"accelerator is {accelerator[:80]!r}; {known} (cpu, gpu:8, v5e:4x4)")
    label, topologies = TPUS[name]
    if size not in topologies:
        known = nearest(size[:80], [*topologies])
        raise UserError(f"accelerator is {accelerator[:80]!r}; {known}")
    count = math.prod(map(int, size.split("x"))) // (chips := topologies[size])
    return _Shape("google.com/tpu", chips, label, size, count)


def _job(command: Command, settings: Settings, count: int, alone: bool) -> dict[str, Any]:
    """The spec of the Job of `count` hosts that is alone, or one of a JobSet."""
    limit = {"activeDeadlineSeconds": math.ceil(settings.hours * 3600)} if settings.hours else {}
    return {
        "completionMode": "Indexed",
        "completions": count,
        "parallelism": count,
        "backoffLimit": settings.retries if alone else 0,
        **limit,
        # The next pod comes when the one before is gone: two must not meet on one cell.
        "podReplacementPolicy": "Failed",
        "podFailurePolicy": {"rules": _pod_rules(alone)},
        "template": {
            "metadata": {"labels": _labels(object_name(command))},
            "spec": _pod(command, settings, alone),
        },
    }


def _pod_rules(alone: bool) -> list[dict[str, Any]]:
    """Alone, a pod is replaced. In a JobSet every known end fails the Job at once, whose message
    then says which it was, for the rules of the set.
    """
    again = "Ignore" if alone else "FailJob"

    def ends(action: str, *codes: int) -> dict[str, Any]:
        match = {"containerName": "worker", "operator": "In", "values": list(codes)}
        return {"action": action, "onExitCodes": match}

    disruption = [{"type": "DisruptionTarget", "status": "True"}]
    return [
        ends("FailJob", *FINAL),
        ends(again, AGAIN),
        {"action": again, "onPodConditions": disruption},
    ]


def _set_policy(settings: Settings) -> dict[str, Any]:
    """Of a JobSet; the first rule that fits counts, and without one it starts again, counted.

    The patterns read the job controller's message, `... failed with exit code 2 matching FailJob
    rule at index 0`; a pod's name has no blanks and cannot imitate it.
    """
    final = "|".join(map(str, FINAL))

    def ends(name: str, action: str, reason: str) -> dict[str, Any]:
        return {"name": name, "action": action, "onJobFailureReasons": [reason]}

    rules = [
        {
            **ends("final", "FailJobSet", "PodFailurePolicy"),
            "onJobFailureMessagePatterns": [f"failed with exit code ({final}) matching"],
        },
        ends("again", "RestartJobSetAndIgnoreMaxRestarts", "PodFailurePolicy"),
        ends("overdue", "FailJobSet", "DeadlineExceeded"),
    ]
    # All pods of one attempt are gone before the next one's come, as in a Job that is alone.
    return {
        "maxRestarts": settings.retries,
        "restartStrategy": "BlockingRecreate",
        "rules": rules,
    }


def _pod(command: Command, settings: Settings, alone: bool) -> dict[str, Any]:
    shape = _shape(settings.accelerator)
    selector = dict(pair.split("=", 1) for pair in settings.nodes.split(",") if pair)
    if shape.topology:
        selector["cloud.google.com/gke-tpu-accelerator"] = shape.label
        selector["cloud.google.com/gke-tpu-topology"] = shape.topology
    asked: dict[str, str] = {"cpu": settings.cpu, "memory": settings.memory}
    limits: dict[str, str] = {"memory": settings.memory}  # no limit on cpu: idle cores may help
    if shape.resource:
        asked[shape.resource] = limits[shape.resource] = str(shape.chips)
    volumes: list[dict[str, Any]] = [
        {"name": "runs", "persistentVolumeClaim": {"claimName": settings.claim}}
    ]
    mounts = [{"name": "runs", "mountPath": settings.mount}]
    if shape.resource == "nvidia.com/gpu":  # NCCL; a container has 64 MiB of it otherwise
        volumes.append({"name": "shm", "emptyDir": {"medium": "Memory"}})
        mounts.append({"name": "shm", "mountPath": "/dev/shm"})
    program, *rest = command.argv
    # The interpreter that runs here is at another place in the image.
    program = settings.python if program == sys.executable else program
    container = {
        "name": "worker",
        "image": settings.image,
        "command": [literal(text) for text in (program, *rest)],
        "env": _environment(command, settings, alone),
        "resources": {"requests": asked, "limits": limits},
        "volumeMounts": mounts,
        "securityContext": {"allowPrivilegeEscalation": False},
        # The last lines of what a failed worker printed become the reason in `status`.
        "terminationMessagePolicy": "FallbackToLogsOnError",
    }
    pod: dict[str, Any] = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": settings.grace,
        "enableServiceLinks": False,
        "automountServiceAccountToken": bool(settings.service_account),
        "containers": [container],
        "volumes": volumes,
    }
    if settings.service_account:
        pod["serviceAccountName"] = settings.service_account
    if selector:
        pod["nodeSelector"] = selector
    if shape.resource:
        taint = {"key": shape.resource, "operator": "Exists", "effect": "NoSchedule"}
        pod["tolerations"] = [taint]
    return pod


def _environment(command: Command, settings: Settings, alone: bool) -> list[dict[str, Any]]:
    """Of several hosts without a TPU, each learns where they meet, how many they are and which one
    it is; on TPU slices GKE says so, and JAX listens by itself.
    """
    entries: list[dict[str, Any]] = [
        {"name": key, "value": literal(value)} for key, value in sorted(command.env.items())
    ]
    if not alone and not _shape(settings.accelerator).topology:
        name = object_name(command)
        index = "metadata.labels['batch.kubernetes.io/job-completion-index']"
        place, count, own = MEETING
        entries += [
            {"name": place, "value": f"{name}-{HOST}-0-0.{name}:{PORT}"},
            {"name": count, "value": str(command.processes)},
            {"name": own, "valueFrom": {"fieldRef": {"fieldPath": index}}},
        ]
    return entries


def literal(text: str) -> str:
    """`text` such that the kubelet, which replaces `$(NAME)` and makes `$` of `$$`, hands over just
    what it was.
    """
    return text.replace("$", "$$")


def _labels(name: str) -> dict[str, str]:
    return {"app.kubernetes.io/name": "onset", MANAGER: "onset", INSTANCE: name}


def _identity(command: Command) -> str:
    # Not the environment, the settings or where Python is: submitted again with more memory, or
    # from another machine, a command is the same, and two would wait for each other's lease.
    program, *rest = command.argv or ("",)
    text = json.dumps([command.name, "" if program == sys.executable else program, *rest])
    return hashlib.sha256(text.encode()).hexdigest()
