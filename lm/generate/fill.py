"""`lm fill CHECKPOINT "This is a [MASK] sentence."`: what a masked model would put there.

    p(w at mask i | the text, with every mask hidden)

Each mask is ranked by itself, the others hidden as well. A tokenizer that has the blank before a
word in the word's own token reads the mask with the blank before it.
"""

import argparse
import json
from dataclasses import dataclass

import numpy as np

from lm.config import UserError, within
from lm.generate.cli import Parser
from lm.pretrained import Loaded, load

MASK = "[MASK]"
LONGEST = 4096  # tokens, where the model's context has no end

EPILOG = """\
A checkpoint is a trained cell of ours (WORKDIR/CELL or WORKDIR/CELL:REPLICA) with objective masked,
or a Hugging Face folder of BERT.

examples:
  lm fill runs/masked/2x64 "This is a [MASK] sentence."
  lm fill bert-base-uncased "Paris is the [MASK] of [MASK]." --top=10 --json
"""


@dataclass(frozen=True)
class Guess:
    """A token for a mask: its text, which begins with a blank where the token does, and id."""

    token: str
    id: int
    probability: float


def fill(loaded: Loaded, text: str, top: int = 5) -> list[list[Guess]]:
    """The `top` likeliest tokens of every mask of a text, likeliest first.

    Raises `UserError` for a text without a mask or too long, and a model that is not masked.
    """
    ids = read(loaded, text)
    (logits,) = loaded.logits(ids[None])
    tokenizer = loaded.tokenizer
    assert tokenizer is not None  # `read` has refused
    found = []
    for place in np.flatnonzero(ids == tokenizer.mask_id):
        row = logits[place].astype(np.float64)
        p = np.exp(row - row.max())
        p /= p.sum()
        best = np.argsort(-p[: tokenizer.vocab_size], kind="stable")[:top]
        found.append([Guess(tokenizer.decode([i]), int(i), float(p[i])) for i in best])
    return found


def read(loaded: Loaded, text: str) -> np.ndarray:
    """The ids of a text with its masks, int32 [T], between the tokens that begin and end one."""
    if getattr(loaded.config, "direction", "causal") != "both":
        raise UserError(
            "this model reads from left to right and has nothing to fill; give one that was trained"
            " with masks, or use `lm generate`"
        )
    tokenizer = loaded.tokenizer
    if tokenizer is None or tokenizer.mask_id is None:
        what = "has no tokenizer" if tokenizer is None else "has a tokenizer without a mask token"
        raise UserError(f"this model {what}; give a checkpoint with one")
    if not text.strip():
        raise UserError(f"the text is empty; give a sentence with {MASK} in it")
    pieces = text.split(MASK)
    if len(pieces) == 1:
        raise UserError(f"the text has no {MASK}; put it where a word is to be found")
    if tokenizer.decode(tokenizer.encode("a b")[-1:]).startswith(" "):
        pieces = [p.removesuffix(" ") for p in pieces[:-1]] + pieces[-1:]
    parts: list[np.ndarray] = [_one(tokenizer.bos_id)]
    for piece in pieces:
        parts += [tokenizer.encode(piece), _one(tokenizer.mask_id)]
    ids = np.concatenate([*parts[:-1], _one(tokenizer.eos_id)])
    longest = getattr(loaded.config, "context", 0) or LONGEST
    if len(ids) > longest:
        raise UserError(
            f"the text has {len(ids):,} tokens, this model reads {longest:,}; shorten it"
        )
    return ids


def _one(token: int | None) -> np.ndarray:
    return np.array([] if token is None else [token], np.int32)


def main(argv: list[str]) -> int:
    """`lm fill CHECKPOINT TEXT [--top=] [--json]`."""
    parser = Parser(
        prog="lm fill",
        description=f"Ranks the tokens that a masked model would put in place of {MASK}.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", help="a trained cell, or a Hugging Face folder")
    parser.add_argument("text", help=f"a text with {MASK}, once or more")
    parser.add_argument("--top", type=int, default=5, help="how many tokens of each (5)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args(argv)
    within("--top", args.top, 1, 1000)
    found = fill(load(args.checkpoint), args.text, args.top)
    if args.json:
        masks = [[vars(guess) for guess in guesses] for guesses in found]
        print(json.dumps({"text": args.text, "masks": masks}))
        return 0
    for i, guesses in enumerate(found):
        if len(found) > 1:
            print(f"{MASK} {i + 1} of {len(found)}")
        for guess in guesses:
            shown = guess.token.strip() if guess.token.strip().isprintable() else repr(guess.token)
            print(f"{guess.probability:8.4f}  {shown or repr(guess.token)}")
    return 0
