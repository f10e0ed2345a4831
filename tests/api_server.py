"""A small Kubernetes API server in this process, which can be told to misbehave.

It keeps Jobs and JobSets as plain mappings, answers create, read, list (in pages), watch and delete
as the API conventions say, and counts versions. A fault is put before the request it is for:
`server.faults.append(Fault("POST", "429", "7"))` answers the next POST with 429 and Retry-After 7.
"""

import copy
import itertools
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qs, urlparse


class Fault(NamedTuple):
    """What happens to the next request of a method: `GET`, `WATCH`, `POST` or `DELETE`.

    `how` is a status code, `late` (done, but the connection is cut before the answer), `cut` (in
    the middle of a watch), `expired` (410 as an event of a watch) or `silent` (no answer for a
    while).
    """

    method: str
    how: str
    after: str = ""  # the value of Retry-After


class Server(ThreadingHTTPServer):
    """`objects` by (plural, namespace, name); `seen` are the requests in their order."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.objects: dict[tuple[str, str, str], dict[str, Any]] = {}
        self.pods: list[dict[str, Any]] = []
        self.events: list[tuple[int, str, dict[str, Any]]] = []
        self.faults: list[Fault] = []
        self.seen: list[tuple[str, str, dict[str, str], Any]] = []
        self.created: Callable[[dict[str, Any]], None] = lambda body: None  # told of every POST
        self.lingering = 0.0  # seconds from a delete until the object is gone; below 0: for ever
        self.changed = threading.Condition()
        self.versions = itertools.count(100)
        self.stop = threading.Event()

    def fault(self, method: str) -> Fault | None:
        with self.changed:
            for fault in self.faults:
                if fault.method == method:
                    self.faults.remove(fault)
                    return fault
        return None

    def put(self, key: tuple[str, str, str], body: dict[str, Any]) -> None:
        """Stores an object as if it had just been created, or changed."""
        with self.changed:
            version = next(self.versions)
            body["metadata"]["resourceVersion"] = str(version)
            body["metadata"].setdefault("uid", f"uid-{version}")
            kind = "MODIFIED" if key in self.objects else "ADDED"
            self.objects[key] = body
            self.events.append((version, kind, copy.deepcopy(body)))
            self.changed.notify_all()

    def end(self, name: str, kind: str, reason: str = "", message: str = "") -> None:
        """Gives the only object of that name the condition it ends with."""
        [key] = [key for key in self.objects if key[2] == name]
        condition = {"type": kind, "status": "True", "reason": reason, "message": message}
        self.put(key, {**self.objects[key], "status": {"conditions": [condition]}})

    def remove(self, key: tuple[str, str, str]) -> None:
        with self.changed:
            if body := self.objects.pop(key, None):
                self.events.append((next(self.versions), "DELETED", body))
                self.changed.notify_all()

    def asked(self, method: str) -> list[tuple[str, str, dict[str, str], Any]]:
        return [entry for entry in self.seen if entry[0] == method]


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._handle("GET")

    def do_POST(self) -> None:
        self._handle("POST")

    def do_DELETE(self) -> None:
        self._handle("DELETE")

    def _handle(self, method: str) -> None:
        url = urlparse(self.path)
        query = {key: values[0] for key, values in parse_qs(url.query).items()}
        length = int(self.headers.get("Content-Length") or 0)
        body = json.loads(self.rfile.read(length) or b"null")
        method = "WATCH" if query.get("watch") in ("true", "True") else method
        self.server.seen.append((method, url.path, query, body))
        fault = self.server.fault(method)
        if fault and fault.how.isdigit():
            self._answer(int(fault.how), {"message": f"told to say {fault.how}"}, fault.after)
            return
        if fault and fault.how == "silent":
            self.server.stop.wait(5)
            self.close_connection = True
            return
        if method == "WATCH":
            self._watch(url.path, query, fault)
            return
        code, answer = self._do(method, url.path.strip("/").split("/"), query, body)
        if fault and fault.how == "late":
            self.close_connection = True
            return
        self._answer(code, answer)

    def _do(self, method: str, parts: list[str], query: dict[str, str], body: Any) -> Any:
        server = self.server
        if parts[:2] == ["api", "v1"]:
            selector = query.get("labelSelector", "")
            items = [p for p in server.pods if p["metadata"]["labels"]["instance"] in selector]
            return 200, {"kind": "PodList", "items": items, "metadata": {}}
        namespace, plural = parts[4], parts[5]
        if method == "POST":
            key = (plural, namespace, body["metadata"]["name"])
            if key in server.objects:
                return 409, {"message": f"{key[2]} already exists", "reason": "AlreadyExists"}
            server.put(key, body)
            server.created(body)
            return 201, server.objects[key]
        if len(parts) == 6:
            return self._page([k for k in sorted(server.objects) if k[:2] == key_of(parts)], query)
        key = (plural, namespace, parts[6])
        if key not in server.objects:
            return 404, {"message": f"{key[2]} not found"}
        if method == "GET":
            return 200, server.objects[key]
        uid = (body or {}).get("preconditions", {}).get("uid")
        if uid not in (None, server.objects[key]["metadata"]["uid"]):
            return 409, {"message": "the UID in the precondition does not match"}
        marked = copy.deepcopy(server.objects[key])
        marked["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
        server.put(key, marked)
        if server.lingering == 0:
            server.remove(key)
        elif server.lingering > 0:
            timer = threading.Timer(server.lingering, server.remove, [key])
            timer.daemon = True
            timer.start()
        return 200, {"kind": "Status", "status": "Success"}

    def _page(self, keys: list[tuple[str, str, str]], query: dict[str, str]) -> Any:
        limit, start = int(query.get("limit", 500)), int(query.get("continue", 0))
        metadata = {"resourceVersion": str(next(self.server.versions))}
        if start + limit < len(keys):
            metadata["continue"] = str(start + limit)
        items = [self.server.objects[key] for key in keys[start : start + limit]]
        return 200, {"kind": "List", "metadata": metadata, "items": items}

    def _watch(self, path: str, query: dict[str, str], fault: Fault | None) -> None:
        server, at = self.server, int(query.get("resourceVersion") or 0)
        end = time.monotonic() + float(query.get("timeoutSeconds", 5))
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        if fault and fault.how == "expired":
            status = {"code": 410, "reason": "Expired", "message": "too old resource version"}
            self._chunk(json.dumps({"type": "ERROR", "object": status}) + "\n")
        if fault and fault.how == "cut":
            self._chunk('{"type": "MODIFIED", "obj')
            self.close_connection = True
            return
        while not fault and time.monotonic() < end and not server.stop.is_set():
            with server.changed:
                new = [event for event in server.events if event[0] > at]
                if not new:
                    server.changed.wait(0.05)
            for version, kind, body in new:
                at = version
                self._chunk(json.dumps({"type": kind, "object": body}) + "\n")
        self._chunk("")

    def _chunk(self, text: str) -> None:
        data = text.encode()
        try:
            self.wfile.write(b"%x\r\n%b\r\n" % (len(data), data))
            self.wfile.flush()
        except OSError:
            self.close_connection = True

    def _answer(self, code: int, body: Any, after: str = "") -> None:
        data = json.dumps(body).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        if after:
            self.send_header("Retry-After", after)
        self.end_headers()
        self.wfile.write(data)


def key_of(parts: list[str]) -> tuple[str, str]:
    return parts[5], parts[4]


@contextmanager
def serving(folder: Path) -> Iterator[tuple[Server, Path]]:
    """A server on a free port of this machine, and the kubeconfig that leads to it."""
    server = Server()
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    path = folder / "kubeconfig"
    port = server.server_address[1]
    path.write_text(
        json.dumps(
            {
                "apiVersion": "v1",
                "kind": "Config",
                "current-context": "test",
                "clusters": [{"name": "c", "cluster": {"server": f"http://127.0.0.1:{port}"}}],
                "users": [{"name": "u", "user": {"token": "none"}}],
                "contexts": [{"name": "test", "context": {"cluster": "c", "user": "u"}}],
            }
        )
    )
    try:
        yield server, path
    finally:
        server.stop.set()
        server.shutdown()
        server.server_close()
        thread.join(10)
