"""The device mesh, and which axis of which array lies on which axis of the mesh.

One program for every machine: a mesh has the three axes `data`, `fsdp` and `tensor`, and one device is the mesh of one.

- Batches are sharded over `data` and `fsdp` together.
- Parameters, and everything shaped like them (moving averages, optimizer moments), are sharded over `fsdp` (fully
  sharded data parallelism: each device keeps a shard and gathers a layer when it needs it) and, for the kernels of the
  transformer's attention and MLP, over `tensor` as well (Megatron: Shoeybi et al. 2019, arXiv 1909.08053, Sec. 3).
- `data` replicates the parameters.

A leaf's sharding follows from its path and shape alone, so the same rules serve a whole train state: an average or a
moment has the path of its parameter as the end of its own.
"""

import dataclasses
import functools
import math
import os
import re
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from typing_extensions import override

from lpl_jax.errors import InputError
from lpl_jax.fields import Check, Part, field

Device: TypeAlias = Any  # jax.Device: jaxlib has no stubs

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")

# (pattern searched in the path of a leaf, mesh axes of its *last* dimensions; none: replicated). The first match
# counts; what no rule names is left to `fsdp`. Projections into heads or hidden units are sharded by output,
# projections out of them by input, so that one all-reduce per branch is all that `tensor` costs.
Rules = Sequence[tuple[str, tuple[str | None, ...]]]
RULES: Rules = (
    (r"block.*(attn/[qkv]|mlp/fc1)/kernel$", (None, "tensor")),
    (r"block.*(attn/out|mlp/fc2)/kernel$", ("tensor", None)),
    (r"(patch_embed|head/out)/kernel$", ()),  # one side is the pixels of a patch
    (r"embedding$", ()),  # a row is looked up for each label: columns would come back sharded
)

# Parameters of scanned layers are stacked along a first axis that the scan slices: never sharded.
STACKED = r"(^|/)(dual_)?blocks/"

# Below this number of elements (of one layer) the collective costs more than the memory is worth: replicated.
MIN_SHARD_SIZE = 2**14


_MOST_DEVICES = 2**20  # of an axis
_AXIS_SIZE = Check(lambda size: 1 <= size <= _MOST_DEVICES or size == -1, f"1 to {_MOST_DEVICES:,}, or -1 for the rest")


@dataclasses.dataclass(frozen=True)
class MeshConfig(Part, section="mesh"):
    """How devices share the work: sizes of the mesh axes; -1, for at most one of them: all that the others leave."""

    data: int = field(-1, "batch split, parameters copied", _AXIS_SIZE)
    fsdp: int = field(1, "batch and parameters split", _AXIS_SIZE)
    tensor: int = field(1, "attention heads and hidden units split", _AXIS_SIZE)
    decoder: Literal["replicated", "fsdp"] = field(
        "replicated", "the first stage: replicated | fsdp (split over fsdp, and gathered in each step that decodes)"
    )

    @override
    def check(self) -> None:
        if [getattr(self, axis) for axis in AXES].count(-1) > 1:
            raise InputError(f"mesh: only one axis can be -1 (the rest), got {self._text()}")

    def _text(self) -> str:
        return ", ".join(f"{axis}={getattr(self, axis)}" for axis in AXES)

    def sizes(self, num_devices: int) -> tuple[int, int, int]:
        """Axis sizes for `num_devices` devices. Raises InputError where the product is not that number."""
        sizes = [getattr(self, axis) for axis in AXES]
        if -1 in sizes:
            sizes[sizes.index(-1)] = num_devices // -math.prod(sizes)
        if math.prod(sizes) != num_devices:
            raise InputError(
                f"mesh {self._text()} does not fit {num_devices} device(s): the product of the axes must be that "
                "number (-1 = the rest)"
            )
        return tuple(sizes)


def device_memory() -> int | None:
    """Bytes that a device of this process has, a CPU's emulated ones a part each; None where it does not say."""
    devices = jax.local_devices()
    if devices[0].platform == "cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // len(devices)
    return (devices[0].memory_stats() or {}).get("bytes_limit")


