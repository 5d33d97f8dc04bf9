"""One training step of every method: `sss-jax bench step_time --config hippocampus`.

Compiles the step of every variant (the method as it is, then with one mechanism switched off at a
time) on clips of the configuration's shapes, and times them alternately, so that a change
of load hits all. What a mechanism costs is the difference to the step without it.
`python -m sss_jax.benchmarks.step_time --count` only counts floating-point operations, which needs
neither time nor memory for the largest network.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from sss_jax import config, flops
from sss_jax.benchmarks import result
from sss_jax.benchmarks.batches import first_batch
from sss_jax.benchmarks.request import Measured, Request
from sss_jax.errors import ConfigError
from sss_jax.options import Options
from sss_jax.train.mesh import make_driver
from sss_jax.train.setup import batch_fields, key_shape, set_up
from sss_jax.train.state import init_all_params, state_of
from sss_jax.train.step import make_train_step, root_key

WITHOUT: dict[str, tuple[str, ...]] = {
    "DFE": ("dfe.enabled=false",),
    "DFE at level 4": ("dfe.level_4=false",),
    "DFE at levels 4 and 8": ("dfe.level_4=false", "dfe.level_8=false"),
    "PCSW": ("pcsw.enabled=false", "semi.labelled_prompts=none"),
    "memory": ("memory.kind=none",),
    "memory's loop": ("memory.unroll=on",),
}


METHODS = ("sss", "unimatch_v2", "fixmatch", "supervised")


class Compiled(NamedTuple):
    """A step that is ready to run."""

    step: Any
    state: Any
    batch: Any
    key: Any
    facts: dict[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    """Compile, time and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="hippocampus")
    parser.add_argument("--methods", nargs="+", default=["sss"])
    parser.add_argument("--without", nargs="*", choices=WITHOUT, default=["DFE", "PCSW", "memory"])
    parser.add_argument("--set", nargs="*", default=[], metavar="SETTING=VALUE")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--count", action="store_true", help="count operations, run nothing")
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args(argv)
    methods, without = tuple(args.methods), tuple(args.without)
    request = Request(args.config, tuple(args.set), methods, without, args.repeats, say=_say)
    rows = count_all(variants(request)) if args.count else measure(request).rows
    for row in rows:
        print(row)
    if args.output:
        result.write(args.output, "step_time", rows, config=args.config, settings=args.set)
    return 0


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def measure(request: Request) -> Measured:
    """Compile and time the step of every variant."""
    steps = {}
    for name, options in variants(request).items():
        steps[name] = compile_step(name, options, request.data)
        request.say(str(steps[name].facts))
    return Measured(time_all(steps, request.repeats, request.trace("step_time")), {})


def variants(request: Request) -> dict[str, Options]:
    """Load every method, and SSS with one mechanism switched off at a time.

    Raises:
        ConfigError: a method or mechanism that does not exist.
    """
    found = request.options(METHODS)
    for name in request.without:
        if name not in WITHOUT:
            raise ConfigError(f"no mechanism is called {name!r}; known: {', '.join(WITHOUT)}")
    if "sss" in found:
        for name in request.without:
            overrides = [*request.overrides, *WITHOUT[name]]
            found[f"sss without {name}"] = config.load(f"{request.name}:sss", overrides)
    return found


def count_all(variants: dict[str, Options]) -> list[dict[str, Any]]:
    """Count the operations of every step, as it is before XLA optimises it."""
    counts = {name: count(options) for name, options in variants.items()}
    whole = next(iter(counts.values()))
    return [
        {
            "name": name,
            "gflop": round(n / 1e9, 1),
            "difference_to_first": round(1 - n / whole, 4),
        }
        for name, n in counts.items()
    ]


def count(options: Options) -> int:
    """Count the operations of the products and convolutions of one step, on shapes alone."""
    model, optimizer, _, state = set_up(options)
    step = make_train_step(model, options, optimizer)
    return flops.count(step, state, batch_fields(options), key_shape())


def place(options: Options, data: str | None = None) -> tuple[Any, tuple[Any, Any, Any]]:
    """Return the step, not compiled, and its state, batch and key where it wants them.

    The batch is the first of `data`, as `--data` names it; synthetic without.
    """
    model, optimizer, memory, shapes = set_up(options)
    key = root_key(0)
    driver = make_driver(model, options, optimizer, shapes)
    state = driver.create(lambda: state_of(init_all_params(model, options, key), optimizer, memory))
    batch = driver.place_batch(first_batch(options, data))
    return driver.step, (state, batch, driver.place_key(key))


def compile_step(name: str, options: Options, data: str | None = None) -> Compiled:
    """Compile the step of one variant and look at what came out."""
    jitted, args = place(options, data)
    began = time.monotonic()
    step = jitted.lower(*args).compile()
    seconds = time.monotonic() - began
    cost, sizes = step.cost_analysis() or {}, step.memory_analysis()
    facts = {
        "name": name,
        "compile_s": round(seconds, 1),
        "xla_gflop": round(cost.get("flops", 0) / 1e9, 2),
        "xla_gbytes": round(cost.get("bytes accessed", 0) / 1e9, 2),
        "temporary_mib": sizes.temp_size_in_bytes >> 20,
    }
    return Compiled(step, *args, facts)


def time_all(
    steps: dict[str, Compiled], repeats: int, profile: Path | None = None
) -> list[dict[str, Any]]:
    """Run every step in turn, `repeats` times after a first round that does not count."""
    times = result.alternate({n: runner(c) for n, c in steps.items()}, repeats, profile)
    whole = statistics.median(times[next(iter(times))])
    rows = []
    for name, c in steps.items():
        taken = result.summary(times[name])
        slices = sum(part["slice_mask"].size for part in c.batch.values())
        rows.append(
            {
                **c.facts,
                "step_s": taken,
                "slices_per_s": round(slices / taken["median"], 2),
                "difference_to_first": round(1 - taken["median"] / whole, 4),
            }
        )
    return rows


def runner(compiled: Compiled) -> Callable[[], None]:
    """Return a function that goes one step on each time."""
    state = compiled.state

    def run() -> None:
        nonlocal state
        state, metrics = compiled.step(state, compiled.batch, compiled.key)
        jax.block_until_ready((state, metrics))

    return run


if __name__ == "__main__":
    sys.exit(main())
