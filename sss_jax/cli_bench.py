"""The verb `sss-jax bench`: measure on this device, or compare two results."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from sss_jax.errors import ConfigError

_NAMES = "step_time, parts, predict_rate, data_rate, compile_time, memory"


def add(verbs: Any) -> None:
    """Add the verb to the parser."""
    text = "Measure this device, or compare two results: bench compare A.json B.json."
    bench = verbs.add_parser("bench", help=text, description=text)
    bench.set_defaults(run=_run)
    bench.add_argument("names", nargs="+", metavar="NAME", help=f"of {_NAMES}; or compare A B")
    bench.add_argument("--config", default="hippocampus", help="as for train")
    bench.add_argument("--data", help="as for train; default: synthetic data")
    bench.add_argument("--methods", nargs="+", default=[], help="default: the configuration's")
    bench.add_argument(
        "--without",
        nargs="*",
        default=["DFE", "PCSW", "memory"],
        metavar="MECHANISM",
        help="step_time: also sss without each of these",
    )
    bench.add_argument("--repeats", type=int, default=5, help="timings of each row")
    bench.add_argument("--json", action="store_true", help="print JSON for machines")
    bench.add_argument("-o", "--output", type=Path, help="file of the result")
    bench.add_argument("--profile", type=Path, metavar="DIR", help="write traces of the steps")
    bench.add_argument("--bound", type=float, default=1.10, help="compare: what still is the same")
    bench.add_argument(
        "--anyway", action="store_true", help="compare: whatever differs between the runs"
    )
    bench.epilog = "Settings are changed by --config.GROUP.FIELD=VALUE."


def _run(args: argparse.Namespace) -> int:
    from sss_jax.benchmarks import bench

    if args.names[0] == "compare":
        files = args.names[1:]
        text, code = bench.compare_files(files, args.bound, args.anyway, args.json)
        print(text)
        return code
    return _measure(args)


def _measure(args: argparse.Namespace) -> int:
    from sss_jax.benchmarks import bench, result
    from sss_jax.benchmarks.request import Request

    if args.repeats < 1:
        raise ConfigError(f"--repeats {args.repeats} must be at least 1")
    request = Request(
        args.config,
        tuple(args.overrides),
        tuple(args.methods),
        tuple(args.without),
        args.repeats,
        args.profile,
        _say,
        args.data,
    )
    found, text = bench.run(args.names, request)
    if args.output:
        result.save(args.output, found)
    print(json.dumps(found, indent=2) if args.json else text)
    return 0


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
