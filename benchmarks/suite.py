"""Everything that the performance page claims, measured on the device at hand by one command.

    python -m sss_jax.benchmarks.suite -o FOLDER                      # one GPU, 1024 px, bfloat16
    python -m sss_jax.benchmarks.suite -o FOLDER --device cpu --size 512 --dtype float32

Each benchmark runs in a process of its own and leaves FOLDER/NAME.json; those that are there
already are not run again, so that a suite may be made over several sittings (`--only` names some).
One that fails leaves its output in FOLDER/NAME.log, and the rest goes on. At the end the results
are held against the goals of `sss_jax.benchmarks.goals`. Races with torch need torch and
transformers, and a checkout of the repository, whose tests hold the other side's weights. On GPUs
it has not been tried: none was at hand.
"""

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from sss_jax.benchmarks import goals, race

ROOT = Path(__file__).resolve().parents[1]
DEVICES = (*race.DEVICES, "tpu")
BENCH = ("parts", "step_time", "memory", "compile_time", "predict_rate", "data_rate")


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is missing, then print the goals as a Markdown table."""
    args = parse(argv)
    work = commands(args)
    chosen = args.only or list(work)
    unknown = set(chosen) - set(work)
    if unknown:
        raise SystemExit(f"--only: no benchmark {sorted(unknown)}; known: {', '.join(work)}")
    failed = [name for name in chosen if not run(name, work[name], args.output)]
    print(goals.render(goals.judge(args.output, args.device)))
    for name in failed:
        print(f"{name} failed: {args.output / name}.log", file=sys.stderr)
    return 1 if failed else 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=DEVICES, default="cuda")
    parser.add_argument("--presets", nargs="+", default=["tiny", "small", "base_plus"])
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--config", default="acdc:sss", help="whose step is measured")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", nargs="+", metavar="NAME")
    parser.add_argument("-o", "--output", type=Path, required=True)
    return parser.parse_args(argv)


def commands(args: argparse.Namespace) -> dict[str, list[str]]:
    """Return the arguments of every benchmark after `python -m`, by name, quick ones first."""
    repeats = ["--repeats", str(args.repeats)]
    found = {"pcsw_cost": ["sss_jax.benchmarks.pcsw_cost", *repeats]}
    sizes = ["--size", str(args.size), "--dtype", args.dtype]
    found["attention_speed"] = ["sss_jax.benchmarks.attention_speed", *sizes, *repeats]
    for preset in args.presets:
        found[f"bench_{preset}"] = [*_bench(args, preset), *repeats]
        if args.device not in race.DEVICES:
            continue
        both = [*sizes, "--device", args.device, "--compile", *repeats]
        sam2 = ["sss_jax.benchmarks.sam2_speed", "--variants", preset, *both]
        found[f"sam2_speed_{preset}"] = sam2
        found[f"peer_step_{preset}"] = ["sss_jax.benchmarks.peer_step", "--preset", preset, *both]
    return found


def _bench(args: argparse.Namespace, preset: str) -> list[str]:
    settings = {"preset": preset, "image_size": args.size, "dtype": args.dtype}
    overrides = [f"--config.model.{name}={value}" for name, value in settings.items()]
    # As large as the largest slice, so that the device resizes.
    overrides.append(f"--config.data.canvas={min(args.size, 512)}")
    return ["sss_jax.cli", "bench", *BENCH, "--config", args.config, *overrides]


def run(name: str, command: Sequence[str], folder: Path) -> bool:
    """Run one benchmark unless its result is there; whether it is there now."""
    done, partial = folder / f"{name}.json", folder / f"{name}.partial.json"
    if done.exists():
        print(f"{name}: there already", file=sys.stderr)
        return True
    folder.mkdir(parents=True, exist_ok=True)
    print(f"{name}: running", file=sys.stderr, flush=True)
    whole = [sys.executable, "-m", *command, "-o", str(partial.resolve())]
    with (folder / f"{name}.log").open("w") as log:
        code = subprocess.run(whole, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT).returncode
    if code:
        return False
    partial.rename(done)
    return True


if __name__ == "__main__":
    sys.exit(main())
