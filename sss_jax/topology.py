"""Accelerators by the names they are rented under, and what their makers say they can do.

Peaks are the vendors' figures for one chip, not measurements. TPU v5e and v6e are named by chips,
v5p by TensorCores, of which a chip has two.
"""

import dataclasses
import math
import re

from sss_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Chip:
    """One accelerator.

    Attributes:
        name: as it is rented.
        flops: peak of bfloat16 products, 1/s.
        memory: bytes.
        bandwidth: of that memory, bytes/s.
        link: bytes/s that a chip exchanges with its neighbours, all links together.
        network: bytes/s between slices or hosts, per chip.
        cores: what one unit of its name counts, per chip.
        matrix: side of a matrix unit, which whole tiles fill; 1 where that is not so.
    """

    name: str
    flops: float
    memory: int
    bandwidth: float
    link: float
    network: float
    cores: int = 1
    matrix: int = 1


_GIB = 2**30
# Google Cloud's pages on v5e, v5p and v6e; NVIDIA's data sheets of the A100, H100 and H200 as SXM.
# The network of a TPU host (v5e 2 x 100 Gbit/s for 8 chips, v5p 200 for 4, v6e 4 x 200 for 8) is
# shared evenly; a GPU of NVIDIA's DGX machines has its own (A100 200 Gbit/s, the others 400).
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v5e", 197e12, 16 * _GIB, 819e9, 200e9, 25e9 / 8, matrix=128),
        Chip("v5p", 459e12, 95 * _GIB, 2765e9, 600e9, 25e9 / 4, cores=2, matrix=128),
        Chip("v6e", 918e12, 32 * _GIB, 1600e9, 400e9, 100e9 / 8, matrix=256),
        Chip("a100", 312e12, 80 * 10**9, 2039e9, 300e9, 25e9),
        Chip("h100", 989e12, 80 * 10**9, 3350e9, 450e9, 50e9),
        Chip("h200", 989e12, 141 * 10**9, 4800e9, 450e9, 50e9),
    )
}
GPUS_OF_A_HOST = 8
_NAME = re.compile(r"(?:(\d+)x)?([a-z]\w*?)-(\d+)")


@dataclasses.dataclass(frozen=True)
class Topology:
    """Some chips: `slices` groups of `chips` each.

    Attributes:
        chip: what they are.
        chips: chips of one slice.
        slices: slices, joined by the data-centre network.
    """

    chip: Chip
    chips: int
    slices: int = 1

    @property
    def devices(self) -> int:
        """All chips."""
        return self.chips * self.slices

    @property
    def is_tpu(self) -> bool:
        """Whether the TPU compiler knows it."""
        return self.chip.name.startswith("v")

    @property
    def groups(self) -> int:
        """Groups of chips that only the network joins: slices of TPUs, hosts of GPUs."""
        hosts = 1 if self.is_tpu else max(1, self.chips // GPUS_OF_A_HOST)
        return self.slices * hosts

    @property
    def grid(self) -> str:
        """Shape of a slice, such as `4x4` or `2x4x4`: as square as powers of two allow.

        Of GPUs the hosts and the GPUs of each.
        """
        if not self.is_tpu:
            each = min(self.chips, GPUS_OF_A_HOST)
            return f"{self.chips // each}x{each}"
        exponent, axes = int(math.log2(self.chips)), 3 if self.chip.name == "v5p" else 2
        low, more = divmod(exponent, axes)
        sides = [2 ** (low + (i >= axes - more)) for i in range(axes)]
        if axes == 3 and self.chips == 4:
            sides = [2, 2, 1]  # the four chips of a host
        return "x".join(map(str, sides))


def parse(name: str) -> Topology:
    """Read a name such as `v5e-16`, `v5p-64`, `h100-8`, or `2xv5e-16` for two slices.

    Raises:
        ConfigError: an unknown chip, or a number of chips that no slice has.
    """
    found = _NAME.fullmatch(name.strip().lower())
    if not found or found.group(2) not in CHIPS:
        known = ", ".join(f"{chip}-N" for chip in CHIPS)
        raise ConfigError(f"unknown topology {name!r}; known: {known}; two slices: 2xv5e-16")
    chip = CHIPS[found.group(2)]
    units, slices = int(found.group(3)), int(found.group(1) or 1)
    chips = units // chip.cores
    whole = chips * chip.cores == units and chips > 0
    topology = Topology(chip, chips, slices)
    if not topology.is_tpu and chips > GPUS_OF_A_HOST and chips % GPUS_OF_A_HOST:
        raise ConfigError(
            f"no machines {name!r}: beyond {GPUS_OF_A_HOST} GPUs, whole hosts of them"
        )
    if not whole or slices < 1 or (topology.is_tpu and chips & (chips - 1)):
        unit = "TensorCores, two a chip" if chip.cores > 1 else "chips"
        raise ConfigError(
            f"no slice {name!r}: {chip.name}-N counts {unit}, by powers of two, as {chip.name}-16"
        )
    return topology
