"""Compare a folder of predicted label volumes with a folder of references.

Writes `metrics.csv` (a row per case and class) and `summary.json` (means, spread, counts, and the
conventions they follow).
"""

import csv
import dataclasses
import hashlib
import io
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sss_jax.atomic import write_json, write_text
from sss_jax.data.faults import FileFault, shown
from sss_jax.data.folders import PREDICTION_STAMP, read_json
from sss_jax.data.nifti import Volume, is_nifti, read_labels, stem
from sss_jax.errors import ConfigError, DataError
from sss_jax.metrics.scores import METRICS, Row, absent_row, score_case, summarise, usual_names
from sss_jax.options import DataOptions, EvalOptions

__all__ = ["Row", "Summary", "evaluate", "score_case"]

_DISTANCES = ("hd95", "asd")
CONVENTIONS = (
    "Scores are per class and per volume; means are over the counted cases, standard deviations "
    "divide by n - 1; the mean over classes weighs classes equally.",
    "HD95 and ASD pool the distances of both surfaces: 95th percentile and mean. Surface: object "
    "voxels with a face neighbour outside.",
    "NSD: share of the pooled surface voxels within the tolerance.",
    "Class in neither volume: not counted ('absent'). In one alone ('missed' or 'spurious'): Dice, "
    "Jaccard and NSD 0, HD95 and ASD the diagonal of the volume.",
)


@dataclasses.dataclass(frozen=True)
class Summary:
    """The result of a comparison.

    Attributes:
        rows: scores per case and class.
        class_names: names of the classes 1..K.
        unit: "mm", or "voxel" where the files do not know their voxel size.
        tolerance: of NSD, in the unit.
        files: SHA-256 of prediction and reference by case.
        unused: references without a prediction.
    """

    rows: tuple[Row, ...]
    class_names: tuple[str, ...]
    unit: str
    tolerance: float
    files: dict[str, dict[str, str]]
    unused: int

    def to_json(self) -> dict[str, Any]:
        """Return what summary.json holds; names of distances end in their unit."""
        summary = summarise(self.rows, self.class_names)
        tables = [*summary["classes"], summary["mean"], summary["over_cases"]]
        for table in tables:
            for metric in _DISTANCES:
                table[f"{metric}_{self.unit}"] = table.pop(metric)
        return {
            "cases": len(self.files),
            "references_without_prediction": self.unused,
            "unit": self.unit,
            "nsd_tolerance": self.tolerance,
            **summary,
            "conventions": list(CONVENTIONS),
            "files": {shown(case): digests for case, digests in self.files.items()},
        }

    def render(self) -> str:
        """Return a plain text table."""
        summary = summarise(self.rows, self.class_names)
        unit, width = self.unit, max(9, *(len(shown(n)) + 4 for n in self.class_names))
        heads = ("Dice", "Jaccard", f"HD95 {unit}", f"ASD {unit}", f"NSD {self.tolerance:g} {unit}")
        lines = [
            f"{len(self.files)} cases",
            f"{'class':<{width}}" + "".join(f"{head:>17}" for head in heads) + "   not found",
        ]
        for row in summary["classes"]:
            cells = [_cell(row[m]["mean"], row[m]["std"], m) for m in METRICS]
            name = f"{row['label']:>3} {shown(row['name'])}"
            lines.append(f"{name:<{width}}" + "".join(f"{c:>17}" for c in cells) + _counts(row))
        spread = summary["over_cases"]
        cells = [_cell(summary["mean"][m], spread[m]["std"], m) for m in METRICS]
        lines.append(f"{'mean':<{width}}" + "".join(f"{cell:>17}" for cell in cells))
        return "\n".join(lines)


def _cell(mean: float | None, std: float | None, metric: str) -> str:
    if mean is None:
        return "-"
    digits = 2 if metric in _DISTANCES else 3
    return f"{mean:.{digits}f}" + ("" if std is None else f" ± {std:.{digits}f}")


def _counts(row: dict[str, Any]) -> str:
    counts = [f"{row[s]} {s}" for s in ("missed", "spurious", "absent") if row[s]]
    return "   " + (", ".join(counts) or "-")