def make_mesh(
    config: MeshConfig,
    devices: Sequence[Device] | None = None,
) -> Mesh:
    """Mesh with the axes `data`, `fsdp`, `tensor` over `devices` (all of them by default)."""
    devices = list(jax.devices() if devices is None else devices)
    return jax.make_mesh(config.sizes(len(devices)), AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def partition_spec(
    path: str, shape: Sequence[int], mesh: Mesh | AbstractMesh, *, rules: Rules = RULES, min_size: int = MIN_SHARD_SIZE
) -> PartitionSpec:
    """Mesh axes of one leaf, from its path ("params/blocks/attn/q/kernel") and shape.

    First the rules, whose axes hold only where they divide the size; then `fsdp`, if no rule has placed it, on the
    first dimension left that it divides. Arrays under `min_size` elements are replicated; axes of size 1 are left out.

    The first dimension of a kernel is its input. Any other choice costs as little memory, but with a sharded output the
    partitioner moves activations, whose batch is sharded over the same axis, rather than the weights.
    """
    first = 1 if re.search(STACKED, path) else 0
    rule = next((spec for pattern, spec in rules if re.search(pattern, path)), (None,))
    if not rule or math.prod(shape[first:]) < min_size:
        return PartitionSpec()
    axes: list[str | None] = [None] * len(shape)

    def fits(dim: int, axis: str) -> bool:
        return mesh.shape[axis] > 1 and shape[dim] % mesh.shape[axis] == 0

    for dim, axis in zip(range(len(shape) - 1, first - 1, -1), reversed(rule), strict=False):
        if axis is not None and fits(dim, axis):
            axes[dim] = axis
    free = [dim for dim in range(first, len(shape)) if axes[dim] is None and fits(dim, "fsdp")]
    if free and "fsdp" not in axes:
        axes[free[0]] = "fsdp"
    return PartitionSpec(*axes)


def leaf_path(path) -> str:
    """A key path of `jax.tree_util` as text: "params/blocks/attn/q/kernel"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def param_sharding(shapes, mesh: Mesh, *, rules: Rules = RULES, min_size: int = MIN_SHARD_SIZE):
    """Tree of NamedSharding for a tree of arrays or ShapeDtypeStructs: parameters alone or a whole train state."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(
            mesh, partition_spec(leaf_path(path), leaf.shape, mesh, rules=rules, min_size=min_size)
        ),
        shapes,
    )


def replicated(mesh: Mesh) -> NamedSharding:
    """Sharding of what is replicated on every device (keys, scalars, the frozen decoder)."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of arrays whose first axis is the batch: over `data` and `fsdp`, replicated over `tensor`."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def batch_shards(mesh: Mesh) -> int:
    """Number of shards of a batch."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def host_parts(processes: np.ndarray, process: int) -> tuple[int, int, list[int]]:
    """(index, count, shards): a batch comes in `count` equal parts, of which a process provides number `index`.

    processes: (shards of a batch, replicas of each), the process of every device. The part fills the listed shards.
    Processes that hold replicas of the same shards (a `tensor` axis over several hosts) provide the same part. Where
    the topology makes a process's shards lie apart, its part is spread over them: the same batch in another order.
    Raises InputError where processes hold replicas of one shard but not of all.
    """
    held = {int(p): tuple(np.flatnonzero((processes == p).any(1)).tolist()) for p in np.unique(processes)}
    distinct = sorted(set(held.values()))
    if sum(map(len, distinct)) != len(processes) or len(set(map(len, distinct))) > 1:
        raise InputError(
            f"mesh: the {len(held)} processes do not share the {len(processes)} pieces of a batch (data x fsdp) "
            "evenly: make mesh.tensor divide the devices of a host, or be a multiple of them"
        )
    mine = held[process]
    return distinct.index(mine), len(distinct), list(mine)


@functools.lru_cache
def _host_parts(mesh: Mesh) -> tuple[int, int, list[int]]:
    processes = np.vectorize(lambda device: device.process_index)(mesh.devices)
    return host_parts(processes.reshape(batch_shards(mesh), -1), jax.process_index())


