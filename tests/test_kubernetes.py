"""Kubernetes: what the manifests say.

The manifests are held against Kubernetes' own schemas and JobSet's, and against a model of how the
controllers read a failure policy. Nothing here is a cluster: docs/kubernetes.md says what has run.
`python tests/test_kubernetes.py` writes the golden files anew.
"""

import copy
import dataclasses
import math
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from launch import Command, cluster, kubernetes, manifest
from launch.manifest import Settings
from lm.config import UserError, build

ROOT = Path(__file__).parents[1]
GOLDEN = Path(__file__).parent / "manifests"
CRD = Path(__file__).parents[2] / "shared/data/kubernetes/jobset_crd.yaml"
BASE = {"image": "registry.example/onset:1.0", "claim": "runs", "mount": "/runs"}
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def settings(**more) -> Settings:
    return Settings(**BASE, **more)


def command(name: str = "2x8+1", workdir: str = "/runs/desk", **more) -> Command:
    argv = (sys.executable, "-m", "experiments.worker", workdir, "--cells", name)
    fields = {"argv": argv, "env": {"NPROC": "2"}, "name": name, **more}
    return Command(log=Path(workdir) / "logs" / "worker.log", **fields)


CASES = {
    "job_cpu": (command(), settings()),
    "job_gpu": (command(), settings(accelerator="gpu:8", queue="research", retries=1)),
    "job_tpu": (command(), settings(accelerator="v5e:2x4", namespace="lm", hours=12)),
    "jobset_gpu": (command(processes=2), settings(accelerator="gpu:8", service_account="onset")),
    "jobset_tpu": (
        command(),
        settings(accelerator="v5p:4x4x4", slices=2, queue="tpu", nodes="cloud/spot=true,pool=a"),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_manifests_are_the_golden_ones(case):
    """Catches any change of what is submitted that nobody meant."""
    assert kubernetes.render([CASES[case][0]], CASES[case][1]) == (
        (GOLDEN / f"{case}.yaml").read_text()
    )


@pytest.mark.parametrize("case", [case for case in CASES if case.startswith("job_")])
def test_jobs_fit_the_schema_of_kubernetes(case):
    """Catches a misspelt field, a wrong type, and a validator that accepts everything."""
    validate = pytest.importorskip("kubernetes_validate", reason="needs kubernetes-validate")
    body = manifest.manifest(*CASES[case])
    validate.validate(body, "1.31", strict=True)
    for path, value in (
        (("spec", "backoffLmit"), 3),
        (("spec", "parallelism"), "one"),
        (("spec", "template", "spec", "contaners"), []),
    ):
        with pytest.raises(validate.ValidationError):
            validate.validate(changed(body, path, value), "1.31", strict=True)


@pytest.fixture(scope="module")
def jobset_schema():
    """JobSet's own schema with every object closed: what it does not list is an error."""
    jsonschema = pytest.importorskip("jsonschema")
    if not CRD.exists():
        pytest.skip("needs JobSet's CRD, jobset_crd.yaml")
    # The C loader takes 0.5 s for it, Python's own 8 s.
    crd = next(filter(None, yaml.load_all(CRD.read_text(), Loader=LOADER)))
    [version] = [v for v in crd["spec"]["versions"] if v["name"] == "v1alpha2"]
    return jsonschema.Draft202012Validator(closed(version["schema"]["openAPIV3Schema"]))


def closed(schema):
    if isinstance(schema, list):
        return [closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    schema = {key: closed(value) for key, value in schema.items()}
    known = isinstance(schema.get("properties"), dict)
    if known and not schema.get("x-kubernetes-preserve-unknown-fields"):
        schema["additionalProperties"] = False
    if schema.pop("x-kubernetes-int-or-string", False):
        schema.pop("type", None)
    return schema


def changed(body, path, value):
    body = copy.deepcopy(body)
    node = body
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    return body


@pytest.mark.parametrize("case", [case for case in CASES if case.startswith("jobset_")])
def test_jobsets_fit_the_schema_of_jobset(case, jobset_schema):
    """Catches a misspelt field, an unknown action, and a rule without its name."""
    body = manifest.manifest(*CASES[case])
    body["metadata"] = {}  # the API server's own, which a CRD leaves open
    assert [error.message for error in jobset_schema.iter_errors(body)] == []
    job = ("spec", "replicatedJobs", 0)
    for path, value in (
        (("spec", "failurePolicy", "maxRestart"), 3),
        (("spec", "failurePolicy", "rules", 0, "action"), "Restart"),
        (("spec", "failurePolicy", "rules", 0), {"action": "FailJobSet"}),
        ((*job, "replicas"), "two"),
        ((*job, "template", "spec", "template", "spec", "nodeSelectors"), {}),
    ):
        wrong = list(jobset_schema.iter_errors(changed(body, path, value)))
        assert wrong, path


def job_end(rules, code=None, disrupted=False):
    """What the job controller does with a pod that ended so: (action, message)."""
    for index, rule in enumerate(rules):
        if codes := rule.get("onExitCodes"):
            fits = codes["operator"] == "In" and code in codes["values"]
            what = f"Container worker for pod ns/p failed with exit code {code}"
        else:
            fits = disrupted and rule["onPodConditions"] == [
                {"type": "DisruptionTarget", "status": "True"}
            ]
            what = "Pod ns/p has condition DisruptionTarget"
        if fits:
            return rule["action"], f"{what} matching FailJob rule at index {index}"
    return "Count", "Job has reached the specified backoff limit"


def set_end(rules, reason, message):
    """What the JobSet controller does with a Job that failed so."""
    for rule in rules:
        patterns = rule.get("onJobFailureMessagePatterns", [""])
        if reason in rule["onJobFailureReasons"] and any(re.search(p, message) for p in patterns):
            return rule["action"]
    return "RestartJobSet"


ENDS = {
    "the user's mistake": ((2,), "fail"),
    "do not retry": ((78,), "fail"),
    "a checkpoint": ((75,), "free"),
    "a checkpoint before preemption": ((75, True), "free"),
    "preempted": ((143, True), "free"),
    "a lost node": ((None, True), "free"),
    "a crash": ((1,), "counted"),
    "out of memory": ((137,), "counted"),
}


@pytest.mark.parametrize("end", ENDS)
def test_failures_are_retried_by_their_kind(end):
    """Catches rules in the wrong order and a pattern that misses the controller's message."""
    how, expected = ENDS[end]
    alone = manifest.manifest(command(), settings(retries=5))["spec"]
    action, _ = job_end(alone["podFailurePolicy"]["rules"], *how)
    assert {"FailJob": "fail", "Ignore": "free", "Count": "counted"}[action] == expected
    assert alone["backoffLimit"] == 5 and alone["podReplacementPolicy"] == "Failed"
    several = manifest.manifest(command(processes=4), settings(retries=5))["spec"]
    job = several["replicatedJobs"][0]["template"]["spec"]
    action, message = job_end(job["podFailurePolicy"]["rules"], *how)
    assert action != "Ignore"  # the other hosts cannot go on alone
    reason = "PodFailurePolicy" if action == "FailJob" else "BackoffLimitExceeded"
    decided = set_end(several["failurePolicy"]["rules"], reason, message)
    names = {"FailJobSet": "fail", "RestartJobSetAndIgnoreMaxRestarts": "free"}
    assert names.get(decided, "counted") == expected
    assert job["backoffLimit"] == 0 and several["failurePolicy"]["maxRestarts"] == 5


def kubelet(text, variables):
    """What the kubelet makes of an argument: `$(NAME)` is replaced, `$$` is `$`."""
    out, i = "", 0
    while i < len(text):
        if text[i] == "$" and i + 1 < len(text):
            if text[i + 1] == "$":
                out, i = out + "$", i + 2
                continue
            if text[i + 1] == "(" and ")" in text[i:]:
                end = text.index(")", i)
                name = text[i + 2 : end]
                out, i = out + variables.get(name, f"$({name})"), end + 1
                continue
        out, i = out + text[i], i + 1
    return out


def test_arguments_reach_the_process_as_they_stand():
    """Catches expansion of $(NAME) by the kubelet, quoting that is lost, and a shell on the way."""
    rng = random.Random(0)
    for _ in range(2000):
        text = "".join(rng.choices("$(){}A'\"\\ ;\n", k=rng.randrange(9)))
        assert kubelet(manifest.literal(text), {"A": "expanded", "": "?"}) == text
    assert kubelet("$(A)", {"A": "expanded"}) == "expanded"
    rude = ("; rm -rf /", "$(HOME)", "`id`", "a b", "--", "%s", "{{.}}", 'x"\n- y: z', "é")
    body = manifest.manifest(command(argv=(sys.executable, *rude)), settings())
    [container] = body["spec"]["template"]["spec"]["containers"]
    assert container["command"][0] == "python" and "args" not in container
    assert tuple(kubelet(text, {"HOME": "/root"}) for text in container["command"][1:]) == rude


def test_yaml_means_the_same_to_every_reader():
    """Catches text that a reader by other rules takes for a number, a truth value or a date."""
    tricky = (
        "1e3",
        "0o17",
        "0x1f",
        "y",
        "no",
        "null",
        "~",
        "2026-01-01",
        "1:30",
        "",
        "01",
        "-",
        "=",
    )
    commands = [command(argv=("prog", *tricky), env={f"V{i}": t for i, t in enumerate(tricky)})]
    text = kubernetes.render(commands, settings())
    assert list(yaml.load_all(text, Loader=LOADER)) == manifest.manifests(commands, settings())
    for value in tricky:
        assert f'- "{value}"\n' in text
    for scalar in re.findall(r"(?:: |- )([^\s\"].*)$", text, re.MULTILINE):
        assert re.fullmatch(r"[0-9]+|true|false|[a-zA-Z]+:.*", scalar), scalar
    assert "&id" not in text and "!!" not in text


@pytest.mark.parametrize(
    "name",
    ["../x", "/etc/passwd", "a/b", "", "a\0b", "a\nb", "a\n", "x" * 300, "-rf", ".git", "аdmin"]
    + ["ﬁle", "a b", "a;b", "$(A)", "x‮y", "é", "a\\b", "{a}", "\ud800"],
)
def test_names_go_through_an_allow_list(name):
    """Catches a name that a path, a shell, a label or an eye would read otherwise (the first а of
    the eleventh is Cyrillic).
    """
    with pytest.raises(UserError, match="not fit for a cluster"):
        manifest.manifest(command(name), settings())


def test_object_names_are_labels_and_differ(monkeypatch):
    """Catches a name that no pod, label or service may bear, and two cells that meet in one."""
    names = ["2x8", "2X8", "2x8+1", "2x8-1", "CON", "a" * 200, "x.y_z", "0", "a--", "=".join("ab")]
    names = [n for n in names if re.fullmatch(manifest.NAME, n)]
    made = {manifest.object_name(command(n, w)) for n in names for w in ("/runs/a", "/runs/b")}
    assert len(made) == 2 * len(names)
    for name in made:
        assert re.fullmatch(r"[a-z]([a-z0-9-]*[a-z0-9])?", name) and len(name) <= 40
        assert len(f"{name}-host-9999-9999-abcde") <= 63
    again = command(env={"NPROC": "8"})  # with more threads, or from another machine: the same cell
    first = manifest.object_name(command())
    assert manifest.object_name(again) == first
    monkeypatch.setattr(sys, "executable", "/opt/other/python")
    assert manifest.object_name(command()) == first
    runner = manifest.object_name(command("onset-2x8-1-0a1b2c3d"))
    assert runner.startswith("onset-2x8-1-0a1b2c3d-")


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("image", "Reg/x y", "image such as"),
        ("image", "-v", "image such as"),
        ("claim", "Runs", "DNS-1123"),
        ("mount", "runs", "absolute path"),
        ("mount", "/", "absolute path"),
        ("mount", "/runs/../etc", "absolute path"),
        ("mount", "/runs\n", "absolute path"),
        ("namespace", "a.b", "DNS-1123"),
        ("namespace", "x" * 64, "DNS-1123"),
        ("queue", "q\n", "DNS-1123"),
        ("cpu", "four", "such as 4"),
        ("memory", "16 GiB", "such as 16Gi"),
        ("memory", "0", "such as 16Gi"),
        ("nodes", "spot", "KEY=VALUE"),
        ("python", "python -c 1", "interpreter"),
        ("accelerator", "v5e:3x3", "did you mean|known"),
        ("accelerator", "v5:4x4", "did you mean|known"),
        ("accelerator", "gpu", "gpu:8"),
        ("accelerator", "gpu:0", "gpu:8"),
        ("slices", 2, "has none"),
        ("slices", 0, "greater than 0"),
        ("retries", -1, "between 0"),
        ("grace", 0, "between 1"),
        ("hours", -1.0, "between 0"),
    ],
)
def test_settings_are_checked_at_the_edge(key, value, words):
    """Catches a setting that reaches the cluster unchecked."""
    with pytest.raises(UserError, match=words) as raised:
        build(Settings, {**BASE, key: value}, "where")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("one", "words"),
    [
        (command(workdir="/home/me/desk"), "not below /runs"),
        (command(workdir="/runs/../etc"), "not below /runs"),
        (command(workdir="/runsaway"), "not below /runs"),
        (command(argv=()), "no arguments"),
        (command(argv=("a\0b",)), "NUL"),
        (command(argv=("\udcff",)), "UTF-8"),
        (command(env={"A": "x\0"}), "NUL"),
        (command(env={"A=B": "x"}), "letters, digits and _"),
        (command(processes=0), "processes is 0"),
    ],
)
def test_commands_are_checked_before_anything_is_sent(one, words):
    """Catches a command that could only fail in its pod, after hours in a queue."""
    with pytest.raises(UserError, match=words):
        manifest.manifest(one, settings())