def evaluate(
    pred_folder: str | os.PathLike[str],
    ref_folder: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    *,
    num_classes: int | None = None,
    tolerance: float = EvalOptions.nsd_tolerance,
    class_names: Sequence[str] | None = None,
    cases: Iterable[str] | None = None,
) -> Summary:
    """Score predictions against references of equal file names.

    Args:
        pred_folder: predicted labels, .nii or .nii.gz.
        ref_folder: reference labels; it may hold more cases than were predicted.
        output: folder for metrics.csv and summary.json; None writes nothing.
        num_classes: K; by default the number of names, else the largest label in any file.
        tolerance: distance that NSD forgives, mm (voxels where the size is unknown).
        class_names: names of the classes 1..K; by default, unless `num_classes` is given, those
            that `predict` wrote beside the predictions.
        cases: names to compare, each with both files; by default all predictions.

    Returns:
        All rows and what a summary needs.

    Raises:
        ConfigError: names and number of classes disagree, or a tolerance below 0.
        DataError: files are missing, damaged or on different grids; all of them are listed.
    """
    if class_names is None and num_classes is None:
        class_names = _written_names(Path(pred_folder))
    if class_names is not None and num_classes not in (None, len(class_names)):
        raise ConfigError(f"{len(class_names)} class names for {num_classes} classes")
    if not (math.isfinite(tolerance) and tolerance >= 0):
        raise ConfigError(f"the NSD tolerance must be a number from 0 on, not {tolerance}")
    limit = len(class_names) if class_names is not None else num_classes
    pairs, unused = _pair(Path(pred_folder), Path(ref_folder), cases)
    rows, unit = _score_all(pairs, limit, tolerance)
    number = limit or max(row.label for row in rows)
    names = class_names or usual_names(number)
    files = {case: {"prediction": _sha(p), "reference": _sha(r)} for case, (p, r) in pairs.items()}
    rows = [row for case in pairs for row in _complete(case, rows, number)]
    summary = Summary(tuple(rows), tuple(names), unit, tolerance, files, unused)
    if output is not None:
        Path(output).mkdir(parents=True, exist_ok=True)
        write_text(Path(output) / "metrics.csv", _table(summary))
        write_json(Path(output) / "summary.json", summary.to_json())
    return summary


def _written_names(pred_folder: Path) -> list[str] | None:
    stamp = pred_folder / PREDICTION_STAMP
    if not stamp.is_file():
        return None
    names = read_json(stamp).get("class_names")
    if not isinstance(names, list):
        raise DataError(
            f"{shown(stamp)} does not name the classes; "
            "predict again, or give the number of classes"
        )
    return names


def _pair(
    pred_folder: Path, ref_folder: Path, cases: Iterable[str] | None
) -> tuple[dict[str, tuple[Path, Path]], int]:
    """Return prediction and reference of each case, and the number of references left over."""
    problems: list[str] = []
    predictions, references = (_files(f, problems) for f in (pred_folder, ref_folder))
    names = sorted(predictions if cases is None else set(cases))
    for name in names:
        for kind, files, folder in (
            ("prediction", predictions, pred_folder),
            ("reference", references, ref_folder),
        ):
            if name not in files:
                problems.append(f"{shown(name)}: no {kind} in {shown(folder)}")
    if not names:
        problems.append(f"{shown(pred_folder)}: no .nii or .nii.gz file to evaluate")
    _refuse(problems)
    return {n: (predictions[n], references[n]) for n in names}, len(set(references) - set(names))


def _files(folder: Path, problems: list[str]) -> dict[str, Path]:
    if not folder.is_dir():
        problems.append(f"{shown(folder)} is no folder")
        return {}
    files: dict[str, Path] = {}
    for path in sorted(p for p in folder.iterdir() if is_nifti(p)):
        if stem(path) in files:
            problems.append(f"{shown(path)}: {shown(files[stem(path)].name)} has the same name")
        files[stem(path)] = path
    return files


