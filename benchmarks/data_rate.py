"""Slices per second on their way to the device: `python -m sss_jax.benchmarks.data_rate -o FILE`.

Times the training loader on the same clips from NIfTI files (decoded anew for every clip, or kept
in memory), from shards prepared of them, and from nowhere (`synthetic:`), in turn, so that a change
of load hits all. Beside it: the bytes of the shards alone, where the time of a clip goes, and what
an accelerator would consume, which is a projection unless you name a measured rate.
"""

import argparse
import contextlib
import dataclasses
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from sss_jax import process
from sss_jax.benchmarks import result
from sss_jax.benchmarks.request import Measured, Request
from sss_jax.data.pipeline import Loader, draw_slices, fitted
from sss_jax.data.prepare import prepare_folder
from sss_jax.data.prepared_source import PreparedSource, PreparedStack
from sss_jax.data.sources import Source, open_source
from sss_jax.data.synthetic import SplitSizes, write_phantoms
from sss_jax.options import DataOptions, ModelOptions, Options, TrainOptions

CLIP, LABELLED, UNLABELLED = 8, 4, 4
UNRESIZED = "prepared, resized by the device"
GFLOP_PER_SLICE = 3492.8 / 2
GFLOP_SIDE = 1024
TFLOP_PER_S = 400.0


@dataclasses.dataclass(frozen=True)
class Way:
    """One way of making batches: its options, and where the scans come from."""

    name: str
    options: Options
    source: Source
    files: tuple[Path, ...] = ()


@dataclasses.dataclass(frozen=True)
class Work:
    """How much is measured.

    Attributes:
        threads: reading threads, one after the other.
        steps: batches in one timing.
        repeats: timings.
        cold: whether to measure with the files' pages dropped too.
        seen: slices/s that a device was seen to take; None: projected.
    """

    threads: tuple[int, ...] = (2,)
    steps: int = 2
    repeats: int = 5
    cold: bool = False
    seen: float | None = None


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and write."""
    if argv is None:
        process.set_up()  # as `sss-jax train` does
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--data", nargs="+", required=True, metavar="FOLDER=SIZE[,SIZE]", help="sizes in pixels"
    )
    parser.add_argument("--threads", type=int, nargs="+", default=[2])
    parser.add_argument("--steps", type=int, default=2, help="batches of 8 clips in one timing")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--cold", action="store_true", help="also drop the files' pages each time")
    parser.add_argument("--consumption", type=float, help="slices/s that a device was seen to take")
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args(argv)
    folders, threads = list(map(parse, args.data)), tuple(args.threads)
    work = Work(threads, args.steps, args.repeats, args.cold, args.consumption)
    measured = rates(folders, work, lambda line: print(line, file=sys.stderr, flush=True))
    result.write(
        args.output,
        "data_rate",
        measured.rows,
        **measured.more,
        settings={"clip_slices": CLIP, "labelled": LABELLED, "unlabelled": UNLABELLED},
        cores_allowed=len(os.sched_getaffinity(0)),
    )
    return 0


def measure(request: Request) -> Measured:
    """Measure on a folder or a few phantoms, at the configuration's image size and threads."""
    options = next(iter(request.options().values()))
    few = SplitSizes(labelled=2, unlabelled=2, val=1, test=0)
    work = Work((options.data.threads,), repeats=request.repeats)
    if request.data is not None:
        return rates([(Path(request.data), [options.model.image_size])], work, request.say)
    with tempfile.TemporaryDirectory() as scratch:
        folder = write_phantoms(Path(scratch) / "phantoms", subjects=few)
        return rates([(folder, [options.model.image_size])], work, request.say)


def rates(
    folders: list[tuple[Path, list[int]]], work: Work, say: Callable[[str], None]
) -> Measured:
    """Measure every folder at its sizes."""
    rows: list[dict[str, Any]] = []
    stages: list[dict[str, Any]] = []
    needs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for folder, sizes in folders:
            shards = Path(scratch) / folder.name
            prepare_folder(folder, shards, say=say)
            for size in sizes:
                need = consumption(size, work.seen)
                needs += [need] if need not in needs else []
                stages += [
                    {"data": folder.name, **row} for row in stage_times(folder, shards, size)
                ]
                for row in _rows(folder, shards, size, work, need["slices_per_s"]):
                    rows.append(row)
                    say(str(row))
    return Measured(rows, {"stages": stages, "consumption": needs})


