"""Where the arrays of a run lie on the mesh, by one small table of rules.

The mesh has three axes. Clips are spread over `data` and `fsdp`; parameters, teacher and optimizer
state are cut over `fsdp`; the rows of every image over `context`.
"""

import re
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, Sharding
from jax.sharding import PartitionSpec as P

from sss_jax.axes import PyTree
from sss_jax.errors import ConfigError
from sss_jax.options import MeshOptions, TrainOptions
from sss_jax.parallel import pmean

DATA, FSDP, CONTEXT = "data", "fsdp", "context"
CLIPS = (DATA, FSDP)
"""Axes over which clips are spread."""

RULES: tuple[tuple[str, tuple[int, ...]], ...] = (
    (r"(^|/)bank/", ()),
    (r"kernel$", (-1, -2)),
    (r"(embed|embedding|tokens?|matrix)\w*$", (-1,)),
    (r"", ()),
)
"""Path of an array, and the axes of which the first that divides evenly is cut over `fsdp`.

The first match holds. Kernels are cut along their output channels, else their input channels.
Biases, norms and scalars are whole on every device, and so is what is shorter than `LEAST`.
"""
LEAST = 2**12
"""Elements from which an array is cut: sending less would cost more than it saves."""

IMAGE_FIELDS = ("image", "label")


def axis_sizes(options: MeshOptions, count: int) -> dict[str, int]:
    """Return the size of every axis over `count` devices.

    Raises:
        ConfigError: the axes do not multiply to the number of devices.
    """
    inner = options.fsdp * options.context
    data = count // inner if options.data == -1 else options.data
    if data == 0 or data * inner != count:
        raise ConfigError(
            f"mesh.data={options.data} x mesh.fsdp={options.fsdp} x mesh.context={options.context} "
            f"does not make {count} devices; mesh.data=-1 takes what the others leave"
        )
    return {DATA: data, FSDP: options.fsdp, CONTEXT: options.context}


def make_mesh(options: MeshOptions, devices: list[jax.Device]) -> Mesh:
    """Arrange devices, in the order of slices and processes, as data x fsdp x context.

    Neighbours in `fsdp` and `context` are neighbours in that order, so that with several slices of
    a TPU the slow network between them carries the gradients of `data` alone.

    Raises:
        ConfigError: the axes do not multiply to the number of devices.
    """
    sizes = axis_sizes(options, len(devices))
    axes = np.array(sorted(devices, key=_place)).reshape(*sizes.values())
    return Mesh(axes, tuple(sizes), axis_types=(AxisType.Auto,) * 3)


def _place(device: jax.Device) -> tuple[int, int, int]:
    return getattr(device, "slice_index", None) or 0, device.process_index, device.id


def check_batches(options: TrainOptions, shards: int, *, semi: bool) -> None:
    """Refuse batches that `shards` groups of devices cannot share evenly.

    Raises:
        ConfigError: naming the batch and the multiple it needs.
    """
    each = shards * options.accumulate
    for name in ("labelled_batch", "unlabelled_batch")[: 1 + semi]:
        batch = getattr(options, name)
        if batch % each:
            raise ConfigError(
                f"train.{name}={batch} cannot be shared by {shards} devices in "
                f"train.accumulate={options.accumulate} parts; make it a multiple of {each}"
            )


def specs(tree: PyTree, mesh: Mesh) -> PyTree:
    """Choose how every array of a state is cut.

    Args:
        tree: state, or a part of it, as arrays or shapes.
        mesh: the devices.
    """
    ways = mesh.shape[FSDP]

    def spec(path: tuple[Any, ...], leaf: Any) -> P:
        axis = _cut(_name(path), leaf.shape, ways)
        return P() if axis is None else P(*(FSDP if i == axis else None for i in range(axis + 1)))

    return jax.tree_util.tree_map_with_path(spec, tree)


def _name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _cut(path: str, shape: tuple[int, ...], ways: int) -> int | None:
    """Axis of an array that is cut in `ways` parts, counted from the front."""
    if ways == 1 or np.prod(shape) < LEAST:
        return None
    axes = next(axes for pattern, axes in RULES if re.search(pattern, path))
    fitting = (len(shape) + a for a in axes if len(shape) >= -a and shape[a] % ways == 0)
    return next(fitting, None)


def place(tree: PyTree, mesh: Mesh) -> PyTree:
    """Turn specs into shardings on a mesh."""
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), tree, is_leaf=_is_spec)


def spread(array: Any, where: Sharding) -> jax.Array:
    """Cut an array that every process has whole; one that lies there already is returned."""
    if isinstance(array, jax.Array) and array.sharding == where:
        return array
    host = jax.device_get(array)
    return jax.make_array_from_callback(host.shape, where, lambda index: host[index])


def batch_specs(batch: PyTree, *, rows: bool = True) -> PyTree:
    """Choose how the arrays of a batch are cut: clips, and with `rows` the rows of images too."""

    def spec(path: tuple[Any, ...], _: Any) -> P:
        name = path[-1].key
        return P(CLIPS, None, CONTEXT) if rows and name in IMAGE_FIELDS else P(CLIPS)

    return jax.tree_util.tree_map_with_path(spec, batch)


@jax.named_scope("gather_parameters")
def whole(shards: PyTree, cuts: PyTree, dtype: str) -> PyTree:
    """Put parameters together from what the devices of `fsdp` hold; inside `shard_map`.

    Kernels take part in the computation in its own type alone, so they are sent in it: the same
    numbers, and in bfloat16 half of the bytes. They arrive in the type they are held in, so that
    gradients of several uses still add up in float32.

    Args:
        shards: the parameters of a device.
        cuts: their specs.
        dtype: type of the computation.
    """

    def join(path: tuple[Any, ...], spec: P, leaf: jax.Array) -> jax.Array:
        axis = _cut_axis(spec)
        if axis is None:
            return leaf
        sent = leaf.astype(dtype) if _name(path).endswith("kernel") else leaf
        return jax.lax.all_gather(sent, FSDP, axis=axis, tiled=True).astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(join, cuts, shards, is_leaf=_is_spec)


@jax.named_scope("reduce_gradients")
def reduce(gradients: PyTree, cuts: PyTree) -> PyTree:
    """Average whole gradients over all clips, each device keeping what it holds of the parameters.

    Inside `shard_map`. What is cut goes through one reduce-scatter and an average over `data`.
    """

    def mean(spec: P, leaf: jax.Array) -> jax.Array:
        axis = _cut_axis(spec)
        if axis is None:
            return pmean(leaf, CLIPS)
        own = jax.lax.psum_scatter(leaf, FSDP, scatter_dimension=axis, tiled=True)
        return pmean(own, DATA) / jax.lax.axis_size(FSDP)

    return jax.tree.map(mean, cuts, gradients, is_leaf=_is_spec)


def _cut_axis(spec: P) -> int | None:
    return next((i for i, name in enumerate(spec) if name == FSDP), None)


def _is_spec(x: Any) -> bool:
    return isinstance(x, P)
