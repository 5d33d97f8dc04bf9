"""The command line: `sss-jax VERB`.

Results go to stdout, logs to stderr. Exit codes: 0 done, 1 data or checkpoint, 2 usage or
configuration, 3 non-finite numbers, 75 preempted (the same command resumes). Imports are inside
the verbs, so that `-h` answers at once and configuration errors come before any device is touched.
"""

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from sss_jax import __version__, cli_bench, cli_launch, process
from sss_jax.errors import ConfigError, PeerLost, SSSError

_OVERRIDE = "--config."


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return its exit code.

    Without `argv` the process is ours alone, and set up to compute.
    """
    if argv is None:
        process.set_up()
    words = list(sys.argv[1:] if argv is None else argv)
    overrides = [word.removeprefix(_OVERRIDE) for word in words if word.startswith(_OVERRIDE)]
    parser = build_parser()
    args = parser.parse_args([word for word in words if not word.startswith(_OVERRIDE)])
    args.overrides = overrides
    try:
        if overrides and not {"config", "train"} & set(vars(args)):
            raise ConfigError(f"{_OVERRIDE}{overrides[0]} does not apply to `{args.verb}`")
        if overrides and "config" in args and not args.config:
            raise ConfigError(f"{_OVERRIDE}{overrides[0]} changes nothing without --config NAME")
        return args.run(args)
    except SSSError as error:
        print(f"sss-jax: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:
        # The reader of our stdout has gone (`| head`): nothing is left to say to it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("sss-jax: interrupted", file=sys.stderr)
        return 130


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all verbs."""
    parser = argparse.ArgumentParser(
        prog="sss-jax", description="Semi-supervised SAM-2 for medical image segmentation, in JAX."
    )
    parser.add_argument("--version", action="version", version=f"sss-jax {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for add in (
        _add_doctor,
        _add_data,
        _add_convert,
        _add_train,
        _add_predict,
        _add_evaluate,
        _add_report,
        _add_estimate,
        cli_launch.add,
        cli_bench.add,
    ):
        add(verbs)
    return parser


def _verb(
    verbs: Any, name: str, run: Callable[[argparse.Namespace], int], text: str, *, as_json: bool
) -> argparse.ArgumentParser:
    parser = verbs.add_parser(name, help=text, description=text)
    parser.set_defaults(run=run)
    if as_json:
        parser.add_argument("--json", action="store_true", help="print JSON for machines")
    return parser


def _add_doctor(verbs: Any) -> None:
    _verb(verbs, "doctor", _doctor, "Say what this machine can run.", as_json=True)


def _add_data(verbs: Any) -> None:
    text = "Look at a data folder, prepare it for fast reading, or write phantoms."
    inner = verbs.add_parser("data", help=text, description=text).add_subparsers(
        dest="data_verb", required=True, metavar="VERB"
    )
    check = _verb(inner, "check", _data_check, "Report every problem of a folder.", as_json=True)
    check.add_argument("folder", type=Path, help="folder with images/, labels/ and a split file")
    check.add_argument("--config", help="configuration whose data settings apply")
    text = "Write a folder as shards for fast reading; run it again to resume, verify or repair."
    prepare = _verb(inner, "prepare", _data_prepare, text, as_json=True)
    prepare.add_argument("folder", type=Path, help="folder with images/, labels/ and a split file")
    prepare.add_argument("out", type=Path, help="new or empty folder")
    prepare.add_argument(
        "--config", help="configuration whose data settings are baked in, for its split alone"
    )
    prepare.add_argument(
        "--shards", type=int, default=0, help="number of shards (default: by size)"
    )
    phantoms = _verb(
        inner, "phantoms", _data_phantoms, "Write the embedded phantom data set.", as_json=False
    )
    phantoms.add_argument("folder", type=Path, help="new or empty folder")
    phantoms.add_argument("--seed", type=int, default=0)
    phantoms.add_argument(
        "--all-labels", action="store_true", help="write labels of the unlabelled cases too"
    )


def _add_convert(verbs: Any) -> None:
    text = "Convert SAM-2 weights of PyTorch or Hugging Face to ours, or back."
    convert = _verb(verbs, "convert", _convert, text, as_json=True)
    convert.add_argument("source", type=Path, help=".pt or .safetensors; or our folder")
    convert.add_argument("target", type=Path, help="folder to make; or .pt with --to-torch")
    convert.add_argument("--to-torch", action="store_true", help="from our folder to a .pt file")
    convert.add_argument(
        "--verify", action="store_true", help="compare outputs with torch and transformers"
    )


