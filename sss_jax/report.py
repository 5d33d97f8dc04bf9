"""One self-contained HTML page on a run: scores, curves, cases, settings.

The page loads nothing and runs nothing: no script, no outside file. What a run folder lacks is
named on the page.
"""

import math
import os
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sss_jax.atomic import write_text
from sss_jax.errors import DataError
from sss_jax.report_curves import curves
from sss_jax.report_data import RunFolder, read_run
from sss_jax.report_overlay import case_views, view_html
from sss_jax.report_settings import settings_tables
from sss_jax.report_style import STYLE
from sss_jax.report_svg import color, escape, strip_chart

_MOST_CASES = 12
_PICTURE_BUDGET = 3_500_000  # characters
_DISTANCES = ("hd95", "asd")
_TITLES = {"dice": "Dice", "jaccard": "Jaccard", "hd95": "HD95", "asd": "ASD", "nsd": "NSD"}


def write_report(
    workdir: str | os.PathLike[str], output: str | os.PathLike[str] | None = None
) -> Path:
    """Write the report of a run folder.

    Args:
        workdir: run folder; what it lacks is left out and named.
        output: HTML file; by default report.html in the run folder.

    Returns:
        The file, below 5 MB.

    Raises:
        DataError: the folder is missing or holds nothing of a run.
    """
    folder = read_run(Path(workdir))
    target = Path(output) if output is not None else folder.path / "report.html"
    target.parent.mkdir(parents=True, exist_ok=True)
    write_text(target, render(folder))
    return target


def render(folder: RunFolder) -> str:
    """Return the page of a run."""
    cases = _cases(folder)  # may add notes
    sections = (_scores(folder), cases, _table_of_cases(folder), _curves(folder), _settings(folder))
    name = escape(folder.path.resolve().name)
    notes = "".join(f'<p class="note">{escape(note)}</p>' for note in folder.notes)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        # Even if an escape were forgotten, nothing could be loaded or run.
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
        "style-src 'unsafe-inline'; img-src data:\">"
        f"<title>{name}: segmentation report</title><style>{STYLE}</style></head><body><main>"
        f"{_header(folder, name)}{notes}{''.join(sections)}"
        "<footer>Written by sss-jax. For research; not a medical device.</footer>"
        "</main></body></html>\n"
    )


def _header(folder: RunFolder, name: str) -> str:
    run, config = folder.run, folder.config
    model, train = config.get("model", {}), config.get("train", {})
    counts = run.get("cases", {}) if isinstance(run.get("cases"), dict) else {}
    versions = run.get("versions", {}) if isinstance(run.get("versions"), dict) else {}
    done = max((row["step"] for row in folder.train + folder.val), default=None)
    steps = train.get("steps")
    facts = {
        "Method": config.get("method"),
        "Network": _join(model.get("preset"), _px(model.get("image_size"))),
        "Steps": f"{done:g} of {steps}" if done is not None and steps else steps,
        "Data": Path(run["data"]).name if isinstance(run.get("data"), str) else None,
        "Cases": ", ".join(f"{n} {part}" for part, n in counts.items()) or None,
        "Split": _join(run.get("split"), str(run.get("split_digest", ""))[:12] or None),
        "Seed": train.get("seed"),
        "Device": _join(run.get("device"), _times(run.get("devices"))),
        "Versions": ", ".join(f"{k} {v}" for k, v in versions.items()) or None,
    }
    shown = "".join(
        f"<div><dt>{key}</dt><dd>{escape(value)}</dd></div>"
        for key, value in facts.items()
        if value not in (None, "")
    )
    return (
        f'<header><p class="kind">Segmentation report</p><h1>{name}</h1>'
        f'<p class="lead">{_lead(folder)}</p><dl class="facts">{shown}</dl></header>'
    )


def _lead(folder: RunFolder) -> str:
    """One sentence with the result."""
    mean = folder.summary.get("mean", {}).get("dice")
    if isinstance(mean, int | float):
        spread = folder.summary.get("over_cases", {}).get("dice", {}).get("std")
        within = f" ± {spread:.3f}" if isinstance(spread, int | float) else ""
        count = len(folder.class_names)
        return (
            f"Mean Dice {mean:.3f}{within} over {escape(folder.summary.get('cases', '?'))} test "
            f"cases and {count} class{'es' if count != 1 else ''}."
        )
    values = [r["dice"] for r in folder.val if isinstance(r.get("dice"), int | float)]
    finite = [v for v in values if math.isfinite(v)]
    if finite:
        return (
            f"Best validation Dice {max(finite):.3f}. There are no test scores yet: run "
            "sss-jax predict --subset test and sss-jax evaluate."
        )
    return "There are no scores yet."


def _join(*parts: Any) -> str | None:
    return ", ".join(str(p) for p in parts if p not in (None, "")) or None


def _px(size: Any) -> str | None:
    return None if size is None else f"{size} px"


def _times(count: Any) -> str | None:
    return f"{count} devices" if isinstance(count, int) and count > 1 else None


def _section(title: str, about: str, body: str) -> str:
    if not body:
        return ""
    return f'<section><h2>{title}</h2><p class="about">{about}</p>{body}</section>'


