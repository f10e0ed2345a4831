"""`lm generate CHECKPOINT PROMPT`: goes on with a text."""

import argparse
import json
import sys
from typing import Any, NoReturn

from lm.config import UserError, within
from lm.generate import Options, choose_sampler, generate, stream
from lm.generate.beam import Beams
from lm.generate.search import search
from lm.generate.weights import open_checkpoint

EPILOG = """\
A checkpoint is a Hugging Face folder, a GGUF file, or a trained cell of ours (WORKDIR/CELL or
WORKDIR/CELL:REPLICA). The prompt `-` is read from stdin, without its last line break. Nothing is
printed of the prompt.

examples:
  lm generate SmolLM2-135M-Instruct.Q4_1.gguf "Once upon a time" --tokens=200 --stream
  lm generate runs/desk/2x32 "the" --temperature=0.8 --top_p=0.95 --n=3 --seed=7
  echo "Hello" | lm generate model - --beams=4 --json
"""


class Parser(argparse.ArgumentParser):
    """Its mistakes are sentences like all others."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; `{self.prog} --help` shows what there is")


def add_sampling(parser: argparse.ArgumentParser, temperature: float, tokens: int) -> None:
    """The arguments that `generate` and `chat` share."""
    add = parser.add_argument
    add("checkpoint", help="a Hugging Face folder, a GGUF file or a trained cell")
    add("--tokens", type=int, default=tokens, help=f"at most so many of an answer ({tokens})")
    add("--temperature", type=float, default=temperature, help=f"0 is greedy ({temperature:g})")
    add("--top_k", type=int, default=0, help="of the k likeliest tokens")
    add("--top_p", type=float, default=1.0, help="of the fewest that have this probability")
    add("--min_p", type=float, default=0.0, help="of those with this share of the likeliest's")
    add("--repetition_penalty", type=float, default=1.0, help="above 1: less of what was there")
    add("--seed", type=int, default=0, help="the same seed gives the same text (0)")
    add("--weights", default="float32", help="float32, bfloat16 or int8, for decoding")


def main(argv: list[str]) -> int:
    """`lm generate CHECKPOINT PROMPT [--tokens=] [--temperature=] [--beams=] [--json] ...`."""
    args = _parse(argv)
    prompt = _prompt(args.prompt)
    sampler = choose_sampler(args.temperature, args.top_k, args.top_p, args.min_p)
    options = [
        Options(args.tokens, tuple(args.stop), args.seed + i, args.repetition_penalty)
        for i in range(args.n)
    ]
    loaded = open_checkpoint(args.checkpoint, args.weights)
    if args.beams:
        return _show_beams(loaded, prompt, args)
    if args.stream:
        for piece in stream(loaded, [prompt], sampler, options):
            print(piece.text, end="", flush=True)
        print()
        return 0
    answers = generate(loaded, [prompt] * args.n, sampler, options)
    if args.json:
        rows = [
            {"text": a.text, "ids": list(a.ids), "end": a.end, "prompt_tokens": a.prompt_tokens}
            for a in answers
        ]
        print(json.dumps([row | {"seed": o.seed} for row, o in zip(rows, options, strict=True)]))
        return 0
    for answer, option in zip(answers, options, strict=True):
        if args.n > 1:
            print(f"--- seed {option.seed}")
        print(answer.text)
    return 0


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser(
        "lm generate",
        description="Goes on with a text.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_sampling(parser, temperature=0.0, tokens=128)
    add = parser.add_argument
    add("prompt", help="the text, or - for stdin")
    add("--stop", action="append", default=[], metavar="TEXT", help="ends an answer; repeatable")
    add("--n", type=int, default=1, help="so many answers, of seeds SEED, SEED + 1, ...")
    add("--beams", type=int, default=0, help="beam search of this width instead of sampling")
    add("--length_penalty", type=float, default=1.0, help="of beams: score = log p / tokens^this")
    add("--json", action="store_true", help="a list of answers, for machines")
    add("--stream", action="store_true", help="shows the text as it comes")
    args = parser.parse_args(argv)
    within("--n", args.n, 1, 64)
    if args.stream and (args.n > 1 or args.json or args.beams):
        raise UserError("--stream shows one text as it comes; leave out --n, --json and --beams")
    if args.beams and (args.temperature or args.n > 1 or args.stop):
        raise UserError("--beams finds one text; leave out --temperature, --n and --stop")
    return args


def _prompt(text: str) -> str:
    """The prompt, or what stdin says."""
    if text != "-":
        return text
    data = sys.stdin.buffer.read()
    try:
        return data.decode().removesuffix("\n")
    except UnicodeDecodeError as error:
        raise UserError(
            f"the prompt on stdin is not UTF-8 at byte {error.start}; convert it, with iconv say"
        ) from error


def _show_beams(loaded: Any, prompt: str, args: argparse.Namespace) -> int:
    beams = Beams(args.beams, args.length_penalty)
    texts = search(loaded, [prompt], beams, args.tokens)[0]
    if args.json:
        rows = [{"text": loaded.tokenizer.decode(t.ids), **t._asdict()} for t in texts]
        print(json.dumps(rows))
        return 0
    print(loaded.tokenizer.decode(texts[0].ids))
    return 0
