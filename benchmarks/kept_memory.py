"""What other ways to hand out memory give: `python -m sss_jax.benchmarks.kept_memory -o FILE`.

The same steps run in processes of their own, in turn with the C library as it is (`usual`), with
large pages (`huge`, as our programs have them), with freed memory kept (`kept`), and with `both`
(SSS_JAX_KEEP_MEMORY=1). Losses must be equal, bit for bit.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from sss_jax import config, process
from sss_jax.benchmarks import result, step_time

WAYS = {
    "usual": {},
    "huge": process.HUGE,
    "kept": process.KEPT,
    "both": process.HUGE | process.KEPT,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the processes in turn and write one row, or be one of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="hippocampus:sss")
    parser.add_argument("--set", nargs="*", default=[], metavar="SETTING=VALUE")
    parser.add_argument("--steps", type=int, default=8, help="timed steps of each process")
    parser.add_argument("--repeats", type=int, default=2, help="processes of each way")
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--as", dest="way", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.way:
        print(json.dumps(steps(args.config, args.set, args.steps)))
        return 0
    row = compare(args.config, args.set, args.steps, args.repeats)
    print(json.dumps(row, indent=2))
    if args.output:
        result.write(args.output, "kept_memory", [row], settings=args.set)
    return 0


def steps(name: str, changes: Sequence[str], count: int) -> dict[str, Any]:
    """Time some steps of this process, the first apart."""
    jitted, (state, batch, key) = step_time.place(config.load(name, changes))
    step = jitted.lower(state, batch, key).compile()
    seconds, faults, losses = [], [], []
    for _ in range(count + 1):
        began, before = time.perf_counter(), result.page_faults()
        state, metrics = step(state, batch, key)
        jax.block_until_ready(state)
        seconds.append(time.perf_counter() - began)
        faults.append(result.page_faults() - before)
        losses.append(float(metrics["loss"]))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    return {"seconds": seconds[1:], "faults": faults[1:], "losses": losses, "peak_mib": peak}


def compare(name: str, changes: Sequence[str], count: int, repeats: int) -> dict[str, Any]:
    """Time all ways in turn.

    Raises:
        SystemExit: a process failed, or the losses differ.
    """
    runs: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as cache:
        for _ in range(repeats):
            for way in WAYS:
                runs[way].append(_run(way, name, changes, count, cache))
                print(f"{way}: {runs[way][-1]['seconds']}", file=sys.stderr, flush=True)
    if any(run["losses"] != runs["usual"][0]["losses"] for way in WAYS for run in runs[way]):
        raise SystemExit("kept_memory: losses differ between the ways")
    row: dict[str, Any] = {"name": name}
    for way in WAYS:
        row[f"{way}_s"] = result.summary([s for run in runs[way] for s in run["seconds"]])
        row[f"{way}_faults"] = max(max(run["faults"]) for run in runs[way])
        row[f"{way}_peak_mib"] = runs[way][-1]["peak_mib"]  # the first of all compiled, too
    for way in list(WAYS)[1:]:
        ratio = row["usual_s"]["median"] / row[f"{way}_s"]["median"]
        row[f"{way}_speedup"] = round(ratio, 2)
    return row


def _run(way: str, name: str, changes: Sequence[str], count: int, cache: str) -> dict[str, Any]:
    command = [sys.executable, "-m", __spec__.name, "--as", way, "--config", name]
    command += ["--steps", str(count), "--set", *changes]
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": cache, "GLIBC_TUNABLES": ""}
    environment = process.with_settings(environment, WAYS[way])
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"kept_memory: the process {way!r} ended with {done.returncode}")
    return dict(json.loads(done.stdout))


if __name__ == "__main__":
    sys.exit(main())
