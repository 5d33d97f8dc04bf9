"""Splits of a data folder into labelled, unlabelled, validation and test cases."""

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from sss_jax.data.faults import FileFault, shown
from sss_jax.data.folders import Case, find_cases, find_images, inside, read_json, readable

PARTS = ("labelled", "unlabelled", "val", "test")
_FORM = """{
  "labelled": ["subject01"], "unlabelled": ["subject02", "subject03"],
  "val": ["subject04"], "test": ["subject05"],
  "cases": {"labelled": ["subject01_scan1"], "unlabelled": ["subject02_scan1", ...], ...}
}"""


@dataclasses.dataclass(frozen=True)
class Split:
    """The cases of each part; `label` is None for unlabelled ones, so nothing can open them."""

    labelled: tuple[Case, ...]
    unlabelled: tuple[Case, ...]
    val: tuple[Case, ...]
    test: tuple[Case, ...]

    @property
    def cases(self) -> tuple[Case, ...]:
        """All cases, part after part."""
        return (*self.labelled, *self.unlabelled, *self.val, *self.test)

    @property
    def digest(self) -> str:
        """SHA-256 of names and subjects by part; equal where two runs learn from the same cases."""
        parts = {p: [(c.name, c.subject) for c in getattr(self, p)] for p in PARTS}
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def without(self, names: Iterable[str]) -> "Split":
        """Return the split without some cases, e.g. those that cannot be read."""
        gone = set(names)
        return Split(*(tuple(c for c in getattr(self, p) if c.name not in gone) for p in PARTS))


def load_split(
    root: Path,
    name: str,
    *,
    all_labels: bool = False,
    labelled_subjects: int = 0,
    find: Callable[[Path], dict[str, Case]] = find_cases,
) -> Split:
    """Read a split file and find its cases.

    The file lists subjects under `labelled`, `unlabelled`, `val` and `test` and file names without
    extension under `cases`, by the same keys. Where `cases` is missing, a part takes all cases of
    its subjects; where the subjects are missing, they follow from the cases.

    Args:
        root: data folder.
        name: split file inside the folder, or an absolute path.
        all_labels: move the unlabelled cases to the labelled ones.
        labelled_subjects: keep the first n labelled subjects; the cases of the others become
            unlabelled. 0 keeps all.
        find: returns the cases of the folder by name.

    Raises:
        DataError: file missing or malformed, a case or a subject in two parts, or files missing.
    """
    path = _split_path(root, name)
    content = read_json(path)
    found = find(root)
    listed = {part: _strings(content, part, path) for part in PARTS}
    order = tuple(dict.fromkeys(s for part in PARTS for s in listed[part]))
    found = {key: _with_subject(case, order) for key, case in found.items()}
    names = _case_names(content, listed, found, path)
    _refuse_leaks(names, listed, found, path)
    parts = {part: [found[n] for n in names[part]] for part in PARTS}
    if labelled_subjects:
        subjects = listed["labelled"] or list(dict.fromkeys(c.subject for c in parts["labelled"]))
        parts = _fewer_labels(parts, subjects, labelled_subjects, path)
    if all_labels:
        parts["labelled"], parts["unlabelled"] = parts["labelled"] + parts["unlabelled"], []
    parts["unlabelled"] = [dataclasses.replace(c, label=None) for c in parts["unlabelled"]]
    _refuse_missing(parts, path)
    return Split(*(tuple(parts[part]) for part in PARTS))


def _split_path(root: Path, name: str) -> Path:
    path = Path(name) if Path(name).is_absolute() else inside(root, root / name)
    if not path.is_file():
        there = ", ".join(sorted(shown(p.name) for p in root.glob("split*.json")))
        hint = f"set data.split to one of {there}" if there else f"write one:\n{_FORM}\n"
        raise FileFault(path, "is missing; it says which cases have labels", hint)
    return path


def _strings(content: Mapping[str, Any], key: str, path: Path) -> list[str]:
    values = content.get(key, [])
    if not isinstance(values, list) or not all(isinstance(v, str) and v for v in values):
        raise FileFault(
            path, f"has no list of names under {key!r}", f"follow this form:\n{_FORM}\n"
        )
    twice = [value for value, count in Counter(values).items() if count > 1]
    _refuse(path, f"lists names twice under {key!r}", twice, "list each once")
    return values


