"""Where every array lives: logical axis names, and tables that turn them into mesh axes.

Models name the axes of an array by meaning (`LOGICAL`). A strategy maps the names of parameters *at
rest* to mesh axes; one table, the same for all strategies, maps names *in compute*. That the two
differ is what FSDP means: a weight rests cut along `embed` over `data`, is gathered for its product
(`constrain`), and its gradient comes back cut again. The optimiser state rests like its parameters.
A strategy's mesh has these axes:

    replicated   data             fsdp_tp    data, tensor
    fsdp         data             sequence   data, sequence

`replica` comes in front when replicas are spread over devices. `sequence` may be added to any
strategy: the parts of a row are then rows of their own (`lm.attention.ring`), so a batch is cut
over `data` when it comes and over `data` and `sequence` while it is used, and weights that rest cut
are cut over both. Axes that speak most are last, where devices are nearest to each other.

A step is `jax.jit(step, in_shardings=..., out_shardings=...)` with trees from `shardings` and
`batch_sharding`, traced under `jax.set_mesh(mesh)`. Replicas: `jax.vmap(step,
spmd_axis_name=replica_axis(mesh))`, so that every `constrain` inside keeps the leading axis spread.
Without a mesh nothing here does anything.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

import jax
import numpy as np
from flax import linen as nn
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from lm.config import UserError

Strategy = Literal["replicated", "fsdp", "fsdp_tp", "sequence"]
REPLICA = "replica"
SEQUENCE = "sequence"

LOGICAL = ("batch", "seq", "embed", "heads", "kv_heads", "head", "mlp", "vocab", "layers", REPLICA)

Table = Mapping[str, tuple[str, ...]]  # logical name -> mesh axes, of which a mesh may lack some

MESH_AXES: Table = {
    "replicated": ("data",),
    "fsdp": ("data",),
    "fsdp_tp": ("data", "tensor"),
    "sequence": ("data", SEQUENCE),
}

# Parameters and optimiser state between steps. A name that is not listed is not cut.
_FSDP: Table = {REPLICA: (REPLICA,), "embed": ("data", SEQUENCE)}
AT_REST: Mapping[str, Table] = {
    "replicated": {REPLICA: (REPLICA,)},
    "fsdp": _FSDP,
    "fsdp_tp": {**_FSDP, "heads": ("tensor",), "mlp": ("tensor",), "vocab": ("tensor",)},
    "sequence": _FSDP,
}

# Activations, and parameters while they are used. An axis that the mesh lacks is not cut.
IN_COMPUTE: Table = {
    REPLICA: (REPLICA,),
    "batch": ("data", SEQUENCE),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
}

# Batches as they come: rows are whole.
AS_READ: Table = {REPLICA: (REPLICA,), "batch": ("data",)}


def make_mesh(
    strategy: Strategy,
    devices: Sequence[jax.Device] | None = None,
    *,
    replicas: int = 1,
    tensor: int | None = None,
    sequence: int | None = None,
) -> Mesh:
    """The mesh of a strategy over `devices` (default: all), which may be those of a topology that
    is only compiled for.

    A leading axis spreads the replicas if `replicas` > 1; `sequence` devices share each row
    (default 2 under `sequence`, else 1); `tensor` devices share each product under `fsdp_tp`
    (default 2); the rest of the devices are `data`. Raises UserError if they do not fit.
    """
    if strategy not in get_args(Strategy):
        raise UserError(f"no strategy '{strategy}'; use one of {', '.join(get_args(Strategy))}")
    devices = jax.devices() if devices is None else devices
    own = MESH_AXES[strategy]
    if tensor is not None and "tensor" not in own:
        raise UserError(
            f"strategy '{strategy}' has no mesh axis 'tensor'; use fsdp_tp, or leave tensor out"
        )
    sizes = {REPLICA: replicas}
    for name, asked in ((SEQUENCE, sequence), ("tensor", tensor)):
        sizes[name] = asked if asked is not None else 2 if name in own else 1
    for name, size in sizes.items():
        if size < 1 or len(devices) % size:
            fit = [n for n in range(1, len(devices) + 1) if len(devices) % n == 0]
            raise UserError(
                f"mesh axis '{name}' of {size} does not divide {len(devices)} devices;"
                f" use one of {fit}"
            )
    data, left = divmod(len(devices), math.prod(sizes.values()))
    if left or not data:
        product = " x ".join(f"{size} {name}" for name, size in sizes.items() if size > 1)
        raise UserError(
            f"mesh axes of {product} do not divide {len(devices)} devices; use fewer of either"
        )
    sizes["data"] = data
    names = [n for n in (REPLICA, "data", SEQUENCE, "tensor") if n in own or sizes[n] > 1]
    grid = _grid(devices, {n: sizes[n] for n in names})
    # jax.make_mesh would make Explicit axes, on which logical partitioning does not work.
    return Mesh(grid, names, axis_types=(AxisType.Auto,) * len(names))


def _grid(devices: Sequence[jax.Device], sizes: Mapping[str, int]) -> np.ndarray:
    """The devices in an array of these axes, near ones along the last axes.

    On a torus of TPUs an axis of the mesh is laid along the links. Slices, whose links to each
    other are slow, are parts of the first axis that they divide, `replica` or `data`.
    """
    shape = list(sizes.values())
    slices = len({getattr(d, "slice_index", 0) for d in devices})
    if slices == 1 and devices[0].platform != "tpu":
        return np.asarray(devices, dtype=object).reshape(shape)
    outer = next((n for n in (REPLICA, "data") if sizes.get(n, 1) % slices == 0), None)
    if outer is None:
        apart = " and ".join(f"'{n}' of {sizes[n]}" for n in (REPLICA, "data") if n in sizes)
        raise UserError(
            f"{slices} slices divide neither of the mesh axes that may lie across them, {apart};"
            " use fewer sequence or tensor devices"
        )
    across = [slices if name == outer else 1 for name in sizes]
    within = [size // apart for size, apart in zip(shape, across, strict=True)]
    if slices == 1:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return mesh_utils.create_hybrid_device_mesh(
        within, across, devices, allow_split_physical_axes=True
    )


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
    """How [rows, ...] arrays of a batch are cut when they come, or [replicas, rows, ...] with
    `replicas` > 0.
    """
    names = (REPLICA, "batch") if replicas else ("batch",)
    shape = (replicas, rows) if replicas else (rows,)
    return NamedSharding(mesh, _spec("batch", shape, names, AS_READ, mesh))


def constrain(x: jax.Array, names: tuple[str | None, ...]) -> jax.Array:
    """Ask for the compute table's layout of an array with these axis names.

    Does nothing without a mesh of several devices.
    """
    mesh = _mesh()
    if mesh is None:
        return x
    return jax.lax.with_sharding_constraint(
        x, _spec("activation", x.shape, names, IN_COMPUTE, mesh)
    )


def devices_along(name: str) -> int:
    """How many devices the compute table cuts an axis of this name over; 1 without a mesh."""
    mesh = _mesh()
    axes = IN_COMPUTE.get(name, ()) if mesh else ()
    return math.prod(mesh.shape.get(axis, 1) for axis in axes) if mesh else 1


def sequence_devices() -> int:
    """How many devices share each row of a batch; 1 without a mesh."""
    mesh = _mesh()
    return mesh.shape.get(SEQUENCE, 1) if mesh else 1


def local(
    f: Callable[..., jax.Array],
    inputs: tuple[tuple[str | None, ...], ...],
    output: tuple[str | None, ...],
    shape: tuple[int, ...],
    *,
    given: Table = IN_COMPUTE,
) -> Callable[..., jax.Array]:
    """f on every device's own part of its arguments, for kernels that XLA cannot cut by itself.

    `inputs` and `output` name the axes of arguments (which may be None) and of the result, whose
    shape is `shape`; the arguments are cut by the table `given`. Without a mesh of several devices
    it is f itself.
    """
    mesh = _mesh()
    if mesh is None:
        return f

    def cut(*args: jax.Array | None) -> jax.Array:
        specs = tuple(
            None if x is None else _spec("activation", x.shape, names, given, mesh)
            for x, names in zip(args, inputs, strict=True)
        )
        out = _spec("activation", shape, output, IN_COMPUTE, mesh)
        return jax.shard_map(f, in_specs=specs, out_specs=out, check_vma=False)(*args)

    return cut


def _mesh() -> AbstractMesh | None:
    """The mesh of the context if there is something to cut on it."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or mesh.size == 1 or mesh.are_all_axes_manual else mesh


