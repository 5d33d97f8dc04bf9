"""Counters that are equal on every machine: `python -m sss_jax.benchmarks.counters --write FILE`.

Times on a shared machine wander by tens of per cent; operations, bytes, kernels and exchanges do
not. The tests hold them against a file in the repository. Three kinds of rows, of a small network:
the traced step of every method over 8 devices, parts of the step compiled for one device, and the
compiled step over 8 devices.
"""

import argparse
import dataclasses
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jaxlib

from sss_jax import config, flops
from sss_jax.axes import PyTree
from sss_jax.benchmarks import result
from sss_jax.benchmarks.step_parts import step_parts
from sss_jax.hlo import Program
from sss_jax.models.presets import preset
from sss_jax.models.sss import SSSModel
from sss_jax.options import Options
from sss_jax.train import sharding
from sss_jax.train.mesh import batch_fields, make_mesh_step
from sss_jax.train.optimizer import make_optimizer
from sss_jax.train.setup import Setup
from sss_jax.train.state import init_all_params, state_of
from sss_jax.train.step import root_key

DEVICES = 8
FLAGS = (
    f"--xla_force_host_platform_device_count={DEVICES} "
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
    "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
)
"""Settings of XLA that the counters belong to; those of the tests."""
METHODS = ("supervised", "fixmatch", "unimatch_v2", "sss")
PARTS = (
    "encoder forward and backward",
    "DFE forward and backward",
    "PCSW",
    "decoder forward, no memory",
    "losses",
)
EXACT = ("flops", "xla_flops", "collectives", "collective_bytes")
SLACK = 1.02
"""How far bytes, temporary memory and fusions may grow without a new file."""
_EXCHANGES = ("psum", "psum_invariant", "all_gather", "reduce_scatter", "ppermute", "all_to_all")
_SIZES = ("model.image_size=32", "data.clip_slices=2", "train.labelled_batch=8")
_ALONE = ("memory.kind=none",)
_SMALL: dict[str, Any] = {
    "embed_dim": 16,
    "depths": (1, 1, 1, 1),
    "global_blocks": (2, 3),
    "width": 32,
    "decoder_mlp": 32,
    "upscale_channels": (16, 8),
    "memory_width": 8,
    "memory_layers": 1,
    "memory_mlp": 32,
}


class Small(NamedTuple):
    """A set-up of the small network by shapes alone."""

    options: Options
    setup: Setup
    batch: PyTree
    key: PyTree


