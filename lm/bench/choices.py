"""Scoring of four-way items by our continuations and by lm-eval's own model for PyTorch, `HFLM`.

Both have one Llama of the shape of SmolLM2-135M with the same random weights, and the same ids in
place of texts: no tokenizer takes part, and no file. Each call scores the next part of the items,
all parts about equally long; results are the log-likelihoods of the first.
"""

import dataclasses
import itertools
from typing import Any

import numpy as np

from lm.bench.cases import EvalCase
from lm.bench.work import Work

BATCH = 64  # of HFLM: a little faster than 16, and 4 takes 2.6 times as long as that
LIMIT = 2048


def items(case: EvalCase, part: int) -> list[tuple[list[int], list[list[int]]]]:
    """Contexts and their four continuations, as ids; part 0, 1, ... of them all."""
    rng = np.random.default_rng(part)
    # The same lengths in every part, so that all take as long, and compile the same shapes.
    spread = np.linspace(0.6, 1.4, case.each)
    contexts = rng.permutation(np.rint(spread * case.context).astype(int))
    lengths = rng.permutation(np.arange(4 * case.each) % 6 + 3).reshape(-1, 4)

    def ids(n: int) -> list[int]:
        return rng.integers(0, case.vocab, n).tolist()

    return [(ids(n), [ids(m) for m in row]) for n, row in zip(contexts, lengths, strict=True)]


def ours(case: EvalCase) -> Work:
    """By `lm.eval.continuations`."""
    from lm.bench.decode_work import drawn, llama
    from lm.eval.continuations import Request, score
    from lm.models import build

    config = llama(case)
    built, params = build(config), drawn(config)

    def run(part: int) -> np.ndarray:
        asked = [
            Request(np.array(context, np.int32), np.array(continuation, np.int32))
            for context, choices in items(case, part)
            for continuation in choices
        ]
        return np.array([found.total for found in score(built, params, asked, LIMIT)[0]])

    return _work(case, run)


def hflm(case: EvalCase) -> Work:
    """By `lm_eval.models.huggingface.HFLM`, in float32."""
    import torch
    from lm_eval.models.huggingface import HFLM

    from lm.bench.decode_peer import load

    lm = HFLM(
        pretrained=load(dataclasses.asdict(case)).to(torch.float32),
        tokenizer=_tokenizer(case),
        batch_size=BATCH,
        max_length=LIMIT,
        device="cpu",
    )

    def run(part: int) -> np.ndarray:
        asked = [
            (("", ""), context, continuation)
            for context, choices in items(case, part)
            for continuation in choices
        ]
        return np.array([total for total, _ in lm._loglikelihood_tokens(asked, disable_tqdm=True)])

    return _work(case, run)


def _work(case: EvalCase, run: Any) -> Work:
    parts = itertools.cycle(range(case.parts))

    return Work(lambda: run(next(parts)), lambda: {"log_likelihood": run(0)})


def _tokenizer(case: EvalCase) -> Any:
    """One that HFLM accepts, and nobody asks."""
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    words = tokenizers.models.WordLevel({"<eos>": 0, "<unk>": 1}, unk_token="<unk>")
    backend = tokenizers.Tokenizer(words)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", unk_token="<unk>")
