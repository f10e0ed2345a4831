"""PyTorch's side: its fused attention, and a GPT of the shape and weights of ours.

It has what ours has: RMSNorm, rotary positions, GELU (tanh), no biases, a tied head, AdamW without
decay of norms, a clipped gradient. What it does its own way is layout: q, k and v are contiguous
[B, N, T, H] for attention alone, and views of one product in the model.
"""

import contextlib
import dataclasses
import time
from typing import Any

import numpy as np

from lm.bench import choices
from lm.bench.cases import AttentionCase, EvalCase, Pass, TrainCase
from lm.bench.work import CHECKED, OPTIM, Work, operands, rows, weight

with contextlib.suppress(ImportError):  # the `peers` extra; lm.bench asks for it before this runs
    import torch
    from torch import nn
    from torch.nn import functional as F


def attend(case: AttentionCase, dtype: str, which: Pass) -> Work:
    """`scaled_dot_product_attention`, causal. With grouped heads `enable_gqa`: repeating the keys
    before took as long (128 to 156 against 136 to 139 ms at 4x8/2x1024x64).
    """
    q, k, v, dout = (
        torch.from_numpy(a.swapaxes(1, 2).copy()).to(getattr(torch, dtype)) for a in operands(case)
    )
    grouped = case.kv_heads < case.heads
    for a in (q, k, v):
        a.requires_grad_(which == "both")

    def call() -> tuple[Any, ...]:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
        return out, *(torch.autograd.grad(out, (q, k, v), dout) if which == "both" else ())

    def results() -> dict[str, np.ndarray]:
        found = [a.detach().float().numpy().swapaxes(1, 2) for a in call()]
        return dict(zip(("out", "dq", "dk", "dv")[: len(found)], found, strict=True))

    return Work(call, results)


def train(case: TrainCase, compiled: bool) -> Work:
    """Training steps as a PyTorch user writes them; `compiled` passes forward and backward through
    `torch.compile`. AdamW is the fused one.
    """
    model = gpt(case)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    norms = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": OPTIM["weight_decay"]}, {"params": norms}],
        lr=OPTIM["learning_rate"],
        betas=(OPTIM["b1"], OPTIM["b2"]),
        eps=OPTIM["epsilon"],
        weight_decay=0.0,
        fused=True,
    )
    batches = [torch.from_numpy(a).long() for a in rows(case, 0)]
    angles = rotations(case)

    def loss_of(tokens: Any, targets: Any) -> Any:
        logits = forward(case, model, tokens, angles)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    begin = time.perf_counter()
    run = torch.compile(loss_of) if compiled else loss_of
    if compiled:
        run(batches[0][0], batches[1][0]).backward()  # compiles both passes
    seconds = time.perf_counter() - begin
    taken = 0

    def call() -> Any:
        nonlocal taken
        i, taken = taken % case.chunk, taken + 1
        optimizer.zero_grad(set_to_none=True)
        loss = run(batches[0][i], batches[1][i])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), OPTIM["clip"])
        optimizer.step()
        return loss.detach()

    def results() -> dict[str, np.ndarray]:
        losses = [float(call()) for _ in range(min(CHECKED, case.chunk))]
        return {"losses": np.array([losses], np.float32)}

    return Work(call, results, compile_s=seconds if compiled else None)


def gpt(case: TrainCase) -> Any:
    """The modules, with the values of `work.weight` in PyTorch's layout."""
    L, N, D = case.layers, case.heads, case.width
    shapes = {"qkv": (D, 3 * D), "out": (D, D), "up": (D, 4 * D), "down": (4 * D, D)}
    stacked = {name: weight(f"layers/{name}", (L, *shape)) for name, shape in shapes.items()}
    # Our columns are ordered by head, [N, (query, key, value), H]; here all queries come first.
    by_head = stacked["qkv"].reshape(L, D, N, 3, D // N)
    stacked["qkv"] = by_head.swapaxes(2, 3).reshape(L, D, 3 * D)

    def block(layer: int) -> Any:
        parts = {"norm1": nn.RMSNorm(D, eps=1e-6), "norm2": nn.RMSNorm(D, eps=1e-6)}
        for name, value in stacked.items():
            parts[name] = nn.Linear(*shapes[name], bias=False)
            parts[name].weight.data = torch.from_numpy(value[layer].T.copy())
        return nn.ModuleDict(parts)

    embed = nn.Embedding(case.vocab, D)
    embed.weight.data = torch.from_numpy(weight("embed", (case.vocab, D)))
    layers = nn.ModuleList(block(layer) for layer in range(L))
    return nn.ModuleDict({"embed": embed, "layers": layers, "norm": nn.RMSNorm(D, eps=1e-6)})


def rotations(case: TrainCase) -> tuple[Any, Any]:
    """Cosine and sine of the rotary angles, [T, H/2] each."""
    H = case.width // case.heads
    frequency = 10_000.0 ** (-torch.arange(0, H, 2) / H)
    angle = torch.arange(case.length)[:, None] * frequency
    return angle.cos(), angle.sin()


def forward(case: TrainCase, model: Any, tokens: Any, angles: tuple[Any, Any]) -> Any:
    """tokens [B, T] -> logits [B, T, V]."""
    (B, T), D = tokens.shape, case.width
    cos, sin = angles

    def heads(x: Any) -> Any:
        return x.view(B, T, case.heads, D // case.heads).transpose(1, 2)

    def rotate(x: Any) -> Any:
        a, b = x.chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)

    x = model["embed"](tokens)
    for layer in model["layers"]:
        q, k, v = map(heads, layer["qkv"](layer["norm1"](x)).split(D, dim=2))
        a = F.scaled_dot_product_attention(rotate(q), rotate(k), v, is_causal=True)
        x = x + layer["out"](a.transpose(1, 2).reshape(B, T, D))
        h = F.gelu(layer["up"](layer["norm2"](x)), approximate="tanh")
        x = x + layer["down"](h)
    return F.linear(model["norm"](x), model["embed"].weight)


def build(spec: dict[str, Any]) -> Work:
    """What a worker asks for: see `lm.bench.worker`."""
    if spec["bench"] == "eval":
        return choices.hflm(EvalCase(**spec["case"]))
    if spec["bench"] == "attention":
        return attend(AttentionCase(**spec["case"]), spec["dtype"], spec["pass"])
    case = dataclasses.replace(TrainCase(**spec["case"]), replicas=1)
    return train(case, spec["impl"] == "torch_compiled")
