"""What OpenAI's protocol says, as pure functions: bytes in, a record or a refusal out; answers in,
JSON out.

Fields that are not supported are refused unless they say what happens anyway, so that no answer is
other than was asked for. Nothing here knows HTTP, threads or a model.
"""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NoReturn

Endpoint = Literal["completions", "chat"]
MOST_STOPS, LONGEST_STOP = 4, 256
MOST_ROWS = 64  # prompts times n of one request
DEEPEST = 16  # levels of JSON; a request has five
MESSAGES = 1024
LARGEST_SEED = 2**63 - 1
DEFAULT_TOKENS = 16  # of a completion, as OpenAI's

COMMON = {"model", "max_tokens", "temperature", "top_p", "n", "stream", "stop", "seed", "user"}
COMMON |= {"stream_options", "metadata", "store"}
FIELDS: dict[str, set[str]] = {
    "completions": COMMON | {"prompt"},
    "chat": COMMON | {"messages", "max_completion_tokens"},
}
# What may be said as long as it changes nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "echo": (False,),
    "suffix": ("",),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "presence_penalty": (0, 0.0),
    "frequency_penalty": (0, 0.0),
    "logit_bias": ({},),
    "best_of": (1,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "service_tier": ("auto", "default"),
}


class Refusal(Exception):
    """A request that is not carried out: an HTTP status and OpenAI's error object."""

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def body(self) -> dict[str, Any]:
        """OpenAI's form of an error."""
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        about = {"param": self.param, "code": self.code}
        return {"error": {"message": self.message, "type": kinds.get(self.status, kind), **about}}


@dataclasses.dataclass(frozen=True)
class Asked:
    """One request: prompts (texts, or ids), or the messages of a chat, and how to go on.

    `tokens` is None where the request does not say.
    """

    endpoint: Endpoint
    prompts: tuple[str | tuple[int, ...], ...]
    messages: tuple[dict[str, str], ...]
    tokens: int | None
    temperature: float
    top_p: float
    n: int
    stop: tuple[str, ...]
    seed: int | None
    stream: bool
    usage: bool  # a last piece of a stream with the counts


def read(body: bytes, endpoint: Endpoint, model: str) -> Asked:
    """The request of a body; raises Refusal."""
    fields = _json(body)
    for name, value in fields.items():
        _known(name, value, endpoint)
    if (said := fields.get("model")) != model:
        if not isinstance(said, str):
            _wrong("model", said, "the name of a model, a string")
        raise Refusal(404, f"the model {said[:100]!r} is not served; use {model!r}", "model",
                      "model_not_found")  # fmt: skip
    chat = endpoint == "chat"
    tokens = _number(fields, "max_tokens", None, 1, 1 << 30, whole=True)
    if chat:
        tokens = _number(fields, "max_completion_tokens", tokens, 1, 1 << 30, whole=True)
    asked = Asked(
        endpoint,
        prompts=() if chat else _prompts(fields.get("prompt")),
        messages=_messages(fields.get("messages")) if chat else (),
        tokens=tokens if chat or tokens else DEFAULT_TOKENS,
        temperature=_number(fields, "temperature", 1.0, 0, 2),
        top_p=_number(fields, "top_p", 1.0, 1e-6, 1),
        n=_number(fields, "n", 1, 1, MOST_ROWS, whole=True),
        stop=_stops(fields.get("stop")),
        seed=_number(fields, "seed", None, -LARGEST_SEED, LARGEST_SEED, whole=True),
        stream=_flag(fields, "stream"),
        usage=_usage(fields),
    )
    if asked.n * max(1, len(asked.prompts)) > MOST_ROWS:
        raise Refusal(
            400, f"prompts times n is more than {MOST_ROWS}; ask in several requests", "n"
        )
    return asked


