"""How far our SAM-2 is from Meta's code, output by output, on the same random weights.

    python -m sss_jax.benchmarks.sam2_parity --variants tiny small --size 1024 -o FILE.json

Errors are shares of the reference's root mean square, which is always float32: the largest and the
root mean square one. Rows that FILE.json has for other networks stay. The table goes to standard
output as Markdown. Needs torch and Meta's `sam2`; `tests/parity/meta.py` says how to get it.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax

from sss_jax.benchmarks import result

TOLERANCE = 1e-4
KEYS = ("variant", "version", "size", "dtype")


def main() -> int:
    """Measure, write the file, print the table; 1 if a float32 error is above the tolerance."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variants", nargs="+", default=["tiny", "small", "base_plus", "large"])
    parser.add_argument("--versions", nargs="+", default=["2.0", "2.1"])
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--parts", nargs="+", default=["image", "video"])
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args()
    jax.config.update("jax_default_matmul_precision", "highest")
    with tempfile.TemporaryDirectory() as cache:
        # Decoder and memory are the same program in all variants.
        jax.config.update("jax_compilation_cache_dir", cache)
        rows = [
            row
            for variant in args.variants
            for version in args.versions
            for row in measure(variant, version, args.size, args.dtype, args.parts)
        ]
    rows = _kept(args.output, rows) + rows
    result.write(args.output, "sam2_parity", rows, tolerance=TOLERANCE)
    print(table(rows))
    exact = [row for row in rows if row["dtype"] == "float32"]
    return int(not all(row["max"] <= TOLERANCE for row in exact))


def measure(
    variant: str, version: str, size: int, dtype: str, parts: list[str]
) -> list[dict[str, Any]]:
    """Rows of one network: an output, its largest and its root mean square error."""
    from tests.parity import parts as image
    from tests.parity import tracks as video
    from tests.parity.compare import worst
    from tests.parity.pair import pair

    both = pair(variant, version, size, dtype)
    key = dict(zip(KEYS, (variant, version, size, dtype), strict=True))
    rows = []
    for part in parts:
        found = worst({"image": image, "video": video}[part].outputs(both))
        for output, (most, mean) in found.items():
            rows.append({**key, "part": part, "output": output, "max": most, "rms": mean})
            print(f"{variant} {version} {size} {dtype}: {output} {most:.1e}", file=sys.stderr)
    return rows


def _kept(path: Path, new: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of a file that this run did not measure again."""
    if not path.exists():
        return []
    done = {tuple(row[key] for key in (*KEYS, "output")) for row in new}
    rows = json.loads(path.read_text())["rows"]
    return [row for row in rows if tuple(row[key] for key in (*KEYS, "output")) not in done]


def table(rows: list[dict[str, Any]]) -> str:
    """Worst error of every output over the networks of a size and a type, as Markdown."""
    columns = sorted({(row["dtype"] != "float32", row["size"], row["dtype"]) for row in rows})
    heads = [_head(rows, size, dtype) for _, size, dtype in columns]
    lines = [f"| output | {' | '.join(heads)} |", "| --- |" + " --- |" * len(heads)]
    for output in dict.fromkeys(row["output"] for row in rows):
        cells = [_cell(rows, output, size, dtype) for _, size, dtype in columns]
        lines.append(f"| {output} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _head(rows: list[dict[str, Any]], size: int, dtype: str) -> str:
    here = [row for row in rows if (row["size"], row["dtype"]) == (size, dtype)]
    count = len({(row["variant"], row["version"]) for row in here})
    return f"{size} px, {dtype}, {count} network{'s' * (count > 1)}"


def _cell(rows: list[dict[str, Any]], output: str, size: int, dtype: str) -> str:
    wanted = output, size, dtype
    here = [row for row in rows if (row["output"], row["size"], row["dtype"]) == wanted]
    if not here:
        return ""
    most = max(row["max"] for row in here)
    if dtype == "float32":
        return f"{most:.1e}"
    return f"{most:.1e} ({max(row['rms'] for row in here):.1e})"


if __name__ == "__main__":
    sys.exit(main())
