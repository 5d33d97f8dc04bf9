"""What an estimate holds, and how it is written as JSON and as text."""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one device.

    Attributes:
        state: parameters, teacher, optimizer and batch.
        temporary: what lives during the step.
        total: largest sum; what a program that does not fit would take.
        capacity: what the compiler may use.
    """

    state: int
    temporary: int
    total: int
    capacity: int

    @property
    def fits(self) -> bool:
        """Whether the program can run."""
        return self.total <= self.capacity


@dataclasses.dataclass(frozen=True)
class Projection:
    """Seconds of one step if every kernel reached its roof; not measured.

    Attributes:
        compute: operations at the peak rate.
        memory: bytes at the memory's bandwidth.
        kernels: sum over kernels of the larger of both.
        exchange: exchanges between devices, nothing beside them.
        mfu: the network's operations, none of them counted twice, at this time and peak.
        slices_per_s: labelled and unlabelled slices, of all devices.
    """

    compute: float
    memory: float
    kernels: float
    exchange: float
    mfu: float
    slices_per_s: float

    @property
    def step(self) -> float:
        """Seconds of a step."""
        return self.kernels + self.exchange


@dataclasses.dataclass(frozen=True)
class Estimate:
    """All that is known of one configuration on one topology; amounts are per device and step.

    `fill` is the part of the matrix unit's work that our own kernels have use for, where they run.
    With `quick` the compiler spent its least effort: a program that needs somewhat more memory and
    moves more bytes than the one that would run.
    """

    topology: str
    chip: str
    devices: int
    mesh: dict[str, int]
    clips: tuple[int, int]
    slices: int
    parameters: int
    model_flops: int
    program_flops: int
    fill: float | None = None
    memory: Memory | None = None
    compile_s: float | None = None
    quick: bool = False
    xla: dict[str, float] | None = None
    exchanges: tuple[dict[str, Any], ...] = ()
    parts: tuple[dict[str, Any], ...] = ()
    host_calls: tuple[str, ...] = ()
    types: tuple[str, ...] = ()
    products: tuple[dict[str, Any], ...] = ()
    projection: Projection | None = None

    def to_json(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        values = dataclasses.asdict(self)
        if self.memory:
            values["memory"]["fits"] = self.memory.fits
        if self.projection:
            values["projection"]["step"] = self.projection.step
        return values


def render(found: Estimate) -> str:
    """Write an estimate as text."""
    lines = _work(found)
    if found.memory is None:
        lines.append("not compiled, for want of a compiler: memory and time are unknown")
        return "\n".join(lines)
    lines.append(_fit(found, found.memory))
    if found.projection is not None:
        lines += _program(found, found.projection)
    return "\n".join(lines)


def _work(found: Estimate) -> list[str]:
    mesh = " x ".join(f"{axis} {size}" for axis, size in found.mesh.items())
    return [
        f"{found.topology}: {found.devices} x {found.chip}, {mesh}",
        f"clips per device: {found.clips[0]} labelled, {found.clips[1]} unlabelled, "
        f"of {found.slices} slices; {found.parameters / 1e6:.1f} M parameters",
        f"operations per device: {found.model_flops / 1e12:.2f} TFLOP of the network, "
        f"{found.program_flops / 1e12:.2f} with what is computed again",
        *_filled(found),
    ]


def _filled(found: Estimate) -> list[str]:
    if found.fill is None:
        return []
    return [f"our kernels fill {found.fill:.0%} of the matrix unit, where times assume all of it"]


def _fit(found: Estimate, memory: Memory) -> str:
    gib = 2**30
    spare = (memory.capacity - memory.total) / gib
    verdict = f"fits, {spare:.2f} GiB spare" if memory.fits else f"TOO LARGE by {-spare:.2f} GiB"
    return (
        f"memory per device: {memory.total / gib:.2f} of {memory.capacity / gib:.2f} GiB, {verdict}"
        f" (compiled in {found.compile_s:.0f} s{', with the least effort' if found.quick else ''})"
    )


def _program(found: Estimate, time: Projection) -> list[str]:
    return [
        f"PROJECTION, not measured: step {time.step * 1e3:.1f} ms "
        f"(kernels {time.kernels * 1e3:.1f}, exchanges {time.exchange * 1e3:.1f}; all operations "
        f"at peak {time.compute * 1e3:.1f}, all bytes {time.memory * 1e3:.1f}), "
        f"MFU {time.mfu:.0%}, {time.slices_per_s:.0f} slices/s",
        f"host calls: {', '.join(found.host_calls) or 'none'}",
        *(
            f"products of {row['types']}, {row['precision']} precision: {row['share']:.2%}"
            for row in found.products
        ),
        "",
        "exchanges per device:",
        *(
            f"  {row['kind']:<18} {row['part']:<18} {row['number']:>5} x, "
            f"{row['bytes'] / 2**20:10.3f} MiB{'' if row['exact'] else ' per turn'}"
            for row in found.exchanges
        ),
        "",
        "parts, by projected time:",
        *(
            f"  {row['part']:<28} {row['seconds'] * 1e3:9.2f} ms {row['flops'] / 1e9:12.1f} GFLOP "
            f"{row['bytes'] / 1e9:9.2f} GB"
            for row in found.parts
        ),
    ]
