"""Write a folder of NIfTI files as shards of records, one slice each; stop it and start it again.

Shards are written one after the other, a volume at a time. A shard takes its name when all of it is
on the disk, and then enters `preparing.json` with its SHA-256; `prepared.json` comes last. A second
run of the same command keeps what is there and proves good, so it resumes, verifies and repairs.
"""

import contextlib
import dataclasses
import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from sss_jax.atomic import TEMPORARY_PREFIX, write_bytes
from sss_jax.data.cases import Case
from sss_jax.data.check import check_folder
from sss_jax.data.check_report import Problem
from sss_jax.data.faults import FileFault, shown
from sss_jax.data.folders import PREPARED, find_cases
from sss_jax.data.prepare_shard import Damaged, hash_file, origin, write_shard
from sss_jax.data.prepared import (
    PREPARING,
    CaseFacts,
    FileFacts,
    Manifest,
    ShardFacts,
    baked,
    differing,
    images_name,
    labels_name,
    read_manifest,
    write_manifest,
)
from sss_jax.data.sources import FolderSource
from sss_jax.errors import ConfigError, DataError
from sss_jax.options import DataOptions, Options

_SHARD_BYTES = 2**24  # of source files
_MOST_SHARDS = 128  # by default; each takes two open files while training
_LARGEST = 400

Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class PrepareReport:
    """The outcome of a preparation.

    Attributes:
        out: the prepared folder.
        cases: cases in it.
        slices: records of images.
        bytes: size of all shards.
        shards: number of shards.
        written: shards that this run wrote; the others were there and are as they were written.
        problems: all that is wrong with the source; where there are any, nothing is finished.
    """

    out: Path
    cases: int
    slices: int
    bytes: int
    shards: int
    written: int
    problems: tuple[Problem, ...]

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        problems = [{**dataclasses.asdict(p), "file": str(p.file)} for p in self.problems]
        return {**dataclasses.asdict(self), "out": str(self.out), "problems": problems}

    def render(self) -> str:
        """Return text for people."""
        if not self.problems:
            kept = f", {self.shards - self.written} of them there before" * (
                self.written < self.shards
            )
            return (
                f"{shown(self.out)}: {self.cases} cases, {self.slices} slices, "
                f"{self.bytes / 1e6:.1f} MB in {self.shards} shards{kept}"
            )
        lines = [f"not finished: {len(self.problems)} problems"]
        for p in self.problems:
            lines += [f"  {shown(p.file)}", f"    {p.problem}", f"    to mend it: {p.fix}"]
        return "\n".join([*lines, "then run the same command again"])


def prepare_folder(
    folder: Path,
    out: Path,
    options: Options | None = None,
    *,
    shards: int = 0,
    say: Say = lambda line: None,
) -> PrepareReport:
    """Prepare a data folder, or go on with what an earlier call left.

    Args:
        folder: NIfTI files and split files.
        out: new or empty folder, or one that this command was writing.
        options: settings that are baked in. With them only the cases of their split are taken,
            and no label of an unlabelled one is read. None takes the defaults, all cases and all
            their labels.
        shards: number of shards; 0 chooses one for every 16 MiB of files, up to 128.
        say: called with lines of progress.

    Raises:
        DataError: `out` holds something else, was made from other files, or cannot be written.
        ConfigError: `out` was made with other settings.
    """
    faults: list[FileFault] = []
    cases = _cases(folder, options, faults)
    data = (options or Options()).data
    classes = options.model.num_classes if options else None
    if faults:
        report = check_folder(folder, options.data.split if options else None, data, classes)
        return _report(out, Manifest({}, ()), 0, report.problems)
    with _locked(out):
        groups, manifest = _begin(folder, out, cases, data, shards)
        return _Work(folder, out, data, classes, say).to_the_end(groups, manifest)


def _cases(folder: Path, options: Options | None, faults: list[FileFault]) -> list[Case]:
    found = find_cases(folder, faults.append)
    if faults or options is None:
        return list(found.values())
    split = FolderSource(folder).split(options.data, options.train)
    return sorted(split.cases, key=lambda case: case.name)


def _begin(
    folder: Path, out: Path, cases: list[Case], data: DataOptions, shards: int
) -> tuple[list[list[Case]], Manifest]:
    """Return the cases of each shard, and what of it is there already."""
    known = _known(out, folder)
    count = _count(cases, shards, known)
    manifest = known or Manifest(baked(data), (None,) * count)
    _refuse_other(manifest, data, count, out)
    _refuse_foreign(out, folder, count)
    if known is None:
        write_manifest(out / PREPARING, manifest)
    places = np.array_split(np.arange(len(cases)), count)
    return [[cases[i] for i in group] for group in places], manifest


def _known(out: Path, folder: Path) -> Manifest | None:
    for name in (PREPARED, PREPARING):
        if (out / name).is_file():
            return read_manifest(out / name)
    return None


