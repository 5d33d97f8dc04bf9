"""What a run would need on machines that are not here: memory, operations, exchanges, time.

The step is compiled ahead of time for named TPUs or GPUs by their own compiler, on a CPU. Sizes,
operations, bytes and exchanges are those of the compiled program. Times are a projection: every
kernel is given the larger of its operations at the chip's peak and its bytes at the memory's
bandwidth, and exchanges are added as if nothing ran beside them. Nothing was measured on a chip.
"""

import dataclasses
import re
import time
from collections.abc import Callable
from typing import Any

import jax

from sss_jax import flops, roofline
from sss_jax.compilers import devices_of
from sss_jax.errors import ConfigError
from sss_jax.estimate_report import Estimate, Memory, Projection
from sss_jax.hlo import Collective, Cost, Program
from sss_jax.models.presets import Kernels
from sss_jax.models.sss import kernels_for
from sss_jax.options import Options
from sss_jax.ssl.propagation import is_unrolled
from sss_jax.topology import Topology, parse
from sss_jax.train import sharding
from sss_jax.train.mesh import make_mesh_step
from sss_jax.train.setup import Setup, batch_fields, key_shape, set_up
from sss_jax.train.step import make_train_step

_LEAST_EFFORT: dict[str, Any] = {"exec_time_optimization_effort": -1.0}
# Without a GPU nothing is tuned, and the compiler's own products then do not take every shape.
_CUBLAS = {"xla_gpu_enable_triton_gemm": False}
# Two ways in which the compiler says what it would take, and what there is.
_FULL = re.compile(
    r"(?:Used ([\d.]+)([KMG]) of|temporaries \(([\d.]+)([KMG])\)).*?([\d.]+)([KMG])", re.DOTALL
)
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}


def estimate(
    options: Options,
    name: str,
    *,
    clips: int | None = None,
    quick: bool = False,
    report: Callable[[str], None] = lambda line: None,
) -> Estimate:
    """Compile the step of a configuration for a topology and read off what it takes.

    Args:
        options: all settings.
        name: topology, such as `v5e-16`, `v5p-64`, `2xv5e-16`, `h100-8`. Where there is no
            compiler for GPUs, only what needs none is returned for them.
        clips: labelled and unlabelled clips per device; by default the configuration's batch.
        quick: compile with the least effort, several times as fast.
        report: receives lines of progress.

    Raises:
        ConfigError: an unknown topology, a mesh or batch that does not fit it, or no TPU compiler.
    """
    topology = parse(name)
    axes = sharding.axis_sizes(options.mesh, topology.devices)
    shards = topology.devices // options.mesh.context
    options = options if clips is None else with_clips(options, clips * shards)
    options = _for_platform(options, "tpu" if topology.is_tpu else "gpu")
    sharding.check_batches(options.train, shards, semi=options.semi.enabled)
    devices = _devices(topology, report)  # before JAX looks for those that are here
    setup = set_up(options)
    plain = _counted(setup, options, name, topology, axes)
    if not devices:
        return plain
    report(f"compiling for {name}, {options.train.labelled_batch // shards} clips a device ...")
    began = time.monotonic()
    how = (_LEAST_EFFORT if quick else {}) | ({} if topology.is_tpu else _CUBLAS)
    compiled = _compile(setup, options, devices, how)
    seconds = round(time.monotonic() - began, 1)
    report(f"compiled in {seconds:.0f} s")
    plain = dataclasses.replace(plain, compile_s=seconds, quick=quick)
    if isinstance(compiled, Memory):
        return dataclasses.replace(plain, memory=compiled)
    return _read(plain, compiled, topology)


def largest(
    options: Options,
    name: str,
    *,
    quick: bool = False,
    report: Callable[[str], None] = lambda line: None,
) -> list[Estimate]:
    """Find the largest number of clips per device that fits, by compiling.

    Memory grows by almost the same with every clip, so two sizes foretell where it ends; that
    size and the next one are then compiled.

    Returns:
        The estimates in the order they were made; the last one that fits is the largest.
    """
    made: dict[int, Memory | None] = {}
    found = []

    def fits(clips: int) -> bool:
        found.append(estimate(options, name, clips=clips, quick=quick, report=report))
        made[clips] = memory = found[-1].memory
        return memory is not None and memory.fits

    low, high, clips = 0, 0, 1
    while not high or high - low > 1:
        low, high = (clips, high) if fits(clips) else (low, clips)
        clips = _foretold(made, low, high)
    return found


def _foretold(made: dict[int, Memory | None], low: int, high: int) -> int:
    """Guess the most clips that fit, above `low`, and below `high` unless that is 0: unknown."""
    (first, memory), *_, (last, other) = sorted(made.items())[0], sorted(made.items())[-1]
    guess = 2 * low
    if memory and other and last > first and other.total > memory.total:
        slope = (other.total - memory.total) / (last - first)
        guess = first + int((memory.capacity - memory.total) / slope)
    return min(max(guess, low + 1), high - 1 if high else max(guess, low + 1))


def with_clips(options: Options, clips: int) -> Options:
    """Set both streams to `clips` clips in the global batch."""
    train = dataclasses.replace(options.train, labelled_batch=clips, unlabelled_batch=clips)
    return dataclasses.replace(options, train=train)


