"""The product's main job on the embedded data set: `python -m sss_jax.benchmarks.demo FOLDER`.

Writes phantoms as NIfTI, trains `supervised` and `sss` on the same few labels, segments the
held-out cases, scores them, and writes a report of each run. Every step is the command line that a
user would type; a run that was stopped goes on from where it was.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

METHODS = ("supervised", "sss")


def main() -> int:
    """Run the demo and print the comparison."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--config", default="demo")
    args, overrides = parser.parse_known_args()
    began = time.monotonic()
    data = args.folder / "data"
    if not (data / "split.json").is_file():
        sss_jax("data", "phantoms", str(data))
    sss_jax("data", "check", str(data), "--config", args.config)
    rows = [
        (method, *run_method(method, args.config, data, args.folder / method, overrides))
        for method in METHODS
    ]
    print_table(rows)
    print(f"\nReports: {', '.join(str(args.folder / m / 'report.html') for m in METHODS)}")
    print(f"Time: {time.monotonic() - began:.0f} s")
    return 0


def run_method(
    method: str, config: str, data: Path, workdir: Path, overrides: list[str]
) -> tuple[dict, float]:
    """Train one method, segment and score the test cases, write the report."""
    began = time.monotonic()
    spec = f"{config}:{method}"
    sss_jax("train", "--config", spec, "--data", str(data), "--workdir", str(workdir), *overrides)
    train_seconds = time.monotonic() - began
    test = str(workdir / "test")
    sss_jax(
        "predict", "--checkpoint", str(workdir), "-i", str(data), "-o", test, "--subset", "test"
    )
    sss_jax("evaluate", "--pred", test, "--ref", str(data / "labels"))
    sss_jax("report", str(workdir))
    return json.loads((workdir / "test" / "summary.json").read_text()), train_seconds


def print_table(rows: list[tuple[str, dict, float]]) -> None:
    """Print test Dice per class and training time of each method."""
    print("\nHeld-out test cases, Dice (mean over cases):")
    for method, summary, seconds in rows:
        classes = "  ".join(f"{row['dice']['mean']:.3f}" for row in summary["classes"])
        mean = summary["mean"]["dice"]
        print(f"  {method:12s} mean {mean:.3f}   classes {classes}   training {seconds:.0f} s")


def sss_jax(*words: str) -> None:
    """Run one verb of the command line; its failure ends the benchmark."""
    print("$ sss-jax", *words, file=sys.stderr, flush=True)
    done = subprocess.run([sys.executable, "-m", "sss_jax.cli", *words], check=False)
    if done.returncode:
        sys.exit(done.returncode)


if __name__ == "__main__":
    sys.exit(main())
