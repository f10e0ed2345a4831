"""The Kubernetes engine against a server that imitates the API's, and misbehaves when told to.

Nothing here is a cluster: docs/kubernetes.md says what has run. Needs the extra `kubernetes`.
"""

import copy
import itertools
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
from api_server import Fault, serving

from launch import Command, cluster, kubernetes, manifest
from launch.manifest import Settings
from lm.config import UserError

pytest.importorskip("kubernetes.client", reason="needs the extra 'kubernetes'")


def settings(**more) -> Settings:
    return Settings("registry.example/onset:1.0", "runs", "/runs", **more)


def command(name: str = "2x8+1", **more) -> Command:
    argv = (sys.executable, "-m", "experiments.worker", "/runs/desk", "--cells", name)
    return Command(argv, Path("/runs/desk/logs/worker.log"), name=name, **more)


@pytest.fixture
def server(tmp_path, monkeypatch):
    with serving(tmp_path) as (server, config):
        monkeypatch.setenv("KUBECONFIG", str(config))
        monkeypatch.setattr(cluster, "PAUSE", 0.01)
        yield server


@pytest.fixture
def clock(monkeypatch):
    """Time that passes only while somebody sleeps; gives the sleeps."""
    slept: list[float] = []
    now = itertools.count()
    monkeypatch.setattr(
        cluster,
        "time",
        SimpleNamespace(sleep=slept.append, monotonic=lambda: sum(slept) + 1e-6 * next(now)),
    )
    monkeypatch.setattr(cluster, "PAUSE", 0.5)
    return slept


def names(server):
    return sorted(key[2] for key in server.objects)


def test_submit_and_submit_again(server):
    """Catches a second object for the same cell, and a kind that goes to the wrong place."""
    commands = [command("a"), command("b"), command("c", processes=2)]
    ids = kubernetes.submit(commands, settings())
    assert [id.split("/")[0] for id in ids] == ["job", "job", "jobset"]
    assert kubernetes.submit(commands, settings(memory="32Gi")) == ids
    assert [id.split("/")[2] for id in ids] == names(server) and len(names(server)) == 3
    assert [s.state for s in kubernetes.status(ids, settings())] == ["waiting"] * 3


def test_what_has_ended_makes_room(server):
    """Catches a resubmitted cell that is answered with the failure of its last attempt."""
    [id] = kubernetes.submit([command()], settings())
    first = next(iter(server.objects.values()))["metadata"]["uid"]
    server.end(id.split("/")[2], "Failed", "BackoffLimitExceeded")
    server.lingering = 0.3
    assert kubernetes.submit([command()], settings()) == [id]
    [item] = server.objects.values()
    assert item["metadata"]["uid"] != first and "status" not in item


def test_another_runner_may_have_been_faster(server):
    """Catches a delete by name alone, which would take the object another runner has just made."""
    [id] = kubernetes.submit([command()], settings())
    key = next(iter(server.objects))
    stale = copy.deepcopy(server.objects[key])
    server.remove(key)
    kubernetes.submit([command()], settings())
    calls = cluster.Calls(settings())
    cluster.delete(calls, cluster.Id(*id.split("/")), stale)
    assert names(server) == [id.split("/")[2]]
    assert "deletionTimestamp" not in server.objects[key]["metadata"]


def test_what_is_not_ours_is_left_alone_and_nothing_half_submitted(server):
    """Catches adoption by name alone, and jobs that stay behind a refusal."""
    kubernetes.submit([command("b")], settings())
    [key] = server.objects
    server.objects[key]["metadata"]["annotations"][manifest.IDENTITY] = "another"
    with pytest.raises(UserError, match="another job called onset-b-"):
        kubernetes.submit([command("a"), command("b"), command("c")], settings())
    assert names(server) == [key[2]]
    assert "deletionTimestamp" not in server.objects[key]["metadata"]


def test_retry_after_is_honoured(server, clock):
    """Catches a client that asks again at once, and one that waits for ever."""
    server.faults += [Fault("POST", "429", "7"), Fault("POST", "429")]
    kubernetes.submit([command()], settings())
    assert clock == [7.0, 1.0]
    server.faults += [Fault("GET", "429", "3600")]
    with pytest.raises(UserError, match="did not answer within 60 s .429"):
        kubernetes.status(["job/default/x"], settings())
    assert sum(clock) < 60


def test_errors_of_the_server_are_outwaited_with_an_end(server, clock):
    """Catches an attempt too few, a pause that does not grow, and a loop without an end."""
    server.faults += [Fault("POST", code) for code in ("500", "502", "503", "504")]
    kubernetes.submit([command()], settings())
    assert clock == [0.5, 1.0, 2.0, 4.0]
    server.faults += [Fault("GET", "503")] * 100
    with pytest.raises(UserError, match="go on by themselves.*same command again"):
        kubernetes.status(["job/default/x"], settings())
    assert 45 < sum(clock) - 7.5 < 60 and max(clock) == 8.0


