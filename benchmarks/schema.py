"""The one form of all results: what a file must hold, and which of its numbers can be compared.

A row is a set of facts by name. It is found by its `name` or, where that is missing, by all its
texts and sizes. Which way a number is better follows from the end of its own name; see
docs/reference/benchmarks.md.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

_TOP: dict[str, tuple[type, ...]] = {
    "benchmark": (str,),
    "date": (str,),
    "device": (str,),
    "processor": (str,),
    "cores": (int, type(None)),
    "load_before": (float, int, type(None)),
    "python": (str,),
    "versions": (dict,),
    "commit": (str, type(None)),
    "rows": (list,),
}
_SUMMARY = {"median", "low", "high"}
# Rates of work: more is better. Rates of operations are not among them: a step that needs fewer
# operations in the same time has not become slower.
RATES = ("slices_per_s", "slices_per_cpu_s", "volumes_per_min")
COUNTERS = ("flops", "gflop", "bytes", "gbytes", "mib", "fusions", "collectives")
_NAMING = ("size", "clips", "threads", "devices", "processes", "seed", "labelled")


class Measure(NamedTuple):
    """One number of a row that can become worse.

    Attributes:
        value: the number, or the median of a timing.
        kind: "time", "rate" or "counter".
    """

    value: float
    kind: str


def problems(document: Any) -> list[str]:
    """Say what is wrong with a result; nothing if it has the form."""
    if not isinstance(document, dict):
        return [f"a result is an object, not {type(document).__name__}"]
    found = [
        f"{name} must be {' or '.join(t.__name__ for t in types)}"
        for name, types in _TOP.items()
        if name not in document or not isinstance(document[name], types)
    ]
    return found or [*_version_problems(document["versions"]), *_row_problems(document["rows"])]


def _version_problems(versions: dict[str, Any]) -> Iterator[str]:
    for name, version in versions.items():
        if not isinstance(version, str | None):
            yield f"versions.{name} must be a text or null"
    for name in ("jax", "jaxlib"):
        if not versions.get(name):
            yield f"versions.{name} is missing"


def _row_problems(rows: list[Any]) -> Iterator[str]:
    if not rows:
        yield "rows is empty"
    seen: set[str] = set()
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            yield f"rows[{number}] must be an object"
            continue
        name = row_name(row)
        if not name or name in seen:
            yield f"rows[{number}] has {'the name of another: ' + name if name else 'no name'}"
        seen.add(name)
        yield from (f"rows[{number}].{key}: {text}" for key, text in _value_problems(row))


def _value_problems(row: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for key, value in row.items():
        if isinstance(value, dict) and value.keys() & _SUMMARY:
            if set(value) != _SUMMARY or not all(_is_number(v) for v in value.values()):
                yield key, "a timing has median, low and high, all numbers"
            elif not value["low"] <= value["median"] <= value["high"]:
                yield key, "low, median and high are out of order"
        elif _kind(key) and not _is_number(value) and not isinstance(value, dict | None):
            yield key, "must be a number or null"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value == value


def row_name(row: Mapping[str, Any]) -> str:
    """Return what a row is found by in another result."""
    if "name" in row:
        named = [row.get("benchmark"), row["name"]]
        return " / ".join(str(text) for text in named if text)
    texts = [str(v) for k, v in row.items() if isinstance(v, str) or k in _NAMING]
    return " / ".join(texts)


def measures(row: Mapping[str, Any]) -> dict[str, Measure]:
    """Return the numbers of a row that can become worse, by name."""
    found = {}
    for key, value in row.items():
        number, kind = value.get("median") if isinstance(value, dict) else value, _kind(key)
        if kind and _is_number(number):
            found[key] = Measure(number, kind)
    return found


def _kind(key: str) -> str | None:
    if key in RATES:
        return "rate"
    if key.endswith("_s") and not key.endswith("per_s"):
        return "time"
    return "counter" if key.rpartition("_")[2] in COUNTERS else None
