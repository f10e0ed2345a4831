"""The models that others trained, in small, and what a config means, written down in NumPy."""

import math

import jax
import numpy as np
from flax import linen as nn

from lm.models import EncoderDecoderConfig, TransformerConfig, abstract

SHAPE = {"vocab_size": 29, "layers": 2, "width": 24, "heads": 4, "kv_heads": 4, "mlp_size": 40}
BIASED = {"norm": "layer", "bias": "all", "norm_epsilon": 1e-5}
LEARNED = {"positions": "learned", "context": 16}
GROUPED = {"kv_heads": 2, "head": "untied"}
STRETCHED = {"rope_base": 100.0, "rope_scaling": (8.0, 1.0, 4.0, 16.0)}

FAMILIES = {
    "ours": {},
    "gpt2": {**BIASED, **LEARNED, "activation": "gelu"},
    "neox": {
        **BIASED,
        "activation": "gelu_exact",
        "block": "parallel",
        "rotary_fraction": 0.7,
        "head": "untied",
    },
    "mistral": {**GROUPED, "window": 3},
    "qwen2": {**GROUPED, "bias": "qkv", "qk_norm": "rms"},
    "llama3": {**GROUPED, **STRETCHED, "base_width": 8},
    "bert": {
        **BIASED,
        **LEARNED,
        "activation": "gelu_exact",
        "block": "post",
        "direction": "both",
        "token_types": 2,
        "head": "mlm",
        "base_width": 8,
    },
    "mixed": {"activation": "geglu", "bias": "all", "block": "post", "window": 2, "kv_heads": 1},
    "relative": {"positions": "relative", "activation": "relu", "head_width": 5},
    "relu": {**LEARNED, "activation": "relu", "norm": "layer", "direction": "both", "window": 2},
}

PAIR = {"vocab_size": 29, "layers": 2, "width": 24, "heads": 4, "mlp_size": 40, "source_length": 6}
PAIRS = {
    "t5": {"positions": "relative", "activation": "relu", "head": "tied_scaled", "head_width": 5},
    "t5 1.1": {
        "positions": "relative",
        "activation": "geglu",
        "head": "untied",
        "decoder_layers": 1,
        "base_width": 8,
    },
    "plain": {},
    "layered": {**LEARNED, "activation": "gelu", "norm": "layer", "decoder_layers": 3},
}


def pair(name, **more):
    return EncoderDecoderConfig(**(PAIR | PAIRS[name] | more))


def family(name, **more):
    return TransformerConfig(**(SHAPE | FAMILIES[name] | more))


