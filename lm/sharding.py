"""Where every array lives: logical axis names, and two tables that turn them into mesh axes.

Models name the axes of an array by meaning (`LOGICAL`). A strategy maps the names of parameters *at
rest* to mesh axes; one table, the same for all strategies, maps names *in compute*. That the two
differ is what FSDP means: a weight rests cut along `embed` over `data`, is gathered for its product
(`constrain`), and its gradient comes back cut again. The optimiser state rests like its parameters.
A strategy's mesh has these axes, with `replica` in front when replicas are spread over devices:

    replicated   data             fsdp   data             fsdp_tp   data, tensor

A step is `jax.jit(step, in_shardings=..., out_shardings=...)` with trees from `shardings` and
`batch_sharding`, traced under `jax.set_mesh(mesh)`. Replicas: `jax.vmap(step,
spmd_axis_name=replica_axis(mesh))`, so that every `constrain` inside keeps the leading axis spread.
Without a mesh nothing here does anything.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

import jax
import numpy as np
from flax import linen as nn
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from lm.config import UserError

Strategy = Literal["replicated", "fsdp", "fsdp_tp"]
REPLICA = "replica"

LOGICAL = ("batch", "seq", "embed", "heads", "kv_heads", "head", "mlp", "vocab", "layers", REPLICA)

MESH_AXES: Mapping[str, tuple[str, ...]] = {
    "replicated": ("data",),
    "fsdp": ("data",),
    "fsdp_tp": ("data", "tensor"),
}

# Parameters and optimiser state between steps. A name that is not listed is not cut.
AT_REST: Mapping[str, Mapping[str, str]] = {
    "replicated": {REPLICA: REPLICA},
    "fsdp": {REPLICA: REPLICA, "embed": "data"},
    "fsdp_tp": {
        REPLICA: REPLICA,
        "embed": "data",
        "heads": "tensor",
        "mlp": "tensor",
        "vocab": "tensor",
    },
}

# Activations, and parameters while they are used. An axis that the mesh lacks is not cut.
IN_COMPUTE: Mapping[str, str] = {
    REPLICA: REPLICA,
    "batch": "data",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
}


def make_mesh(
    strategy: Strategy,
    devices: Sequence[jax.Device] | None = None,
    *,
    replicas: int = 1,
    tensor: int | None = None,
) -> Mesh:
    """The mesh of a strategy over `devices` (default: all).

    A leading axis spreads the replicas if `replicas` > 1; `tensor` devices share each product under
    `fsdp_tp` (default 2); the rest of the devices are `data`.
    """
    if strategy not in get_args(Strategy):
        raise UserError(f"no strategy '{strategy}'; use one of {', '.join(get_args(Strategy))}")
    devices = jax.devices() if devices is None else devices
    axes = MESH_AXES[strategy]
    if tensor is not None and "tensor" not in axes:
        raise UserError(
            f"strategy '{strategy}' has no mesh axis 'tensor'; use fsdp_tp, or leave tensor out"
        )
    sizes = {REPLICA: replicas, "tensor": (tensor or 2) if "tensor" in axes else 1}
    for name, size in sizes.items():
        if size < 1 or len(devices) % size:
            fit = [n for n in range(1, len(devices) + 1) if len(devices) % n == 0]
            raise UserError(
                f"mesh axis '{name}' of {size} does not divide {len(devices)} devices;"
                f" use one of {fit}"
            )
    data, left = divmod(len(devices), replicas * sizes["tensor"])
    if left or not data:
        raise UserError(
            f"{replicas} replicas x {sizes['tensor']} tensor devices do not divide"
            f" {len(devices)} devices; use fewer of either"
        )
    sizes["data"] = data
    names = ((REPLICA,) if replicas > 1 else ()) + axes
    grid = np.asarray(devices, dtype=object).reshape([sizes[n] for n in names])
    # jax.make_mesh would make Explicit axes, on which logical partitioning does not work.
    return Mesh(grid, names, axis_types=(AxisType.Auto,) * len(names))


def replica_axis(mesh: Mesh | None) -> str | None:
    """`spmd_axis_name` for a vmap over replicas on this mesh."""
    return REPLICA if mesh is not None and REPLICA in mesh.axis_names else None


def shardings(abstract: Any, mesh: Mesh, strategy: Strategy, *, replicas: bool = False) -> Any:
    """The tree of NamedSharding at rest for a tree of shapes.

    Leaves are shapes or arrays, boxed with their logical names where they have any
    (`nn.LogicallyPartitioned`, as `eval_shape` of an initialisation gives them); the result has one
    sharding in place of each, box and all, and fits the unboxed tree. `replicas`: every leaf has a
    leading replica axis that its names do not tell.
    """

    def one(path: tuple, leaf: Any) -> NamedSharding:
        boxed = isinstance(leaf, nn.Partitioned)
        shape = leaf.value.shape if boxed else leaf.shape
        lead = (REPLICA,) if replicas else ()
        names = lead + tuple(leaf.names) if boxed else lead + (None,) * (len(shape) - len(lead))
        where = "state" + jax.tree_util.keystr(path)
        return NamedSharding(mesh, _spec(where, shape, names, AT_REST[strategy], mesh))

    return jax.tree_util.tree_map_with_path(
        one, abstract, is_leaf=lambda x: isinstance(x, nn.Partitioned)
    )


def batch_sharding(mesh: Mesh, rows: int, *, replicas: int = 0) -> NamedSharding:
    """How [rows, ...] arrays of a batch are cut, or [replicas, rows, ...] with `replicas` > 0."""
    names = (REPLICA, "batch") if replicas else ("batch",)
    shape = (replicas, rows) if replicas else (rows,)
    return NamedSharding(mesh, _spec("batch", shape, names, IN_COMPUTE, mesh))


def constrain(x: jax.Array, names: tuple[str | None, ...]) -> jax.Array:
    """Ask for the compute table's layout of an array with these axis names.

    Does nothing without a mesh of several devices.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or mesh.are_all_axes_manual:
        return x
    return jax.lax.with_sharding_constraint(
        x, _spec("activation", x.shape, names, IN_COMPUTE, mesh)
    )