def _add_train(verbs: Any) -> None:
    train = _verb(
        verbs, "train", _train, "Train; the same command resumes a stopped run.", as_json=True
    )
    train.add_argument(
        "--config", required=True, help="FILE.py[:method] or a name such as hippocampus:sss"
    )
    train.add_argument(
        "--data",
        required=True,
        help="data folder, prepared folder, or synthetic:[ROWSxCOLUMNSxSLICES[,CASES]]",
    )
    train.add_argument("--workdir", type=Path, required=True, help="run folder")
    train.add_argument("--fresh", action="store_true", help="discard what the run folder holds")
    train.add_argument(
        "--skip-bad", action="store_true", help="leave out cases that cannot be read, and list them"
    )
    train.add_argument(
        "--distributed",
        action="store_true",
        help="one of several processes, started by Slurm, GKE, TPU or MPI",
    )
    train.add_argument("--coordinator", metavar="HOST:PORT", help="of process 0, elsewhere")
    train.add_argument("--processes", type=int, metavar="N", help="with --coordinator")
    train.add_argument("--process", type=int, metavar="I", help="with --coordinator, from 0")
    train.epilog = "Settings are changed by --config.GROUP.FIELD=VALUE."


def _add_predict(verbs: Any) -> None:
    predict = _verb(verbs, "predict", _predict, "Segment NIfTI images.", as_json=True)
    predict.add_argument(
        "--checkpoint", type=Path, required=True, help="run folder; with --prompts, SAM-2 weights"
    )
    predict.add_argument("-i", "--input", type=Path, required=True, help="image, or a folder")
    predict.add_argument("-o", "--output", type=Path, required=True, help="folder for the labels")
    predict.add_argument("--which", choices=("best", "latest"), default="best")
    predict.add_argument(
        "--subset",
        choices=("val", "test"),
        help="INPUT is a data folder: segment these cases of the run's split",
    )
    predict.add_argument(
        "--prompts",
        type=Path,
        help="JSON of boxes, points and masks for one image; OUTPUT is a file",
    )
    predict.add_argument("--image-size", type=int, default=1024, help="with --prompts: pixels")
    predict.add_argument(
        "--window", type=float, nargs=2, metavar=("LOW", "HIGH"), help="with --prompts: CT, HU"
    )
    predict.add_argument(
        "--clean-area",
        type=int,
        default=0,
        metavar="N",
        help="with --prompts: fill holes and remove islands of up to N pixels of SAM-2's masks",
    )
    predict.add_argument(
        "--no-overlap",
        action="store_true",
        help="with --prompts: objects do not overlap in what SAM-2 remembers either",
    )


def _add_evaluate(verbs: Any) -> None:
    evaluate = _verb(verbs, "evaluate", _evaluate, "Compare labels with a reference.", as_json=True)
    evaluate.add_argument("--pred", type=Path, required=True, help="folder of predicted labels")
    evaluate.add_argument("--ref", type=Path, required=True, help="folder of reference labels")
    evaluate.add_argument("-o", "--output", type=Path, help="folder of the tables (default: PRED)")
    evaluate.add_argument("--classes", type=int, help="number of classes (default: the largest)")
    evaluate.add_argument("--tolerance", type=float, default=1.0, help="of NSD, mm or voxels")


def _add_report(verbs: Any) -> None:
    report = _verb(verbs, "report", _report, "Write one HTML page on a run.", as_json=False)
    report.add_argument("workdir", type=Path)
    report.add_argument("-o", "--output", type=Path, help="file (default: WORKDIR/report.html)")


def _add_estimate(verbs: Any) -> None:
    text = "Compile the step for accelerators that are not here: memory, exchanges, projected time."
    verb = _verb(verbs, "estimate", _estimate, text, as_json=True)
    verb.add_argument("--config", required=True, help="as for train")
    verb.add_argument(
        "--topology", required=True, help="v5e-16, v5p-64, v6e-256, 2xv5e-16 (two slices), h100-8"
    )
    verb.add_argument("--clips", type=int, metavar="N", help="clips of both streams per device")
    verb.add_argument(
        "--largest", action="store_true", help="search the most clips per device that fit"
    )
    verb.add_argument(
        "--quick", action="store_true", help="least effort of the compiler: figures are upper ends"
    )
    verb.epilog = "Settings are changed by --config.GROUP.FIELD=VALUE. Needs: pip install libtpu."


def _doctor(args: argparse.Namespace) -> int:
    from sss_jax.doctor import diagnose

    return _print_report(diagnose(), args.json)


def _data_check(args: argparse.Namespace) -> int:
    from sss_jax import config
    from sss_jax.data.check import check_folder
    from sss_jax.options import Options

    options = config.load(args.config, args.overrides) if args.config else Options()
    classes = options.model.num_classes if args.config else None
    split = options.data.split if args.config else None
    return _print_report(check_folder(args.folder, split, options.data, classes), args.json)


