"""What each method is worth on real data: `python -m sss_jax.benchmarks.quality --data NAME=DIR`.

Trains every method with the same network, steps, labelled cases and seeds, segments the held-out
test cases once with the weights that were best on the validation cases, and adds a row per run to
one JSON file. Runs that are in the file already are not repeated, and a run that was stopped goes
on from its last checkpoint, so the table can grow over many sessions. `--table` writes the summary
over seeds as Markdown.
"""

import argparse
import collections
import dataclasses
import hashlib
import itertools
import json
import os
import resource
import shutil
import statistics
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from sss_jax import config
from sss_jax.atomic import write_text
from sss_jax.benchmarks import result
from sss_jax.benchmarks.demo import sss_jax
from sss_jax.options import (
    DFEOptions,
    MemoryOptions,
    Options,
    PCSWOptions,
    SemiOptions,
)

_ALL, _WEAK = "dfe.level_4=true", "dfe.pair=weak_strong"

# Name of a row: method of the configuration, and what is switched beside it. "+" adds one
# mechanism to UniMatch V2; sss has all of them. "all levels": DFE at stride 4 too, as in the paper;
# "weak view": that, and DFE compares with the weak view, as in the paper.
METHODS: dict[str, tuple[str, tuple[str, ...]]] = {
    "floor": ("supervised", ()),
    "fixmatch": ("fixmatch", ()),
    "unimatch_v2": ("unimatch_v2", ()),
    "+ DFE": ("unimatch_v2", ("dfe.enabled=true",)),
    "+ DFE, all levels": ("unimatch_v2", ("dfe.enabled=true", _ALL)),
    "+ DFE, weak view": ("unimatch_v2", ("dfe.enabled=true", _ALL, _WEAK)),
    "+ PCSW": ("unimatch_v2", ("pcsw.enabled=true", "semi.labelled_prompts=mixed")),
    "+ memory": ("unimatch_v2", ("memory.kind=fifo",)),
    "sss": ("sss", ()),
    "sss, all levels": ("sss", (_ALL,)),
    "sss, weak view": ("sss", (_ALL, _WEAK)),
    "sss_sketch": ("sss_sketch", ()),
    "ceiling": ("supervised", ("train.all_labels=true",)),
}
CURVES = (
    "coverage",
    "coverage_foreground",
    "prompts_valid",
    "loss_unlabelled",
    "similarity_level_4",
    "similarity_level_8",
    "similarity_level_16",
)
VAL_CURVES = ("pseudo_precision", "pseudo_recall", "prompts_found", "prompt_iou")


@dataclasses.dataclass(frozen=True)
class Run:
    """One cell of the table for one seed.

    Attributes:
        data: name of the data set, which is that of its configuration.
        labelled: labelled subjects; 0: all that the split has.
        method: key of `METHODS`.
        seed: seed of parameters, data order and augmentation.
        extra: overrides that hold for all runs.
    """

    data: str
    labelled: int
    method: str
    seed: int
    extra: tuple[str, ...] = ()

    @property
    def overrides(self) -> tuple[str, ...]:
        """Settings beside those of the configuration."""
        own = () if self.method == "ceiling" else (f"train.labelled_subjects={self.labelled}",)
        return (*METHODS[self.method][1], *own, f"train.seed={self.seed}", *self.extra)

    @property
    def spec(self) -> str:
        """Configuration."""
        return f"{self.data}:{METHODS[self.method][0]}"

    @property
    def options(self) -> Options:
        """Every setting of the run."""
        return config.load(self.spec, self.overrides)

    @property
    def folder(self) -> str:
        """Name of the run folder."""
        text = config.to_json(self.options)
        return f"{self.data}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"

    def is_done(self, rows: Iterable[dict[str, Any]]) -> bool:
        """Whether a row has these very settings; options that are newer have their defaults."""
        own = _effective(self.options)
        return any(_effective(config.from_dict(json.loads(row["settings"]))) == own for row in rows)


