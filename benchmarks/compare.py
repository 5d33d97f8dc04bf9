"""Two results row by row: `sss-jax bench compare A.json B.json`.

Every time, rate and counter that both have is given as a ratio, B over A. A row is worse if a time
or a counter grew, or a rate shrank, beyond the bound.
"""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sss_jax.benchmarks import schema
from sss_jax.benchmarks.schema import Measure
from sss_jax.errors import ConfigError, DataError

BOUND = 1.10
_SAME = ("benchmark", "device", "processor", "cores", "python", "config", "settings", "data")


@dataclasses.dataclass(frozen=True)
class Ratio:
    """One number of one row on both sides.

    Attributes:
        row: name of the row.
        measure: name of the number.
        before: its value in A.
        after: its value in B.
    """

    row: str
    measure: str
    before: Measure
    after: Measure

    @property
    def value(self) -> float:
        """B over A; infinite where something came out of nothing."""
        if self.before.value == 0:
            return 1.0 if self.after.value == 0 else float("inf")
        return self.after.value / self.before.value

    def verdict(self, bound: float) -> str:
        """Say "worse" or "better" beyond the bound, else nothing."""
        grew, shrank = self.value > bound, self.value < 1 / bound
        if self.before.kind == "rate":
            grew, shrank = shrank, grew
        return "worse" if grew else "better" if shrank else ""


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What two results say of each other.

    Attributes:
        ratios: numbers that both sides have.
        only: names of rows and numbers that one side lacks, by side.
        differs: in what the two runs differ beside the code.
        bound: how much worse is still the same.
    """

    ratios: tuple[Ratio, ...]
    only: dict[str, tuple[str, ...]]
    differs: tuple[str, ...]
    bound: float

    @property
    def worse(self) -> list[Ratio]:
        """Numbers that are worse beyond the bound."""
        return [one for one in self.ratios if one.verdict(self.bound) == "worse"]

    def to_json(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        rows = [
            {
                "row": one.row,
                "measure": one.measure,
                "before": one.before.value,
                "after": one.after.value,
                "ratio": one.value if one.before.value else None,
                "verdict": one.verdict(self.bound),
            }
            for one in self.ratios
        ]
        only, differs = dict(self.only), list(self.differs)
        worse = len(self.worse)
        return {"bound": self.bound, "worse": worse, "differs": differs, "only": only, "rows": rows}

    def render(self) -> str:
        """Write a table and the verdict."""
        lines = [f"differs: {line}" for line in self.differs]
        width = max((len(f"{one.row}: {one.measure}") for one in self.ratios), default=0)
        for one in self.ratios:
            label, verdict = f"{one.row}: {one.measure}", one.verdict(self.bound)
            numbers = f"{one.before.value:>12.5g} {one.after.value:>12.5g} {one.value:>8.3f}"
            lines.append(f"{label:<{width}} {numbers}  {verdict}".rstrip())
        lines += [f"only in {side}: {name}" for side, names in self.only.items() for name in names]
        count = len(self.worse)
        lines.append(
            f"{count} of {len(self.ratios)} numbers worse than the bound of {self.bound:g}"
        )
        return "\n".join(lines)


def read(path: Path) -> dict[str, Any]:
    """Read a result and check its form.

    Raises:
        DataError: it cannot be read, or is no result.
    """
    try:
        found = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"{path} cannot be read as a result: {error}") from error
    faults = schema.problems(found)
    if faults:
        raise DataError(f"{path} is no result: {'; '.join(faults[:5])}")
    return found


def compare(
    before: dict[str, Any], after: dict[str, Any], *, bound: float = BOUND, anyway: bool = False
) -> Comparison:
    """Compare two results.

    Args:
        before: A.
        after: B.
        bound: how much worse is still the same; at least 1.
        anyway: compare results of different devices, versions or settings too.

    Raises:
        ConfigError: an impossible bound; or the results cannot be compared and `anyway` is not set.
    """
    if not bound >= 1:
        raise ConfigError(f"--bound {bound:g} must be at least 1: a ratio of 1 is no change")
    differs = tuple(differences(before, after))
    if differs and not anyway:
        raise ConfigError(
            f"not comparable: {'; '.join(differs)}; --anyway compares them all the same"
        )
    ours, theirs = (_by_name(one) for one in (before, after))
    ratios = [
        Ratio(row, measure, ours[row][measure], theirs[row][measure])
        for row in ours
        if row in theirs
        for measure in ours[row]
        if measure in theirs[row]
    ]
    if not ratios:
        raise ConfigError("the two results have no number of a row in common")
    only = {"A": tuple(_lacking(ours, theirs)), "B": tuple(_lacking(theirs, ours))}
    return Comparison(tuple(ratios), only, differs, bound)


def differences(before: dict[str, Any], after: dict[str, Any]) -> Iterator[str]:
    """Name what differs beside the code: device, settings, versions of what both have."""
    for name in _SAME:
        if before.get(name) != after.get(name):
            yield f"{name} {before.get(name)!r} and {after.get(name)!r}"
    old, new = before["versions"], after["versions"]
    for name in old.keys() & new.keys():
        if old[name] and new[name] and old[name] != new[name]:
            yield f"{name} {old[name]} and {new[name]}"


def _by_name(document: dict[str, Any]) -> dict[str, dict[str, Measure]]:
    return {schema.row_name(row): schema.measures(row) for row in document["rows"]}


def _lacking(
    have: dict[str, dict[str, Measure]], other: dict[str, dict[str, Measure]]
) -> Iterator[str]:
    for row, found in have.items():
        if row not in other:
            yield row
        else:
            yield from (f"{row}: {measure}" for measure in found if measure not in other[row])