def _spec(
    where: str,
    shape: tuple[int, ...],
    names: tuple[str | None, ...],
    table: Table,
    mesh: Mesh | AbstractMesh,
) -> PartitionSpec:
    """The spec of one array, or a sentence about the axis that cannot be cut."""
    unknown = [n for n in names if n is not None and n not in LOGICAL]
    if unknown or len(names) != len(shape):
        raise ValueError(
            f"{where} of shape {shape} has axis names {names}; use {len(shape)} of {LOGICAL}"
        )
    taken: dict[str, str] = {}
    spec: list[str | tuple[str, ...] | None] = []
    for name, size in zip(names, shape, strict=True):
        axes = tuple(a for a in table.get(name or "", ()) if a in mesh.axis_names)
        for axis in axes:
            if axis in taken:
                raise ValueError(
                    f"{where} of shape {shape} is cut over mesh axis '{axis}' along"
                    f" '{taken[axis]}' and along '{name}'; name one of the two None"
                )
            taken[axis] = str(name)
        count = math.prod(mesh.shape[axis] for axis in axes)
        if size % count:
            below, above = size // count * count, (size // count + 1) * count
            remedy = f"use {below} or {above}" if below else f"use {above}"
            what = name if where in ("batch", "activation") else f"{name} (of {where})"
            over = (
                "axis " + repr(axes[0]) if len(axes) == 1 else "axes " + " x ".join(map(repr, axes))
            )
            raise UserError(
                f"{what} {size} is not divisible by the {count} devices of mesh {over}; {remedy}"
            )
        spec.append(axes if len(axes) > 1 else axes[0] if axes else None)
    return PartitionSpec(*spec)
