"""What the benchmarks are meant to show, held against the results of a suite.

Every goal looks at the worst row of the results that it needs; a goal whose results are missing
says so.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

Rows = Sequence[tuple[dict[str, Any], dict[str, Any]]]
"""Rows of a benchmark, each with the file that holds it."""
Values = Iterable[tuple[str, float]]

ENCODER, TRAINED = "encoder", "encoder forward and backward"
COMPILED = "torch.compile"


class Goal(NamedTuple):
    """What is hoped for.

    Attributes:
        name: what is measured, for a table.
        devices: where it holds, as the suite names them.
        bound: smallest value wanted, or the largest where `most` is set.
        source: benchmark whose rows it needs.
        values: named values of those rows.
    """

    name: str
    devices: tuple[str, ...]
    bound: float
    source: str
    values: Callable[[Rows], Values]
    most: bool = False


class Judged(NamedTuple):
    """A goal, and the value that comes nearest to missing it; None where there are no results."""

    goal: Goal
    row: str = ""
    value: float | None = None

    @property
    def met(self) -> bool | None:
        """Whether it is met; None where that is not known."""
        if self.value is None:
            return None
        over = self.value >= self.goal.bound
        return self.value <= self.goal.bound if self.goal.most else over


def judge(folder: Path, device: str) -> list[Judged]:
    """Hold the results in a folder against the goals of a device."""
    documents = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    return [_judge(goal, documents) for goal in GOALS if device in goal.devices]


def _judge(goal: Goal, documents: Sequence[dict[str, Any]]) -> Judged:
    rows = [
        (row, document)
        for document in documents
        for row in document["rows"]
        if goal.source in (document["benchmark"], row.get("benchmark"))
    ]
    found = [(value, name) for name, value in goal.values(rows)]
    if not found:
        return Judged(goal)
    value, name = max(found) if goal.most else min(found)
    return Judged(goal, name, value)


def render(judged: Sequence[Judged]) -> str:
    """Write a Markdown table."""
    lines = ["| goal | wanted | worst | at | met |", "| --- | --- | --- | --- | --- |"]
    for goal, row, value in judged:
        met = Judged(goal, row, value).met
        found = "not measured" if value is None else f"{value:.3g}"
        sign = "at most" if goal.most else "at least"
        word = "" if met is None else "yes" if met else "no"
        lines.append(f"| {goal.name} | {sign} {goal.bound:g} | {found} | {row} | {word} |")
    return "\n".join(lines)


def _beside_torch(rows: Rows) -> Values:
    return [(_name(row), row["speedup"]) for row, _ in rows if "speedup" in row]


def _beside_compiled(rows: Rows) -> Values:
    return _beside_torch([pair for pair in rows if COMPILED in pair[0]["row"]])


def _semi_supervised(rows: Rows) -> Values:
    return _beside_torch([pair for pair in rows if pair[0]["step"] == "semi-supervised"])


def _share_of_products(rows: Rows) -> Values:
    return [
        (row["variant"], row["ours_flops_per_s"] / document["ceilings"]["matmul_flops_per_s"])
        for row, document in rows
        if row["row"] == ENCODER
    ]


def _utilisation(rows: Rows) -> Values:
    return [
        (
            row["variant"],
            row["ours_flops_per_s"] / document["ceilings"]["peak_bfloat16_flops_per_s"],
        )
        for row, document in rows
        if row["row"] == TRAINED and document["ceilings"]["chip"]
    ]


def _ssl_share(rows: Rows) -> Values:
    shares: dict[str, float] = {}
    for row, document in rows:
        if row["in_step"] and row["part"].startswith(("DFE", "PCSW")):
            name = " ".join(document["settings"])
            shares[name] = shares.get(name, 0.0) + row["share"]
    return shares.items()


def _pcsw(rows: Rows) -> Values:
    return [(row["masks"], row["speedup"]) for row, _ in rows]


def _feed(rows: Rows) -> Values:
    """Slices per second of the quickest way to read, over what the step takes."""
    best: dict[str, float] = {}
    for row, document in rows:
        takes = [r["slices_per_s"] for r in document["rows"] if r.get("benchmark") == "step_time"]
        if takes and row["source"].startswith("prepared, resized"):
            name = " ".join(document["settings"])
            rate = row["slices_per_s"]["median"] / max(takes)
            best[name] = max(best.get(name, 0.0), rate)
    return best.items()


def _name(row: dict[str, Any]) -> str:
    known = ("variant", "row", "step", "torch")
    return ", ".join(str(row[key]) for key in known if key in row)


GOALS = (
    Goal("SAM-2 beside torch, every row", ("cpu",), 1.0, "sam2_speed", _beside_torch),
    Goal(
        "SAM-2 beside torch.compile with SDPA, every row",
        ("cuda",),
        1.3,
        "sam2_speed",
        _beside_compiled,
    ),
    Goal("encoder's rate over that of products", ("cpu",), 0.85, "sam2_speed", _share_of_products),
    Goal("MFU of the encoder's training", ("cuda",), 0.4, "sam2_speed", _utilisation),
    Goal("semi-supervised step beside torch", ("cpu",), 1.5, "peer_step", _semi_supervised),
    Goal("semi-supervised step beside torch", ("cuda",), 2.0, "peer_step", _semi_supervised),
    Goal("DFE and PCSW, share of the step", ("cuda", "tpu"), 0.15, "parts", _ssl_share, most=True),
    Goal("data over the step's consumption", ("cpu", "cuda", "tpu"), 2.0, "data_rate", _feed),
    Goal("PCSW beside scipy", ("cuda",), 20.0, "pcsw_cost", _pcsw),
)
"""Goals of the performance page."""
