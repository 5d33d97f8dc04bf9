"""One step over 1 to 8 devices and 1 to 4 processes: losses, exchanges, compile and step time.

    python -m sss_jax.benchmarks.scaling -o FILE

Rows that FILE holds already are not measured again.
Devices are virtual ones of this CPU. The global batch stays the same, so the losses must too. Rows
of `drivers`: the step under `pmap`, over a mesh, and with parameters cut (`fsdp`). Rows of
`processes`: `sss-jax train` on synthetic volumes, one process or several on loopback. Times say how
the ways compare on this machine, which has fewer cores than devices; they are no scaling curve.
"""

import argparse
import collections
import dataclasses
import itertools
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from sss_jax import config
from sss_jax.benchmarks import result
from sss_jax.benchmarks.batches import synthetic_batch
from sss_jax.hlo import Program
from sss_jax.options import Options
from sss_jax.train.mesh import make_driver
from sss_jax.train.setup import set_up
from sss_jax.train.state import init_all_params, state_of
from sss_jax.train.step import root_key

MOST = 8
WAYS = ("pmap", "data", "fsdp")
SMALL = (
    "model.image_size=32",
    "data.clip_slices=2",
    "model.loop_blocks=true",
    "train.labelled_batch=8",
    "train.unlabelled_batch=8",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="hippocampus:sss")
    parser.add_argument("--set", nargs="*", default=[], metavar="SETTING=VALUE")
    parser.add_argument("--devices", nargs="+", type=int, default=[1, 2, 4, 8])
    parser.add_argument("--processes", nargs="*", type=int, default=[1, 2, 4])
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args(argv)
    jax.config.update("jax_num_cpu_devices", MOST)
    changes = [*SMALL, *args.set]
    rows = earlier(args.output, args.config, changes)
    for row in itertools.chain(
        drivers(config.load(args.config, changes), args.devices, args.steps, rows),
        processes(args.config, changes, args.processes, args.steps, rows),
    ):
        print(json.dumps(row), file=sys.stderr, flush=True)
        rows.append(row)
        if args.output:
            result.write(args.output, "scaling", rows, config=args.config, settings=changes)
    print(render(rows))
    return 0


def earlier(path: Path | None, name: str, changes: Sequence[str]) -> list[dict[str, Any]]:
    """Return the rows that an earlier call left in the file.

    Raises:
        SystemExit: they were made with other settings.
    """
    if path is None or not path.exists():
        return []
    found = json.loads(path.read_text())
    if (found["config"], found["settings"]) != (name, list(changes)):
        raise SystemExit(f"scaling: {path} holds rows of other settings; choose another file")
    return list(found["rows"])


def drivers(
    options: Options, devices: Sequence[int], steps: int, done: Sequence[dict[str, Any]] = ()
) -> Iterator[dict[str, Any]]:
    """Run the same steps under every driver on every number of devices that is not done."""
    for way, count in itertools.product(WAYS, devices):
        if result.holds(done, {"way": way, "devices": count}):
            continue
        train = dataclasses.replace(options.train, parallel="pmap" if way == "pmap" else "mesh")
        mesh = dataclasses.replace(options.mesh, fsdp=count if way == "fsdp" else 1)
        own = dataclasses.replace(options, train=train, mesh=mesh)
        yield {"kind": "driver", "way": way, "devices": count, **run(own, count, steps)}


def run(options: Options, devices: int, steps: int) -> dict[str, Any]:
    """Compile and run some steps on the first devices."""
    model, optimizer, memory, shapes = set_up(options)
    driver = make_driver(model, options, optimizer, shapes, jax.devices()[:devices])
    key = root_key(0)
    state = driver.create(lambda: state_of(init_all_params(model, options, key), optimizer, memory))
    batch, key = driver.place_batch(synthetic_batch(options)), driver.place_key(key)
    began = time.monotonic()
    step = driver.step.lower(state, batch, key).compile()
    compile_s = time.monotonic() - began
    held = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(state))
    losses, times = [], []
    for _ in range(steps):
        began = time.perf_counter()
        state, metrics = step(state, batch, key)
        losses.append(float(jax.tree.leaves(metrics["loss"])[0]))
        times.append(time.perf_counter() - began)
    return {
        "compile_s": round(compile_s, 1),
        "step_s": result.summary(times[1:]),
        "losses": losses,
        "state_bytes_per_device": held,
        "exchanges": exchanges(step.as_text()) if devices > 1 else {},
    }


def exchanges(text: str) -> dict[str, int]:
    """Bytes that one device exchanges in a step, by kind."""
    totals: dict[str, int] = collections.Counter()
    for one in Program(text).collectives():
        totals[one.kind] += one.nbytes * one.times
    return dict(totals)


def processes(
    name: str,
    changes: Sequence[str],
    counts: Sequence[int],
    steps: int,
    done: Sequence[dict[str, Any]] = (),
) -> Iterator[dict[str, Any]]:
    """Train with every number of processes that is not done and read their logs."""
    with tempfile.TemporaryDirectory() as folder:
        for count in counts:
            if result.holds(done, {"processes": count}):
                continue
            began = time.monotonic()
            losses = train(name, changes, count, steps, Path(folder) / str(count))
            yield {
                "kind": "processes",
                "processes": count,
                "devices": MOST,
                "losses": losses,
                "whole_run_s": round(time.monotonic() - began, 1),
            }


def train(name: str, changes: Sequence[str], count: int, steps: int, workdir: Path) -> list[float]:
    """Run `sss-jax train` as `count` processes with all devices between them; return the losses."""
    words = [sys.executable, "-m", "sss_jax.cli", "train", "--config", name]
    words += ["--data", f"synthetic:24x20x6,{MOST}", "--workdir", str(workdir)]
    settings = [*changes, f"train.steps={steps}", "train.log_every=1", "train.eval_every=0"]
    words += [f"--config.{setting}" for setting in settings]
    environment = dict(os.environ, JAX_NUM_CPU_DEVICES=str(MOST // count))
    meeting = f"127.0.0.1:{_free_port()}"
    running = []
    for number in range(count):
        more = ["--coordinator", meeting, "--processes", str(count), "--process", str(number)]
        own = words + (more if count > 1 else [])
        running.append(subprocess.Popen(own, env=environment, stdout=subprocess.DEVNULL))
    codes = [process.wait() for process in running]
    if any(codes):
        raise SystemExit(f"scaling: a run with {count} processes failed; its message is above")
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [row["loss"] for row in map(json.loads, lines) if row["kind"] == "train"]


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def difference(losses: Sequence[float], first: Sequence[float]) -> float:
    """Largest relative difference of two runs' losses."""
    if len(losses) != len(first):
        return float("inf")
    return max(abs(a - b) / abs(b) for a, b in zip(losses, first, strict=True))


def render(rows: Sequence[dict[str, Any]]) -> str:
    """Write the rows as a Markdown table; losses beside those of the first row of their kind."""
    lines = [
        "| way | devices | losses differ by | exchanged, MiB a step | state, MiB | compile, s "
        "| step, s |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        first = next(one for one in rows if one["kind"] == row["kind"])
        away = f"{difference(row['losses'], first['losses']):.1e}"
        if row["kind"] == "processes":
            lines.append(
                f"| {row['processes']} processes | {row['devices']} | {away} |  |  |  |  |"
            )
            continue
        moved = sum(row["exchanges"].values()) / 2**20
        held = row["state_bytes_per_device"] / 2**20
        lines.append(
            f"| {row['way']} | {row['devices']} | {away} | {moved:.2f} | {held:.1f} "
            f"| {row['compile_s']} | {row['step_s']['median']:.2f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