def test_an_answer_that_is_lost_creates_nothing_twice(server):
    """Catches a create whose repetition fails, or makes a second object."""
    server.faults += [Fault("POST", "late"), Fault("GET", "late"), Fault("DELETE", "late")]
    [id] = kubernetes.submit([command()], settings())
    assert names(server) == [id.split("/")[2]] and len(server.asked("POST")) == 2
    assert kubernetes.status([id], settings())[0].state == "waiting"
    kubernetes.cancel([id], settings(), grace=1.0)
    assert not server.objects


def test_silence_ends_in_a_sentence(server, monkeypatch):
    """Catches a call without a timeout."""
    monkeypatch.setattr(cluster, "ANSWER", 0.2)
    monkeypatch.setattr(cluster, "PATIENCE", 0.6)
    server.faults += [Fault("GET", "silent")] * 20
    begun = time.monotonic()
    with pytest.raises(UserError, match="did not answer within 1 s .ReadTimeoutError"):
        kubernetes.status(["job/default/x"], settings())
    assert time.monotonic() - begun < 10
    server.stop.set()


def test_lists_come_in_pages_and_begin_again_when_expired(server, monkeypatch):
    """Catches a list that ends at its first page, or goes on from one that is no longer valid."""
    monkeypatch.setattr(cluster, "PAGE", 2)
    ids = kubernetes.submit([command(f"c{i}") for i in range(5)], settings())
    assert {s.state for s in kubernetes.status(ids, settings())} == {"waiting"}
    pages = [query.get("continue") for *_, query, _ in server.asked("GET")]
    assert pages == [None, "2", "4"]
    server.seen.clear()
    real = server.fault

    def expire_second(method):
        return Fault("GET", "410") if len(server.asked("GET")) == 2 else real(method)

    monkeypatch.setattr(server, "fault", expire_second)
    assert {s.state for s in kubernetes.status(ids, settings())} == {"waiting"}
    pages = [query.get("continue") for *_, query, _ in server.asked("GET")]
    assert pages == [None, "2", None, "2", "4"]


def test_a_list_that_always_expires_ends(server, clock, monkeypatch):
    """Catches a loop over 410 without an end or without a pause."""
    monkeypatch.setattr(server, "fault", lambda method: Fault(method, "410"))
    with pytest.raises(UserError, match="410"):
        kubernetes.status(["job/default/x"], settings())
    assert 45 < sum(clock) < 60 and len(server.seen) < 20


@pytest.mark.parametrize("how", ["cut", "expired", "503", "410", "none"])
def test_cancel_stands_a_watch_that_breaks(server, how):
    """Catches a watch whose end is taken for the end of the jobs, or that is never begun again."""
    ids = kubernetes.submit([command("a"), command("b"), command("done")], settings())
    server.end(ids[2].split("/")[2], "Complete")
    server.faults += [Fault("WATCH", how)] * (how != "none")
    server.lingering = 0.3
    kubernetes.cancel(ids, settings(), grace=7.0)
    assert names(server) == [ids[2].split("/")[2]]  # what has ended keeps its record
    states = [s.state for s in kubernetes.status(ids, settings())]
    assert states == ["gone", "gone", "done"]
    [pods] = [entry for entry in server.asked("DELETE") if entry[1].endswith("/pods")]
    assert pods[2]["gracePeriodSeconds"] == "7" and ids[0].split("/")[2] in pods[2]["labelSelector"]
    assert ids[2].split("/")[2] not in pods[2]["labelSelector"]


def test_cancel_does_not_wait_for_ever(server):
    """Catches a wait for an object whose node is lost."""
    [id] = kubernetes.submit([command()], settings())
    server.lingering = -1
    calls, key = cluster.Calls(settings()), cluster.Id(*id.split("/"))
    cluster.delete(calls, key, next(iter(server.objects.values())))
    begun = time.monotonic()
    cluster.await_gone(calls, {key}, 1.0)
    assert 0.9 < time.monotonic() - begun < 20 and names(server)
    assert kubernetes.status([id], settings())[0] == ("running", None, "is being deleted")


def pod(name, code, at, attempt=0, reason="Error", message=""):
    end = {"exitCode": code, "reason": reason, "message": message, "finishedAt": at}
    notes = {"jobset.sigs.k8s.io/restart-attempt": str(attempt)}
    return {
        "metadata": {"labels": {"instance": name}, "annotations": notes},
        "status": {"containerStatuses": [{"state": {"terminated": end}}]},
    }


