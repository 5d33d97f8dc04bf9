"""Whole SSS steps compiled for TPU slices that are not here: what fits, and how fast at best.

    python -m sss_jax.benchmarks.estimate_table -o FILE [--only base_plus/1024/v5e-16 ...]

Every cell is `sss-jax estimate --quick` for one clip of each stream per device, recomputing no more
than the chip's memory asks for (`settings_of`); `--set` changes that. Cells that FILE holds already
are not compiled again, so a table may be made over several sittings. The most clips that fit are
foretold from two sizes (`--clips 1 2`), or from the temporaries of one. Needs libtpu.
"""

import argparse
import itertools
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sss_jax import config, estimate, topology
from sss_jax.benchmarks import result

KEEP_ALL = (
    "model.dtype=bfloat16",
    "model.remat=false",
    "model.loop_blocks=false",
    "memory.remat=false",
    "dfe.remat=false",
)
KEEP_TRUNK = (*KEEP_ALL[:3], "memory.remat=true", "memory.remat_keeps=attention", "dfe.remat=true")
KEEP_INPUTS = (
    "model.dtype=bfloat16",
    "model.remat=true",
    "model.loop_blocks=true",
    "memory.remat=true",
    "dfe.remat=true",
)
# What does not fit with everything kept; by network, pixels and chip.
TIGHT = {
    ("base_plus", "1024", "v5e"): KEEP_TRUNK,
    ("large", "1024", "v5e"): (*KEEP_INPUTS, "mesh.fsdp=16"),
}
AXES = (
    ("tiny", "small", "base_plus", "large"),
    (1024, 512),
    ("v5e-16", "v5p-64", "v6e-256", "2xv5e-16"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Compile what is missing, one cell after the other, and write after each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="acdc:sss")
    parser.add_argument("--set", nargs="*", default=[], metavar="SETTING=VALUE")
    parser.add_argument("--only", nargs="*", metavar="PRESET/SIZE/TOPOLOGY")
    parser.add_argument("--clips", nargs="+", type=int, default=[1])
    parser.add_argument("--full", action="store_true", help="all of the compiler's effort")
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args(argv)
    rows = result.rows_of(args.output)
    every = ["/".join(map(str, c)) for c in itertools.product(*AXES)]
    for cell, clips in itertools.product(args.only or every, args.clips):
        settings = [*settings_of(cell), *args.set]
        wanted = {"cell": cell, "clips": clips, "quick": not args.full, "settings": settings}
        wanted |= {"changes": " ".join(args.set)} if args.set else {}
        if result.holds(rows, wanted):
            continue
        rows.append(wanted | compile_cell(args.config, settings, cell, clips, not args.full))
        result.write(args.output, "estimate_table", rows, config=args.config)
        print(render(rows), file=sys.stderr, flush=True)
    print(render(rows))
    return 0


def settings_of(cell: str) -> tuple[str, ...]:
    """Return what a cell keeps for its backward pass: all where that fits."""
    preset, size, machines = cell.split("/")
    return TIGHT.get((preset, size, topology.parse(machines).chip.name), KEEP_ALL)


def compile_cell(
    name: str, settings: Sequence[str], cell: str, clips: int, quick: bool
) -> dict[str, Any]:
    """Estimate one cell; what the page needs of it."""
    preset, size, machines = cell.split("/")
    own = [f"model.preset={preset}", f"model.image_size={size}"]
    options = config.load(name, [*settings, *own])
    say = lambda line: print(f"{cell}: {line}", file=sys.stderr, flush=True)  # noqa: E731
    found = estimate.estimate(options, machines, clips=clips, quick=quick, report=say)
    values = found.to_json()
    values.pop("clips")
    return values


def share_of_exchanges(row: dict[str, Any]) -> float | None:
    """Part of the projected step that is exchange."""
    if not row["projection"]:
        return None
    return float(row["projection"]["exchange"] / row["projection"]["step"])


def most_clips(rows: Sequence[dict[str, Any]], row: dict[str, Any]) -> int:
    """Most clips that fit: along the line through two sizes, or through one and the state."""
    totals = {0: row["memory"]["state"]} | {
        other["clips"]: other["memory"]["total"]
        for other in rows
        if all(other[key] == row[key] for key in ("cell", "quick", "settings"))
    }
    (few, less), (many, more) = sorted(totals.items())[-2:]
    return many + math.floor((row["memory"]["capacity"] - more) * (many - few) / (more - less))


def render(rows: Sequence[dict[str, Any]]) -> str:
    """Write the rows as a Markdown table."""
    lines = [
        "| network | px | machines | clips | memory, GiB of | fits | most clips | step, ms | "
        "slices/s | MFU | exchanges | compiled in, s |",
        "| --- " * 12 + "|",
    ]
    for row in rows:
        preset, size, machines = row["cell"].split("/")
        memory, time = row["memory"], row["projection"]
        held = f"{memory['total'] / 2**30:.1f} of {memory['capacity'] / 2**30:.1f}"
        cells = [preset, size, machines, str(row["clips"]), held]
        cells += ["yes" if memory["fits"] else "no", str(most_clips(rows, row))]
        if time:
            cells += [f"{time['step'] * 1e3:.0f}", f"{time['slices_per_s']:.0f}"]
            cells += [f"{time['mfu']:.0%}", f"{share_of_exchanges(row):.1%}"]
        else:
            cells += [""] * 4
        lines.append(f"| {' | '.join([*cells, format(row['compile_s'], '.0f')])} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
