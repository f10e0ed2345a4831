"""Chat templates: Jinja programs that come with a model, and are not to be trusted.

Jinja's immutable sandbox keeps a template from reaching Python. It does not keep it from looping
for ever, or from doubling a text or a list until the memory is full. So the tree of a template is
rewritten before it is compiled, such that every pass of a loop and every call is counted against a
limit and a clock, every text and list that it makes is weighed, and all that it writes is counted,
also what it writes into a variable. What no chat template uses is not there at all.
"""

import datetime
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jinja2
from jinja2 import nodes, sandbox
from jinja2.ext import Extension
from jinja2.filters import FILTERS

from lm.config import UserError

LONGEST_TEMPLATE = 1 << 18  # characters; the longest known have about 20,000
LONGEST = 1 << 22  # characters and entries of any value, and of all that is written
MOST_STEPS = 100_000  # passes of loops and calls
SECONDS = 2.0
_FILTERS = (
    *("abs", "capitalize", "count", "d", "default", "dictsort", "first", "float", "int", "items"),
    *("last", "length", "lower", "max", "min", "reverse", "round", "safe", "sort", "title"),
    *("trim", "upper"),
)
_TEXT_METHODS = (
    *("capitalize", "count", "endswith", "find", "isdigit", "isspace", "lower", "lstrip", "rfind"),
    *("rstrip", "split", "splitlines", "startswith", "strip", "title", "upper"),
)
_PLAIN = (str, int, float, bool, type(None), jinja2.Undefined)


class _TooMuch(jinja2.TemplateError):
    """A template that wants more than any chat needs."""


