"""What a device can do at most, measured: products of matrices and copies; and what bounds a part.

Vendors' peaks are never reached, and CPUs have none that means much. So a part is held against the
best that large products and large copies reach on the same device in the same run.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from sss_jax import compiling, topology
from sss_jax.benchmarks import result

LEAST = 0.5
"""Share of a part's time that a ceiling must explain to be called its bound."""

# Parts of the names that devices give themselves, the longer ones first.
_CHIPS = {"v5 lite": "v5e", "v5e": "v5e", "v5": "v5p", "v6": "v6e", "h100": "h100"}


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """Rates that a device reached.

    Attributes:
        flops: operations of a large product of matrices, 1/s.
        bandwidth: bytes read and written by a large copy, 1/s.
        chip: name of the device in `sss_jax.topology`; None where it is not there.
    """

    flops: float
    bandwidth: float
    chip: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the rates, and the vendor's peaks where they are known."""
        rates = {"matmul_flops_per_s": self.flops, "copy_bytes_per_s": self.bandwidth}
        if self.chip is None:
            return {**rates, "chip": None}
        peaks = topology.CHIPS[self.chip]
        return {
            **rates,
            "chip": self.chip,
            "peak_bfloat16_flops_per_s": peaks.flops,
            "peak_bytes_per_s": peaks.bandwidth,
        }


def measure(dtype: str = "float32", repeats: int = 5) -> Ceilings:
    """Time a product and a copy large enough for the default device."""
    small = jax.default_backend() == "cpu"
    return Ceilings(
        matmul_rate(2048 if small else 8192, dtype, repeats),
        copy_rate(2**28 if small else 2**30, repeats),
        chip_name(jax.devices()[0].device_kind),
    )


def matmul_rate(side: int = 2048, dtype: str = "float32", repeats: int = 5) -> float:
    """Operations per second of a product of square matrices."""
    x = jnp.ones((side, side), dtype)
    product = compiling.jit(lambda a: a @ a)
    times = result.seconds(lambda: product(x).block_until_ready(), repeats)
    return 2 * side**3 / min(times)


def copy_rate(nbytes: int = 2**28, repeats: int = 5) -> float:
    """Bytes per second that a pass over an array reads and writes."""
    x = jnp.ones(nbytes // 4, jnp.float32)
    step = compiling.jit(lambda a: a + 1)
    times = result.seconds(lambda: step(x).block_until_ready(), repeats)
    return 2 * nbytes / min(times)


def chip_name(kind: str) -> str | None:
    """Find a device in `sss_jax.topology` by the name that it gives itself."""
    return next((chip for part, chip in _CHIPS.items() if part in kind.lower()), None)


def bound(seconds: float, flops: float, nbytes: float, ceilings: Ceilings) -> str:
    """Say what keeps a part from being faster.

    Returns:
        "compute" or "memory" where its operations at the rate of products, or its bytes at the
        rate of copies, take at least half of its time, whichever takes longer; else "latency":
        small kernels, waits, or work that is neither.
    """
    compute, memory = flops / ceilings.flops, nbytes / ceilings.bandwidth
    if max(compute, memory) < LEAST * seconds:
        return "latency"
    return "compute" if compute >= memory else "memory"
