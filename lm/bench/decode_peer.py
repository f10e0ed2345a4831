"""The peer of `lm bench decode`: transformers' Llama in eager PyTorch, with its cache.

Run by path with any Python that has the two, so it imports nothing of ours; it speaks the protocol
of `lm.bench.worker` and draws the weights of `lm.bench.work.weight`. The loop is a plain greedy
one, which is a little faster than `generate`.
"""

import json
import os
import sys
import time
import zlib
from typing import Any

import numpy as np


def weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """As `lm.bench.work.weight`."""
    if "norm" in name:
        return np.ones(shape, np.float32)
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    return rng.standard_normal(shape, np.float32) * np.float32(shape[-1] ** -0.5)


def load(case: dict[str, Any]) -> Any:
    """The model of a case, whose other settings may be anything, with our weights in its layout."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    L, D, N, K, F, V = (
        case[k] for k in ("layers", "width", "heads", "kv_heads", "mlp_size", "vocab")
    )
    H = D // N
    config = LlamaConfig(
        vocab_size=V,
        hidden_size=D,
        intermediate_size=F,
        num_hidden_layers=L,
        num_attention_heads=N,
        num_key_value_heads=K,
        head_dim=H,
        rms_norm_eps=1e-6,
        rope_theta=10_000.0,
        tie_word_embeddings=True,
        max_position_embeddings=4096,
    )
    model = LlamaForCausalLM(config).eval()
    packed = weight("layers/qkv", (L, D, (N + 2 * K) * H)).reshape(L, D, K, N // K + 2, H)
    stacked = {
        "self_attn.q_proj": packed[:, :, :, : N // K].reshape(L, D, N * H),
        "self_attn.k_proj": packed[:, :, :, -2].reshape(L, D, K * H),
        "self_attn.v_proj": packed[:, :, :, -1].reshape(L, D, K * H),
        "self_attn.o_proj": weight("layers/out", (L, N * H, D)),
        "mlp.gate_proj": weight("layers/gate", (L, D, F)),
        "mlp.up_proj": weight("layers/up", (L, D, F)),
        "mlp.down_proj": weight("layers/down", (L, F, D)),
    }
    state = {"model.embed_tokens.weight": torch.from_numpy(weight("embed", (V, D)))}
    for name, values in stacked.items():
        for layer in range(L):
            turned = torch.from_numpy(values[layer].T.copy())
            state[f"model.layers.{layer}.{name}.weight"] = turned
    wrong = model.load_state_dict(state, strict=False).unexpected_keys
    assert not wrong, wrong
    model.tie_weights()
    return model


class Peer:
    """A case made ready."""

    def __init__(self, case: dict[str, int]) -> None:
        import torch
        from transformers import DynamicCache

        self.case, self.model, self.cache = case, load(case), DynamicCache
        ids = np.random.default_rng(0).integers(0, case["vocab"], case["prompt"])
        self.prompt = torch.from_numpy(ids)[None]
        self.held: Any = None
        self.token: Any = None

    def forward(self, ids: Any, cache: Any) -> Any:
        """The logits of the last token."""
        return self.model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[
            :, -1
        ]

    def call(self) -> Any:
        """One repetition."""
        if not self.case["tokens"]:
            return self.forward(self.prompt, self.cache())
        if self.held is None or self.held.get_seq_length() > 8 * self.case["tokens"]:
            self.held = self.cache()
            self.token = self.forward(self.prompt, self.held).argmax(-1, keepdim=True)
        for _ in range(self.case["tokens"]):
            self.token = self.forward(self.token, self.held).argmax(-1, keepdim=True)
        return self.token

    def results(self) -> dict[str, Any]:
        """The logits after the prompt, or after its most likely token."""
        cache = self.cache()
        y = self.forward(self.prompt, cache)
        if self.case["tokens"]:
            y = self.forward(y.argmax(-1, keepdim=True), cache)
        return {"logits": y[0].numpy()}


def main(threads: int) -> None:
    """Answers until stdin ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import torch

    torch.set_num_threads(threads)
    peer = None
    with torch.inference_mode():
        for line in sys.stdin:
            message = json.loads(line)
            if message["do"] == "prepare":
                peer = Peer(message["spec"]["case"])
                np.savez(message["results"], allow_pickle=False, **peer.results())
                peer.call()
                begin = time.perf_counter()
                peer.call()
                seconds = time.perf_counter() - begin
                answer = {"seconds": seconds, "steps": 1, "growth": None, "temporaries": None}
                answer |= {"compile_s": None, "threads": torch.get_num_threads()}
            else:
                begin = time.perf_counter()
                assert peer, "nothing is prepared"
                for _ in range(message["loops"]):
                    peer.call()
                answer = {"begin": begin, "end": time.perf_counter()}
            print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main(int(sys.argv[-1]))
