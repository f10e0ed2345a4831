"""Runs inside: the two programs that meet in a jail. `lm.eval.code` reads this file as text and
adds the line that calls `judge` or `solve`; nobody imports it.

The judge has the tests and never runs what was generated; the solution has the generated code and
never sees the tests. They exchange JSON lines: arguments one way, values the other. So neither what
the solution prints, nor its exit code, nor what it does to `assert`, to builtins or to its own
interpreter can make a test pass: it has to return the right values. Standard library only.
"""

import builtins
import contextlib
import json
import os
from collections.abc import Callable
from typing import Any

LONGEST = 1 << 22  # bytes of a line
SHOWN = 300  # characters of a reason
PLAIN = (type(None), bool, str)
SEQUENCES = {"l": list, "t": tuple, "s": set, "z": frozenset}


def encode(value: Any) -> Any:
    """Plain values as JSON that keeps their types; raises TypeError for all others.

    What a subclass overrides does not travel: a value compares as its plain type does.
    """
    if type(value) in PLAIN:
        return value
    if isinstance(value, int):
        return {"i": hex(value)}
    if isinstance(value, float):
        return {"f": float.hex(value)}
    if isinstance(value, complex):
        return {"c": [float.hex(value.real), float.hex(value.imag)]}
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, bytes):
        return {"b": bytes(value).hex()}
    if isinstance(value, dict):
        return {"d": [[encode(k), encode(v)] for k, v in dict.items(value)]}
    for name, kind in SEQUENCES.items():
        if isinstance(value, kind):
            return {name: [encode(v) for v in value]}
    raise TypeError(f"a {type(value).__name__} cannot leave the jail; only plain values can")


def decode(found: Any) -> Any:
    """The value, made of builtin types only; raises ValueError or TypeError."""
    if type(found) in PLAIN:
        return found
    if type(found) is not dict or len(found) != 1:
        raise ValueError("not a value")
    [(kind, inner)] = found.items()
    if kind == "i":
        return int(inner, 16)
    if kind == "f":
        return float.fromhex(inner)
    if kind == "c":
        return complex(*map(float.fromhex, inner))
    if kind == "b":
        return bytes.fromhex(inner)
    if kind == "d":
        return {decode(k): decode(v) for k, v in inner}
    if kind in SEQUENCES:
        return SEQUENCES[kind](map(decode, inner))
    raise ValueError("not a value")


def _brief(error: BaseException) -> str:
    try:
        text = str(error)[:SHOWN]
    except BaseException:
        text = ""
    return f"{type(error).__name__}{': ' if text else ''}{text}"


def solve(source: str, entry: str) -> None:
    """Runs a solution and answers calls of its function `entry` until nobody asks any more."""
    asked, answers = os.fdopen(3, "rb"), os.fdopen(4, "wb", buffering=0)

    def answer(kind: str, value: Any) -> None:
        line = json.dumps([kind, value]).encode() + b"\n"
        while line:  # a write to a raw file may be short
            line = line[answers.write(line) :]

    space: dict[str, Any] = {"__name__": "solution", "__builtins__": builtins}
    try:
        exec(compile(source, "solution.py", "exec"), space)
        function = space[entry]
    except BaseException as error:
        answer("broken", _brief(error))
        return
    answer("ready", None)
    for line in asked:
        try:
            args, named = (decode(part) for part in json.loads(line))
            answer("value", encode(function(*args, **named)))
        except BaseException as error:
            # A frame may be too long, or too deep, only when it is written.
            answer("raised", [type(error).__name__, _brief(error)])


def _error(value: Any) -> Exception:
    """The exception that the solution raised, as far as a test may want to catch it."""
    kind, text = RuntimeError, str(value)
    with contextlib.suppress(TypeError, ValueError):
        name, text = map(str, value)
        kind = getattr(builtins, name, RuntimeError)
    try:
        # An AssertionError would look like the test's own.
        plain = issubclass(kind, Exception) and not issubclass(kind, AssertionError)
        error = kind(text) if plain else RuntimeError(text)
    except TypeError:  # no class, or one that wants more arguments
        error = RuntimeError(text)
    error.of_solution = True  # type: ignore[attr-defined]
    return error


class Stop(BaseException):
    """The end of judging; no `except Exception` of a test catches it."""

    def __init__(self, verdict: str, why: str) -> None:
        super().__init__(verdict, why)
        self.verdict, self.why = verdict, why


def judge(prompt: str, test: str, entry: str) -> None:
    """Runs the tests on a solution that is asked over the wire; writes the verdict to file 5."""
    try:
        _judge(prompt, test, entry)
        found = ("passed", "")
    except Stop as stop:
        found = (stop.verdict, stop.why)
    except AssertionError as error:
        found = ("failed", _brief(error))
    except BaseException as error:
        raised = getattr(error, "of_solution", False)
        found = ("raised" if raised else "failed", _brief(error))
    os.write(5, json.dumps(found).encode())


def _judge(prompt: str, test: str, entry: str) -> None:
    space: dict[str, Any] = {"__name__": "judge", "__builtins__": builtins}
    # A prompt that ends within a statement defines nothing that a test could use.
    with contextlib.suppress(SyntaxError):
        exec(compile(prompt, "prompt.py", "exec"), space)
    candidate = _candidate()
    space[entry] = candidate
    try:
        exec(compile(test, "test.py", "exec"), space)
        check = space["check"]
    except Exception as error:
        if getattr(error, "of_solution", False) or isinstance(error, AssertionError):
            raise
        raise Stop("broken", f"the problem's test cannot be run: {_brief(error)}") from error
    check(candidate)


def _candidate() -> Callable[..., Any]:
    """The solution's function, as far as a test can tell."""
    answers, asked = os.fdopen(3, "rb"), os.fdopen(4, "wb", buffering=0)

    def read() -> tuple[str, Any]:
        line = answers.readline(LONGEST)
        if not line:
            raise Stop("ended", "the program ended before it answered")
        try:
            kind, value = json.loads(line)
            if kind not in ("broken", "ready", "value", "raised"):
                raise ValueError(kind)
            return kind, decode(value) if kind == "value" else value
        except (ValueError, TypeError, RecursionError, OverflowError) as error:
            raise Stop("raised", "the program answered with what is no value") from error

    def candidate(*args: Any, **named: Any) -> Any:
        try:
            line = json.dumps([encode(args), encode(named)]).encode() + b"\n"
        except TypeError as error:
            raise Stop("broken", f"the problem's test passes {error}") from error
        try:
            while line:
                line = line[asked.write(line) :]
        except BrokenPipeError:
            raise Stop("ended", "the program ended before it was asked") from None
        kind, value = read()
        if kind == "value":
            return value
        raise _error(value)

    kind, why = read()
    if kind != "ready":
        raise Stop("raised", str(why))
    return candidate
