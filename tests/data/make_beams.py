"""Writes beams.json beside this file: what transformers finds by beam search with two parity sets.

Needs PyTorch and transformers, which the tests do not: python tests/data/make_beams.py PARITY, the
folder with t5_v11_gated and llama_gqa. Ends are tokens that the models like, so that texts end.
"""

import json
import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file

TOKENS = 10
ENDS = {"t5_v11_gated": (205, 5), "llama_gqa": (200, 121)}
# Beams, length penalty, early stopping as transformers has it, and which of the ends.
SETTINGS = (
    *((3, 1.0, False, 1), (4, 0.0, False, 0), (4, 2.0, False, 1), (4, 1.0, True, 0)),
    *((3, 1.0, "never", 1), (4, -1.0, False, 0), (4, 0.6, "never", 0)),
)


def main(parity: Path) -> None:
    """Texts are what is written, up to their end, of all rows, the best first."""
    kinds = transformers.T5ForConditionalGeneration, transformers.LlamaForCausalLM
    found = []
    for (name, ends), kind in zip(ENDS.items(), kinds, strict=True):
        model = kind.from_pretrained(parity / name).eval()
        inputs = load_file(parity / name / "reference.safetensors")
        rows = slice(None) if name.startswith("t5") else slice(1)  # the second is padded right
        ids, mask = inputs["input_ids"][rows], inputs["attention_mask"][rows]
        written = 1 if name.startswith("t5") else ids.shape[1]
        for beams, penalty, early, end in SETTINGS:
            with torch.no_grad():
                result = model.generate(
                    input_ids=ids,
                    attention_mask=mask,
                    max_new_tokens=TOKENS,
                    num_beams=beams,
                    num_return_sequences=beams,
                    length_penalty=penalty,
                    early_stopping=early,
                    eos_token_id=ends[end],
                    pad_token_id=0,
                    do_sample=False,
                    output_scores=True,
                    return_dict_in_generate=True,
                )
            texts = [text[written:] for text in result.sequences.tolist()]
            texts = [t[: t.index(ends[end]) + 1] if ends[end] in t else t for t in texts]
            about = {"model": name, "beams": beams, "penalty": penalty, "early": early}
            scores = [round(float(score), 5) for score in result.sequences_scores]
            found.append(about | {"end": ends[end], "texts": texts, "scores": scores})
    whole = {"transformers": transformers.__version__, "tokens": TOKENS, "searches": found}
    text = json.dumps(whole).replace('{"model"', '\n{"model"')
    Path(__file__).with_name("beams.json").write_text(text + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