def _with_subject(case: Case, subjects: tuple[str, ...]) -> Case:
    """Name the subject of a case that cases.csv does not list: the longest that starts its name."""
    if case.subject != case.name or case.name in subjects:
        return case
    starts = [s for s in subjects if case.name.startswith(s) and not case.name[len(s)].isalnum()]
    return dataclasses.replace(case, subject=max(starts, key=len)) if starts else case


def _case_names(
    content: Mapping[str, Any],
    listed: Mapping[str, list[str]],
    found: Mapping[str, Case],
    path: Path,
) -> dict[str, list[str]]:
    if "cases" not in content:
        names = {p: [n for n, c in found.items() if c.subject in set(listed[p])] for p in PARTS}
        have = {c.subject for c in found.values()}
        lost = [s for part in PARTS for s in listed[part] if s not in have]
        _refuse(path, "lists subjects without an image", lost, "correct the list, or add images")
    elif not isinstance(content["cases"], dict):
        raise FileFault(path, "has no object under 'cases'", f"follow this form:\n{_FORM}\n")
    else:
        names = {part: _strings(content["cases"], part, path) for part in PARTS}
        lost = [n for part in PARTS for n in names[part] if n not in found]
        _refuse(path, "lists cases without an image", lost, "correct the list, or add the images")
    if not any(names.values()):
        raise FileFault(path, "lists no case", f"follow this form:\n{_FORM}\n")
    return names


def _refuse_leaks(
    names: Mapping[str, list[str]],
    listed: Mapping[str, list[str]],
    found: Mapping[str, Case],
    path: Path,
) -> None:
    """Refuse a case or a subject in two parts: the test set would be known from training."""
    fix = "keep all cases of a subject in one part"
    _refuse(path, "has cases in two parts", _shared(names), fix)
    subjects = {p: {*listed[p], *(found[n].subject for n in names[p])} for p in PARTS}
    _refuse(path, "has subjects in two parts", _shared(subjects), fix)


def _shared(parts: Mapping[str, Iterable[str]]) -> list[str]:
    seen: dict[str, str] = {}
    clash = []
    for part, values in parts.items():
        for value in values:
            if seen.setdefault(value, part) != part:
                clash.append(f"{value} ({seen[value]}, {part})")
    return sorted(clash)


def _fewer_labels(
    parts: dict[str, list[Case]], subjects: list[str], keep: int, path: Path
) -> dict[str, list[Case]]:
    if keep > len(subjects):
        problem = f"has {len(subjects)} labelled subjects; {keep} are asked for"
        raise FileFault(path, problem, "lower train.labelled_subjects")
    unknown = [c.name for c in parts["labelled"] if c.subject not in set(subjects)]
    fix = "add cases.csv with the columns case,subject to the folder"
    _refuse(path, "does not tell the subject of labelled cases", unknown, fix)
    kept = set(subjects[:keep])
    moved = [c for c in parts["labelled"] if c.subject not in kept]
    labelled = [c for c in parts["labelled"] if c.subject in kept]
    return parts | {"labelled": labelled, "unlabelled": moved + parts["unlabelled"]}


def _refuse_missing(parts: Mapping[str, list[Case]], path: Path) -> None:
    cases = [c for part in PARTS for c in parts[part]]
    images = [c.name for c in cases if not readable(c.image)]
    _refuse(path, "lists cases whose image cannot be read", images, "add the files")
    seen = [c for part in PARTS if part != "unlabelled" for c in parts[part]]
    labels = [c.name for c in seen if c.label is None or not readable(c.label)]
    _refuse(
        path, "lists cases without a label file", labels, "add the files, or list them elsewhere"
    )


def _refuse(path: Path, problem: str, names: list[str], fix: str) -> None:
    if names:
        shown_names = ", ".join(shown(n) for n in names)
        raise FileFault(path, f"{problem}: {shown_names}", fix)


__all__ = ["PARTS", "Case", "Split", "find_cases", "find_images", "load_split"]
