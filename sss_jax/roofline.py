"""Seconds and shares of a compiled program if every kernel reached its roof.

A kernel takes the larger of its operations at the chip's peak and its bytes at the bandwidth of
main memory. That is a bound and a projection, never a measurement.
"""

import collections
from collections.abc import Iterable
from typing import Any

from sss_jax.flops import Kernel
from sss_jax.hlo import Collective, Cost
from sss_jax.topology import Topology

# Part of a step, by the first name that stands in the source of a kernel.
PARTS = (
    "gather_parameters",
    "reduce_gradients",
    "cutmix_partner",
    "optimizer",
    "augment",
    "pcsw",
    "dfe",
    "losses",
    "memory_attention",
    "memory_encoder",
    "sam_mask_decoder",
    "sam_prompt_encoder",
    "coarse",
    "neck",
    "trunk",
)


def roof(cost: Cost, topology: Topology) -> float:
    """Seconds that a kernel takes at least."""
    chip = topology.chip
    return max(cost.flops / chip.flops, cost.nbytes / chip.bandwidth)


def fill(kernels: Iterable[Kernel], topology: Topology) -> float | None:
    """Part of the matrix unit's work that kernels have use for; None without kernels or tiles.

    The unit holds square tiles of the right factor while rows of the left, eight at a time, pass.
    """
    side, useful, work = topology.chip.matrix, 0, 0
    for kernel in kernels:
        for rows, columns, depth, times in kernel.products:
            done = _whole(rows, 8) * _whole(columns, side) * _whole(depth, side)
            useful += kernel.times * times * rows * columns * depth
            work += kernel.times * times * done
    return useful / work if work and side > 1 else None


def _whole(size: int, tile: int) -> int:
    return -(-size // tile) * tile


def exchange_time(one: Collective, topology: Topology) -> float:
    """Seconds of an exchange around a ring of all chips, and through the network between groups.

    An all-reduce sends everything twice, the others once; between groups, slices of TPUs or hosts
    of GPUs, each chip sends its part.
    """
    chip, twice = topology.chip, 2 if one.kind == "all-reduce" else 1
    seconds = twice * one.nbytes / chip.link
    if topology.groups > 1:
        part = one.nbytes * topology.groups / topology.devices
        seconds += twice * part / chip.network
    return seconds


def by_source(collectives: Iterable[Collective]) -> list[dict[str, Any]]:
    """Group exchanges by kind and part of the step, largest first."""
    groups: dict[tuple[str, str], list[Collective]] = collections.defaultdict(list)
    for one in collectives:
        groups[one.kind, part_of(one.source)].append(one)
    rows = [
        {
            "kind": kind,
            "part": part,
            "number": sum(one.times for one in group),
            "bytes": sum(one.nbytes * one.times for one in group),
            "exact": all(one.exact for one in group),
            "example": group[0].source,
        }
        for (kind, part), group in groups.items()
    ]
    return sorted(rows, key=lambda row: -row["bytes"])


def by_part(costs: Iterable[Cost], topology: Topology) -> list[dict[str, Any]]:
    """Add up kernels by part of the step, forward and backward apart, dearest first."""
    groups: dict[str, list[Cost]] = collections.defaultdict(list)
    for cost in costs:
        backward = "transpose(" in cost.source
        groups[part_of(cost.source) + (", backward" if backward else "")].append(cost)
    rows = [
        {
            "part": part,
            "flops": sum(c.flops * c.times for c in group),
            "bytes": sum(c.nbytes * c.times for c in group),
            "seconds": sum(roof(c, topology) * c.times for c in group),
        }
        for part, group in groups.items()
    ]
    return sorted(rows, key=lambda row: -row["seconds"])


def part_of(source: str) -> str:
    """Name the part of the step that a kernel belongs to."""
    return next((part for part in PARTS if part in source), "other")
