"""Accelerators by name: what one device has, and how devices are joined.

    v5e:16x16  v5p:8x8x8  v6e:16x16     one slice of TPUs, its chips along each side
    2xv5e:16x16                         two such slices, joined by the data-center network
    h100:32x8                           32 hosts of 8 GPUs

Peaks and links are the makers' data sheets; links are one way. `limit` is what a program may use:
on a TPU the memory that its compiler says is available, on a GPU the share that JAX takes unless
it is told otherwise. Dollars are list prices per chip and hour, from a reservation of years to on
demand, as known in November 2026 and not asked of anyone: they differ by region and contract.
"""

import dataclasses
import difflib
import math
import os
import re
from importlib.util import find_spec
from typing import Any, Literal

from lm.config import UserError

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device as JAX sees it: bytes, FLOP/s in bfloat16, bytes/s, dollars per hour."""

    platform: Literal["tpu", "gpu"]
    limit: float  # bytes of memory for a program
    flops: float
    memory_rate: float
    fast: float  # within a slice or host, one way
    slow: float  # between slices or hosts, one way
    dollars: tuple[float, float]
    sides: int = 2  # of a slice's shape; hosts and GPUs
    largest: tuple[int, ...] = (16, 16)
    per_chip: int = 1  # devices of a chip


CHIPS: dict[str, Chip] = {
    "v4": Chip("tpu", 30.75 * GIB, 275e12, 1228e9, 300e9, 6.25e9, (1.45, 3.22), 3, (12, 16, 16)),
    "v5e": Chip("tpu", 15.75 * GIB, 197e12, 819e9, 200e9, 3.1e9, (0.54, 1.20)),
    "v5p": Chip("tpu", 95.73 * GIB, 459e12, 2765e9, 600e9, 6.25e9, (1.89, 4.20), 3, (16, 20, 28)),
    "v6e": Chip("tpu", 31.24 * GIB, 918e12, 1640e9, 400e9, 12.5e9, (1.22, 2.70)),
    # Each of its two devices has half a chip; no list price is known here.
    "tpu7x": Chip(
        "tpu", 94.74 * GIB, 1153e12, 3690e9, 300e9, 6.25e9, (2.0, 6.0), 3, (16, 16, 36), 2
    ),
    # XLA_PYTHON_CLIENT_MEM_FRACTION is 0.75 unless it is set.
    "h100": Chip("gpu", 0.75 * 84929347584, 989e12, 3350e9, 450e9, 50e9, (2.0, 11.0), 2, (4096, 8)),
}


# What XLA has to know of a GPU that is not here, as a text of its protocol buffer; an H100 SXM.
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  clock_rate_ghz: 1.98
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  device_memory_size: 84929347584
  cuda_compute_capability { major: 9 }
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 7 }
runtime_version { major: 12 minor: 8 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


@dataclasses.dataclass(frozen=True)
class Topology:
    """A named set of equal devices; `fast_group` of them are joined by the fast links."""

    name: str
    chip: Chip
    kind: str
    slices: int
    shape: tuple[int, ...]

    @property
    def devices(self) -> int:
        """How many devices JAX sees."""
        return self.slices * math.prod(self.shape) * self.chip.per_chip

    @property
    def fast_group(self) -> int:
        """Devices of a slice, or of a host of GPUs."""
        if self.chip.platform == "gpu":
            return self.shape[-1]
        return self.devices // self.slices

    @property
    def dollars_per_hour(self) -> tuple[float, float]:
        """Of all devices, from cheap to dear."""
        chips = self.devices / self.chip.per_chip
        return self.chip.dollars[0] * chips, self.chip.dollars[1] * chips


EXAMPLES = ("v4:4x4x4", "v5e:16x16", "v5p:8x8x8", "v6e:16x16", "tpu7x:4x4x4", "h100:32x8")


def parse(name: str) -> Topology:
    """The topology of a name; raises UserError on a chip that is not known or a shape it cannot
    have.
    """
    match = re.fullmatch(r"(?:(\d{1,4})x)?([a-z]\w*):(\d{1,4}(?:x\d{1,4})*)", name)
    if not match:
        raise UserError(f"topology {name!r} is not CHIP:SHAPE; {_near(name)}")
    kind, shape = match[2], tuple(int(side) for side in match[3].split("x"))
    if kind not in CHIPS:
        raise UserError(f"topology {name!r} has an unknown chip {kind!r}; {_near(name)}")
    chip, slices = CHIPS[kind], int(match[1] or 1)
    if len(shape) != chip.sides or min(*shape, slices) < 1:
        sides = "HOSTSxGPUS" if chip.platform == "gpu" else "x".join("N" * chip.sides)
        raise UserError(f"topology {name!r} has the wrong shape; write {kind}:{sides}")
    if any(a > b for a, b in zip(sorted(shape), sorted(chip.largest), strict=True)):
        most = "x".join(map(str, chip.largest))
        raise UserError(
            f"topology {name!r} is larger than {kind}:{most}; use a smaller one or several slices"
        )
    if slices > 1 and chip.platform == "gpu":
        raise UserError(f"topology {name!r} has slices, which are for TPUs; write more hosts")
    return Topology(name, chip, kind, slices, shape)


def _near(name: str) -> str:
    found = difflib.get_close_matches(name, EXAMPLES, n=1, cutoff=0.4)
    return f"did you mean {found[0]!r}?" if found else f"write it as one of {', '.join(EXAMPLES)}"


def missing(topology: Topology) -> str:
    """Empty if the compiler for this topology is installed, or a sentence about what to install."""
    if topology.chip.platform == "tpu":
        absent, extra = find_spec("libtpu") is None, "tpu"
    else:
        absent, extra = find_spec("jax_cuda13_plugin") is None, "cuda"
    if not absent:
        return ""
    return (
        f"nothing was compiled: the compiler for {topology.kind} is not installed; pip install"
        f" 'onset-lm[{extra}]' gives its own figures of memory and collectives"
    )


def set_environment(topology: Topology) -> None:
    """What JAX has to be told before it is imported: no device is looked for, nothing is fetched.

    Two processes may load the TPU library at once only if both say so.
    """
    os.environ["JAX_PLATFORMS"] = "cpu"
    if topology.chip.platform == "tpu":
        os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
        os.environ["TPU_SKIP_MDS_QUERY"] = "1"
        os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
        os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-8")
        os.environ.setdefault("TPU_STDERR_LOG_LEVEL", "3")
    else:
        os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


def describe(topology: Topology) -> list[Any]:
    """The devices, none of which need be here; raises UserError if the compiler does not know the
    shape.
    """
    from jax.experimental import topologies

    if topology.chip.platform == "gpu":
        hosts, gpus = topology.shape
        found = topologies.get_topology_desc(
            topology.kind,
            platform="cuda",
            topology=f"1x{hosts}x{gpus}",
            target_config=H100,
        )
        return list(found.devices)
    settings: dict[str, Any] = {"num_slices": topology.slices} if topology.slices > 1 else {}
    if topology.kind == "v4":
        settings["chip_config_name"] = "megacore"  # one device a chip, as the newer ones are
    shape = "x".join(map(str, topology.shape))
    try:
        found = topologies.get_topology_desc(
            platform="tpu", topology_name=f"{topology.kind}:{shape}", **settings
        )
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"topology {topology.name!r}: {reason}; use another shape") from error
    return list(found.devices)