def main(argv: Sequence[str] | None = None) -> int:
    """Write all counters."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", type=Path, required=True, metavar="FILE")
    args = parser.parse_args(argv)
    os.environ["XLA_FLAGS"], os.environ["JAX_PLATFORMS"] = FLAGS, "cpu"
    rows = [row for make in (traced, parts, compiled) for row in make()]
    result.write(args.write, "counters", rows, flags=FLAGS)
    return 0


def small(method: str, *changes: str) -> Small:
    """Describe the small network for one method."""
    both = (*_SIZES, "train.unlabelled_batch=8", *changes)
    options = config.load(f"hippocampus:{method}", both)
    network = preset("nano", options.model.image_size, memory=options.memory.kind != "none")
    sized = dataclasses.replace(network, **_SMALL)
    model = SSSModel(sized, options.model.num_classes, options.model.class_token_std)
    key = jax.eval_shape(lambda: root_key(0))
    params = jax.eval_shape(lambda k: init_all_params(model, options, k), key)
    optimizer = make_optimizer(options.optimizer, options.train.steps, params)
    state = jax.eval_shape(lambda p: state_of(p, optimizer), params)
    return Small(options, Setup(model, optimizer, {}, state), batch_fields(options), key)


def over_devices(found: Small) -> tuple[Any, tuple[Any, ...]]:
    """Return the jitted step over 8 devices, and the shapes to call it with."""
    model, optimizer, _, state = found.setup
    mesh = sharding.make_mesh(found.options.mesh, jax.devices()[:DEVICES])
    step, _, _ = make_mesh_step(model, found.options, optimizer, state, found.batch, mesh)
    return step, (state, found.batch, found.key)


def traced(methods: Sequence[str] = METHODS) -> Iterator[dict[str, Any]]:
    """Count the step of every method as it is before XLA sees it."""
    for method in methods:
        step, args = over_devices(small(method))
        operations = flops.count(step, *args)
        moved = [
            (sum(v.aval.size * v.aval.dtype.itemsize for v in equation.outvars), times)
            for equation, times in _equations(jax.make_jaxpr(step)(*args).jaxpr, 1)
            if equation.primitive.name in _EXCHANGES
        ]
        yield {
            "name": f"traced step: {method}",
            "flops": operations,
            "collectives": sum(times for _, times in moved),
            "collective_bytes": sum(nbytes * times for nbytes, times in moved),
        }


def _equations(jaxpr: Any, times: int) -> Iterator[tuple[Any, int]]:
    for equation in jaxpr.eqns:
        yield equation, times
        turns = equation.params["length"] if equation.primitive.name == "scan" else 1
        for within in flops.inner(equation.params):
            yield from _equations(within, times * turns)


def parts(names: Sequence[str] = PARTS) -> Iterator[dict[str, Any]]:
    """Compile parts of the step for one device."""
    found = small("sss", *_ALONE)
    whole = step_parts(
        found.options, found.setup, found.setup.state, found.batch, found.key, jax.eval_shape
    )
    for part in whole:
        if part.name in names:
            counts = count_compiled(part.function, part.args)
            yield {"name": f"part: {part.name}", **counts}


def compiled() -> Iterator[dict[str, Any]]:
    """Compile the whole step of SSS over 8 devices, which takes minutes."""
    step, args = over_devices(small("sss"))
    yield {"name": "compiled step: sss", **count_compiled(step, args)}


def count_compiled(function: Callable[..., Any], args: tuple[Any, ...]) -> dict[str, int]:
    """Compile a function for shapes and count what XLA made of it, on one of the devices."""
    with jax.default_matmul_precision("highest"):
        program = jax.jit(function).lower(*args).compile()
    text = Program(program.as_text())
    cost, exchanged = program.cost_analysis() or {}, text.collectives()
    return {
        "flops": flops.count(function, *args),
        "xla_flops": round(cost.get("flops", 0)),
        "bytes": round(cost.get("bytes accessed", 0)),
        "temporary_bytes": program.memory_analysis().temp_size_in_bytes,
        "fusions": sum(i.opcode == "fusion" for i in text.instructions()),
        "collectives": sum(c.times for c in exchanged),
        "collective_bytes": sum(c.times * c.nbytes for c in exchanged),
    }


def other_conditions(golden: dict[str, Any]) -> str:
    """Say why counters of this process cannot be held against a file; empty if they can."""
    for name, now in (("jax", jax.__version__), ("jaxlib", jaxlib.__version__)):
        if now != (then := golden["versions"][name]):
            return f"the counters were written with {name} {then}, this is {now}"
    if os.environ.get("XLA_FLAGS") != golden["flags"]:
        return f"the counters were written with XLA_FLAGS={golden['flags']!r}"
    return ""


def changes(row: dict[str, Any], golden: dict[str, Any]) -> list[str]:
    """Name every counter of a row that the file does not allow."""
    before = {r["name"]: r for r in golden["rows"]}.get(row["name"])
    if before is None:
        return [f"{row['name']} is not in the file"]
    found = []
    for counter, now in row.items():
        then = before.get(counter)
        if counter == "name" or now == then:
            continue
        if then is None or counter in EXACT or now > SLACK * then:
            found.append(f"{row['name']}: {counter} was {then}, is {now}")
    return found


if __name__ == "__main__":
    sys.exit(main())
