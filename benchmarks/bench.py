"""`sss-jax bench`: measure by name, one form of result for all.

A benchmark is a module of this package with `measure(request) -> Measured`, and perhaps
`render(measured)`; each is imported when it is asked for.
"""

import importlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sss_jax.benchmarks import compare, result, schema
from sss_jax.benchmarks.request import Measured, Request
from sss_jax.errors import ConfigError

MODULES = {
    "step_time": "step_time",
    "parts": "parts",
    "predict_rate": "predict_rate",
    "data_rate": "data_rate",
    "compile_time": "programs",
    "memory": "programs",
}
"""Benchmarks and the modules that they are in."""


def run(names: Sequence[str], request: Request) -> tuple[dict[str, Any], str]:
    """Measure, and return one result with its text.

    Raises:
        ConfigError: a benchmark, method or mechanism that does not exist.
        DataError: the data folder cannot be read.
    """
    for name in names:
        if name not in MODULES:
            raise ConfigError(f"no benchmark is called {name!r}; known: {', '.join(MODULES)}")
    rows: list[dict[str, Any]] = []
    more: dict[str, Any] = {"config": request.config, "settings": list(request.overrides)}
    more["data"] = Path(request.data).name if request.data else "synthetic"
    texts = []
    for name in dict.fromkeys(names):
        measured = _measure(name, request)
        rows += measured.rows
        more |= measured.more
        texts.append(f"{name}\n{_render(name, measured)}")
    found = result.document("+".join(dict.fromkeys(names)), rows, **more)
    faults = schema.problems(found)
    assert not faults, faults
    return found, "\n\n".join(texts)


def _measure(name: str, request: Request) -> Measured:
    module = importlib.import_module(f"sss_jax.benchmarks.{MODULES[name]}")
    measure = getattr(module, f"measure_{name}", None) or module.measure
    measured = measure(request)
    return measured._replace(rows=[{"benchmark": name, **row} for row in measured.rows])


def _render(name: str, measured: Measured) -> str:
    module = importlib.import_module(f"sss_jax.benchmarks.{MODULES[name]}")
    render = getattr(module, "render", table)
    return render(measured)


def table(measured: Measured) -> str:
    """Write rows as aligned columns: names, and medians or numbers."""
    columns = ["name", *schema.measures(measured.rows[0])]
    lines = [columns]
    for row in measured.rows:
        found = schema.measures(row)
        lines.append([schema.row_name(row), *(_number(found, column) for column in columns[1:])])
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])])
        for line in lines
    )


def _number(found: dict[str, schema.Measure], column: str) -> str:
    return f"{found[column].value:.6g}" if column in found else "-"


def compare_files(
    files: Sequence[str], bound: float, anyway: bool, as_json: bool
) -> tuple[str, int]:
    """Compare two result files; return the text and 1 if anything is worse, else 0.

    Raises:
        ConfigError: not two files, or two that cannot be compared.
        DataError: a file that is no result.
    """
    if len(files) != 2:
        raise ConfigError("write: sss-jax bench compare A.json B.json")
    before, after = (compare.read(Path(file)) for file in files)
    found = compare.compare(before, after, bound=bound, anyway=anyway)
    text = json.dumps(found.to_json(), indent=2) if as_json else found.render()
    return text, 1 if found.worse else 0
