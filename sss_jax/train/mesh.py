"""Drivers of the step: one pure function, over a mesh (default) or under pmap."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sss_jax.axes import PyTree
from sss_jax.compiling import LARGE_IMAGE, compiler_options
from sss_jax.errors import ConfigError
from sss_jax.models.sss import SSSModel
from sss_jax.options import MeshOptions, Options
from sss_jax.train import sharding
from sss_jax.train.hosts import part_of_batch
from sss_jax.train.setup import batch_fields
from sss_jax.train.sharding import CLIPS, CONTEXT, DATA
from sss_jax.train.step import (
    Exchange,
    GradientFunction,
    Gradients,
    TrainStep,
    make_gradients,
    make_train_step,
)


class Driver(NamedTuple):
    """A compiled step with the functions that place its arguments.

    Attributes:
        step: `step(state, batch, key)`; donates the state.
        create: calls a function without arguments that makes a state, where the step wants it.
        target: shapes of a state and, over a mesh, where the step wants it: what a checkpoint is
            restored to.
        place_state: puts a host or single-device state there; every process has all of it. What
            was restored to `target` is there already and is not copied.
        place_batch: puts this process's part of a host batch where the step wants it.
        place_key: the same for the key.
        fetch: a state with the shapes of one copy, still spread over devices where it is cut.
        local: a part of such a state, whole, on one device of this process.
        part: (i, n): this process reads part i of n of every batch.
    """

    step: TrainStep
    create: Callable[[Callable[[], PyTree]], PyTree]
    target: PyTree
    place_state: Callable[[PyTree], PyTree]
    place_batch: Callable[[PyTree], PyTree]
    place_key: Callable[[PyTree], PyTree]
    fetch: Callable[[PyTree], PyTree]
    local: Callable[[PyTree], PyTree]
    part: tuple[int, int] = (0, 1)


def make_driver(
    model: SSSModel,
    options: Options,
    optimizer: optax.GradientTransformation,
    state: PyTree,
    devices: list[jax.Device] | None = None,
) -> Driver:
    """Return the driver named by `train.parallel` over `devices` (default: all).

    Args:
        model: the network.
        options: all settings.
        optimizer: transformation of the gradients.
        state: the train state, or its shapes.
        devices: the devices of all processes.

    Raises:
        ConfigError: a batch or a mesh that does not fit the devices.
    """
    devices = devices or jax.devices()
    if options.train.parallel == "pmap":
        return _pmap_driver(model, options, optimizer, state, devices)
    return _mesh_driver(model, options, optimizer, state, devices)


def make_mesh_step(
    model: SSSModel,
    options: Options,
    optimizer: optax.GradientTransformation,
    state: PyTree,
    batch: PyTree,
    mesh: Mesh,
) -> tuple[Any, PyTree, PyTree]:
    """Return the jitted step over a mesh, and the shardings of its state and its batch.

    The gradient is taken in `shard_map`, where every exchange between devices is written down;
    the optimizer and the teacher follow array by array as the state lies. `state` and `batch` may
    be shapes, and the mesh one of devices that are not here.
    """
    cuts = sharding.specs(state, mesh)
    placed = sharding.place(cuts, mesh)
    rows = sharding.place(sharding.batch_specs(batch), mesh)
    replicated = NamedSharding(mesh, P())
    large = options.model.image_size >= LARGE_IMAGE
    gradients = _over_mesh(model, options, mesh, cuts, sharding.batch_specs(batch, rows=False))
    step = jax.jit(
        make_train_step(model, options, optimizer, gradients=gradients),
        in_shardings=(placed, rows, replicated),
        out_shardings=(placed, replicated),
        donate_argnums=0,
        compiler_options=compiler_options(mesh.devices.flat[0].platform) if large else {},
    )
    return step, placed, rows


def _over_mesh(
    model: SSSModel, options: Options, mesh: Mesh, cuts: PyTree, batch_cuts: PyTree
) -> GradientFunction:
    """Wrap the gradient: clips and parameters by hand, rows of images by the compiler."""
    net = cuts["ema"] if options.semi.teacher == "ema" else cuts["params"]["net"]
    held = {"params": cuts["params"], "ema": net}
    exchange = Exchange(
        whole=lambda shards: sharding.whole(shards, held, options.model.dtype),
        reduce=lambda gradients: sharding.reduce(gradients, cuts["params"]),
    )
    everywhere: Any = P()
    # A compiler that need not split rows is left nothing to decide.
    by_hand = set(CLIPS) if mesh.shape[CONTEXT] > 1 else set(mesh.axis_names)
    return jax.shard_map(
        make_gradients(model, options, CLIPS, exchange),
        mesh=mesh,
        axis_names=by_hand,
        in_specs=(cuts["params"], net, P(), batch_cuts, P(), P()),
        out_specs=Gradients(cuts["params"], everywhere, everywhere, everywhere),
        check_vma=False,
    )


def _mesh_driver(
    model: SSSModel,
    options: Options,
    optimizer: optax.GradientTransformation,
    state: PyTree,
    devices: list[jax.Device],
) -> Driver:
    mesh = sharding.make_mesh(options.mesh, devices)
    shards = mesh.shape[DATA] * mesh.shape[sharding.FSDP]
    sharding.check_batches(options.train, shards, semi=options.semi.enabled)
    fields = batch_fields(options)
    step, placed, rows = make_mesh_step(model, options, optimizer, state, fields, mesh)
    replicated = NamedSharding(mesh, P())
    gather = jax.jit(lambda tree: tree, out_shardings=replicated)

    def place_batch(batch: PyTree) -> PyTree:
        return jax.tree.map(jax.make_array_from_process_local_data, rows, batch)

    def place_key(key: jax.Array) -> jax.Array:
        return jax.random.wrap_key_data(sharding.spread(jax.random.key_data(key), replicated))

    def local(tree: PyTree) -> PyTree:
        return jax.tree.map(lambda x: x.addressable_shards[0].data, gather(tree))

    return Driver(
        step,
        lambda make: jax.jit(make, out_shardings=placed)(),
        jax.tree.map(_shape, state, placed),
        lambda state: jax.tree.map(sharding.spread, state, placed),
        place_batch,
        place_key,
        lambda state: state,
        local,
        part_of_batch(NamedSharding(mesh, P(CLIPS)), shards),
    )


def _shape(x: Any, sharding: NamedSharding | None = None) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def _pmap_driver(
    model: SSSModel,
    options: Options,
    optimizer: optax.GradientTransformation,
    state: PyTree,
    devices: list[jax.Device],
) -> Driver:
    count = len(devices)
    if options.mesh != MeshOptions() or jax.process_count() > 1:
        raise ConfigError(
            "train.parallel=pmap copies the state to every device of one process; "
            "use train.parallel=mesh for mesh.* and for several processes"
        )
    sharding.check_batches(options.train, count, semi=options.semi.enabled)
    step = jax.pmap(
        make_train_step(model, options, optimizer, axis=DATA),
        axis_name=DATA,
        in_axes=(0, 0, 0),
        out_axes=(0, None),
        donate_argnums=0,
        devices=devices,
    )
    spread = NamedSharding(sharding.make_mesh(options.mesh, devices), P(DATA))

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

    def create(make: Callable[[], PyTree]) -> PyTree:
        return copies(jax.jit(make)())

    target = jax.tree.map(_shape, state)
    return Driver(step, create, target, copies, place_batch, copies, fetch, lambda tree: tree)