def _count(cases: list[Case], shards: int, known: Manifest | None) -> int:
    if not 0 <= shards <= _LARGEST:
        raise ConfigError(f"--shards {shards} is outside 1..{_LARGEST}")
    if not shards and known is not None:
        return len(known.shards)
    if not shards:
        total = sum(path.stat().st_size for c in cases for path in (c.image, c.label) if path)
        shards = min(-(-total // _SHARD_BYTES), _MOST_SHARDS)
    return min(max(shards, 1), len(cases))


def _refuse_other(manifest: Manifest, data: DataOptions, count: int, out: Path) -> None:
    words = differing(manifest.settings, data)
    if words:
        raise ConfigError(f"{shown(out)} was begun with {words}: choose another folder")
    if len(manifest.shards) != count:
        raise ConfigError(
            f"{shown(out)} was begun with {len(manifest.shards)} shards, {count} are asked for: "
            "leave out --shards, or choose another folder"
        )


def _refuse_foreign(out: Path, folder: Path, count: int) -> None:
    """Refuse a folder with anything that this command does not write; remove its leftovers."""
    own = {PREPARED, PREPARING, *(p.name for p in _splits(folder))}
    own |= {name(i, count) for i in range(count) for name in (images_name, labels_name)}
    begun = any((out / name).is_file() for name in (PREPARED, PREPARING))
    leftovers = []
    for path in sorted(out.iterdir()):
        left = path.name.startswith(TEMPORARY_PREFIX) and path.name.split("-", 2)[-1] in own
        if left:
            leftovers.append(path)
        elif not begun or path.name not in own | {p.name for p in out.glob("split*.json")}:
            problem = f"holds {shown(path.name)}, which is not of this preparation"
            raise FileFault(out, problem, "choose a new or empty folder")
    for path in leftovers:
        path.unlink()


def _splits(folder: Path) -> list[Path]:
    return sorted(p for p in folder.glob("split*.json") if p.is_file())


@contextlib.contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Keep a second preparation out of the folder, for as long as this process lives."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(out, os.O_RDONLY)
    except OSError as error:
        problem = f"cannot be made: {error.strerror}"
        raise FileFault(out, problem, "name a folder that you may write to") from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DataError(f"{shown(out)} is being prepared by another process") from error
        except OSError:
            pass  # Some network file systems have no locks.
        yield
    finally:
        os.close(descriptor)


@dataclasses.dataclass(frozen=True)
class _Work:
    """A preparation under way."""

    folder: Path
    out: Path
    data: DataOptions
    classes: int | None
    say: Say

    def to_the_end(self, groups: list[list[Case]], manifest: Manifest) -> PrepareReport:
        """Write what is missing or damaged; finish if nothing was wrong with any case."""
        problems: list[FileFault] = []
        written = 0
        for index, cases in enumerate(groups):
            before = manifest.shards[index]
            if before is not None and self._stands(index, len(groups), cases, before):
                self.say(f"shard {index + 1} of {len(groups)}: there already, verified")
                continue
            try:
                made = self._write(index, len(groups), cases)
            except Damaged as damaged:
                problems += damaged.faults
                continue
            written += 1
            parts = (*manifest.shards[:index], made, *manifest.shards[index + 1 :])
            manifest = dataclasses.replace(manifest, shards=parts)
            if not (self.out / PREPARED).is_file():
                write_manifest(self.out / PREPARING, manifest)
        if not problems:
            self._finish(manifest)
        found = tuple(Problem(f.path, f.problem, f.fix) for f in problems)
        return _report(self.out, manifest, written, found)

    def _stands(self, index: int, count: int, cases: list[Case], before: ShardFacts) -> bool:
        """Tell whether a finished shard is good; raise where its source is another than it was."""
        if len(cases) != len(before.cases):
            raise self._changed(self.folder, "has other cases")
        for case, facts in zip(cases, before.cases, strict=True):
            self._refuse_changed(case, facts)
        return _same(self.out / images_name(index, count), before.images) and (
            before.labels is None or _same(self.out / labels_name(index, count), before.labels)
        )

    def _refuse_changed(self, case: Case, facts: CaseFacts) -> None:
        labelled = case.label is not None
        if (case.name, case.subject) != (facts.name, facts.subject):
            raise self._changed(self.folder, "has other cases or subjects")
        if labelled != (facts.label is not None):
            raise self._changed(case.image, f"{'has' if labelled else 'lacks'} a label file to use")
        pairs = [(case.image, facts.image.origin)]
        if case.label is not None and facts.label is not None:
            pairs.append((case.label, facts.label.origin))
        for path, was in pairs:
            if origin(path, self.folder) != was:
                raise self._changed(path, "has changed")

    def _changed(self, path: Path, problem: str) -> FileFault:
        where = shown(self.out)
        fix = f"remove {where} and prepare again, or restore what was there"
        return FileFault(path, f"{problem} since {where} was prepared from it", fix)

    def _write(self, index: int, count: int, cases: list[Case]) -> ShardFacts:
        images, labels = (self.out / name(index, count) for name in (images_name, labels_name))
        made = write_shard(images, labels, self.folder, cases, self.data, self.classes)
        slices = made.images.records
        self.say(
            f"shard {index + 1} of {count}: {len(cases)} cases, {slices} slices, "
            f"{made.images.bytes / 1e6:.1f} MB"
        )
        return made

    def _finish(self, manifest: Manifest) -> None:
        for path in _splits(self.folder):
            target, content = self.out / path.name, path.read_bytes()
            if not target.is_file() or target.read_bytes() != content:
                write_bytes(target, content)
        if not (self.out / PREPARED).is_file() or read_manifest(self.out / PREPARED) != manifest:
            write_manifest(self.out / PREPARED, manifest)
        (self.out / PREPARING).unlink(missing_ok=True)


def _same(path: Path, facts: FileFacts) -> bool:
    if not path.is_file() or path.stat().st_size != facts.bytes:
        return False
    return hash_file(path) == facts.sha256


def _report(
    out: Path, manifest: Manifest, written: int, problems: tuple[Problem, ...]
) -> PrepareReport:
    done = [shard for shard in manifest.shards if shard is not None]
    files = [f for shard in done for f in (shard.images, shard.labels) if f is not None]
    return PrepareReport(
        out,
        cases=sum(len(shard.cases) for shard in done),
        slices=sum(shard.images.records for shard in done),
        bytes=sum(file.bytes for file in files),
        shards=len(manifest.shards),
        written=written,
        problems=problems,
    )