def batch_part(mesh: Mesh) -> tuple[int, int]:
    """(index, count): which of how many equal parts of each batch this process reads and gives to `put_batch`."""
    return _host_parts(mesh)[:2]


def put_batch(batch, mesh: Mesh):
    """Host arrays, this process's part of each batch, to global arrays sharded over the batch axes.

    batch: tree of arrays (b, ...), b = global batch / number of parts (`batch_part`). Raises InputError where the
    global batch does not divide by the `data` and `fsdp` axes.
    """
    _, count, shards = _host_parts(mesh)

    def put(local):
        local = np.asarray(local)
        size = len(local) * count
        rows = _rows_of_shard(size, mesh)

        def shard(index):
            position = shards.index((index[0].start or 0) // rows)
            return local[position * rows : (position + 1) * rows]

        return jax.make_array_from_callback((size, *local.shape[1:]), batch_sharding(mesh), shard)

    return jax.tree.map(put, batch)


def put_global(batch, mesh: Mesh):
    """Host arrays that every process has in full, to global arrays sharded as by `put_batch`. Raises as that."""

    def put(array):
        array = np.asarray(array)
        _rows_of_shard(len(array), mesh)
        return jax.make_array_from_callback(array.shape, batch_sharding(mesh), array.__getitem__)

    return jax.tree.map(put, batch)


def _rows_of_shard(size: int, mesh: Mesh) -> int:
    rows, rest = divmod(size, batch_shards(mesh))
    if rest:
        raise InputError(
            f"batch size {size} cannot be split over data={mesh.shape['data']} x fsdp={mesh.shape['fsdp']}: "
            f"it must be a multiple of {batch_shards(mesh)}"
        )
    return rows


def put_replicated(tree, mesh: Mesh):
    """Every leaf replicated over the mesh (all processes must give equal values)."""
    if jax.process_count() == 1:
        return jax.device_put(tree, replicated(mesh))
    # device_put would compare the processes' values, a broadcast for each leaf.
    return jax.jit(lambda leaves: leaves, out_shardings=replicated(mesh))(tree)


def put_decoder(tree, mesh: Mesh, how: str):
    """The frozen first stage on the mesh, as `MeshConfig.decoder` says; see `gather_decoder`."""
    if how == "replicated":
        return put_replicated(tree, mesh)
    return jax.jit(lambda leaves: leaves, out_shardings=param_sharding(tree, mesh))(tree)


def gather_decoder(tree):
    """All-gathers what `put_decoder` has sharded; inside jit, under `jax.set_mesh(mesh)`, else the identity."""
    if not set(AXES) <= _free_axes().keys():
        return tree
    return jax.tree.map(lambda leaf: jax.lax.with_sharding_constraint(leaf, PartitionSpec()), tree)


def no_mesh():
    """Context manager that unsets the mesh, for single-device programs under somebody's `jax.set_mesh`."""
    return jax.set_mesh(Mesh(np.empty((), object), ()))


def constrain_params(tree):
    """Constrains leaves shaped like parameters to `param_sharding`; inside jit, under `jax.set_mesh(mesh)`."""
    mesh = jax.sharding.get_abstract_mesh()
    if not set(AXES) <= _free_axes().keys():
        return tree
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: jax.lax.with_sharding_constraint(leaf, partition_spec(leaf_path(path), leaf.shape, mesh)),
        tree,
    )


def shard_map_heads(function):
    """`jax.shard_map` of a function of arrays (B, N, heads, size), to one such array, over batch and heads.

    For kernels that the partitioner cannot partition. Inside jit, under `jax.set_mesh(mesh)`: the batch is sharded over
    the batch axes and heads over `tensor`. An axis that does not divide them is left out, so that its devices compute
    replicas; without a mesh the function is called as it is.
    """

    def call(*arrays):
        sizes = _free_axes()
        if not sizes:
            return function(*arrays)

        def fitting(names, dim):
            axes = tuple(axis for axis in names if axis in sizes)
            return axes if axes and arrays[0].shape[dim] % math.prod(sizes[axis] for axis in axes) == 0 else None

        spec = PartitionSpec(fitting(BATCH_AXES, 0), None, fitting(("tensor",), 2), None)
        # The check of what varies over which axis does not know kernels.
        mapped = jax.shard_map(function, in_specs=spec, out_specs=spec, axis_names=frozenset(sizes), check_vma=False)
        return mapped(*arrays)

    return call