def _devices(topology: Topology, report: Callable[[str], None]) -> list[Any]:
    """Devices to compile for; of GPUs none, which is said, where there is no compiler."""
    try:
        return devices_of(topology)
    except ConfigError as error:
        if topology.is_tpu:
            raise
        report(str(error))
        return []


def _counted(
    setup: Setup, options: Options, name: str, topology: Topology, mesh: dict[str, int]
) -> Estimate:
    """What needs no compiler."""
    train, devices = options.train, topology.devices
    shards = devices // options.mesh.context
    traced = _trace(setup, options)
    lean = _without_remat(options)
    model = traced if lean == options else _trace(set_up(lean), lean)
    return Estimate(
        topology=name,
        chip=topology.chip.name,
        devices=devices,
        mesh=mesh,
        clips=(
            train.labelled_batch // shards,
            train.unlabelled_batch // shards if options.semi.enabled else 0,
        ),
        slices=options.data.clip_slices,
        parameters=sum(leaf.size for leaf in jax.tree.leaves(setup.state["params"])),
        model_flops=flops.operations(model, again=False) // devices,
        program_flops=flops.operations(traced) // devices,
        fill=roofline.fill(flops.kernels(traced), topology),
    )


def _trace(setup: Setup, options: Options) -> Any:
    step = make_train_step(setup.model, options, setup.optimizer)
    return flops.trace(step, setup.state, batch_fields(options), key_shape())


def _for_platform(options: Options, platform: Kernels) -> Options:
    """Choose what is left to the platform as that of the topology, not of this machine, would."""
    kernels = kernels_for(options, platform)
    unroll = "on" if is_unrolled(options, platform) else "off"
    model = dataclasses.replace(options.model, kernels=kernels)
    memory = dataclasses.replace(options.memory, unroll=unroll)
    return dataclasses.replace(options, model=model, memory=memory)


def _without_remat(options: Options) -> Options:
    # The kernels' operations include what they compute again.
    model = dataclasses.replace(options.model, remat=False, kernels="off")
    memory = dataclasses.replace(options.memory, remat=False)
    dfe = dataclasses.replace(options.dfe, remat=False)
    return dataclasses.replace(options, model=model, memory=memory, dfe=dfe)


def _compile(setup: Setup, options: Options, devices: list[Any], how: dict[str, Any]) -> Any:
    """Return the compiled step, or the memory that it would take where it does not fit."""
    mesh = sharding.make_mesh(options.mesh, devices)
    fields, state = batch_fields(options), setup.state
    step, _, _ = make_mesh_step(setup.model, options, setup.optimizer, state, fields, mesh)
    lowered = step.lower(state, fields, key_shape())
    try:
        return lowered.compile(how)
    except jax.errors.JaxRuntimeError as error:
        full = _FULL.search(str(error))
        if full is None:
            raise
        sizes = [group for group in full.groups() if group is not None]
        used, capacity = (int(float(sizes[i]) * _UNITS[sizes[i + 1]]) for i in (0, 2))
        return Memory(state=0, temporary=used, total=used, capacity=capacity)


def _read(plain: Estimate, compiled: Any, topology: Topology) -> Estimate:
    program = Program(compiled.as_text())
    costs, collectives = program.costs(), program.collectives()
    sizes, xla = compiled.memory_analysis(), compiled.cost_analysis() or {}
    state = sizes.argument_size_in_bytes
    temporary = sizes.temp_size_in_bytes + sizes.generated_code_size_in_bytes
    fresh = sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    return dataclasses.replace(
        plain,
        memory=Memory(state, temporary, state + temporary + fresh, topology.chip.memory),
        xla={
            "flops": xla.get("flops", 0.0),
            "bytes": xla.get("bytes accessed", 0.0),
            "flops_with_loops": float(sum(c.flops * c.times for c in costs)),
            "bytes_with_loops": float(sum(c.nbytes * c.times for c in costs)),
        },
        exchanges=tuple(roofline.by_source(collectives)),
        parts=tuple(roofline.by_part(costs, topology)),
        host_calls=tuple(program.host_calls()),
        types=tuple(sorted(program.types())),
        products=tuple(_shares(program.products())),
        projection=_project(plain, costs, collectives, topology),
    )


def _shares(products: dict[tuple[str, str], int]) -> list[dict[str, Any]]:
    """Products by what they multiply, largest share first."""
    total = sum(products.values()) or 1
    rows = [
        {"types": types, "precision": precision, "share": flops / total}
        for (types, precision), flops in products.items()
    ]
    return sorted(rows, key=lambda row: -row["share"])


def _project(
    plain: Estimate, costs: list[Cost], collectives: list[Collective], topology: Topology
) -> Projection:
    chip = topology.chip
    kernels = sum(roofline.roof(cost, topology) * cost.times for cost in costs)
    exchange = sum(roofline.exchange_time(one, topology) * one.times for one in collectives)
    step = kernels + exchange
    shards = plain.devices // plain.mesh["context"]
    return Projection(
        compute=sum(c.flops * c.times for c in costs) / chip.flops,
        memory=sum(c.nbytes * c.times for c in costs) / chip.bandwidth,
        kernels=kernels,
        exchange=exchange,
        mfu=plain.model_flops / (step * chip.flops),
        slices_per_s=sum(plain.clips) * plain.slices * shards / step,
    )
