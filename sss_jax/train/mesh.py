"""Drivers of the step: one pure function, over a mesh (default) or under pmap."""

import functools
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sss_jax.axes import PyTree
from sss_jax.compiling import LARGE_IMAGE, compiler_options
from sss_jax.errors import ConfigError
from sss_jax.models.sss import SSSModel
from sss_jax.options import Options
from sss_jax.train.step import TrainStep, make_train_step

AXIS = "data"


class Driver(NamedTuple):
    """A compiled step with the functions that place its arguments.

    `step(state, batch, key)` donates the state; `place_state` copies a host or single-device state
    to every device, `place_batch` cuts a host batch along its first axis, `fetch` brings a state
    back to one copy.
    """

    step: TrainStep
    place_state: Any
    place_batch: Any
    place_key: Any
    fetch: Any


def make_driver(
    model: SSSModel,
    options: Options,
    optimizer: optax.GradientTransformation,
    devices: list[jax.Device] | None = None,
) -> Driver:
    """Return the driver named by `train.parallel` over `devices` (default: all).

    Raises:
        ConfigError: a batch that the devices cannot share evenly.
    """
    devices = devices or jax.devices()
    _check_divisible(options, len(devices))
    make = _pmap_driver if options.train.parallel == "pmap" else _mesh_driver
    return make(model, options, optimizer, devices)


def data_mesh(devices: list[jax.Device]) -> Mesh:
    """Return a mesh with the one axis `data` over these devices."""
    return Mesh(np.array(devices), (AXIS,), axis_types=(AxisType.Auto,))


def _mesh_driver(
    model: SSSModel,
    options: Options,
    optimizer: optax.GradientTransformation,
    devices: list[jax.Device],
) -> Driver:
    mesh = data_mesh(devices)
    replicated, split = NamedSharding(mesh, P()), NamedSharding(mesh, P(AXIS))
    large = options.model.image_size >= LARGE_IMAGE
    step = jax.jit(
        make_train_step(model, options, optimizer),
        in_shardings=(replicated, split, replicated),
        out_shardings=(replicated, replicated),
        donate_argnums=0,
        compiler_options=compiler_options() if large else {},
    )
    replicate = functools.partial(jax.device_put, device=replicated)

    def place_batch(batch: PyTree) -> PyTree:
        return jax.tree.map(lambda x: jax.make_array_from_process_local_data(split, x), batch)

    return Driver(step, replicate, place_batch, replicate, lambda state: state)


def _pmap_driver(
    model: SSSModel,
    options: Options,
    optimizer: optax.GradientTransformation,
    devices: list[jax.Device],
) -> Driver:
    count = len(devices)
    mesh = data_mesh(devices)
    step = jax.pmap(
        make_train_step(model, options, optimizer, axis=AXIS),
        axis_name=AXIS,
        in_axes=(0, 0, 0),
        out_axes=(0, None),
        donate_argnums=0,
        devices=devices,
    )
    spread = NamedSharding(mesh, P(AXIS))

    def copies(tree: PyTree) -> PyTree:
        def copy(x: Any) -> jax.Array:
            return jax.device_put(jax.numpy.broadcast_to(x, (count, *x.shape)), spread)

        return jax.tree.map(copy, tree)

    def place_batch(batch: PyTree) -> PyTree:
        def shards(x: np.ndarray) -> jax.Array:
            return jax.device_put(x.reshape(count, -1, *x.shape[1:]), spread)

        return jax.tree.map(shards, batch)

    def fetch(state: PyTree) -> PyTree:
        return jax.tree.map(lambda x: x.addressable_shards[0].data[0], state)

    return Driver(step, copies, place_batch, copies, fetch)


def _check_divisible(options: Options, devices: int) -> None:
    train = options.train
    for name in ("labelled_batch", "unlabelled_batch"):
        batch = getattr(train, name)
        if batch % devices:
            raise ConfigError(
                f"train.{name}={batch} cannot be shared by {devices} devices; "
                f"make it a multiple of {devices}"
            )
