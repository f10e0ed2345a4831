"""Our models in EleutherAI's lm-evaluation-harness, as its model `onset`.

`lm eval CHECKPOINT --harness=TASKS` runs its tasks on any checkpoint that `lm.pretrained` loads.
Its own command line, with all its options, is

    python -m lm.eval.harness run --model onset --model_args path=CHECKPOINT --tasks TASKS

since lm-eval 0.4.13 finds the models that it ships and no others: it reads no entry points, and
`--include_path` is for tasks.

Requests are scored by `lm.eval.continuations`: the choices of an item, and a few-shot prompt that
items share, are computed once. A context above `max_length` tokens loses its left, as in lm-eval's
own models, and how many did is said.
"""

import itertools
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs

from lm.config import UserError, within
from lm.eval.continuations import LENGTH, Request, refuse, score, windows
from lm.generate import Options, choose_sampler, context, generate
from lm.pretrained import Loaded, load

ROWS = 16  # answers that are generated at once
GENERATED = 256  # tokens of an answer where the task does not say; as in lm-eval's own models


@register_model("onset")
class OnsetLM(TemplateLM):
    """A checkpoint as lm-eval sees it: `path` is what `lm.pretrained.load` takes, or what it gave.

    lm-eval's command line gives batch sizes and a device to every model; ours have no use for them.
    """

    def __init__(
        self,
        path: Any,
        max_length: int | None = None,
        batch_size: Any = None,
        max_batch_size: Any = None,
        device: Any = None,
    ) -> None:
        super().__init__()
        named = isinstance(path, str | Path)
        self.loaded: Loaded = load(path) if named else path
        self.name = str(path) if named else "onset"
        refuse(self.loaded, self.name)
        assert self.loaded.tokenizer
        self.reader = self.loaded.tokenizer
        longest = context(self.loaded)
        self.max_length = longest or LENGTH if max_length is None else max_length
        within("max_length", self.max_length, 1, longest or 1 << 20)
        self.truncated = 0
        self._chat = False  # whether prompts are rendered chats, in which control tokens are read

    @property
    def tokenizer_name(self) -> str:
        return self.name.replace("/", "__")

    @property
    def eot_token_id(self) -> int:
        """What ends a text, or begins one where nothing does."""
        return self._one_of(self.reader.eos_id, self.reader.bos_id)

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has no context."""
        return self._one_of(self.reader.bos_id, self.reader.eos_id)

    def _one_of(self, first: int | None, second: int | None) -> int:
        found = second if first is None else first
        assert found is not None  # `refuse` has asked
        return found

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Ids, after the token that begins a text where the model was trained with one."""
        encode = self.reader.encode if add_special_tokens is False else self.reader.begin
        return encode(string, special=self._chat).tolist()

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """As lm-eval has it, with its bar on a terminal only."""
        return super().loglikelihood(requests, disable_tqdm or not sys.stderr.isatty())

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        for (_, continuation), _, ids in requests:
            if not ids:
                raise UserError(
                    f"the continuation {continuation!r} has no tokens; every choice needs some text"
                )
        asked = [Request(np.array(c, np.int32), np.array(i, np.int32)) for _, c, i in requests]
        answers = [(found.total, bool(found.greedy.all())) for found in self._score(asked)]
        for (texts, _, _), answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood", texts, answer)
        return answers

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """log p of whole texts, in windows of `max_length` tokens that overlap by one."""
        asked: list[Request] = []
        owner: list[int] = []
        for number, request in enumerate(requests):
            tokens = self.reader.encode(request.args[0])
            cut = list(windows(tokens, self.prefix_token_id, self.max_length))
            asked += cut
            owner += [number] * len(cut)
        totals = [0.0] * len(requests)
        for number, found in zip(owner, self._score(asked), strict=True):
            totals[number] += found.total
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """What the model goes on with, up to a stop string, the end of a text or the task's number
        of tokens.
        """
        kwargs = [normalize_gen_kwargs(r.args[1], GENERATED) for r in requests]
        prompts = [self._prompt(r.args[0], k) for r, k in zip(requests, kwargs, strict=True)]
        samplers = [_sampler(k) for k in kwargs]
        texts = [""] * len(requests)
        order = sorted(range(len(requests)), key=lambda i: (repr(samplers[i]), -len(prompts[i])))
        for _, same in itertools.groupby(order, key=lambda i: repr(samplers[i])):
            for batch in itertools.batched(same, ROWS):
                rows, options = [prompts[i] for i in batch], [_options(kwargs[i]) for i in batch]
                answers = generate(self.loaded, rows, samplers[batch[0]], options)
                for i, answer in zip(batch, answers, strict=True):
                    texts[i] = answer.text
        for request, text in zip(requests, texts, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts

    def _prompt(self, context: str, kwargs: Mapping[str, Any]) -> np.ndarray:
        """The ids of a context, as many from its right as leave room for the answer."""
        room = self.max_length - kwargs["max_gen_toks"]
        if room < 1:
            raise UserError(
                f"an answer of {kwargs['max_gen_toks']} tokens leaves no room for the question in"
                f" {self.max_length}; lower the task's max_gen_toks"
            )
        ids = self.tok_encode(context) or [self.prefix_token_id]
        self.truncated += len(ids) > room
        return np.array(ids[-room:], np.int32)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The chat as the model's own template writes it; raises UserError without one."""
        self._chat = True
        return self.reader.chat(chat_history, add_generation_prompt)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The model's template, which lm-eval keeps with the results."""
        return self.reader.template if chat_template else None

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval writes beside the results."""
        return {"path": self.name, "max_length": self.max_length, "truncated": self.truncated}

    def _score(self, requests: Sequence[Request]) -> list[Any]:
        found, short = score(self.loaded.model, self.loaded.params, requests, self.max_length)
        self.truncated += short
        if short:
            print(
                f"{short} of {len(requests)} requests were above {self.max_length} tokens and lost"
                " the left of their context",
                file=sys.stderr,
            )
        return found


def _sampler(kwargs: Mapping[str, Any]) -> Any:
    """The sampler that a task's `generation_kwargs` ask for; what it does not know is refused."""
    known = {"do_sample", "temperature", "top_k", "top_p", "min_p", "until", "max_gen_toks", "seed"}
    if unknown := sorted(set(kwargs) - known):
        raise UserError(
            f"generation_kwargs has {unknown[0]!r}, which is not known; use"
            f" {', '.join(sorted(known))}"
        )
    if not kwargs["do_sample"]:
        return choose_sampler()
    names = ("temperature", "top_k", "top_p", "min_p")
    return choose_sampler(**{name: kwargs[name] for name in names if kwargs.get(name) is not None})


def _options(kwargs: Mapping[str, Any]) -> Options:
    stop = tuple(filter(None, kwargs["until"]))
    return Options(kwargs["max_gen_toks"], stop, int(kwargs.get("seed") or 0))


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