def _scores(folder: RunFolder) -> str:
    """Headline figures, the table of classes and the spread of the cases."""
    summary = folder.summary
    classes = summary.get("classes", [])
    if not classes:
        return ""
    unit, tolerance = folder.unit, f"{summary.get('nsd_tolerance', 0):g}"
    keys = [(m, f"{m}_{unit}" if m in _DISTANCES else m) for m in _TITLES]
    over = summary.get("over_cases", {})
    figures = "".join(
        f"<li><b>{_value(summary['mean'].get(key), m)} "
        f"<small>{_plus_minus(over.get(key, {}).get('std'), m)}</small></b>"
        f"<span>{_head(m, unit, tolerance)}</span></li>"
        for m, key in keys
        if m != "jaccard"
    )
    head = "".join(f"<th>{_head(m, unit, tolerance)}</th>" for m, _ in keys)
    named = enumerate(zip(folder.class_names, classes, strict=True), start=1)
    rows = "".join(_class_row(name, row, number, keys) for number, (name, row) in named)
    total = "".join(
        f"<td>{_value(summary['mean'].get(key), m)} "
        f'<span class="sd">{_plus_minus(over.get(key, {}).get("std"), m)}</span></td>'
        for m, key in keys
    )
    table = (
        f'<div class="scroll"><table><thead><tr><th>Class</th>{head}<th>Counted</th><th>Missed</th>'
        f"<th>Spurious</th></tr></thead><tbody>{rows}"
        f'<tr class="total"><td>Mean of the classes</td>{total}<td></td><td></td><td></td></tr>'
        "</tbody></table></div>"
    )
    about = (
        f"{escape(summary.get('cases', '?'))} test cases, each volume scored whole. "
        "Mean ± standard deviation over cases."
    )
    body = f'<ul class="figures">{figures}</ul>{table}{_strips(folder)}{_conventions(summary)}'
    return _section("Test scores", about, body)


def _class_row(name: str, row: dict[str, Any], number: int, keys: Iterable[tuple[str, str]]) -> str:
    cells = "".join(
        f"<td>{_value(row.get(key, {}).get('mean'), m)} "
        f'<span class="sd">{_plus_minus(row.get(key, {}).get("std"), m)}</span></td>'
        for m, key in keys
    )
    counts = "".join(
        f"<td{' class=low' if name != 'counted' and row.get(name) else ''}>"
        f"{escape(row.get(name, ''))}</td>"
        for name in ("counted", "missed", "spurious")
    )
    return f"<tr><td>{_key(number)}{escape(name)}</td>{cells}{counts}</tr>"


def _key(number: int) -> str:
    return f'<span class="key" style="background:{color(number)}"></span>'


def _head(metric: str, unit: str, tolerance: Any) -> str:
    if metric in _DISTANCES:
        return f"{_TITLES[metric]}, {escape(unit)}"
    if metric == "nsd":
        return f"NSD at {escape(tolerance)} {escape(unit)}"
    return _TITLES[metric]


def _value(value: Any, metric: str) -> str:
    if not isinstance(value, int | float) or not math.isfinite(value):
        return "–"
    return f"{value:.2f}" if metric in _DISTANCES else f"{value:.3f}"


def _plus_minus(value: Any, metric: str) -> str:
    text = _value(value, metric)
    return "" if text == "–" else f"± {text}"


def _strips(folder: RunFolder) -> str:
    groups = [
        (name, [v for r in folder.scores if r["class"] == str(k) and (v := _float(r["dice"])) >= 0])
        for k, name in enumerate(folder.class_names, start=1)
    ]
    if not any(values for _, values in groups):
        return ""
    chart = strip_chart("Dice of each case", "Dice; bar: mean", groups)
    return f'<div class="charts" style="margin-top:20px">{chart}{_distance_strips(folder)}</div>'


def _distance_strips(folder: RunFolder) -> str:
    key = f"hd95_{folder.unit}"
    found = [
        (name, [_float(r.get(key)) for r in folder.scores if r["class"] == str(k)])
        for k, name in enumerate(folder.class_names, start=1)
    ]
    largest = max((v for _, values in found for v in values if v >= 0), default=0.0)
    if largest <= 0:
        return ""
    groups = [(name, [v for v in values if v >= 0]) for name, values in found]
    return strip_chart("HD95 of each case", f"HD95, {folder.unit}; bar: mean", groups, largest)


def _conventions(summary: dict[str, Any]) -> str:
    lines = summary.get("conventions", [])
    if not isinstance(lines, list) or not lines:
        return ""
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return (
        '<details style="margin-top:18px"><summary>How these numbers are defined</summary>'
        f'<ul class="plain">{items}</ul></details>'
    )


def _float(text: Any) -> float:
    try:
        return float(text)
    except (TypeError, ValueError):
        return math.nan


def _curves(folder: RunFolder) -> str:
    about = (
        "Training values are those of single steps; long runs are drawn as means of neighbouring "
        "log lines. The number beside a name is the last one drawn."
    )
    body = curves(folder)
    return _section("Course of the run", about, f'<div class="charts">{body}</div>' if body else "")