def make_params(config, seed=0):
    """Parameters large enough that attention is far from uniform; norms and biases random too."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        name, size = path[-1].key, leaf.shape[-1]
        if name.endswith("_bias") or "norm" in name:
            middle = 0.0 if name.endswith("_bias") else 1.0
            return (middle + 0.3 * rng.standard_normal(leaf.shape)).astype(np.float32)
        return (1.5 * rng.standard_normal(leaf.shape) / size**0.5).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, nn.unbox(abstract(config)))


def plain(config, params, tokens, segments, positions, types=None):
    """Logits [B, T, V] in float64, one row, layer, head and query at a time."""
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    types = np.zeros_like(tokens) if types is None else types
    rows = zip(tokens, segments, positions, types, strict=True)
    return np.stack([_row(config, p, *row) for row in rows])


def _row(c, p, tokens, segments, positions, types):
    x = p["embed"][tokens]
    if c.positions == "learned":
        x = x + p["position_embed"][positions]
    if c.token_types:
        x = x + p["type_embed"][types]
    if c.block == "post":
        x = _norm(c, p, "embed_norm", x)
    for i in range(c.layers):
        w = {name: stacked[i] for name, stacked in p["layers"].items()} | {"far": p.get("relative")}
        if c.block == "pre":
            x = x + _attend(c, w, _norm(c, w, "norm1", x), segments, positions)
            x = x + _mlp(c, w, _norm(c, w, "norm2", x))
        elif c.block == "post":
            x = _norm(c, w, "norm1", x + _attend(c, w, x, segments, positions))
            x = _norm(c, w, "norm2", x + _mlp(c, w, x))
        else:
            attended = _attend(c, w, _norm(c, w, "norm1", x), segments, positions)
            x = x + attended + _mlp(c, w, _norm(c, w, "norm2", x))
    if c.block != "post":
        x = _norm(c, p, "norm", x)
    if c.head == "mlm":
        x = _norm(c, p, "transform_norm", _act(c, x @ p["transform"] + p["transform_bias"]))
    table = p["head"] if c.head == "untied" else p["embed"]
    return x @ table.T / c.width_ratio + p.get("head_bias", 0)


def _norm(c, w, name, x):
    if c.norm == "layer":
        x = x - x.mean(-1, keepdims=True)
    x = x / np.sqrt((x * x).mean(-1, keepdims=True) + c.norm_epsilon)
    return x * w[name] + w.get(f"{name}_bias", 0)


def _act(c, x):
    if c.activation == "swiglu":
        return x / (1 + np.exp(-x))
    if c.activation == "relu":
        return np.maximum(x, 0)
    if c.activation == "gelu_exact":
        return x * (1 + np.vectorize(math.erf)(x / 2**0.5)) / 2
    return x * (1 + np.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x**3))) / 2


def _mlp(c, w, x):
    up = x @ w["up"] + w.get("up_bias", 0)
    h = _act(c, x @ w["gate"] + w.get("gate_bias", 0)) * up if c.gated else _act(c, up)
    return h @ w["down"] + w.get("down_bias", 0)


def _turn(c, x, position):
    """One head's x [H] at a position."""
    if c.positions != "rotary":
        return x
    half, x = (c.rotated + 1) // 2, x.copy()
    for i in range(half):
        f = c.rope_base ** (-2 * i / c.rotated)
        if c.rope_scaling:
            factor, low, high, context = c.rope_scaling
            turns = context * f / (2 * np.pi)
            kept = min(max((turns - low) / (high - low), 0), 1)
            f = kept * f + (1 - kept) * f / factor
        a, b, cos, sin = x[i], x[i + half], np.cos(position * f), np.sin(position * f)
        x[i], x[i + half] = a * cos - b * sin, b * cos + a * sin
    return x


def _sees(c, segments, t, s):
    near = not c.window or abs(t - s) < c.window
    return near and segments[t] == segments[s] != 0 and (s <= t or c.direction == "both")


def _bucket(c, distance):
    """Where T5 has the bias of a key that stands so far to the right of its query."""
    count = 16 if c.direction == "both" else 32
    side, n = (16, distance) if c.direction == "both" and distance > 0 else (0, max(-distance, 0))
    exact = count // 2
    if n < exact:
        return side + n
    far = exact + int(math.log(n / exact) / math.log(128 / exact) * (count - exact))
    return side + min(far, count - 1)


def _score(c, w, q, key, head, distance):
    if c.positions == "relative":
        return q @ key + w["far"][_bucket(c, distance), head]
    return q @ key / c.head_size**0.5


def _attend(c, w, x, segments, positions):
    T, K, G, H = len(x), c.kv_heads, c.group, c.head_size
    qkv = (x @ w["qkv"] + w.get("qkv_bias", 0)).reshape(T, K, G + 2, H)
    out = np.zeros((T, K, G, H))
    for k in range(K):
        for g in range(G):
            q, keys, values = qkv[:, k, g], qkv[:, k, G], qkv[:, k, G + 1]
            if c.qk_norm == "rms":
                rms = [np.sqrt((a * a).mean(-1, keepdims=True) + c.norm_epsilon) for a in (q, keys)]
                q, keys = q / rms[0] * w["q_norm"], keys / rms[1] * w["k_norm"]
            q = [_turn(c, a, n) for a, n in zip(q, positions, strict=True)]
            keys = [_turn(c, a, n) for a, n in zip(keys, positions, strict=True)]
            for t in range(T):
                seen = [s for s in range(T) if _sees(c, segments, t, s)]
                if seen:
                    pairs = [_score(c, w, q[t], keys[s], k * G + g, s - t) for s in seen]
                    score = np.array(pairs)
                    e = np.exp(score - score.max())
                    out[t, k, g] = e @ values[seen] / e.sum()
    return out.reshape(T, -1) @ w["out"] + w.get("out_bias", 0)
