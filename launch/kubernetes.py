"""The Kubernetes engine: one Indexed Job or JobSet for every command, through the official client.

`launch.manifest` says what is asked for, `launch.cluster` asks; the cluster restarts what was
preempted or failed, by the policy in the manifest. Output goes where a cluster keeps it (`kubectl
logs`), not to the command's log file.

`render` needs neither a client nor a cluster. None of this has run on a real cluster: it is tested
against the published schemas and a server that imitates one.
"""

import contextlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from launch import Command, Status, cluster, manifest
from launch.manifest import FINAL, INSTANCE, Settings, manifests
from lm.config import UserError

__all__ = ["Settings", "cancel", "render", "status", "submit"]


def render(commands: Sequence[Command], settings: Settings) -> str:
    """The manifests of all commands as YAML, for `kubectl apply -f`."""
    import yaml

    class Dumper(yaml.SafeDumper):
        def ignore_aliases(self, data: Any) -> bool:
            return True

    def represent(dumper: Any, text: str) -> Any:
        return dumper.represent_scalar("tag:yaml.org,2002:str", str(text), style='"')

    Dumper.add_representer(_Text, represent)
    bodies = [_quoted(body) for body in manifests(commands, settings)]
    return str(yaml.dump_all(bodies, Dumper=Dumper, sort_keys=False, explicit_start=True))


def ready(settings: Settings) -> None:
    """Raises UserError without the official client, or where no cluster is configured."""
    cluster.Calls(settings)


def processes(settings: Settings) -> int:
    """How many carry out one cell together, each on a host of its own."""
    return manifest.hosts(Command((), Path(), processes=settings.processes or 1), settings)


def submit(commands: Sequence[Command], settings: Settings) -> list[str]:
    """Creates an object for every command, or adopts the one that is there; returns their ids.

    Everything is checked before the first is created; if one is refused, those that this call made
    are deleted again, and `UserError` is raised.
    """
    if not commands:
        return []
    bodies = manifests(commands, settings)
    calls = cluster.Calls(settings)
    ids: list[cluster.Id] = []
    made: list[tuple[cluster.Id, Any]] = []
    try:
        for body in bodies:
            id, new = cluster.create(calls, body)
            ids.append(id)
            made += [(id, new)] if new else []
    except BaseException:
        calls.patience = min(calls.patience, 5.0)  # a server that is gone must not hold us up again
        for id, new in made:
            try:
                cluster.delete(calls, id, new)
            except Exception:  # the first failure is the one to tell
                break
        raise
    return ["/".join(id) for id in ids]


def status(ids: Sequence[str], settings: Settings) -> list[Status]:
    """The state of each, from one list of objects for every kind and namespace; `waiting` while it
    is queued or has no pod that runs.
    """
    if not ids:  # nothing to ask: no cluster needed
        return []
    wanted = [_parse(text) for text in ids]
    calls = cluster.Calls(settings)
    there: dict[cluster.Id, Any] = {}
    for kind, namespace in sorted({(id.kind, id.namespace) for id in wanted}):
        there |= cluster.objects(calls, kind, namespace)[0]
    return [_status(calls, id, there.get(id)) for id in wanted]


def cancel(ids: Sequence[str], settings: Settings, grace: float = 30.0) -> None:
    """Deletes what has not ended: pods get SIGTERM, and SIGKILL after `grace` seconds; returns when
    all are gone, or half a minute after that.
    """
    if not ids:
        return
    wanted = [_parse(text) for text in ids]
    calls = cluster.Calls(settings)
    for kind, namespace in sorted({(id.kind, id.namespace) for id in wanted}):
        there, _ = cluster.objects(calls, kind, namespace)
        live = [id for id in wanted if id in there and not cluster.ended(id.kind, there[id])]
        for id in live:
            cluster.delete(calls, id, there[id])
        # What goes with its owner keeps the grace of its own manifest, so pods are asked as well.
        for start in range(0, len(live), 50):
            names = ",".join(id.name for id in live[start : start + 50])
            with _absent():
                calls(
                    calls.core.delete_collection_namespaced_pod,
                    namespace,
                    label_selector=f"{INSTANCE} in ({names})",
                    grace_period_seconds=max(0, round(grace)),
                )
        cluster.await_gone(calls, set(live), grace + 30.0)


