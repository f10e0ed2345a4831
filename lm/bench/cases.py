"""What is measured: shapes as literal tables, and how many FLOPs each costs.

FLOPs are those of the products, 2 per multiply-add, and only those that are needed. Causal
attention sees T (T + 1) / 2 pairs of the T^2, so forward is 4 B N H T (T + 1) / 2 (q k' and p v);
backward is 2.5 times that (p again, and four products), however the implementation goes about it.
A training step is counted by `lm.sizes`: 6 per weight and token, and causal attention.

Nothing here imports JAX: the process that runs PyTorch reads it too.
"""

from dataclasses import dataclass
from typing import Literal

Pass = Literal["forward", "both"]


@dataclass(frozen=True)
class AttentionCase:
    """Causal attention of N heads over K kv heads; `group` says into which mean it enters."""

    batch: int
    heads: int
    kv_heads: int
    length: int
    head_size: int
    group: Literal["large", "tiny", "memory"] = "large"

    @property
    def name(self) -> str:
        """B x N (or N/K) x T x H."""
        grouped = f"/{self.kv_heads}" if self.kv_heads < self.heads else ""
        return f"{self.batch}x{self.heads}{grouped}x{self.length}x{self.head_size}"

    @property
    def tokens(self) -> int:
        """Tokens of one call."""
        return self.batch * self.length

    def flops(self, which: Pass) -> float:
        """Of one call."""
        pairs = self.length * (self.length + 1) // 2
        forward = 4 * self.batch * self.heads * self.head_size * pairs
        return forward * (3.5 if which == "both" else 1)

    def operand_bytes(self, itemsize: int) -> int:
        """Bytes of q, k, v, the output and the gradients of all four."""
        rows = self.batch * self.length * self.head_size
        return 2 * rows * (2 * self.heads + 2 * self.kv_heads) * itemsize


@dataclass(frozen=True)
class TrainCase:
    """A GPT with GELU, F = 4 D, RMSNorm, rotary positions and a tied head, in float32.

    A batch is `rows` of `length` tokens for each of the R `replicas`; `chunk` steps are one
    dispatch of our program.
    """

    layers: int
    heads: int
    width: int
    vocab: int
    length: int
    rows: int
    chunk: int
    replicas: int = 1

    @property
    def name(self) -> str:
        """Layers x width, as in a ladder; layers x heads x width where a head is not 16."""
        heads = "" if self.width == 16 * self.heads else f"{self.heads}x"
        return f"{self.layers}x{heads}{self.width}"

    @property
    def tokens(self) -> int:
        """Tokens of one step of all replicas."""
        return self.replicas * self.rows * self.length


@dataclass(frozen=True)
class EvalCase:
    """A Llama that scores four-way items of about `context` tokens, `each` of them in one call; all
    calls in turn ask `parts` times as many.
    """

    layers: int
    heads: int
    kv_heads: int
    width: int
    mlp_size: int
    vocab: int
    context: int
    each: int
    parts: int

    @property
    def name(self) -> str:
        """Layers x heads / kv heads x width."""
        return f"{self.layers}x{self.heads}/{self.kv_heads}x{self.width}"

    @property
    def tokens(self) -> int:
        """Of one call, about: each context once, and four continuations of 5.5."""
        return self.each * (self.context + 22)

    @property
    def flops(self) -> float:
        """Of one call, about: 2 per weight and token, without attention, the head where asked."""
        size = self.width // self.heads
        heads = 2 * self.width * self.width + 2 * self.width * self.kv_heads * size
        layers = self.layers * (heads + 3 * self.width * self.mlp_size)
        return 2 * self.tokens * layers + 2 * self.each * 19 * self.vocab * self.width


ATTENTION = (
    AttentionCase(8, 8, 8, 256, 64),
    AttentionCase(4, 8, 8, 1024, 64),
    AttentionCase(1, 8, 8, 4096, 64),
    AttentionCase(64, 4, 4, 64, 32),
    AttentionCase(2, 16, 16, 512, 128),
    AttentionCase(4, 8, 2, 1024, 64),
    AttentionCase(48, 2, 2, 64, 8, "tiny"),
    AttentionCase(48, 4, 4, 64, 8, "tiny"),
    AttentionCase(192, 2, 2, 48, 16, "tiny"),
    AttentionCase(1, 1, 1, 16_384, 64, "memory"),
)

# The first two are the shapes of nanoGPT's examples, the others the desk study's own. A dispatch of
# two steps is the least that is still a loop.
STEP = (
    TrainCase(6, 6, 384, vocab=65, length=256, rows=8, chunk=2),
    TrainCase(4, 4, 128, vocab=65, length=64, rows=12, chunk=10),
    TrainCase(2, 1, 16, vocab=128, length=32, rows=64, chunk=50),
    TrainCase(2, 2, 32, vocab=128, length=32, rows=64, chunk=50),
)

POPULATION = (
    TrainCase(2, 1, 16, vocab=128, length=32, rows=64, chunk=10, replicas=16),
    TrainCase(2, 2, 32, vocab=128, length=32, rows=64, chunk=10, replicas=16),
)

# The shape of SmolLM2-135M; 200 items in all.
EVAL = (EvalCase(30, 9, 3, 576, 1536, 49_152, context=100, each=25, parts=8),)

# `--smoke`: the same path in seconds.
SMOKE_ATTENTION = (AttentionCase(2, 2, 1, 16, 8), AttentionCase(1, 2, 2, 24, 8, "tiny"))
SMOKE_STEP = (TrainCase(1, 1, 16, vocab=16, length=8, rows=4, chunk=4),)
SMOKE_EVAL = (EvalCase(2, 4, 2, 16, 24, 64, context=12, each=4, parts=2),)
SMOKE_POPULATION = (TrainCase(1, 1, 16, vocab=16, length=8, rows=4, chunk=4, replicas=4),)
