"""Onset: train language models of many sizes and seeds, and say where each ability begins.

Axis legend, one letter per axis in every docstring and einsum:

    B batch    T query length    S key length    D embed (width)    N heads    K kv heads
    H head size    F mlp    V vocab    L layers    R replica

Units: losses are nats per token, `bpb` bits per byte, `flops` forward + backward and exact
(causal), times in seconds. Importing this package imports nothing else, so that the command line
starts at once.
"""

__version__ = "0.1.0"