def constrain_batch(tree):
    """Constrains the first axis of every leaf, and of its gradient, to the batch axes; inside jit, under a mesh.

    For activations where there are few of them (context tokens, conditioning vectors): the partitioner would rather
    move those than the weights that they meet, and pays for it later. No constraint where no mesh is set or the batch
    does not divide; the other dimensions are left to the partitioner.
    """
    axes, shards = tuple(axis for axis in BATCH_AXES if axis in _free_axes()), context_shards()

    def constrain(leaf):
        if shards == 1 or leaf.shape[0] % shards:
            return leaf
        free = (PartitionSpec.UNCONSTRAINED,) * (leaf.ndim - 1)
        return jax.lax.with_sharding_constraint(leaf, PartitionSpec(axes, *free))

    return jax.tree.map(constrain, tree)


def context_shards() -> int:
    """Number of shards of a batch on the mesh that is set (`jax.set_mesh`); 1 where none is."""
    return math.prod(size for axis, size in _free_axes().items() if axis in BATCH_AXES)


def shard_map_batch(function):
    """`jax.shard_map` of `function(replicated, *rows) -> (rows, replicated)` over the batch axes of the mesh.

    Leaves of `rows` are sharded along their first axis, over `data` and `fsdp`; the others are replicated. There is no
    collective inside. The function itself is returned where no mesh is set or the mesh has one device. Not to be
    differentiated through: take gradients inside.

    Raises InputError where a first axis does not divide into the shards.
    """
    axes = _free_axes()
    if math.prod(axes.values()) == 1:
        return function
    by_rows, everywhere = PartitionSpec(tuple(axis for axis in axes if axis in BATCH_AXES)), PartitionSpec()

    def call(replicated, *rows):
        for size in {leaf.shape[0] for leaf in jax.tree.leaves(rows)}:
            if size % context_shards():
                raise InputError(f"a batch of {size} cannot be split into {context_shards()} equal parts (data x fsdp)")
        return jax.shard_map(
            function,
            in_specs=(everywhere, *(by_rows for _ in rows)),
            out_specs=(by_rows, everywhere),
            axis_names=frozenset(axes),
            check_vma=False,  # types of axes would have to be kept by every loop inside; nothing here needs them
        )(replicated, *rows)

    return call


def _free_axes() -> dict[str, int]:
    """Axes of the mesh that is set, and their sizes, but for those that an enclosing `shard_map` has made manual."""
    mesh = jax.sharding.get_abstract_mesh()
    types = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return {axis: mesh.shape[axis] for axis, kind in types if kind != AxisType.Manual}


def splits_weights() -> bool:
    """Inside jit: whether the mesh that is set shards parameters over `fsdp`, and leaves that to the partitioner."""
    mesh = jax.sharding.get_abstract_mesh()
    types = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    return all(types.get(axis) == AxisType.Auto for axis in AXES) and mesh.shape["fsdp"] > 1


def gather_block_params(params):
    """All-gathers the parameters of one block over `fsdp`; inside jit, where `splits_weights()`.

    The axis that shards the weights shards the batch, too. Left to itself the partitioner gathers the activations of
    all images rather than the weights: 70 times the bytes in a step of `paper796` on 16 TPU chips
    (docs/scaling.md).
    """
    mesh = jax.sharding.get_abstract_mesh()

    def gather(path, leaf):
        sharded = partition_spec(f"block/{leaf_path(path)}", leaf.shape, mesh)
        gathered = PartitionSpec(*(axis if axis == "tensor" else None for axis in sharded))
        return jax.lax.with_sharding_constraint(leaf, gathered)

    return jax.tree_util.tree_map_with_path(gather, params)