def _effective(options: Options) -> Options:
    """Forget settings that change no result: of parts that are off, and of how a run computes."""
    model = dataclasses.replace(
        options.model, remat=False, remat_keeps="nothing", loop_blocks=False, kernels="auto"
    )
    memory, dfe, pcsw, semi = options.memory, options.dfe, options.pcsw, options.semi
    train = options.train
    if not semi.enabled:
        train = dataclasses.replace(train, unlabelled_batch=1)
        names = ("enabled", "ema_decay", "labelled_prompts", "box_jitter")
        semi = SemiOptions(**{name: getattr(semi, name) for name in names})
    return dataclasses.replace(
        options,
        model=model,
        memory=dataclasses.replace(
            MemoryOptions(kind="none") if memory.kind == "none" else memory,
            remat=False,
            remat_keeps="nothing",
            unroll="auto",
        ),
        dfe=dataclasses.replace(dfe if dfe.enabled else DFEOptions(enabled=False), remat=False),
        pcsw=pcsw if pcsw.enabled else PCSWOptions(enabled=False),
        semi=semi,
        train=train,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is missing and write the tables."""
    args = _arguments(argv)
    folders = dict(item.split("=", 1) for item in args.data)
    rows = result.rows_of(args.output)
    for run in plan(folders, args.labelled, args.methods, args.seeds, tuple(args.set)):
        if run.is_done(rows):
            continue
        workdir = args.workdir / run.folder
        row = measure(run, Path(folders[run.data]), workdir)
        rows = [*result.rows_of(args.output), row]  # another process may have added to it
        result.write(args.output, "quality", rows)
        if not args.keep:
            shutil.rmtree(workdir)
    if args.table:
        write_text(args.table, table(rows))
    print(table(rows))
    return 0


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", nargs="+", required=True, metavar="NAME=DIR")
    parser.add_argument("--labelled", nargs="+", type=int, default=[0], metavar="SUBJECTS")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="SETTING=VALUE", help="for all runs"
    )
    parser.add_argument("--workdir", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--keep", action="store_true", help="keep checkpoints and predictions")
    parser.add_argument("-o", "--output", type=Path, required=True, help="JSON to add to")
    parser.add_argument("--table", type=Path, help="Markdown to write")
    return parser.parse_args(argv)


def plan(
    data: Iterable[str],
    labelled: Sequence[int],
    methods: Sequence[str],
    seeds: Sequence[int],
    extra: tuple[str, ...] = (),
) -> list[Run]:
    """List the runs, seed by seed, so that a table cut short is still one over all methods.

    The ceiling knows all labels, whatever the number of labelled subjects: it runs once.
    """
    runs = [
        Run(d, 0 if m == "ceiling" else n, m, seed, extra)
        for seed, d, n, m in itertools.product(seeds, data, labelled, methods)
    ]
    return list(dict.fromkeys(runs))


def measure(run: Run, data: Path, workdir: Path) -> dict[str, Any]:
    """Train, segment the test cases, score them, and return the row."""
    began, resumed = time.monotonic(), workdir.exists()
    settings = [f"--config.{item}" for item in run.overrides]
    checkpoint, test = str(workdir), str(workdir / "test")
    sss_jax("train", "--config", run.spec, "--data", str(data), "--workdir", checkpoint, *settings)
    trained = time.monotonic()
    subset = ("-o", test, "--subset", "test")
    sss_jax("predict", "--checkpoint", checkpoint, "-i", str(data), *subset)
    refs = ("--ref", str(data / "labels"), "--classes", str(run.options.model.num_classes))
    sss_jax("evaluate", "--pred", test, *refs)
    summary = json.loads((workdir / "test" / "summary.json").read_text())
    log = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {
        **dataclasses.asdict(run),
        "settings": json.dumps(dataclasses.asdict(run.options)),
        "steps": log[-1]["step"],
        "test": summary["mean"],
        "classes": [c["dice"]["mean"] for c in summary["classes"]],
        "over_cases": summary["over_cases"]["dice"],
        "cases": summary["classes"][0]["cases"],
        "val": [[r["step"], r["dice"]] for r in log if r["kind"] == "val"],
        "curves": curves(log),
        "slices_per_s": statistics.median(r["slices_per_s"] for r in log if r["kind"] == "train"),
        "train_s": None if resumed else round(trained - began, 1),
        "peak_mib": None if resumed else _peak_mib(),
        "load": os.getloadavg()[0],
        "commit": result.commit(),
    }


def _peak_mib() -> int:
    """Largest resident memory that any verb of this process took so far."""
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024


def curves(log: list[dict[str, Any]], points: int = 20) -> dict[str, list[list[float]]]:
    """Thin the curves that say why the unlabelled images helped or did not."""
    found: dict[str, list[list[float]]] = {}
    for kind, names in (("train", CURVES), ("val", VAL_CURVES)):
        for name in names:
            rows = [(r["step"], r[name]) for r in log if r["kind"] == kind and name in r]
            every = max(1, len(rows) // points) if kind == "train" else 1
            if rows:
                found[name] = [[step, round(value, 4)] for step, value in rows[::every]]
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """Summarise over seeds: one line per data set, labelled subjects and method."""
    lines = [
        "| data | labelled subjects | method | seeds | test Dice | HD95, mm | recovered gap "
        "| minutes | slices/s | peak, MiB |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    groups: dict[tuple, list[dict[str, Any]]] = collections.defaultdict(list)
    for row in rows:
        groups[row["data"], row["labelled"], row["method"], tuple(row["extra"])].append(row)
    order = {name: i for i, name in enumerate(METHODS)}
    for key in sorted(groups, key=lambda k: (k[0], k[3], k[1] or 10**6, order[k[2]])):
        lines.append(_line(key, groups))
    return "\n".join(lines) + "\n"


def _line(key: tuple, groups: dict[tuple, list[dict[str, Any]]]) -> str:
    data, labelled, method, extra = key
    own = groups[key]
    subjects = "all" if method == "ceiling" else labelled or "all of the split"
    cells = [
        data if not extra else f"{data} ({', '.join(extra)})",
        subjects,
        method,
        len(own),
        _spread([row["test"]["dice"] for row in own], 3),
        _distance([row["test"] for row in own]),
        recovered(groups, key),
        _minutes([row["train_s"] for row in own]),
        f"{statistics.fmean(row['slices_per_s'] for row in own):.1f}",
        max((row["peak_mib"] for row in own if row["peak_mib"]), default="stopped"),
    ]
    return "| " + " | ".join(map(str, cells)) + " |"


def _distance(scores: list[dict[str, Any]]) -> str:
    """HD95 in mm; in voxels, said so, where the files do not know their spacing."""
    if any("hd95_mm" in test for test in scores):
        return _spread([test.get("hd95_mm") for test in scores], 2)
    found = _spread([test.get("hd95_voxel") for test in scores], 2)
    return found if found == "none" else f"{found} voxels"


def _spread(values: list[float | None], digits: int) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "none"
    mean = f"{statistics.fmean(known):.{digits}f}"
    return f"{mean} ± {statistics.stdev(known):.{digits}f}" if len(known) > 1 else mean


def _minutes(seconds: list[float | None]) -> str:
    """Mean of the runs that went through without a stop."""
    whole = [value for value in seconds if value is not None]
    return f"{statistics.fmean(whole) / 60:.1f}" if whole else "stopped"


def recovered(groups: dict[tuple, list[dict[str, Any]]], key: tuple) -> str:
    """Share of the gap between floor and ceiling, at the method's seeds where they have them."""
    data, labelled, method, extra = key
    floor, ceiling = (data, labelled, "floor"), (data, 0, "ceiling")
    ends = [_with_same_labels(groups, end, extra) for end in (floor, ceiling)]
    if method in ("floor", "ceiling") or not all(ends):
        return ""
    seeds = {row["seed"] for row in groups[key]}
    low, high = (_dice([r for r in end if r["seed"] in seeds] or end) for end in ends if end)
    own = _dice(groups[key])
    return f"{(own - low) / (high - low):+.0%}" if high > low else "no gap"


def _with_same_labels(
    groups: dict[tuple, list[dict[str, Any]]], end: tuple, extra: tuple[str, ...]
) -> list[dict[str, Any]] | None:
    """Rows of an end of the gap; the plain ones where `extra` changes nothing in them."""
    own = groups.get((*end, extra))
    plain = groups.get((*end, ()))
    if own or not plain:
        return own
    run = Run(*end, seed=plain[0]["seed"], extra=extra)
    return plain if run.is_done(plain) else None


def _dice(rows: list[dict[str, Any]]) -> float:
    return statistics.fmean(row["test"]["dice"] for row in rows)


if __name__ == "__main__":
    sys.exit(main())