class _Environment(sandbox.ImmutableSandboxedEnvironment):
    """The sandbox with its limits; made anew for every rendering, since it counts."""

    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,  # nothing is worked out before the clock runs
            extensions=[_Generation, "jinja2.ext.loopcontrols"],
            finalize=jinja2.pass_context(lambda _, value: self.written(value)),
        )
        self.left, self.room, self.end = MOST_STEPS, LONGEST, time.monotonic() + SECONDS
        self.filters = {name: FILTERS[name] for name in _FILTERS} | {
            **{"join": _join, "replace": _replace, "indent": _indent, "tojson": _tojson},
            **{"string": _text, "list": lambda v: _weighed(list(self.counted(v)))},
            **{"map": lambda v, attribute: (self.part(x, attribute) for x in self.counted(v))},
            **{"select": self.sieve(True, False), "selectattr": self.sieve(True, True)},
            **{"reject": self.sieve(False, False), "rejectattr": self.sieve(False, True)},
            **{"_counted": self.counted, "_weighed": _weighed},
        }
        self.globals = {
            **{"raise_exception": _raise_exception, "strftime_now": _strftime_now},
            **{"namespace": jinja2.utils.Namespace, "range": sandbox.safe_range},
            "dict": lambda *a, **k: _weighed(dict(*a, **k)),
        }

    def take(self) -> None:
        """Counts one step."""
        self.left -= 1
        if self.left < 0 or time.monotonic() > self.end:
            raise _TooMuch(f"it takes more than {MOST_STEPS:,} steps or {SECONDS:g} seconds")

    def counted(self, values: Iterable[Any]) -> Iterator[Any]:
        """The same values, a step each."""
        for value in values:
            self.take()
            yield value

    def written(self, value: Any) -> str:
        """The text of what is written, wherever to."""
        self.take()
        text = _text(value)
        self.room -= len(text)
        if self.room < 0:
            raise _TooMuch(f"it writes more than {LONGEST:,} characters")
        return text

    def part(self, value: Any, attribute: str) -> Any:
        """A named part of a message."""
        return self.getitem(value, attribute)

    def sieve(self, keep: bool, by_part: bool) -> Callable[..., Iterator[Any]]:
        """The four filters of Jinja that keep some of the values, by a test or by truth."""

        def go(values: Iterable[Any], *args: Any) -> Iterator[Any]:
            for value in self.counted(values):
                asked = self.part(value, args[0]) if by_part else value
                test = args[1:] if by_part else args
                found = self.call_test(test[0], asked, test[1:]) if test else asked
                if bool(found) == keep:
                    yield value

        return go

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        return _rewritten(super()._parse(source, name, filename), self)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """One of the operators that can make something large."""
        self.take()
        if operator == "+":
            _short(_weight(left) + _weight(right))
        elif not all(isinstance(x, int | float) and abs(x) < 1 << 32 for x in (left, right)):
            raise _TooMuch(f"{operator!r} is for small numbers here")
        elif operator == "**" and abs(right) > 16:
            raise _TooMuch(f"{right} is a large power")
        return super().call_binop(context, operator, left, right)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Of a text, only the methods that do not lengthen it."""
        if isinstance(obj, str):
            return attr in _TEXT_METHODS
        return super().is_safe_attribute(obj, attr, value)

    def call(self, context: Any, obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: D102
        self.take()
        return super().call(context, obj, *args, **kwargs)


class _Generation(Extension):
    """`{% generation %}` marks what an assistant says; for rendering it is nothing."""

    tags = {"generation"}

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def render(
    template: str, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool, **more: str
) -> str:
    """The text of a chat by a template; `more` are `bos_token` and the like.

    Raises `UserError` where the template is broken, refuses these messages, or wants too much.
    """
    if len(template) > LONGEST_TEMPLATE:
        raise UserError(
            f"the chat template has {len(template):,} characters; at most {LONGEST_TEMPLATE:,} are"
            " read"
        )
    values = {"messages": [dict(m) for m in messages], **more}
    if (size := _weight(values)) > LONGEST:
        raise UserError(f"the chat has about {size:,} characters; at most {LONGEST:,} are written")
    try:
        program = _Environment().from_string(template)
        return program.render(add_generation_prompt=add_generation_prompt, **values)
    # Whatever a program of somebody else's raises: it is the template's doing.
    except (jinja2.TemplateError, ArithmeticError, LookupError, TypeError, ValueError) as error:
        why = str(error)[:300] or type(error).__name__
        raise UserError(f"the model's chat template cannot write this chat: {why}") from error
    except (RecursionError, AttributeError, SyntaxError, MemoryError) as error:
        raise UserError(f"the model's chat template is broken: {type(error).__name__}") from error


def _rewritten(node: Any, environment: _Environment) -> Any:
    """The tree in which loops count, lists are weighed, `~` is a weighed `+`, and plain text is
    written as values are.
    """

    def through(name: str, value: Any) -> Any:
        found = nodes.Filter(value, name, [], [], None, None, lineno=value.lineno)
        return found.set_environment(environment)

    for name, value in node.iter_fields():
        if isinstance(value, nodes.Node):
            setattr(node, name, _rewritten(value, environment))
        elif isinstance(value, list):
            parts = [_rewritten(x, environment) if isinstance(x, nodes.Node) else x for x in value]
            setattr(node, name, parts)
    if isinstance(node, nodes.For):
        node.iter = through("_counted", node.iter)
    elif isinstance(node, nodes.TemplateData):
        return nodes.Const(node.data, lineno=node.lineno).set_environment(environment)
    elif isinstance(node, nodes.Concat):
        first, *rest = (through("string", part) for part in node.nodes)
        for part in rest:
            first = nodes.Add(first, part, lineno=node.lineno).set_environment(environment)
        return first
    elif isinstance(node, nodes.Tuple) and node.ctx == "load":
        # A list has no hash: hashing tuples of tuples of the same tuple takes for ever.
        return through("_weighed", nodes.List(node.items, lineno=node.lineno))
    elif isinstance(node, nodes.List | nodes.Dict):
        return through("_weighed", node)
    return node


def _weight(value: Any) -> int:
    """Characters and entries of a value, those that stand in it often as often; stops counting
    soon after `LONGEST`.
    """
    total, waiting = 0, [value]
    while waiting and total <= LONGEST:
        value = waiting.pop()
        total += len(value) if isinstance(value, str | list | tuple | Mapping) else 1
        if isinstance(value, list | tuple):
            waiting += value
        elif isinstance(value, Mapping):
            waiting += [*value.keys(), *value.values()]
    return total


def _short(length: int) -> None:
    if length > LONGEST:
        raise _TooMuch(f"it makes something of {length:,} characters; {LONGEST:,} is the most")


def _weighed[T](value: T) -> T:
    _short(_weight(value))
    return value


def _text(value: Any) -> str:
    if not isinstance(value, _PLAIN):
        if not isinstance(value, list | tuple | dict):
            raise _TooMuch(f"it writes a {type(value).__name__}, which is no text")
        _weighed(value)
    return str(value)


def _join(values: Iterable[Any], d: str = "", attribute: str | None = None) -> str:
    parts = [_text(v if attribute is None else v[attribute]) for v in values]
    _short(sum(map(len, parts)) + len(d) * len(parts))
    return d.join(parts)


def _replace(s: str, old: str, new: str) -> str:
    s, old, new = _text(s), _text(old), _text(new)
    _short(len(s) + s.count(old) * len(new))
    return s.replace(old, new)


def _indent(s: str, width: int = 4, first: bool = False, blank: bool = False) -> str:
    _short(len(s) + (s.count("\n") + 1) * int(width))
    return str(FILTERS["indent"](s, width, first, blank))


def _tojson(value: Any, indent: int | None = None, ensure_ascii: bool = False) -> str:
    if indent is not None and not 0 <= indent <= 8:
        raise _TooMuch(f"it indents by {indent}")
    return json.dumps(_weighed(value), indent=indent, ensure_ascii=ensure_ascii)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(_text(message))


def _strftime_now(format: str) -> str:
    if len(format) > 200:
        raise _TooMuch("it asks for a very long date")
    return datetime.datetime.now().strftime(format)
