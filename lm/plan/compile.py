"""The step that trains a cell, compiled for devices that are not here.

`lm.train.program.make_cell_population` makes the function, as it does for training; only the
devices come from a description of a topology. Memory is what the compiler allocated, per device.
"""

import dataclasses
import re
import resource
import time
from typing import Any

import jax
import jax.numpy as jnp

from lm.attention import BACKENDS, ORDER, Mask
from lm.config import UserError
from lm.plan import hlo
from lm.plan.estimate import transformer
from lm.plan.topology import GIB, Topology, describe
from lm.train.cell import Cell
from lm.train.program import cell_mesh, make_cell_population, scoring_rows


@dataclasses.dataclass(frozen=True)
class Compiled:
    """Bytes per device as the compiler counts them; `refused` is its sentence where it ran out of
    memory, and then there are no collectives. Seconds are wall and processor time.
    """

    args: int
    temp: int
    peak: int
    fits: bool
    refused: str
    collectives: list[hlo.Collective]
    kernels: dict[str, int]
    seconds: float
    processor_seconds: float
    host_gib: float  # the largest this process has been


def attention_for(cell: Cell, topology: Topology) -> str:
    """The backend that `auto` takes on devices that are not here, for the rows that each has."""
    m = transformer(cell)
    if m.attention != "auto":
        return m.attention
    batch = cell.data.rows, cell.data.length
    q, k = (jax.ShapeDtypeStruct((*batch, n, m.head_size), m.dtype) for n in (m.heads, m.kv_heads))
    segments: Any = jax.ShapeDtypeStruct(batch, jnp.int32)
    mask = Mask(causal=True, q_segments=segments)
    size = cell.data.length**2
    with jax.sharding.use_abstract_mesh(cell_mesh(cell, _grid(topology)).abstract_mesh):
        return next(
            name
            for name, limit in ORDER[topology.chip.platform]
            if not BACKENDS[name].supports(q, k, k, mask) and (limit is None or size <= limit)
        )


def placed(cell: Cell, topology: Topology) -> Cell:
    """The cell with what would be chosen on the topology's devices written down."""
    if cell.train.strategy == "sequence" or cell.train.sequence_devices > 1:
        return cell  # the ring has no backends to choose from
    name = attention_for(cell, topology)
    return dataclasses.replace(cell, model=dataclasses.replace(transformer(cell), attention=name))


def compile_step(
    cell: Cell, topology: Topology, devices: list[Any] | None = None, text: str = ""
) -> Compiled:
    """Compiles one dispatch of training; raises UserError if the batch or a weight does not divide.

    `devices` are those of `describe`, where they are known already; `text` is a file for the
    program's text.
    """
    cell = placed(cell, topology)
    mesh = cell_mesh(cell, devices or describe(topology))
    population = make_cell_population(cell, mesh)
    shape = (len(cell.replicas), cell.train.chunk, cell.data.rows, cell.data.length)
    batches = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(shape, a.dtype, sharding=population.batches),
        scoring_rows(cell),
    )
    begin, used = time.monotonic(), time.process_time()
    refused, compiled = "", None
    with jax.set_mesh(mesh):
        lowered = population.run.lower(population.states, batches)
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            refused = _out_of_memory(str(error))
            if not refused:
                raise
    took = time.monotonic() - begin, time.process_time() - used
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    if compiled is None:
        return Compiled(0, 0, _needed(refused), False, refused, [], {}, *took, host)
    memory, program = compiled.memory_analysis(), compiled.as_text()
    if text:
        with open(text, "w") as file:
            file.write(program)
    args, temp = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    # A TPU's `peak` leaves out what its allocator loses between buffers; `temp` does not.
    peak = max(memory.peak_memory_in_bytes, args)
    # A TPU's compiler refuses what does not fit; a GPU's does not know how much JAX may take.
    fits = topology.chip.platform == "tpu" or args + temp <= topology.chip.limit
    found = hlo.collectives(program, topology.devices, cell.train.chunk)
    return Compiled(args, temp, peak, fits, "", found, hlo.kernels(program), *took, host)


def check(cell: Cell, topology: Topology) -> None:
    """Raises UserError if a batch or a weight does not divide the devices, without compiling."""
    try:
        mesh = cell_mesh(cell, _grid(topology))
        make_cell_population(placed(cell, topology), mesh)
    except UserError as error:
        raise UserError(f"point {cell.name} on {topology.name}: {error}") from error


@dataclasses.dataclass(frozen=True)
class _Device:
    """Enough of a device to stand in a mesh; a GPU's stands where it is put."""

    id: int
    platform: str = "gpu"
    device_kind: str = "described"
    process_index: int = 0


def _grid(topology: Topology) -> list[Any]:
    return [_Device(i) for i in range(topology.devices)]


def _out_of_memory(text: str) -> str:
    """The compiler's sentence about memory, or nothing if the error is another."""
    if "RESOURCE_EXHAUSTED" not in text and "out of memory" not in text.lower():
        return ""
    found = re.search(r"total memory required[^.]*\([\d.]+[KMGT]\)[^.]*\([\d.]+[KMGT]\)", text)
    return found[0] if found else text.splitlines()[0][:200]


def _needed(refused: str) -> int:
    found = re.search(r"\(([\d.]+)([KMGT])\)", refused)
    units = {"K": 2**10, "M": 2**20, "G": GIB, "T": 2**40}
    return int(float(found[1]) * units[found[2]]) if found else 0
