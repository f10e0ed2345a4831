"""`lm translate` and `lm summarize`: what a model that learned pairs of texts writes for a source.

A decoder-only model of our studies reads the source and a line feed and goes on; an encoder-decoder
reads the source. T5 wants to be told what to do: `--prefix="translate English to German: "`. One
source is one line, and so is its answer, so that a file of sources becomes a file that `lm score`
takes.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from lm.config import UserError, within
from lm.data.pair_readers import one_line
from lm.data.segments import read_segments

TOKENIZER = "tokenizer"  # the folder of a tokenizer of ours beside weights of ours
BETWEEN = "\n"  # ends the source where source and answer are one text
BATCH = 32  # sources that are answered side by side
WINDOW = 16 * BATCH  # sources among which those of like length are put together


def answers(
    loaded: Any, sources: Sequence[str], *, tokens: int = 128, beams: int = 1, prefix: str = ""
) -> list[str]:
    """What a model writes for each source, on one line: greedily, or the best of a beam search;
    for an empty source nothing.

    `loaded` is what `lm.pretrained.load` gives. Raises `UserError` for a model without a tokenizer,
    one that writes no text, and a source that is longer than its context.
    """
    found = [""] * len(sources)
    for first in range(0, len(sources), WINDOW):
        window = range(first, min(first + WINDOW, len(sources)))
        prompts = {i: prompt(loaded, sources[i], prefix) for i in window if sources[i].strip()}
        order = sorted(prompts, key=lambda i: len(prompts[i]))
        for start in range(0, len(order), BATCH):
            some = order[start : start + BATCH]
            texts = _written(loaded, [prompts[i] for i in some], tokens, beams)
            for i, text in zip(some, texts, strict=True):
                found[i] = one_line(text)
    return found


def prompt(loaded: Any, source: str, prefix: str = "") -> Any:
    """The ids that a model reads for a source, int32 [T]."""
    if loaded.tokenizer is None:
        raise UserError("the model has no tokenizer; put its tokenizer.json beside its weights")
    from lm.generate.decode import encodes

    text, own = prefix + one_line(source), loaded.tokenizer
    if not encodes(loaded.config):
        return own.begin(text + BETWEEN)
    return np.append(own.encode(text), [] if own.eos_id is None else [own.eos_id]).astype(np.int32)


def _written(loaded: Any, prompts: Sequence[Any], tokens: int, beams: int) -> list[str]:
    from lm.generate import Options, generate
    from lm.generate.beam import Beams
    from lm.generate.search import search

    if beams == 1:
        return [answer.text for answer in generate(loaded, prompts, None, Options(tokens))]
    best = [found[0].ids for found in search(loaded, prompts, Beams(beams), tokens)]
    return [loaded.tokenizer.decode(ids) for ids in best]


def open_model(path: str) -> Any:
    """What `lm.pretrained.load` gives, with the tokenizer that a study of pairs put beside it."""
    from lm.data import tokenizer
    from lm.generate.weights import open_checkpoint
    from lm.pretrained import load
    from lm.pretrained.tokenizer import from_ours

    if not (Path(path) / TOKENIZER).is_dir():
        return open_checkpoint(path)
    own = from_ours(tokenizer.load(Path(path) / TOKENIZER))
    return dataclasses.replace(load(path), tokenizer=own)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; `{self.prog} --help` shows what there is")


def translate(argv: list[str]) -> int:
    """`lm translate CHECKPOINT [TEXT|-] [--prefix=] [--beams=] [--tokens=] [--json]`."""
    return _main(
        argv,
        "translate",
        "Translates texts with a model that was trained to.",
        'example: lm translate runs/translation/kjv-4x64/model-0 "Thou hast spoken well."',
    )


def summarize(argv: list[str]) -> int:
    """`lm summarize CHECKPOINT [TEXT|-] [--prefix=] [--beams=] [--tokens=] [--json]`."""
    return _main(
        argv,
        "summarize",
        "Summarizes texts with a model that was trained to.",
        "example: lm summarize runs/summarization/docstrings-2x32/model-0 - < texts.txt",
    )


def _main(argv: list[str], verb: str, description: str, example: str) -> int:
    parser = _Parser(
        f"lm {verb}",
        description=f"{description} A text a line goes in, an answer a line comes out.",
        epilog=example,
    )
    parser.add_argument(
        "checkpoint", help="what `lm generate` takes, or the model-N of a study of pairs"
    )
    parser.add_argument("text", nargs="?", default="-", help="or -: the standard input (default)")
    parser.add_argument("--prefix", default="", help='before each text, such as "summarize: "')
    parser.add_argument("--beams", type=int, default=1, help="of a beam search; 1 is greedy")
    parser.add_argument("--tokens", type=int, default=128, help="of an answer, at most")
    parser.add_argument("--json", action="store_true", help="a JSON object a line, for machines")
    args = parser.parse_args(argv)
    within("--beams", args.beams, 1, 64)
    within("--tokens", args.tokens, 1, 1 << 16)
    if args.text == "-" and sys.stdin.isatty():
        raise UserError(f"there is no text; give one, or pipe texts into `lm {verb}`")
    sources = read_segments("-") if args.text == "-" else [one_line(args.text)]
    if not any(sources):
        raise UserError("the text is empty; give at least one word")

    loaded = open_model(args.checkpoint)
    options = {"tokens": args.tokens, "beams": args.beams, "prefix": args.prefix}
    for first in range(0, len(sources), WINDOW):
        some = sources[first : first + WINDOW]
        for source, text in zip(some, answers(loaded, some, **options), strict=True):
            print(json.dumps({"source": source, "text": text}) if args.json else text, flush=True)
    return 0
