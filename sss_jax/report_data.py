"""What a run folder holds, read for the report; whatever is missing or damaged becomes a note."""

import csv
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from sss_jax.data.faults import shown
from sss_jax.data.folders import Case, find_cases, read_json
from sss_jax.data.nifti import is_nifti, stem
from sss_jax.errors import DataError
from sss_jax.evaluate import plain_cell
from sss_jax.metrics.scores import usual_names

_SPECIAL = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


@dataclasses.dataclass
class RunFolder:
    """The parts of a run folder; an empty part is one that is not there.

    Attributes:
        path: the folder.
        config: settings by group.
        run: versions, device, data folder, split.
        train: rows of the training log.
        val: rows of the validation log.
        summary: test/summary.json.
        scores: rows of test/metrics.csv.
        predictions: test predictions by case name, as metrics.csv writes it.
        cases: cases of the data folder by the same names.
        class_names: names of the classes 1..K.
        notes: what is missing or could not be read, one sentence each.
    """

    path: Path
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    run: dict[str, Any] = dataclasses.field(default_factory=dict)
    train: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    val: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    summary: dict[str, Any] = dataclasses.field(default_factory=dict)
    scores: list[dict[str, str]] = dataclasses.field(default_factory=list)
    predictions: dict[str, Path] = dataclasses.field(default_factory=dict)
    cases: dict[str, Case] = dataclasses.field(default_factory=dict)
    class_names: list[str] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)

    @property
    def unit(self) -> str:
        """Unit of the distances in the test scores."""
        return str(self.summary.get("unit", "mm"))


def read_run(workdir: Path) -> RunFolder:
    """Read a run folder.

    Raises:
        DataError: the folder is missing or holds nothing of a run.
    """
    if not workdir.is_dir():
        raise DataError(f"{shown(workdir)} is no folder; name the folder of a run")
    folder = RunFolder(workdir)
    folder.config = _json(folder, "config.json", "the settings")
    folder.run = _json(folder, "run.json", "versions, device and data")
    _read_log(folder)
    folder.summary = _json(folder, "test/summary.json", "the test scores")
    _drop_malformed(folder)
    _read_scores(folder)
    folder.class_names = _class_names(folder)
    test = workdir / "test"
    paths = sorted(p for p in test.iterdir() if is_nifti(p)) if test.is_dir() else []
    folder.predictions = {plain_cell(stem(p)): p for p in paths}
    if not (folder.config or folder.run or folder.train or folder.val or folder.summary):
        raise DataError(f"{shown(workdir)} holds no run: {' '.join(folder.notes)}")
    if folder.predictions:
        _find_data(folder)
    return folder


def _json(folder: RunFolder, name: str, what: str) -> dict[str, Any]:
    path = folder.path / name
    if not path.is_file():
        folder.notes.append(f"{name} is not there, so {what} are not shown.")
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        folder.notes.append(f"{name} cannot be read ({shown(error)}), so {what} are not shown.")
        return {}
    if not isinstance(content, dict):
        folder.notes.append(f"{name} is no JSON object, so {what} are not shown.")
        return {}
    return content


def _drop_malformed(folder: RunFolder) -> None:
    """Leave out what has not the form that this package writes."""
    for group in ("model", "train", "data"):
        if not isinstance(folder.config.get(group, {}), dict):
            folder.notes.append("config.json is not a settings file of this package.")
            folder.config = {}
    summary = folder.summary
    classes = summary.get("classes")
    tables: list[Any] = classes if isinstance(classes, list) else [None]
    tables = [summary.get("mean"), summary.get("over_cases"), *tables]
    if summary and not all(isinstance(table, dict) for table in tables):
        folder.notes.append("test/summary.json is not of this package; it is not shown.")
        folder.summary = {}


def _class_names(folder: RunFolder) -> list[str]:
    """Return the names of the test summary or, where it has none, of the split file."""
    classes = folder.summary.get("classes", [])
    count = len(classes) or int(folder.config.get("model", {}).get("num_classes", 0))
    usual = usual_names(count)
    names = [str(row.get("name", "")) for row in classes] or usual
    data, split = folder.run.get("data"), folder.run.get("split")
    if names != usual or not (isinstance(data, str) and isinstance(split, str)):
        return names
    try:
        given = read_json(Path(data) / split).get("class_names")
    except DataError:
        return names
    if not isinstance(given, list) or len(given) != count:
        return names
    return [str(name) for name in given]


def _read_log(folder: RunFolder) -> None:
    """Sort the rows of metrics.jsonl by kind; a torn line at the end of a killed run is skipped."""
    path = folder.path / "metrics.jsonl"
    if not path.is_file():
        folder.notes.append("metrics.jsonl is not there, so no curves are shown.")
        return
    skipped = 0
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except ValueError:
            # What follows the last line end is empty, or was cut off when the run was stopped.
            skipped += bool(line.strip()) and number < len(lines)
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int | float):
            row = {k: _SPECIAL.get(v, v) if isinstance(v, str) else v for k, v in row.items()}
            {"train": folder.train, "val": folder.val}.get(row.get("kind", ""), []).append(row)
        else:
            skipped += 1
    if skipped:
        lines_read = "1 line" if skipped == 1 else f"{skipped} lines"
        folder.notes.append(f"{lines_read} of metrics.jsonl could not be read.")


def _read_scores(folder: RunFolder) -> None:
    path = folder.path / "test" / "metrics.csv"
    if not path.is_file():
        if folder.summary:
            folder.notes.append("test/metrics.csv is not there, so single cases are not shown.")
        return
    with open(path, newline="", encoding="utf-8", errors="replace") as file:
        rows = list(csv.DictReader(file))
    good = [r for r in rows if {"case", "class", "dice", "status"} <= r.keys()]
    folder.scores = [{k: v for k, v in r.items() if isinstance(v, str)} for r in good]
    if len(good) < len(rows) or not rows:
        folder.notes.append("test/metrics.csv lacks columns or rows.")


def _find_data(folder: RunFolder) -> None:
    data = folder.run.get("data")
    if not isinstance(data, str):
        folder.notes.append("run.json does not name the data folder, so no images are shown.")
        return
    try:
        found = find_cases(Path(data))
    except (DataError, OSError) as error:
        folder.notes.append(f"No images are shown: {shown(error)}")
        return
    folder.cases = {plain_cell(name): case for name, case in found.items()}
