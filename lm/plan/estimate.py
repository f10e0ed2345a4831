"""What a step takes on a topology, by arithmetic: memory by kind, collectives, time and dollars.

Memory of one device, with n devices sharing a weight, M tokens of a batch on each, and 2 or 4
bytes a number as the config says:

    parameters, optimiser   4 P and 8 P bytes (Adam), over n
    gradients               4 P over n
    activations             what remat keeps of every layer: the stream alone (full), with the
                            products (dots), or everything the gradient reads (none)
    logits                  M V in float32 and their gradient, or one chunk of them
    working                 weights and gradients in bfloat16, over n; gathered weights of the
                            layers in flight; the layer that is done again

The first three follow from the program, as does what `full` and `dots` keep. How much `none` keeps,
and how many copies of a layer's weights and of its widest activation a compiler has at once, is
fitted to compiled programs (docs/plan.md has them).

Time: FLOPs with those that remat repeats, with the matrix units busy for `BUSY` of the time, or the
memory or the links where they take longer; in the better case links work beside products, in the
worse after them.
"""

import dataclasses
import math

from lm.config import UserError
from lm.loss import CHUNK
from lm.models import TransformerConfig
from lm.objectives import WITHOUT_LOGITS
from lm.plan.hlo import Collective
from lm.plan.topology import Topology
from lm.sizes import flops_per_sequence, parameters
from lm.train.cell import Cell

