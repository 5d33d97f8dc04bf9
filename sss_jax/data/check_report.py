"""What `data check` found: problems, a summary and suggested settings."""

import dataclasses
import statistics
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sss_jax.data.faults import shown


@dataclasses.dataclass(frozen=True)
class Problem:
    """One thing that is wrong with one file."""

    file: Path
    problem: str
    fix: str


@dataclasses.dataclass(frozen=True)
class CaseFacts:
    """What one readable case holds.

    Attributes:
        name: case name.
        shape: stored shape, voxels.
        spacing: along the stored axes, mm.
        orientation: body directions of the stored axes, e.g. "LPS", or "unknown".
        slice_axis: canonical axis that -1 would cut along.
        slices: slices along it.
        plane: rows and columns of a slice.
        smallest: lowest intensity.
        largest: highest intensity.
        percentiles: intensities at 0.5 and 99.5 %.
        voxels: number of voxels of each label; empty where no label was read.
    """

    name: str
    shape: tuple[int, int, int]
    spacing: tuple[float, float, float]
    orientation: str
    slice_axis: int
    slices: int
    plane: tuple[int, int]
    smallest: float
    largest: float
    percentiles: tuple[float, float]
    voxels: dict[int, int]


@dataclasses.dataclass(frozen=True)
class CheckReport:
    """The outcome of a check.

    Attributes:
        root: data folder.
        checked: cases that were looked at.
        cases: facts of those whose image can be read.
        problems: all that is wrong.
        labelled: names of the cases that training learns labels from.
    """

    root: Path
    checked: int
    cases: tuple[CaseFacts, ...]
    problems: tuple[Problem, ...]
    labelled: tuple[str, ...]

    @property
    def voxels(self) -> dict[int, int]:
        """Voxels of each label over all cases."""
        total: Counter[int] = Counter()
        for case in self.cases:
            total.update(case.voxels)
        return dict(sorted(total.items()))

    @property
    def suggestion(self) -> dict[str, Any]:
        """Settings that fit the data, by their configuration names."""
        return _suggest(self.cases, self.voxels) if self.cases else {}

    @property
    def notes(self) -> list[str]:
        """Remarks that forbid nothing but should be known."""
        return _notes(self.cases, set(self.labelled), self.voxels)

    def to_json(self) -> dict[str, Any]:
        """Return everything as plain JSON types."""
        total = sum(self.voxels.values())
        return {
            "folder": shown(self.root),
            "checked": self.checked,
            "problems": [
                {"file": shown(p.file), "problem": p.problem, "fix": p.fix} for p in self.problems
            ],
            "labels": {
                str(k): {"voxels": n, "share": n / total, "cases": self._cases_with(k)}
                for k, n in self.voxels.items()
            },
            "notes": self.notes,
            "suggestion": self.suggestion,
            "cases": [{**_plain(c), "name": shown(c.name)} for c in self.cases],
        }

    def render(self) -> str:
        """Return the report as text for a terminal."""
        labelled = sum(bool(c.voxels) for c in self.cases)
        lines = [
            f"{shown(self.root)}: {self.checked} cases, {len(self.cases)} images read, "
            f"{labelled} label maps read"
        ]
        lines += [*_summary(self.cases), *self._label_lines()]
        lines += [f"note: {note}" for note in self.notes]
        if self.suggestion:
            settings = " ".join(f"--config.{k}={v}" for k, v in self.suggestion.items())
            lines += ["suggested settings:", f"  {settings}"]
        lines += [f"{len(self.problems)} problems" if self.problems else "no problems"]
        for p in self.problems:
            lines += [f"  {shown(p.file)}", f"    {p.problem}", f"    to mend it: {p.fix}"]
        return "\n".join(lines)

    def _cases_with(self, label: int) -> int:
        return sum(label in case.voxels for case in self.cases)

    def _label_lines(self) -> Iterable[str]:
        total = sum(self.voxels.values())
        for label, count in self.voxels.items():
            share = f"{100 * count / total:7.3f} %"
            yield f"  label {label:3d}  {share} of voxels, in {self._cases_with(label)} cases"


def _plain(case: CaseFacts) -> dict[str, Any]:
    facts = dataclasses.asdict(case)
    return {k: list(v) if isinstance(v, tuple) else v for k, v in facts.items()} | {
        "voxels": {str(k): n for k, n in case.voxels.items()}
    }


def _summary(cases: tuple[CaseFacts, ...]) -> list[str]:
    if not cases:
        return []
    shapes = (_range([c.shape[a] for c in cases]) for a in range(3))
    spacing = (_range([round(c.spacing[a], 4) for c in cases]) for a in range(3))
    turns = Counter(c.orientation for c in cases)
    return [
        f"  shape        {' x '.join(shapes)}",
        f"  spacing, mm  {' x '.join(spacing)}",
        f"  orientation  {', '.join(f'{name} ({n})' for name, n in turns.most_common())}",
        f"  slices       {_range([c.slices for c in cases])}",
        f"  intensities  {min(c.smallest for c in cases):g} to {max(c.largest for c in cases):g}",
    ]


def _range(values: list[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:g}" if low == high else f"{low:g}..{high:g}"


def _notes(cases: tuple[CaseFacts, ...], labelled: set[str], voxels: dict[int, int]) -> list[str]:
    notes = []
    unknown = sum(c.orientation == "unknown" for c in cases)
    if unknown:
        notes.append(
            f"{unknown} images carry no orientation; they are taken as stored and must all be "
            "stored the same way"
        )
    if 0 < unknown < len(cases):
        notes.append("images with and without orientation are mixed; slices may be turned")
    if len({c.slice_axis for c in cases}) > 1:
        notes.append("the coarsest axis differs between images; set data.slice_axis yourself")
    known = {k for c in cases if c.name in labelled for k in c.voxels}
    top = max(voxels, default=0)
    lacking = [str(k) for k in range(1, top + 1) if k not in known]
    if labelled and lacking:
        notes.append(f"no labelled case shows label {', '.join(lacking)} of 1..{top}")
    return notes


def _suggest(cases: tuple[CaseFacts, ...], voxels: dict[int, int]) -> dict[str, Any]:
    axis = Counter(c.slice_axis for c in cases).most_common(1)[0][0]
    middle = int(statistics.median_low([c.slices for c in cases]))
    side = statistics.median([max(c.plane) for c in cases])
    found: dict[str, Any] = {}
    if max(voxels, default=0) > 0:
        found["model.num_classes"] = max(voxels)
    found["model.image_size"] = min(max(32 * round(side / 32), 64), 1024)
    found["data.slice_axis"] = axis
    found["data.clip_slices"] = min(2 ** (middle.bit_length() - 1), 16)
    return found | _suggest_scaling(cases)


def _suggest_scaling(cases: tuple[CaseFacts, ...]) -> dict[str, Any]:
    """CT is told by its air of about -1000 HU; its numbers mean the same in every scan."""
    if sum(c.smallest <= -500 for c in cases) < 0.75 * len(cases):
        return {"data.normalise": "percentile"}
    low, high = (statistics.median([c.percentiles[end] for c in cases]) for end in (0, 1))
    window = {
        "data.window_low": 50.0 * round(low / 50),
        "data.window_high": 50.0 * round(high / 50),
    }
    return {"data.normalise": "window", **window}
