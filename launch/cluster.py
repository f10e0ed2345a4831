"""Calls to a Kubernetes API server that are bounded in time, and what they are about: the objects
of `launch.manifest`, made, read, listed, watched and deleted.

Everything that is no refusal (429, 5xx, a connection that is cut or silent) is tried again for
`PATIENCE` seconds and then told in a sentence. A create that may or may not have arrived is safe to
repeat, since the name of an object says what it is.
"""

import contextlib
import functools
import json
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from launch.manifest import IDENTITY, MANAGER, Settings
from lm.config import UserError

# Kind in an id -> API group, version, plural, and the conditions of success and of failure.
KINDS = {
    "job": ("batch", "v1", "jobs", "Complete", "Failed"),
    "jobset": ("jobset.x-k8s.io", "v1alpha2", "jobsets", "Completed", "Failed"),
}
OURS = f"{MANAGER}=onset"
PAGE = 500  # objects of one answer
PATIENCE = 60.0  # seconds in which one call must have succeeded
ANSWER = 20.0  # seconds without a byte after which an attempt has failed
PAUSE = 0.5  # seconds before the second attempt; doubled up to 8
BUSY = (429, 500, 502, 503, 504)
EXPIRED = 410
MISSING = "--where=kubernetes needs the official client; pip install 'onset-lm[kubernetes]'"


class Id(NamedTuple):
    """An object of the cluster; as a text, KIND/NAMESPACE/NAME."""

    kind: str
    namespace: str
    name: str


class Calls:
    """`calls(function, *args)`: repeated while the server is busy or cannot be reached, for
    `patience` seconds at most, after which `UserError` is raised. Refusals are raised at once, as
    the client's ApiException.
    """

    def __init__(self, settings: Settings) -> None:
        self.patience = PATIENCE
        api, self.refused, self.cut = _connect(settings.context, os.environ.get("KUBECONFIG"))
        self.host = api.configuration.host
        self.objects, self.core, self.watch = _services(api)

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        deadline = time.monotonic() + self.patience
        pause = PAUSE
        while True:
            left = max(0.1, deadline - time.monotonic())
            timeout = (min(left, 5.0), min(left, ANSWER))
            try:
                return function(*args, _request_timeout=timeout, **kwargs)
            except self.refused as error:
                if error.status not in BUSY:
                    raise
                why, wait = f"{error.status} {error.reason}", _retry_after(error) or pause
            except self.cut as error:
                why, wait = type(error).__name__, pause
            if time.monotonic() + wait >= deadline:
                raise UserError(
                    f"{self.host} did not answer within {self.patience:.0f} s ({why}); jobs there"
                    " go on by themselves, so give the same command again when it does"
                )
            time.sleep(wait)
            pause = min(2 * pause, 8.0)


@functools.lru_cache(1)
def _connect(context: str, file: str | None) -> tuple[Any, Any, Any]:
    """The client of a kubeconfig, or inside a pod of its service account; what a refusal raises and
    what a lost connection. Kept, because some clusters are signed in to by a program that takes a
    second, and the client renews what it got from there by itself.
    """
    try:
        import kubernetes
        import urllib3
    except ImportError as error:
        raise UserError(MISSING) from error
    config, configuration = kubernetes.config, kubernetes.client.Configuration()
    try:
        # The client has read the variable once and for all, at its import.
        config.load_kube_config(
            file,
            context=context or None,
            client_configuration=configuration,
            persist_config=False,
        )
    except config.ConfigException as error:
        try:
            if context:
                raise
            config.load_incluster_config(client_configuration=configuration)
        except config.ConfigException:
            raise UserError(
                f"no cluster is configured ({line(str(error))}); set KUBECONFIG, or name a context"
            ) from error
    # urllib3's own tries would multiply ours, and sleep for as long as Retry-After says.
    configuration.retries = False
    cut = (urllib3.exceptions.HTTPError, OSError)
    return kubernetes.client.ApiClient(configuration), kubernetes.client.ApiException, cut


def _services(api: Any) -> tuple[Any, Any, Any]:
    import kubernetes

    client = kubernetes.client
    return client.CustomObjectsApi(api), client.CoreV1Api(api), kubernetes.watch.Watch


def create(calls: Calls, body: Mapping[str, Any]) -> tuple[Id, Any]:
    """The id, and the object if this call made it. One of ours that has ended makes room; one that
    still runs is adopted.
    """
    kind, metadata = body["kind"].lower(), body["metadata"]
    id = Id(kind, metadata["namespace"], metadata["name"])
    group, version, plural, *_ = KINDS[kind]
    for _ in range(3):
        try:
            made = calls(
                calls.objects.create_namespaced_custom_object,
                *(group, version, id.namespace, plural),
                dict(body),
            )
            return id, made
        except calls.refused as error:
            if error.status != 409:
                raise refusal(error, f"cannot create {kind} {id.name}") from error
        there = get(calls, id)
        if there is None:  # it went while we looked
            continue
        mark = there["metadata"].get("annotations", {}).get(IDENTITY)
        if mark != metadata["annotations"][IDENTITY]:
            raise UserError(
                f"namespace {id.namespace} has another {kind} called {id.name}; delete it or"
                " choose another namespace"
            )
        leaving = "deletionTimestamp" in there["metadata"]
        if not leaving and not ended(kind, there):
            return id, None
        if not leaving:
            delete(calls, id, there)
        await_gone(calls, {id}, calls.patience)
    raise UserError(
        f"{kind} {id.name} of an earlier run is still being deleted; give the same command again"
        " when it is gone"
    )