BUSY = (0.35, 0.60)  # share of the peak that products reach, repeated ones counted
# Copies that the compilers keep: of a layer's gathered weights, and of [M, F].
LAYER_COPIES = {"v4": 7.7, "v5e": 7.7, "v5p": 7.7, "v6e": 7.7, "tpu7x": 5.1, "h100": 1.5}
ACROSS_SLICES = 1.7  # instead, where a weight is cut over several slices
WIDE_COPIES = {"tpu": 6.0, "gpu": 5.6}


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one device, by kind."""

    parameters: float
    optimiser: float
    gradients: float
    activations: float
    logits: float
    working: float

    @property
    def args(self) -> float:
        """What is there between steps."""
        return self.parameters + self.optimiser

    @property
    def total(self) -> float:
        """The most that is there at once."""
        return self.args + self.gradients + self.activations + self.logits + self.working


@dataclasses.dataclass(frozen=True)
class Cost:
    """One step and one run, from the better to the worse case; seconds, tokens per second, dollars
    of all devices.
    """

    step: tuple[float, float]
    tokens_per_second: tuple[float, float]
    hours: tuple[float, float]
    dollars: tuple[float, float]


@dataclasses.dataclass(frozen=True)
class Spread:
    """How a strategy uses devices: those that cut the batch, a product, the state at rest, the
    tokens of a row.
    """

    data: int
    tensor: int
    rest: int
    sequence: int = 1


def transformer(cell: Cell) -> TransformerConfig:
    """The model of a cell; raises UserError for another kind, of which nothing is fitted."""
    if not isinstance(cell.model, TransformerConfig):
        raise UserError(
            f"cell {cell.name} has a model of kind {cell.model.kind!r}, plans are made for"
            " transformers; leave it out of the study, or see what `lm run STUDY --dry_run` says"
        )
    return cell.model


def spread(cell: Cell, topology: Topology) -> Spread:
    """The devices of one replica's mesh, as `lm.sharding.make_mesh` makes it."""
    train = cell.train
    each = max(topology.devices // train.replica_devices, 1)
    tensor = (train.tensor_devices or 2) if train.strategy == "fsdp_tp" else 1
    sequence = train.sequence_devices or (2 if train.strategy == "sequence" else 1)
    data = max(each // (tensor * sequence), 1)
    rest = 1 if train.strategy == "replicated" else data * sequence * tensor
    return Spread(data, tensor, rest, sequence)


def replicas_per_device(cell: Cell) -> float:
    """Replicas that are side by side on one device."""
    return len(cell.replicas) / cell.train.replica_devices


def memory(cell: Cell, topology: Topology) -> Memory:
    """Bytes of one device while it trains."""
    c, over = transformer(cell), spread(cell, topology)
    side = replicas_per_device(cell)
    live = 1 if cell.train.replicas == "sequential" else side  # one after another
    wide = 2 if c.dtype == "bfloat16" else 4
    count = parameters(c)
    stored = 4 if c.param_dtype == "float32" else 2
    tokens = math.ceil(cell.data.rows / over.data) * cell.data.length // over.sequence
    norms = (2 * c.layers + 1) * c.width  # rest whole on every device
    at_rest = (count.total - norms) / over.rest + norms
    share = 1 if over.tensor == 1 else 1 / over.tensor
    layer = (count.non_embedding / c.layers) * wide * share
    widest = tokens * c.mlp_size * wide * share
    platform = topology.chip.platform
    chunked = c.loss == "chunked" or (c.loss == "auto" and c.vocab_size >= WITHOUT_LOGITS)
    table = c.vocab_size * c.width * wide * share
    cast = 2 * at_rest * wide if wide != stored else 0  # weights in bfloat16, and their gradients
    logits = tokens * (CHUNK if chunked else c.vocab_size * share) * 4 * 2
    kept = _kept(cell, share) * tokens * wide * c.layers
    # What is not done again keeps the weights as they were gathered for it.
    if c.remat == "none" and over.data > 1 and over.rest > 1:
        kept += layer * c.layers
    copies = LAYER_COPIES[topology.kind] if topology.slices == 1 else ACROSS_SLICES
    gathered = copies * layer if over.rest > 1 else layer
    return Memory(
        parameters=side * at_rest * stored,
        optimiser=side * at_rest * stored * 2,
        gradients=live * at_rest * stored,
        activations=live * kept,
        logits=live * logits,
        working=live * (max(gathered, 2 * table) + cast + WIDE_COPIES[platform] * widest),
    )


def _kept(cell: Cell, share: float) -> float:
    """Numbers of a token that every layer keeps for the backward pass."""
    c = transformer(cell)
    heads = (c.heads + 2 * c.kv_heads) * c.head_size * share
    mlp = c.mlp_size * (2 if c.activation == "swiglu" else 1) * share
    if c.remat == "full":
        return c.width
    if c.remat == "dots":  # the products that end in a sum are not read again
        return c.width + heads + mlp
    return 12 * c.width + 3 * heads + 2.5 * mlp


def collectives(cell: Cell, topology: Topology) -> list[Collective]:
    """What a step has to say at least: weights gathered forward and backward, gradients reduced,
    and the products' sums where they are cut.
    """
    c, over = cell.model, spread(cell, topology)
    side = max(round(replicas_per_device(cell)), 1)
    wide = 2 if c.dtype == "bfloat16" else 4
    whole = parameters(c).total * wide * side // over.tensor
    found = []
    if over.rest > 1 and over.data > 1:
        found.append(Collective("all-gather", 2, whole, over.data, over.tensor))
    if over.data > 1:
        found.append(Collective("all-reduce", 1, whole, over.data, over.tensor))
    if over.tensor > 1:
        tokens = cell.data.rows * cell.data.length // (over.data * over.sequence)
        stream = tokens * c.width * wide * side
        found.append(Collective("all-reduce", 4 * c.layers, stream, over.tensor, 1))
    return found


def flops_per_step(cell: Cell) -> float:
    """Exact FLOPs, forward and backward, of all replicas; what remat repeats is not counted."""
    each = flops_per_sequence(cell.model, cell.data.length) * cell.data.rows
    return float(each) * len(cell.replicas)


def cost(cell: Cell, topology: Topology, said: list[Collective]) -> Cost:
    """Time and dollars of a cell; `said` are its collectives, compiled or estimated."""
    chip, n = topology.chip, topology.devices
    again = {"full": 4 / 3, "dots": 1.05, "none": 1.0}[transformer(cell).remat]
    products = flops_per_step(cell) * again / (n * chip.flops)
    links = sum(one.seconds(topology) for one in said)
    # State is read and written once, a layer's weights are read three times.
    whole = parameters(cell.model).total * 2 / spread(cell, topology).tensor
    traffic = 2 * memory(cell, topology).args + 3 * whole * replicas_per_device(cell)
    read = traffic / chip.memory_rate
    best = max(products / BUSY[1], links, read)
    worst = max(products / BUSY[0], read) + links
    tokens = cell.tokens_per_step * len(cell.replicas)
    hours = best * cell.steps / 3600, worst * cell.steps / 3600
    low, high = topology.dollars_per_hour
    return Cost(
        (best, worst),
        (tokens / worst, tokens / best),
        hours,
        (hours[0] * low, hours[1] * high),
    )