STATES = {
    "queued": ({"spec": {"suspend": True}}, [], ("waiting", None)),
    "no pod yet": ({"status": {"active": 1, "ready": 0}}, [], ("waiting", None)),
    "running": ({"status": {"active": 1, "ready": 1}}, [], ("running", None)),
    "done": ("Complete", [], ("done", 0)),
    "mistake": ("exit code 2 matching", [(2, "1", 0), (1, "0", 0)], ("failed", 2)),
    "mistake, pods gone": ("exit code 2 matching", [], ("failed", 2)),
    "oom": ("backoff limit", [(1, "1", 0), (137, "2", 0)], ("failed", -9)),
    "crash": ("backoff limit", [(137, "1", 0), (1, "2", 0)], ("failed", 1)),
    "nobody knows": ("backoff limit", [], ("failed", None)),
}


@pytest.mark.parametrize("case", STATES)
def test_status_says_state_and_code(server, case):
    """Catches a state that is read from the wrong field, and an exit code of an earlier attempt."""
    how, pods, expected = STATES[case]
    [id] = kubernetes.submit([command()], settings())
    name = id.split("/")[2]
    key = next(iter(server.objects))
    if isinstance(how, dict):
        server.put(key, {**server.objects[key], **how})
    elif how == "Complete":
        server.end(name, "Complete")
    else:
        server.end(name, "Failed", "PodFailurePolicy", f"Container w for pod n/p failed with {how}")
    server.pods = [pod(name, code, at, attempt) for code, at, attempt in pods]
    [found] = kubernetes.status([id], settings())
    assert found[:2] == expected and "\n" not in found.why


def test_of_several_hosts_the_first_to_fail_counts(server):
    """Catches a cause that is only the death of the others, or that of an earlier attempt."""
    [id] = kubernetes.submit([command(processes=3)], settings())
    name = id.split("/")[2]
    server.end(name, "Failed", "FailedJobs", "jobset failed due to one or more job failures")
    old = [pod(name, 3, "1", 0)]
    last = [pod(name, 134, "6", 1), pod(name, 137, "5", 1, "OOMKilled"), pod(name, 134, "7", 1)]
    server.pods = old + last
    found = kubernetes.status([id], settings())[0]
    assert found.code == -9 and "OOMKilled" in found.why
    server.pods += [pod(name, 2, "8", 1, message="lm: error\nheads 3 does not divide width 4\n")]
    found = kubernetes.status([id], settings())[0]
    assert found.code == 2 and "heads 3 does not divide width 4" in found.why


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("403", "cannot create job onset-2x8-1-.*403.*docs/kubernetes.md"),
        ("401", "sign in"),
        ("404", "namespace"),
        ("422", "told to say 422; correct the setting"),
    ],
)
def test_refusals_are_one_sentence(server, fault, words):
    """Catches a traceback for what the user can mend, and a refusal that is tried again."""
    server.faults += [Fault("POST", fault)]
    with pytest.raises(UserError, match=words) as raised:
        kubernetes.submit([command()], settings())
    assert "\n" not in str(raised.value) and len(server.asked("POST")) == 1


def test_no_cluster_is_one_sentence(server, tmp_path, monkeypatch):
    """Catches a traceback where no kubeconfig is, or the context is not in it."""
    with pytest.raises(UserError, match="no cluster is configured.*name a context"):
        kubernetes.submit([command()], settings(context="elsewhere"))
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "nowhere"))
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    with pytest.raises(UserError, match="no cluster is configured"):
        kubernetes.submit([command()], settings())
    with pytest.raises(UserError, match="no id of Kubernetes"):
        kubernetes.status(["4711"], settings())
    assert kubernetes.status([], settings()) == kubernetes.submit([], settings()) == []


@pytest.mark.slow
def test_a_study_runs_on_it(server, study, finished, tmp_path, lm):
    """Catches a manifest whose command, environment or paths are not those of a worker: a thread
    stands for a node, and starts what the manifest says.
    """
    workdir = tmp_path / "mounted" / "run"
    workdir.parent.mkdir()
    begun = []

    def node(body):
        [container] = body["spec"]["template"]["spec"]["containers"]
        begun.append(container)
        env = {entry["name"]: entry["value"] for entry in container["env"]}
        name = body["metadata"]["name"]

        def carry_out():
            command = [sys.executable if a == "python" else a for a in container["command"]]
            done = subprocess.run(command, env=tiny.environment(**env), timeout=300)
            kind = "Failed" if done.returncode else "Complete"
            server.end(name, kind, "BackoffLimitExceeded", f"exit code {done.returncode}")

        threading.Thread(target=carry_out, daemon=True).start()

    server.created = node
    where = {"image": "onset:1", "claim": "runs", "mount": workdir.parent, "cpu": "1"}
    done = lm(
        *("run", study, f"--workdir={workdir}", "--where=kubernetes"),
        *(f"--where.{key}={value}" for key, value in where.items()),
    )
    assert done.code == 0, done
    for cell in tiny.CELLS:
        assert tiny.rows(workdir / cell) == tiny.rows(finished / cell)
    assert len(begun) == len(tiny.CELLS) == len(server.objects)