def _refuse(problems: list[str]) -> None:
    if problems:
        count = f"{len(problems)} problem" + ("s" if len(problems) > 1 else "")
        listed = "\n".join(f"  {p}" for p in problems)
        raise DataError(f"nothing was evaluated because of {count}:\n{listed}")


def _score_all(
    pairs: dict[str, tuple[Path, Path]], limit: int | None, tolerance: float
) -> tuple[list[Row], str]:
    """Read and score all cases; a class that no volume of a case has may lack its row."""
    rows: list[Row] = []
    problems: list[str] = []
    units: dict[str, str] = {}
    for case, (prediction_path, reference_path) in pairs.items():
        try:
            reference = read_labels(reference_path, limit, DataOptions.max_voxels)
            prediction = read_labels(prediction_path, limit, DataOptions.max_voxels)
            _refuse_other_grid(prediction, reference)
        except FileFault as fault:
            problems.append(str(fault))
            continue
        units[case] = length_unit(reference)
        if not problems:  # otherwise the rest is only checked
            highest = limit or max(1, int(prediction.array.max()), int(reference.array.max()))
            spacing = reference.spacing if units[case] == "mm" else (1.0, 1.0, 1.0)
            arrays = (prediction.array, reference.array)
            rows += score_case(*arrays, spacing, highest, tolerance, case)
    if len(set(units.values())) > 1:
        unknown = [shown(case) for case, unit in units.items() if unit == "voxel"]
        problems.append(
            f"{len(unknown)} of {len(units)} cases do not state their voxel size, such as "
            f"{unknown[0]}: distances in mm and in voxels cannot share a table; evaluate them apart"
        )
    _refuse(problems)
    return rows, units[next(iter(units))]


def length_unit(volume: Volume) -> str:
    """Return "voxel" where the header gives neither a length unit nor an orientation, else "mm"."""
    known = volume.oriented or int(volume.header["xyzt_units"]) & 7
    return "mm" if known else "voxel"


def _refuse_other_grid(prediction: Volume, reference: Volume) -> None:
    """Raise FileFault where two volumes differ in shape or lie in different places."""
    mend = "predict from the image that the reference was drawn on, or resample the prediction"
    shape, other = prediction.array.shape, reference.array.shape
    if shape != other:
        problem = f"has the shape {shape}, its reference {other}"
        raise FileFault(prediction.path, problem, mend)
    if prediction.oriented != reference.oriented:
        lacking = "prediction" if reference.oriented else "reference"
        problem = f"only the {lacking} lacks an orientation (qform and sform codes are 0)"
        raise FileFault(prediction.path, problem, mend)
    corners = np.array(np.meshgrid(*((0, n) for n in shape), (1,))).reshape(4, -1)
    difference = (prediction.affine - reference.affine)[:3] @ corners
    apart = float(np.linalg.norm(difference, axis=0).max())
    # Rounding in headers moves a corner less than a tenth of the smallest voxel side.
    if apart > 0.1 * min(reference.spacing):
        problem = f"has another affine than its reference: corners are {apart:.3g} mm apart"
        raise FileFault(prediction.path, problem, mend)


def _complete(case: str, rows: Sequence[Row], number: int) -> list[Row]:
    """Return the rows of a case, with `absent` ones for the classes that it lacks."""
    mine = {row.label: row for row in rows if row.case == case}
    return [mine.get(k) or absent_row(case, k) for k in range(1, number + 1)]


def _table(summary: Summary) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    metrics = [f"{m}_{summary.unit}" if m in _DISTANCES else m for m in METRICS]
    writer.writerow(
        ("case", "class", "name", *metrics, "voxels_prediction", "voxels_reference", "status")
    )
    for row in summary.rows:
        scores = [_number(getattr(row, metric)) for metric in METRICS]
        counts = (row.voxels_prediction, row.voxels_reference, row.status)
        name = summary.class_names[row.label - 1]
        writer.writerow((plain_cell(row.case), row.label, plain_cell(name), *scores, *counts))
    return text.getvalue()


def _number(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.6g}"


def plain_cell(text: str) -> str:
    """Return text that a spreadsheet shows and does not run as a formula."""
    text = shown(text)
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text


def _sha(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