def _print_report(report: Any, as_json: bool) -> int:
    print(json.dumps(report.to_json(), indent=2) if as_json else report.render())
    return 1 if report.problems else 0


def _data_prepare(args: argparse.Namespace) -> int:
    from sss_jax import config
    from sss_jax.data.prepare import prepare_folder

    options = config.load(args.config, args.overrides) if args.config else None
    report = prepare_folder(args.folder, args.out, options, shards=args.shards, say=_say)
    return _print_report(report, args.json)


def _data_phantoms(args: argparse.Namespace) -> int:
    from sss_jax.data.synthetic import write_phantoms

    write_phantoms(args.folder, seed=args.seed, all_labels=args.all_labels)
    print(args.folder)
    return 0


def _train(args: argparse.Namespace) -> int:
    from sss_jax import config

    options = config.load(args.config, args.overrides)
    from sss_jax.train import hosts
    from sss_jax.train.loop import train

    meeting = hosts.Meeting(args.coordinator, args.processes, args.process)
    several = args.distributed or meeting != hosts.Meeting()
    with _libraries_on_stderr() if several else contextlib.nullcontext():
        if several:
            hosts.join(meeting)
        try:
            summary = train(
                options, args.data, args.workdir, fresh=args.fresh, skip_bad=args.skip_bad
            )
        except PeerLost as error:
            # An ordinary exit would wait for all processes to say goodbye.
            print(f"sss-jax: {error}", file=sys.stderr, flush=True)
            os._exit(error.exit_code)
    if hosts.is_lead():
        print(json.dumps(summary, indent=2) if args.json else _render_summary(summary))
    return 0


@contextlib.contextmanager
def _libraries_on_stderr() -> Iterator[None]:
    """Send what libraries write to standard output to standard error: only results belong there."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)


def _render_summary(summary: dict[str, Any]) -> str:
    return "\n".join(f"{name}: {value}" for name, value in summary.items())


def _say(line: str) -> None:
    """Show progress beside the result."""
    print(line, file=sys.stderr)


def _convert(args: argparse.Namespace) -> int:
    from sss_jax.conversion.sam2 import run

    result = run(args.source, args.target, to_torch=args.to_torch, verify=args.verify, report=_say)
    print(json.dumps(result, indent=2) if args.json else result["target"])
    return 0


def _predict_prompted(args: argparse.Namespace) -> int:
    from sss_jax import sam2
    from sss_jax.predict_prompts import data_options, predict_prompted

    options = data_options(args.window)
    network = sam2.load(args.checkpoint, image_size=args.image_size)
    result = predict_prompted(
        network,
        args.input,
        args.prompts,
        args.output,
        options,
        clean_area=args.clean_area,
        overlap=not args.no_overlap,
    )
    print(json.dumps(result, indent=2) if args.json else result["target"])
    return 0


def _predict(args: argparse.Namespace) -> int:
    if args.prompts:
        return _predict_prompted(args)
    from sss_jax.predict import run_predict

    failures = run_predict(
        args.checkpoint,
        args.input,
        args.output,
        which=args.which,
        subset=args.subset,
        report=_say,
    )
    if args.json:
        print(json.dumps({"output": str(args.output), "failures": failures}, indent=2))
    else:
        print(args.output)
    return 1 if failures else 0


def _evaluate(args: argparse.Namespace) -> int:
    from sss_jax.evaluate import evaluate

    summary = evaluate(
        args.pred,
        args.ref,
        args.output or args.pred,
        num_classes=args.classes,
        tolerance=args.tolerance,
    )
    print(json.dumps(summary.to_json(), indent=2) if args.json else summary.render())
    return 0


def _estimate(args: argparse.Namespace) -> int:
    from sss_jax import config

    options = config.load(args.config, args.overrides)
    from sss_jax.estimate import estimate, largest
    from sss_jax.estimate_report import render

    if args.largest:
        found = largest(options, args.topology, quick=args.quick, report=_say)
    else:
        found = [estimate(options, args.topology, clips=args.clips, quick=args.quick, report=_say)]
    if args.json:
        print(json.dumps([one.to_json() for one in found], indent=2))
    else:
        print("\n\n".join(render(one) for one in found))
    fitting = [one for one in found if one.memory is None or one.memory.fits]
    return 0 if fitting else 1


def _report(args: argparse.Namespace) -> int:
    from sss_jax.report import write_report

    print(write_report(args.workdir, args.output))
    return 0


if __name__ == "__main__":
    sys.exit(main())