def local(
    f: Callable[..., jax.Array],
    inputs: tuple[tuple[str | None, ...], ...],
    output: tuple[str | None, ...],
    shape: tuple[int, ...],
) -> Callable[..., jax.Array]:
    """f on every device's own part of its arguments, for kernels that XLA cannot cut by itself.

    `inputs` and `output` name the axes of arguments (which may be None) and of the result, whose
    shape is `shape`. Without a mesh of several devices it is f itself.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or mesh.are_all_axes_manual:
        return f

    def cut(*args: jax.Array | None) -> jax.Array:
        specs = tuple(
            None if x is None else _spec("activation", x.shape, names, IN_COMPUTE, mesh)
            for x, names in zip(args, inputs, strict=True)
        )
        out = _spec("activation", shape, output, IN_COMPUTE, mesh)
        return jax.shard_map(f, in_specs=specs, out_specs=out, check_vma=False)(*args)

    return cut


def _spec(
    where: str,
    shape: tuple[int, ...],
    names: tuple[str | None, ...],
    table: Mapping[str, str],
    mesh: Mesh | AbstractMesh,
) -> PartitionSpec:
    """The spec of one array, or a sentence about the axis that cannot be cut."""
    unknown = [n for n in names if n is not None and n not in LOGICAL]
    if unknown or len(names) != len(shape):
        raise ValueError(
            f"{where} of shape {shape} has axis names {names}; use {len(shape)} of {LOGICAL}"
        )
    axes = [table.get(n) if n else None for n in names]
    axes = [a if a in mesh.axis_names else None for a in axes]
    for name, size, axis in zip(names, shape, axes, strict=True):
        count = mesh.shape[axis] if axis else 1
        if size % count:
            below, above = size // count * count, (size // count + 1) * count
            remedy = f"use {below} or {above}" if below else f"use {above}"
            what = name if where in ("batch", "activation") else f"{name} (of {where})"
            raise UserError(
                f"{what} {size} is not divisible by the {count} devices of mesh axis '{axis}';"
                f" {remedy}"
            )
    return PartitionSpec(*axes)