def _status(calls: cluster.Calls, id: cluster.Id, item: Any) -> Status:
    if item is None:
        return Status("gone", None, f"the cluster has no {id.kind} {id.name} (any more)")
    ended = cluster.ended(id.kind, item)
    if ended and ended["type"] == cluster.KINDS[id.kind][3]:
        return Status("done", 0)
    if ended:
        code, why = _cause(calls, id, ended.get("message", ""))
        return Status("failed", code, cluster.line(f"{ended.get('reason', 'Failed')}: {why}"))
    spec, state = item.get("spec", {}), item.get("status", {})
    logs = f"kubectl logs -n {id.namespace} -l {INSTANCE}={id.name}"
    if "deletionTimestamp" in item["metadata"]:
        return Status("running", None, "is being deleted")
    if spec.get("suspend"):
        return Status("waiting", None, "is suspended, until its queue admits it")
    states = state.get("replicatedJobsStatus", []) if id.kind == "jobset" else [state]
    if any(one.get("ready", 0) for one in states):
        return Status("running", None, logs)
    return Status("waiting", None, "no pod is ready yet")


def _cause(calls: cluster.Calls, id: cluster.Id, message: str) -> tuple[int | None, str]:
    """Exit code and words: those of the pod that ended it, else what the condition says.

    Of one host the last pod counts; of several the first of the last attempt to fail, since it
    takes the others with it, or one that may not be tried again. 128 + n is the signal n.
    """
    said = re.search(r"failed with exit code (\d+) matching", message)
    code = int(said[1]) if said else None
    try:
        answer = calls(
            calls.core.list_namespaced_pod,
            id.namespace,
            label_selector=f"{INSTANCE}={id.name}",
            _preload_content=False,
        )
        pods = json.loads(answer.data).get("items", []) if answer.status == 200 else []
    except (calls.refused, UserError, ValueError):  # the right to list pods may be lacking
        pods = []
    ends = sorted(
        (
            (attempt, end.get("finishedAt") or "", end)
            for pod in pods
            for attempt, end in _ends(pod)
            if end.get("exitCode") and code in (None, end["exitCode"])
        ),
        key=lambda entry: entry[:2],
    )
    if ends:
        last = [end for attempt, _, end in ends if attempt == ends[-1][0]]
        if id.kind == "jobset":
            end = min(last, key=lambda end: end["exitCode"] not in FINAL)
        else:
            end = last[-1]
        code = end["exitCode"]
        words = [end.get("reason", ""), (end.get("message") or "").strip().rpartition("\n")[2]]
        message = f"{message} ({', '.join(word for word in words if word)})"
    return (128 - code if code is not None and code > 128 else code), message


def _ends(pod: Mapping[str, Any]) -> Iterator[tuple[int, dict[str, Any]]]:
    """The attempt of a JobSet that a pod belonged to, and how its container ended."""
    notes = pod["metadata"].get("annotations") or {}
    attempt = int(notes.get("jobset.sigs.k8s.io/restart-attempt", 0))
    for container in pod.get("status", {}).get("containerStatuses") or []:
        if end := container.get("state", {}).get("terminated"):
            yield attempt, end


def _parse(text: str) -> cluster.Id:
    parts = text.split("/")
    if len(parts) != 3 or parts[0] not in cluster.KINDS or not all(parts):
        raise UserError(f"{text[:80]!r} is no id of Kubernetes; ids are job/NAMESPACE/NAME")
    return cluster.Id(*parts)


@contextlib.contextmanager
def _absent() -> Iterator[None]:
    """Passes over what is not there, or not ours to do."""
    import kubernetes

    try:
        yield
    except kubernetes.client.ApiException as error:
        if error.status not in (403, 404):
            raise cluster.refusal(error, "cannot delete pods") from error


class _Text(str):
    """A value that stands between double quotes in YAML."""


def _quoted(value: Any) -> Any:
    """Kubernetes reads YAML by other rules than PyYAML writes it: 1e3, 0o17 and y are text to one
    and a number or a truth value to the other. Quoted, all are text to both.
    """
    if isinstance(value, dict):
        return {key: _quoted(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_quoted(item) for item in value]
    return _Text(value) if isinstance(value, str) else value
