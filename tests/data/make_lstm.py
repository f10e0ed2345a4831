"""Writes lstm.npz beside this file: torch.nn.LSTM on random numbers, its outputs and gradients.

Needs PyTorch, which the tests do not: python tests/data/make_lstm.py
"""

from pathlib import Path

import numpy as np
import torch

WIDTH, BATCH, LENGTH, LAYERS = 6, 3, 7, 2


def main() -> None:
    """One stack without a projection and one of 10 cells projected to the width."""
    torch.manual_seed(0)
    found = {}
    for name, sizes in (("plain", (WIDTH, 0)), ("projected", (10, WIDTH))):
        lstm = torch.nn.LSTM(WIDTH, sizes[0], LAYERS, batch_first=True, proj_size=sizes[1])
        for weight in lstm.parameters():
            torch.nn.init.normal_(weight, std=0.6)
        x = torch.randn(BATCH, LENGTH, WIDTH, requires_grad=True)
        by = torch.randn(BATCH, LENGTH, WIDTH)
        y, (h, c) = lstm(x)
        (y * by).sum().backward()
        tensors = dict(lstm.named_parameters())
        found |= {f"{name}.{k}": v for k, v in tensors.items()}
        found |= {f"{name}.{k}.grad": v.grad for k, v in tensors.items()}
        named = {"x": x, "x.grad": x.grad, "by": by, "y": y, "h": h, "c": c}
        found |= {f"{name}.{k}": v for k, v in named.items()}
    arrays = {k: v.detach().numpy() for k, v in found.items()}
    np.savez_compressed(Path(__file__).with_name("lstm.npz"), **arrays)


if __name__ == "__main__":
    main()
