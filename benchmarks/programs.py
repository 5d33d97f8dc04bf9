"""What programs take to compile, and what memory they need: `sss-jax bench compile_time memory`.

The programs are the training step and the prediction of a volume, of every method asked for.
"""

import contextlib
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.experimental.compilation_cache import compilation_cache

from sss_jax.benchmarks import result, step_time
from sss_jax.benchmarks.predict_rate import make_predictor, some_volume, volume_args
from sss_jax.benchmarks.request import Measured, Request

_CACHE = {
    "jax_persistent_cache_min_compile_time_secs": 0.0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
}
_CACHE_HIT = "/jax/compilation_cache/cache_hits"


class Program(NamedTuple):
    """A jitted function, and what to call it with; the step uses its state up."""

    name: str
    jitted: Any
    args: tuple[Any, ...]


def programs(request: Request) -> Iterator[Program]:
    """Make the programs one after the other, so that not all of their arguments live at once."""
    for method, options in request.options().items():
        yield Program(f"{method}: step", *step_time.place(options, request.data))
        predictor = make_predictor(options)
        with tempfile.TemporaryDirectory() as scratch:
            args = volume_args(predictor, some_volume(Path(scratch), options, request.data))
        yield Program(f"{method}: prediction", predictor.function, args)


def measure_compile_time(request: Request) -> Measured:
    """Compile every program with an empty persistent cache, and again from what it then holds."""
    rows = []
    for program in programs(request):
        with _own_cache() as folder:
            cold = _compile(program)
            entries = sum(1 for _ in folder.iterdir())
            jax.clear_caches()
            with _count_events(_CACHE_HIT) as hits:
                cached = _compile(program)
        row = {"name": program.name, **cold, "cached_compile_s": cached["compile_s"]}
        rows.append({**row, "cache_files": entries, "cache_hits": len(hits)})
        request.say(str(rows[-1]))
    return Measured(rows, {})


def _compile(program: Program) -> dict[str, float]:
    began = time.perf_counter()
    lowered = program.jitted.lower(*program.args)
    middle = time.perf_counter()
    lowered.compile()
    return {"trace_s": middle - began, "compile_s": time.perf_counter() - middle}


@contextlib.contextmanager
def _count_events(name: str) -> Iterator[list[str]]:
    """List the events of this name that JAX reports meanwhile."""
    seen: list[str] = []

    def listen(event: str, **_: Any) -> None:
        if event == name:
            seen.append(event)

    jax.monitoring.register_event_listener(listen)
    try:
        yield seen
    finally:
        jax.monitoring.unregister_event_listener(listen)


@contextlib.contextmanager
def _own_cache() -> Iterator[Path]:
    """Let programs be kept in a new folder, whatever they took to compile."""
    with tempfile.TemporaryDirectory() as folder:
        wanted = {**_CACHE, "jax_compilation_cache_dir": folder}
        before = {name: getattr(jax.config, name) for name in wanted}
        _configure(wanted)
        try:
            yield Path(folder)
        finally:
            _configure(before)


def _configure(values: dict[str, Any]) -> None:
    for name, value in values.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def measure_memory(request: Request) -> Measured:
    """Compile every program, read what it will take, and run it once to see."""
    rows = []
    for program in programs(request):
        compiled = program.jitted.lower(*program.args).compile()
        sizes = compiled.memory_analysis()
        planned = {
            "argument_bytes": sizes.argument_size_in_bytes,
            "output_bytes": sizes.output_size_in_bytes - sizes.alias_size_in_bytes,
            "temporary_bytes": sizes.temp_size_in_bytes,
        }
        rows.append({"name": program.name, **planned, **_peak(compiled, program.args)})
        request.say(str(rows[-1]))
    return Measured(rows, {})


def _peak(compiled: Any, args: tuple[Any, ...]) -> dict[str, Any]:
    """Run once: peak of the device since the process began, or of this process in this run."""

    def run() -> None:
        jax.block_until_ready(compiled(*args))

    resident = result.peak_bytes(run)
    device = jax.devices()[0].memory_stats()
    if device and "peak_bytes_in_use" in device:
        return {"peak_bytes": device["peak_bytes_in_use"], "peak_of": "device, so far"}
    return {"peak_bytes": resident, "peak_of": "process, beyond arguments"}