def _json(body: bytes) -> dict[str, Any]:
    try:
        found = json.loads(body.decode("utf-8"), parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        raise Refusal(400, f"the body is not UTF-8: {error.reason} at {error.start}") from error
    except (ValueError, RecursionError) as error:
        what = "nested too deeply" if isinstance(error, RecursionError) else str(error)[:200]
        raise Refusal(400, f"the body is not JSON: {what}") from error
    if not isinstance(found, dict):
        raise Refusal(400, f"the body is {_kind(found)}; it must be an object")
    _shallow(found)
    return found


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def _shallow(found: Any) -> None:
    """Refuses depth, and halves of characters, which no text can be made of."""
    level = [found]
    for _ in range(DEEPEST):
        below: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                below += [*value, *value.values()]
            elif isinstance(value, list):
                below += value
            elif isinstance(value, str) and not _whole(value):
                raise Refusal(400, "a string holds half of a surrogate pair; send whole characters")
        level = below
    if level:
        raise Refusal(400, f"the body is nested more than {DEEPEST} deep")


def _whole(text: str) -> bool:
    try:
        text.encode()
        return True
    except UnicodeEncodeError:
        return False


def _known(name: str, value: Any, endpoint: Endpoint) -> None:
    if name in FIELDS[endpoint] or value is None:
        return
    if name not in NEUTRAL:
        raise Refusal(400, f"{name[:100]!r} is not a field of this request", name[:100])
    if not any(type(value) is type(may) and value == may for may in NEUTRAL[name]):
        may = " or ".join(json.dumps(v) for v in NEUTRAL[name])
        raise Refusal(400, f"{name} is not supported here; leave it out, or say {may}", name)


def _prompts(value: Any) -> tuple[str | tuple[int, ...], ...]:
    """A text, a list of texts, a list of ids, or a list of lists of ids."""
    if isinstance(value, str):
        value = [value]
    if isinstance(value, list) and value and all(type(v) is int for v in value):
        value = [value]
    wanted = "a string, a list of strings, a list of token ids, or a list of such lists"
    if not isinstance(value, list) or not value:
        _wrong("prompt", value, wanted)
    if len(value) > MOST_ROWS:
        raise Refusal(400, f"prompt has {len(value)} entries; at most {MOST_ROWS} are taken",
                      "prompt")  # fmt: skip
    if all(isinstance(v, str) for v in value):
        prompts = value
    elif all(isinstance(v, list) and all(type(i) is int for i in v) for v in value):
        prompts = [tuple(v) for v in value]
    else:
        _wrong("prompt", value, wanted)
    if not all(prompts):
        raise Refusal(400, "a prompt is empty; send at least one token", "prompt")
    return tuple(prompts)


def _messages(value: Any) -> tuple[dict[str, str], ...]:
    if not isinstance(value, list) or not value:
        _wrong("messages", value, "a list of at least one message")
    if len(value) > MESSAGES:
        raise Refusal(400, f"there are {len(value)} messages; at most {MESSAGES} are taken",
                      "messages")  # fmt: skip
    found = []
    for i, message in enumerate(value):
        where = f"messages[{i}]"
        if not isinstance(message, dict):
            _wrong(where, message, "an object with role and content")
        role = message.get("role")
        if role not in ("system", "developer", "user", "assistant"):
            _wrong(f"{where}.role", role, "system, user or assistant")
        for name in message:
            if name not in ("role", "content") and message[name] is not None:
                raise Refusal(400, f"{where}: {name[:100]!r} is not supported here", where)
        content = _content(message.get("content"), f"{where}.content")
        found.append({"role": "system" if role == "developer" else role, "content": content})
    return tuple(found)


def _content(value: Any, where: str) -> str:
    """A string, or a list of parts that are text."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        _wrong(where, value, "a string, or a list of parts of text")
    texts = []
    for part in value:
        if not isinstance(part, dict) or part.get("type") != "text":
            _wrong(where, part, 'parts such as {"type": "text", "text": "..."}')
        if not isinstance(part.get("text"), str):
            _wrong(where, part.get("text"), "parts with a text that is a string")
        texts.append(part["text"])
    return "".join(texts)


def _stops(value: Any) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else [] if value is None else value
    if not isinstance(stops, list) or not all(isinstance(s, str) for s in stops):
        _wrong("stop", value, "a string or a list of strings")
    if len(stops) > MOST_STOPS:
        raise Refusal(400, f"stop has {len(stops)} strings; at most {MOST_STOPS} are taken", "stop")
    if not all(1 <= len(s) <= LONGEST_STOP for s in stops):
        raise Refusal(400, f"a stop string must have 1 to {LONGEST_STOP} characters", "stop")
    return tuple(stops)


def _number(
    fields: Mapping[str, Any], name: str, default: Any, low: float, high: float, whole: bool = False
) -> Any:
    value = fields.get(name)
    if value is None:
        return default
    if type(value) not in ((int,) if whole else (int, float)):
        _wrong(name, value, "a whole number" if whole else "a number")
    if not low <= value <= high:
        raise Refusal(400, f"{name} is {_show(value)}; it must be between {low} and {high}", name)
    return value


def _flag(fields: Mapping[str, Any], name: str) -> bool:
    value = fields.get(name)
    if not isinstance(value, bool | None):
        _wrong(name, value, "true or false")
    return bool(value)


def _usage(fields: Mapping[str, Any]) -> bool:
    value = fields.get("stream_options")
    if value is None:
        return False
    if not isinstance(value, dict) or set(value) - {"include_usage", "include_obfuscation"}:
        _wrong("stream_options", value, 'an object such as {"include_usage": true}')
    return _flag(value, "include_usage")


def _wrong(name: str, value: Any, wanted: str) -> NoReturn:
    raise Refusal(400, f"{name} is {_kind(value)}; it must be {wanted}", name.split("[")[0])


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a Boolean"}
    return "missing or null" if value is None else names.get(type(value), "a number")


def _show(value: float) -> str:
    """Numbers of a thousand digits are not repeated."""
    if isinstance(value, int) and abs(value) > 10**20:
        return f"about {'-' if value < 0 else ''}10^{round(math.log10(abs(value)))}"
    return str(value)


@dataclasses.dataclass(frozen=True)
class Counts:
    """Tokens of all prompts, and of all answers."""

    prompt: int
    answer: int

    def body(self) -> dict[str, int]:
        """OpenAI's `usage`."""
        total = self.prompt + self.answer
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.answer,
            "total_tokens": total,
        }