def _rows(
    folder: Path, shards: Path, size: int, work: Work, need: float
) -> Iterator[dict[str, Any]]:
    for threads in work.threads:
        ways = make_ways(folder, shards, size, threads, work.steps)
        for row in time_all(ways, shards, work.repeats, work.cold):
            share = row["slices_per_s"]["median"] / need
            fixed = {"data": folder.name, "size": size, "threads": threads}
            yield {**fixed, **row, "share_of_consumption": round(share, 4)}


def parse(text: str) -> tuple[Path, list[int]]:
    """Split a folder from the sizes it is tried at."""
    folder, _, sizes = text.partition("=")
    return Path(folder), [int(size) for size in (sizes or "256").split(",")]


def consumption(size: int, seen: float | None = None) -> dict[str, Any]:
    """Return how many slices per second a device takes: as named, else projected for an H100.

    The projection is an upper bound of what data must deliver, not a measurement: no step of this
    package ran on that device for it.
    """
    if seen is not None:
        return {"size": size, "slices_per_s": seen, "kind": "given by the user"}
    gflop = GFLOP_PER_SLICE * (size / GFLOP_SIDE) ** 2
    return {
        "size": size,
        "slices_per_s": round(1000 * TFLOP_PER_S / gflop, 1),
        "kind": "projection",
        "assumes": [
            f"{GFLOP_PER_SLICE:.0f} GFLOP per slice at {GFLOP_SIDE} px: a step of SSS, tiny, "
            "without memory, one labelled and one unlabelled slice (results/dfe_cost_1024.json)",
            "operations grow with the number of pixels",
            f"{TFLOP_PER_S:.0f} TFLOP/s achieved in bfloat16 on one H100, 40 % of its dense peak, "
            "which few programs reach",
        ],
    }


def make_options(size: int, threads: int, steps: int, cache: int) -> Options:
    """Return settings that differ in what is measured alone."""
    return Options(
        model=ModelOptions(image_size=size, num_classes=254),
        data=DataOptions(clip_slices=CLIP, threads=threads, cache_bytes=cache),
        train=TrainOptions(steps=steps, labelled_batch=LABELLED, unlabelled_batch=UNLABELLED),
    )


def make_ways(folder: Path, shards: Path, size: int, threads: int, steps: int) -> list[Way]:
    """Return the ways to compare, over the same cases."""
    plain = make_options(size, threads, steps, 0)
    kept = make_options(size, threads, steps, 2**33)
    few = dataclasses.replace(plain, model=dataclasses.replace(plain.model, num_classes=3))
    nifti, prepared = open_source(folder, plain), PreparedSource(shards)
    canvas = dataclasses.replace(plain.data, canvas=largest_side(prepared, plain))
    files = tuple(p for name in ("images", "labels") for p in (folder / name).glob("*.nii*"))
    return [
        Way("nifti", plain, nifti, files),
        Way("nifti, volumes in memory", kept, nifti),
        Way("prepared", plain, prepared, tuple(shards.glob("*.array_record"))),
        Way("synthetic", few, open_source("synthetic:", few)),
        Way(UNRESIZED, dataclasses.replace(plain, data=canvas), prepared),
    ]


def largest_side(source: Source, options: Options) -> int:
    """Return the smallest canvas for all slices of a source, pixels."""
    cases = source.split(options.data, options.train).cases
    return max(max(source.read(case, None, options.data).frame.plane) for case in cases)