def get(calls: Calls, id: Id) -> Any:
    group, version, plural, *_ = KINDS[id.kind]
    try:
        return calls(
            calls.objects.get_namespaced_custom_object,
            *(group, version, id.namespace, plural, id.name),
        )
    except calls.refused as error:
        if error.status == 404:
            return None
        raise refusal(error, f"cannot read {id.kind} {id.name}") from error


def delete(calls: Calls, id: Id, item: Mapping[str, Any]) -> None:
    """Deletes what was seen under this name, and not what may have followed it; its pods first, so
    that it is there until the last of them is gone.
    """
    group, version, plural, *_ = KINDS[id.kind]
    options = {
        "propagationPolicy": "Foreground",
        "preconditions": {"uid": item["metadata"]["uid"]},
    }
    try:
        calls(
            calls.objects.delete_namespaced_custom_object,
            *(group, version, id.namespace, plural, id.name),
            body=options,
        )
    except calls.refused as error:
        if error.status not in (404, 409):
            raise refusal(error, f"cannot delete {id.kind} {id.name}") from error


def objects(calls: Calls, kind: str, namespace: str) -> tuple[dict[Id, Any], str]:
    """All of ours of a kind, page by page, and the version of the list. A list whose next page has
    expired is begun again.
    """
    group, version, plural, *_ = KINDS[kind]
    deadline = time.monotonic() + calls.patience
    pause = PAUSE
    found: dict[Id, Any] = {}
    token: dict[str, str] = {}
    while True:
        try:
            page = calls(
                calls.objects.list_namespaced_custom_object,
                *(group, version, namespace, plural),
                label_selector=OURS,
                limit=PAGE,
                **token,
            )
        except calls.refused as error:
            if error.status == EXPIRED and time.monotonic() + pause < deadline:
                time.sleep(pause)
                pause, found, token = min(2 * pause, 8.0), {}, {}
                continue
            raise refusal(error, f"cannot list {plural} of namespace {namespace}") from error
        for item in page.get("items", []):
            found[Id(kind, namespace, item["metadata"]["name"])] = item
        metadata = page.get("metadata", {})
        if not metadata.get("continue"):
            return found, metadata.get("resourceVersion", "")
        token = {"_continue": metadata["continue"]}


def await_gone(calls: Calls, ids: set[Id], seconds: float) -> None:
    """Returns when none of `ids` is there any more, or after `seconds`.

    A list says what is there, a watch what goes. A watch that is cut, too old (410) or refused ends
    in another list, never in a guess.
    """
    deadline = time.monotonic() + seconds
    pause = PAUSE
    while ids and (left := deadline - time.monotonic()) > 0:
        kind, namespace, _ = next(iter(ids))
        there, at = objects(calls, kind, namespace)
        ids = ids & there.keys()
        if not ids:
            return
        try:
            for name in _deleted(calls, kind, namespace, at, left):
                ids = ids - {Id(kind, namespace, name)}
                pause = PAUSE
                if not ids:
                    return
        except calls.refused as error:
            if error.status not in (EXPIRED, *BUSY):
                raise refusal(error, f"cannot watch {kind}s of namespace {namespace}") from error
        except calls.cut:
            pass
        time.sleep(max(0.0, min(pause, deadline - time.monotonic())))
        pause = min(2 * pause, 8.0)


def _deleted(calls: Calls, kind: str, namespace: str, at: str, seconds: float) -> Iterator[str]:
    """The names of objects as they go, from the version `at` on."""
    group, version, plural, *_ = KINDS[kind]
    stream = calls.watch().stream(
        calls.objects.list_namespaced_custom_object,
        *(group, version, namespace, plural),
        label_selector=OURS,
        resource_version=at,
        timeout_seconds=max(1, round(seconds)),
        _request_timeout=(5.0, max(1.0, seconds)),
    )
    with contextlib.closing(stream):
        for event in stream:
            if event and event["type"] == "DELETED":
                yield event["raw_object"]["metadata"]["name"]


def ended(kind: str, item: Mapping[str, Any]) -> dict[str, Any] | None:
    """The condition that says how an object ended, if it has."""
    for condition in item.get("status", {}).get("conditions") or []:
        if condition.get("type") in KINDS[kind][3:] and condition.get("status") == "True":
            return dict(condition)
    return None


def refusal(error: Any, what: str) -> UserError:
    """A sentence from what the server answered."""
    try:
        message = json.loads(error.body)["message"]
    except (KeyError, TypeError, ValueError):
        message = error.reason
    remedy = {
        401: "sign in to the cluster again",
        403: "ask for the right to do so (docs/kubernetes.md lists what is needed)",
        404: "create the namespace, or install JobSet where it is the JobSet that is unknown",
        422: "correct the setting it names",
    }.get(error.status, "correct the setting, or ask whoever runs the cluster")
    return UserError(f"{what}: {error.status} {line(str(message))}; {remedy}")


def _retry_after(error: Any) -> float:
    """Seconds the server asks for; 0 where it does not say, or says a date."""
    text = (error.headers or {}).get("Retry-After", "")
    return float(text) if re.fullmatch(r"[0-9]{1,6}", text) else 0.0


def line(text: str) -> str:
    return " ".join(text.split())[:300]
