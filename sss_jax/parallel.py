"""Collectives that are the identity where there is no device axis.

The same pure functions run in two ways. Under plain `jit` they see the global batch
(`axis=None`). Under `pmap` or `shard_map` each device sees its own rows and `axis` names the
device axis; device i holds the rows [i * b, (i + 1) * b) of the global batch.

A loss is a ratio of sums over the global batch. The mean of per-device ratios is another number
as soon as the devices' denominators differ (padding slices, confident pixels, classes present),
so numerators and denominators are summed over the axis separately, and every device holds the
global loss. Autodiff on a device then gives the gradient of n times that loss with respect to the
device's own copy of the parameters; `pmean` of the gradients is the gradient of the global loss.
"""

import jax
import jax.numpy as jnp

from sss_jax.axes import Array, Int, PyTree

__all__ = ["Axis", "axis_index", "axis_size", "gather", "pmean", "psum", "rows", "swap_neighbours"]

Axis = str | tuple[str, ...]
"""Name of the device axis; several names together count as one axis, the last one fastest."""


def psum(tree: PyTree, axis: Axis | None) -> PyTree:
    """Sum every leaf over the device axis."""
    return tree if axis is None else jax.lax.psum(tree, axis)


def pmean(tree: PyTree, axis: Axis | None) -> PyTree:
    """Average every leaf over the device axis."""
    return tree if axis is None else jax.lax.pmean(tree, axis)


def gather(tree: PyTree, axis: Axis | None) -> PyTree:
    """Join every leaf's rows of all devices to the global batch."""
    return tree if axis is None else jax.lax.all_gather(tree, axis, tiled=True)


def axis_size(axis: Axis | None) -> int:
    """Number of devices on the axis."""
    return 1 if axis is None else jax.lax.axis_size(axis)


def axis_index(axis: Axis | None) -> Int[Array, ""]:
    """Position of this device on the axis."""
    return jnp.zeros((), jnp.int32) if axis is None else jax.lax.axis_index(axis)


def rows(batch: int, axis: Axis | None) -> Int[Array, " B"]:
    """Places, in the global batch, of the `batch` rows held here."""
    return axis_index(axis) * batch + jnp.arange(batch, dtype=jnp.int32)


@jax.named_scope("cutmix_partner")
def swap_neighbours(tree: PyTree, axis: Axis | None) -> PyTree:
    """Exchange rows 0 and 1, 2 and 3, ... of the global batch; the last of an odd number stays.

    A device with an even number of rows has both of every pair. With an odd number it sends one
    row to a device beside it, whatever the number of devices.
    """
    return jax.tree.map(lambda x: _swap(x, axis), tree)


def _swap(x: Array, axis: Axis | None) -> Array:
    if len(x) % 2 == 0:
        return _swap_pairs(x)
    second = axis_index(axis) % 2 == 1  # its first row belongs to the device before it
    edge = jnp.where(second, x[:1], x[-1:])
    if axis is not None:
        last = axis_size(axis) - 1
        edge = jax.lax.ppermute(edge, axis, [(i, min(i ^ 1, last)) for i in range(last + 1)])
    first_of_pair = jnp.concatenate([_swap_pairs(x[:-1]), edge])
    second_of_pair = jnp.concatenate([edge, _swap_pairs(x[1:])])
    return jnp.where(second, second_of_pair, first_of_pair)


def _swap_pairs(x: Array) -> Array:
    return jnp.flip(x.reshape(len(x) // 2, 2, *x.shape[1:]), 1).reshape(x.shape)