def time_all(ways: list[Way], shards: Path, repeats: int, cold: bool) -> Iterator[dict[str, Any]]:
    """Time every way in turn, after a round that does not count; then the reading alone."""
    runs: dict[tuple[str, str], Callable[[], int]] = {}
    for way in ways:
        pull = batches_of(way)
        runs[way.name, "in the page cache"] = pull
        if cold and way.files:
            runs[way.name, "dropped"] = lambda p=pull, f=way.files: p() if drop(f) else 0
    runs["prepared, bytes alone", "in the page cache"] = bytes_of(ways[2])
    times: dict[tuple[str, str], list[tuple[float, float]]] = {key: [] for key in runs}
    for turn in range(repeats + 1):
        for key, run in runs.items():
            began, worked = time.perf_counter(), time.process_time()
            slices = run()
            wall, work = time.perf_counter() - began, time.process_time() - worked
            if turn:
                times[key].append((slices / wall, slices / max(work, 1e-9)))
    for (name, pages), rates in times.items():
        wall, work = ([r[i] for r in rates] for i in (0, 1))
        yield {
            "source": name,
            "files": pages if "synthetic" not in name else "none",
            "slices_per_s": rounded(result.summary(wall)),
            "slices_per_cpu_s": rounded(result.summary(work)),
        }


def rounded(values: dict[str, float]) -> dict[str, float]:
    """Keep four digits."""
    return {name: float(f"{value:.4g}") for name, value in values.items()}


def batches_of(way: Way) -> Callable[[], int]:
    """Return a function that makes all batches and counts their slices; volumes stay in memory."""
    o = way.options
    split = way.source.split(o.data, o.train)
    loader = Loader(split, o.model, o.data, o.train, read=way.source.read)

    def pull() -> int:
        slices = 0
        with contextlib.closing(loader.iterate()) as batches:
            for batch in batches:
                slices += sum(int(part["slice_mask"].sum()) for part in batch.values())
        return slices

    return pull


def clips_of(way: Way, count: int) -> list[tuple[Any, bool, np.ndarray]]:
    """Draw clips as training does: case, whether it is labelled, slices."""
    o, rng = way.options, np.random.default_rng(0)
    split = way.source.split(o.data, o.train)
    clips = []
    for number in range(count):
        labelled = number % 2 == 0
        part = split.labelled if labelled else split.unlabelled
        case = part[int(rng.integers(len(part)))]
        stack = way.source.read(case, None, o.data)
        clips.append((case, labelled, draw_slices(stack, o.data, rng, labelled=labelled)))
    return clips


def bytes_of(way: Way) -> Callable[[], int]:
    """Return a function that reads the records of as many clips, checks and decodes none."""
    o = way.options
    clips = clips_of(way, o.train.steps * (LABELLED + UNLABELLED))

    def read(clip: tuple[Any, bool, np.ndarray]) -> int:
        stack = way.source.read(clip[0], None, o.data)
        assert isinstance(stack, PreparedStack)
        for position in clip[2]:
            stack.images.read(stack.facts.image.first + int(position))
            if stack.labels is not None and stack.facts.label is not None:
                stack.labels.read(stack.facts.label.first + int(position))
        return len(clip[2])

    def pull() -> int:
        with ThreadPoolExecutor(max(o.data.threads, 1)) as pool:
            return sum(pool.map(read, clips))

    return pull


def drop(files: Sequence[Path]) -> bool:
    """Ask the system to forget the pages of files, so that they come from the disk."""
    for path in files:
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return True


def stage_times(folder: Path, shards: Path, size: int) -> list[dict[str, Any]]:
    """Return where the time of a clip goes, processor milliseconds per slice, one thread."""
    rows = []
    for way in make_ways(folder, shards, size, 0, 3):
        if "memory" in way.name:
            continue
        clips = clips_of(way, 24)
        spent, slices = np.zeros(3), 0
        for number, (case, _, positions) in enumerate(clips):
            marks = [time.process_time()]
            scan = way.source.read(case, None, way.options.data).read(positions)
            marks.append(time.process_time())
            image, _, _ = fitted(scan, size, way.options.data)
            marks.append(time.process_time())
            np.stack([image])
            marks.append(time.process_time())
            if number >= 4:
                spent += np.diff(marks)
                slices += len(positions)
        names = ("decode_ms", "resize_ms", "copy_ms")
        times = {n: float(f"{1000 * s / slices:.3g}") for n, s in zip(names, spent, strict=True)}
        rows.append({"size": size, "source": way.name, **times})
    return rows


if __name__ == "__main__":
    sys.exit(main())
