"""Our side of `lm bench decode`: prefill and decoding as `lm.generate` does them."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from lm.bench.cases import EvalCase
from lm.bench.decode import DecodeCase
from lm.bench.work import Work, weight
from lm.generate import decode as loop
from lm.generate.sampling import Greedy
from lm.models import Transformer, TransformerConfig, abstract, decode
from lm.models.int8 import quantise


def build(case: DecodeCase, impl: str) -> Work:
    """The work of a case by one of `lm.bench.decode.OURS`."""
    if impl == "xla":
        decode.PLAIN["kind"] = "none"  # the kernel computes no such model
    config = llama(case)
    model, params = Transformer(config), _weights(config, impl)
    prompt = np.random.default_rng(0).integers(0, case.vocab, case.prompt).astype(np.int32)
    rules = loop.Rules(Greedy(), jnp.ones(1), jnp.zeros(0, jnp.int32))
    filled = loop.read_prompts(model, params, [prompt], 1)
    first = np.asarray(filled.logits)[0]
    if not case.tokens:
        return Work(lambda: _fill(model, params, prompt), lambda: {"logits": first})
    held: list[Any] = []

    def call() -> None:
        # A fresh start every so often, or the cache would be full.
        if not held or held[1] < case.tokens:
            filled = loop.read_prompts(model, params, [prompt], 8 * case.tokens)
            state = loop.start(model, params, filled, rules, [prompt], [0])
            held[:] = [jax.block_until_ready(state), 8 * case.tokens]
        state, tokens = loop.advance(model, params, held[0], rules, case.tokens)
        held[:] = [jax.block_until_ready(state), held[1] - case.tokens]

    def results() -> dict[str, Any]:
        """The logits after the prompt's most likely token, by what decodes."""
        token = first.argmax()
        columns = (jnp.full((1, 1), x, jnp.int32) for x in (token, 1, case.prompt))
        logits, _ = loop.prefill(model, params, *columns, filled.cache)
        return {"logits": np.asarray(logits)[0]}

    return Work(call, results)


def _fill(model: Any, params: Any, prompt: np.ndarray) -> None:
    jax.block_until_ready(loop.read_prompts(model, params, [prompt], 1).logits)


def llama(case: DecodeCase | EvalCase) -> TransformerConfig:
    """The model of a case."""
    return TransformerConfig(
        vocab_size=case.vocab,
        layers=case.layers,
        width=case.width,
        heads=case.heads,
        kv_heads=case.kv_heads,
        mlp_size=case.mlp_size,
    )


def drawn(config: TransformerConfig) -> Any:
    """Random parameters, the same in every process."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: jnp.asarray(weight("/".join(key.key for key in path), leaf.shape)),
        nn.unbox(abstract(config)),
    )


def _weights(config: TransformerConfig, impl: str) -> Any:
    params = drawn(config)
    if impl == "onset_int8":
        return quantise(params)
    if impl == "onset_bfloat16":
        return jax.tree.map(lambda a: a.astype(jnp.bfloat16), params)
    return params