def test_processes_must_be_the_hosts_of_the_slice():
    """Catches a run on a part of the slice that is paid for, and two commands that are the same."""
    with pytest.raises(UserError, match="3 processes.*2 x v5e:4x4 has 8 hosts"):
        manifest.manifest(command(processes=3), settings(accelerator="v5e:4x4", slices=2))
    assert manifest.hosts(command(processes=8), settings(accelerator="v5e:4x4", slices=2)) == 8
    with pytest.raises(UserError, match="given twice"):
        kubernetes.render([command(), command("other"), command()], settings())


def test_slices_are_whole_hosts():
    """Catches a row of the table whose chips do not fill their hosts."""
    for name, (_, topologies) in manifest.TPUS.items():
        for topology, chips in topologies.items():
            shape = manifest._shape(f"{name}:{topology}")
            sizes = [int(n) for n in topology.split("x")]
            assert len(sizes) == (2 if name in ("v5e", "v6e") else 3)
            assert shape.hosts * chips == math.prod(sizes) and chips <= 8


def test_rendering_needs_no_client():
    """Catches an import that makes every command line wait for the client, or need it."""
    code = (
        "import sys; sys.modules['kubernetes'] = None\n"
        "import launch.kubernetes as k\n"
        "from pathlib import Path; from launch import Command\n"
        "s = k.Settings('a', 'b', '/r'); c = Command(('p',), Path('/r/l'))\n"
        "assert 'kind: \"Job\"' in k.render([c], s)\n"
        "assert 'urllib3' not in sys.modules\n"
        "try: k.submit([c], s)\n"
        "except ValueError as e: print(e)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == cluster.MISSING + "\n", done.stderr


def test_settings_are_documented():
    """Catches a setting that docs/kubernetes.md does not name."""
    page = (ROOT / "docs" / "kubernetes.md").read_text()
    for field in dataclasses.fields(Settings):
        assert f"`{field.name}`" in page, field.name


def test_several_hosts_are_told_what_the_worker_listens_to():
    """Catches variables that the worker does not know."""
    source = (ROOT / "experiments" / "processes.py").read_text()
    assert ", ".join(f'"{name}"' for name in manifest.MEETING) in source
    spec = manifest.manifest(command(processes=2), settings())["spec"]
    pod = spec["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    env = {entry["name"]: entry for entry in pod["containers"][0]["env"]}
    name = manifest.object_name(command())
    assert env["ONSET_COORDINATOR"]["value"] == f"{name}-host-0-0.{name}:55527"
    assert spec["network"]["subdomain"] == name and env["ONSET_PROCESSES"]["value"] == "2"


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for case, (one, chosen) in CASES.items():
        (GOLDEN / f"{case}.yaml").write_text(kubernetes.render([one], chosen))
