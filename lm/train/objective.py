"""What a cell minimises, and how held-out rows are shown to a model that is to restore them.

The ids that hide something lie above the tokenizer's: the last of the model's vocabulary is [MASK],
or the first sentinel, and those below it are the next ones.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import numpy as np

from lm import objectives
from lm.config import UserError
from lm.corruption import Masking, Spans, cut_spans, mask_one, mask_tokens
from lm.data.loader import Batch
from lm.data.tokenizer import BOS, EOS, PAD, UNK, Tokenizer
from lm.data.words import word_places, word_table

Objective = Literal["causal", "masked", "span", "seq2seq"]
TEXT, PAIRS = "text", "pairs"  # sources of a mixture that are no abilities
View = Callable[[Batch], Batch]


def check_objective(cell: Any) -> None:
    """Refuses a model or a mixture that the objective of a cell or point cannot have, and settings
    of another objective.
    """
    model, data, train = cell.model, cell.data, cell.train
    name, kind = train.objective, model.kind
    both = getattr(model, "direction", "causal") == "both"
    if (kind == "encoder_decoder") != (name in ("span", "seq2seq")) or both != (name == "masked"):
        found = f"{kind} of both directions" if both else kind
        raise UserError(
            f"objective {name!r} does not train a model of kind {found}; causal takes a transformer"
            " or an lstm, masked a transformer with direction 'both', span and seq2seq an"
            " encoder_decoder"
        )
    sources = {m.task for m in data.mixture.values()}
    only = {"masked": {TEXT}, "span": {TEXT}, "seq2seq": {PAIRS}}.get(name)
    if sources != only if only else PAIRS in sources:
        raise UserError(
            f"objective {name!r} cannot learn from a mixture of {', '.join(sorted(sources))}; give"
            f" it {min(only) if only else 'text and abilities'} alone"
        )
    if (data.pairs is None) == (PAIRS in sources):
        raise UserError("data.pairs and the mixture's task 'pairs' go together; give both or none")
    if kind == "encoder_decoder" and not 0 < model.source_length < data.length - 1:
        raise UserError(
            f"model.source_length {model.source_length} leaves no target in rows of {data.length};"
            " use less, or raise data.length"
        )
    _check_settings(train)
    _check_shared_rows(model, train)
    if name == "masked":
        masking(cell)
    if name == "span":
        spans(cell)


def _check_settings(train: Any) -> None:
    """Refuses what would be set and not read."""
    for setting, users in (
        ("mask_rate", ("masked", "span")),
        ("mask_unit", ("masked",)),
        ("span_length", ("span",)),
        ("label_smoothing", ("seq2seq",)),
    ):
        default = train.__dataclass_fields__[setting].default
        if train.objective not in users and getattr(train, setting) != default:
            raise UserError(
                f"{setting} is {getattr(train, setting)!r}, but objective {train.objective!r} reads"
                f" none; leave it out, or choose objective {' or '.join(users)}"
            )


def _check_shared_rows(model: Any, train: Any) -> None:
    """Refuses devices that share each row where the model cannot be cut that way (the ring of
    `lm.attention`).
    """
    if train.strategy != "sequence" and train.sequence_devices < 2:
        return
    what = ""
    if model.kind != "transformer":
        what = f"a model of kind {model.kind!r}"
    elif model.direction == "both":
        what = "a model of both directions"
    elif model.window or model.positions == "relative":
        what = f"a model with window {model.window} and {model.positions} positions"
    if what:
        raise UserError(
            f"devices cannot share the rows of {what}, only of a causal transformer without a"
            " window and relative positions; choose another strategy, and sequence_devices 0"
        )


def masking(cell: Any) -> Masking:
    """The masks of a cell; raises UserError where its vocabulary has no room for [MASK]."""
    stop, train = cell.data.tokenizer.vocab_size, cell.train
    _check_room(cell, 1)
    return Masking(cell.model.vocab_size - 1, UNK + 1, stop, train.mask_rate, train.mask_unit)


def spans(cell: Any) -> Spans:
    """The spans of a cell; raises UserError where its rows or its vocabulary have no room."""
    source = cell.model.source_length
    rest, last = cell.data.length - source, cell.model.vocab_size - 1
    rate, length = cell.train.mask_rate, cell.train.span_length
    found = Spans(source, rest, last, PAD, BOS, EOS, rate, length)
    _check_room(cell, found.counts[2])
    return found


def _check_room(cell: Any, ids: int) -> None:
    have, need = cell.model.vocab_size, cell.data.tokenizer.vocab_size + ids
    if have < need:
        raise UserError(
            f"objective {cell.train.objective!r} needs {ids} ids above the tokenizer's: give"
            f" model.vocab_size {need} or more, it is {have}"
        )


def held_out(cell: Any) -> str:
    """The source whose held-out rows are measured, beside abilities."""
    return PAIRS if cell.train.objective == "seq2seq" else TEXT


def make_objective(cell: Any) -> Callable:
    """The objective of a cell, but for the fused kernel's."""
    match cell.train.objective:
        case "masked":
            return functools.partial(objectives.masked, masking=masking(cell))
        case "span":
            return functools.partial(objectives.span, spans=spans(cell))
        case "seq2seq":
            return functools.partial(objectives.seq2seq, smoothing=cell.train.label_smoothing)
        case _:
            return objectives.causal


def draws(cell: Any) -> bool:
    """Whether a step needs a key; it comes from the replica's dropout seed."""
    return cell.model.dropout > 0 or cell.train.objective in ("masked", "span")


def words(cell: Any, tokenizer: Tokenizer) -> np.ndarray | None:
    """The table of `lm.data.words` for a cell whose masks fall on words."""
    return word_table(tokenizer) if cell.train.mask_unit == "words" else None


def held_out_view(cell: Any, tokenizer: Tokenizer) -> View | None:
    """How a cell's held-out rows of text are shown, always alike: None is as they are.

    Masked rows come twice: with the masks of training, and with one mask in each.
    """
    key = jax.random.key(cell.replicas[0].eval)
    if cell.train.objective == "span":
        cut = jax.jit(functools.partial(cut_spans, spans=spans(cell)))
        return lambda rows: _numpy(cut(rows, key))
    if cell.train.objective != "masked":
        return None
    masks, table = masking(cell), words(cell, tokenizer)

    @jax.jit
    def both(rows: Batch) -> tuple[Batch, Batch]:
        many, one = jax.random.split(key)
        return mask_tokens(rows, many, masks), mask_one(rows, one, masks)

    def view(rows: Batch) -> Batch:
        if table is not None:
            rows = rows._replace(targets=word_places(rows.tokens, rows.segments, table))
        parts = map(_numpy, both(rows))
        return Batch(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))

    return view


def _numpy(rows: Batch) -> Batch:
    return Batch(*(np.asarray(array) for array in rows))
