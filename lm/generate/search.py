"""Beam search from prompts: the front of `lm.generate.beam` for what `lm.pretrained.load` gives."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from lm.generate import Options, begins, encode_prompt, ends, limit
from lm.generate.beam import Beams, Text, beam_search
from lm.generate.decode import read_prompts


def search(
    loaded: Any, prompts: Sequence[str | np.ndarray], beams: Beams, tokens: int = 128
) -> list[list[Text]]:
    """Up to `beams.width` texts of at most `tokens` tokens for each prompt, the best first.

    Rows are searched as one batch. Raises UserError as `lm.generate.stream` does.
    """
    rows = [encode_prompt(loaded, prompt) for prompt in prompts]
    most = min(limit(loaded, len(ids), Options(tokens)) for ids in rows)
    filled = read_prompts(loaded.model, loaded.params, rows, most, begins(loaded))
    return beam_search(loaded.model, loaded.params, filled, beams, tokens=most, eos=ends(loaded))