@dataclasses.dataclass(frozen=True)
class Head:
    """What all objects of one answer have in common."""

    endpoint: Endpoint
    id: str
    created: int
    model: str

    def whole(self, texts: Sequence[tuple[str, str]], counts: Counts) -> dict[str, Any]:
        """The object of an answer that is not streamed; `texts` with why each ended."""
        choices = []
        for i, (text, end) in enumerate(texts):
            said: dict[str, Any] = {"text": text}
            if self.endpoint == "chat":
                said = {"message": {"role": "assistant", "content": text, "refusal": None}}
            choices.append({"index": i, **said, "logprobs": None, "finish_reason": end})
        return self._object("") | {"choices": choices, "usage": counts.body()}

    def piece(self, index: int, text: str, end: str, first: bool) -> dict[str, Any]:
        """An object of a stream: more text of one choice."""
        said: dict[str, Any] = {"text": text}
        if self.endpoint == "chat":
            said = {"delta": ({"role": "assistant"} if first else {}) | {"content": text}}
        choice = {"index": index, **said, "logprobs": None, "finish_reason": end or None}
        return self._object(".chunk") | {"choices": [choice]}

    def last(self, counts: Counts) -> dict[str, Any]:
        """The object of a stream that has the counts."""
        return self._object(".chunk") | {"choices": [], "usage": counts.body()}

    def _object(self, suffix: str) -> dict[str, Any]:
        kind = f"chat.completion{suffix}" if self.endpoint == "chat" else "text_completion"
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}