def _ranked(folder: RunFolder) -> list[tuple[str, float, list[dict[str, str]]]]:
    """Return cases with their mean Dice over counted classes, worst first; uncounted ones last."""
    by_case: dict[str, list[dict[str, str]]] = {}
    for row in folder.scores:
        by_case.setdefault(row["case"], []).append(row)
    ranked = []
    for case, rows in by_case.items():
        values = [v for r in rows if not math.isnan(v := _float(r["dice"]))]
        ranked.append((case, statistics.fmean(values) if values else math.inf, rows))
    return sorted(ranked, key=lambda entry: (entry[1], entry[0]))


def _cases(folder: RunFolder) -> str:
    """Pictures of the worst cases, as many as the size of the page allows."""
    if not (folder.predictions and folder.cases):
        return ""
    ranked = _ranked(folder) or [(c, math.inf, []) for c in folder.predictions]
    cards: list[str] = []
    spent = 0
    for case, mean, rows in ranked[:_MOST_CASES]:
        card = _card(folder, len(cards) + 1, case, mean, rows)
        if spent + len(card) > _PICTURE_BUDGET:
            break
        cards.append(card)
        spent += len(card)
    keys = "".join(
        f"<li>{_key(k)}{escape(name)}</li>" for k, name in enumerate(folder.class_names, start=1)
    )
    about = (
        f"{len(cards)} of {len(ranked)} test cases, the worst mean Dice first. Slices are cropped "
        "to the labelled region, in the proportions of the voxel size; letters name the patient's "
        "side (R right, A front, S head) where the file knows it."
    )
    return _section("Cases", about, f'<ul class="classes">{keys}</ul>{"".join(cards)}')


def _card(
    folder: RunFolder, number: int, case: str, mean: float, rows: list[dict[str, str]]
) -> str:
    names = folder.class_names
    scores = " · ".join(f"{escape(_named(names, row))} {_case_score(row)}" for row in rows)
    lead = f"mean Dice {mean:.3f}" if math.isfinite(mean) else "no class to score"
    try:
        if case not in folder.cases or case not in folder.predictions:
            raise DataError("the image or the prediction of this case is not there")
        axis = folder.config.get("data", {}).get("slice_axis", -1)
        views = case_views(folder.cases[case], folder.predictions[case], int(axis))
        classes = range(1, max(len(names), 1) + 1)
        body = "".join(
            view_html(view, f"picture-{number}-{i}", classes) for i, view in enumerate(views)
        )
        body = f'<div class="views">{body}</div>'
    except (DataError, OSError) as error:
        body = f'<p class="note">No picture: {escape(error)}</p>'
    return (
        f'<article class="case"><header><h3>{number}. {escape(case)}</h3><span>{lead}</span>'
        f"<span>{scores}</span></header>{body}</article>"
    )


def _named(names: list[str], row: dict[str, str]) -> str:
    by_number = {str(k): name for k, name in enumerate(names, start=1)}
    return by_number.get(row["class"], row["class"])


def _case_score(row: dict[str, str]) -> str:
    if row["status"] == "absent":
        return "absent"
    mark = f" ({escape(row['status'])})" if row["status"] != "found" else ""
    return f"{_value(_float(row['dice']), 'dice')}{mark}"


def _table_of_cases(folder: RunFolder) -> str:
    """Dice and HD95 of every case and class, worst case first."""
    ranked, names = _ranked(folder), folder.class_names
    if not ranked:
        return ""
    key = f"hd95_{folder.unit}"
    groups = "".join(
        f'<th class="group" colspan="2">{_key(k)}{escape(name)}</th>'
        for k, name in enumerate(names, start=1)
    )
    heads = f"<th>Dice</th><th>HD95, {escape(folder.unit)}</th>" * len(names)
    body = []
    for case, mean, rows in ranked:
        by_class = {row["class"]: row for row in rows}
        cells = []
        for k in range(1, len(names) + 1):
            row = by_class.get(str(k), {})
            bad = ' class="low"' if row.get("status") in ("missed", "spurious") else ""
            mark = f' title="{escape(row.get("status", ""))}"'
            cells.append(
                f"<td{bad}{mark}>{_value(_float(row.get('dice')), 'dice')}</td>"
                f"<td{bad}{mark}>{_value(_float(row.get(key)), 'hd95')}</td>"
            )
        body.append(
            f"<tr><td>{escape(case)}</td><td>{_value(mean, 'dice')}</td>{''.join(cells)}</tr>"
        )
    table = (
        f'<div class="scroll"><table><thead><tr><th></th><th></th>{groups}</tr>'
        f"<tr><th>Case</th><th>Mean Dice</th>{heads}</tr></thead>"
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )
    about = (
        "Worst case first. A dash: the class is in neither volume. Coloured: the class is in one "
        "volume alone, and HD95 is the diagonal of the volume."
    )
    return _section("All test cases", about, table)


def _settings(folder: RunFolder) -> str:
    about = "As stored in config.json. Bold: differs from the default, which is given beside it."
    return _section("Settings", about, settings_tables(folder.config))
