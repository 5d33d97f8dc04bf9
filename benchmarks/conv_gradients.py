"""Gradients of convolutions inside a loop: `python -m sss_jax.benchmarks.conv_gradients -o FILE`.

Both sides add up the gradients of four turns of a `scan`: one as autodiff writes them, the other
as `sss_jax.models.convolution` does on CPUs. They must agree, or nothing is written.
"""

import argparse
import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sss_jax.axes import Array
from sss_jax.benchmarks import result
from sss_jax.models import convolution

TURNS = 4
TOLERANCE = 1e-5
"""Largest difference over the largest gradient."""


class Size(NamedTuple):
    """Where a convolution stands, and its shapes."""

    name: str
    maps: int
    side: int
    width: int
    features: int
    kernel: int
    stride: int


SIZES = (
    Size("mask downsampler, last layer, nano at 64 px", 16, 16, 16, 64, 3, 2),
    Size("mask downsampler, last layer, one object at 512 px", 1, 64, 64, 256, 3, 2),
    Size("patch embedding, nano at 64 px", 32, 64, 3, 16, 7, 4),
    Size("DFE, stride 4, nano at 64 px", 32, 16, 64, 64, 3, 1),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Time both sides at every size, in turn."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args(argv)
    rows = []
    for size in SIZES:
        rows.append(compare(size, args.repeats))
        print(rows[-1], file=sys.stderr, flush=True)
    result.write(args.output, "conv_gradients", rows, turns=TURNS)
    return 0


def compare(size: Size, repeats: int) -> dict[str, Any]:
    """Time one size, after both sides gave the same gradients.

    Raises:
        SystemExit: they did not.
    """
    rng = np.random.default_rng(0)
    shape = (TURNS, size.maps, size.side, size.side, size.width)
    x = jnp.asarray(rng.normal(size=shape), jnp.float32)
    kernel = rng.normal(size=(size.kernel, size.kernel, size.width, size.features))
    args = (x, jnp.asarray(kernel, jnp.float32))
    forms = {"autodiff": convolution._convolve, "ours": convolution.convolve}
    runs = {name: jax.jit(_in_loop(form, size)) for name, form in forms.items()}
    found = {name: run(*args) for name, run in runs.items()}
    away = max(map(_difference, found["ours"], found["autodiff"]))
    if away > TOLERANCE:
        raise SystemExit(f"{size.name}: gradients differ by {away:.1e} of the largest")
    waiting = {n: functools.partial(_finish, run, args) for n, run in runs.items()}
    times = {n: result.summary(t) for n, t in result.alternate(waiting, repeats).items()}
    ratio = times["autodiff"]["median"] / times["ours"]["median"]
    seconds = {f"{name}_s": time for name, time in times.items()}
    return {**size._asdict(), **seconds, "speedup": round(ratio, 1), "differ_by": float(away)}


def _in_loop(form: Callable[..., Array], size: Size) -> Callable[..., Any]:
    def loss(x: Array, kernel: Array) -> Array:
        y = form(x, kernel, size.stride, size.kernel // 2)
        return 0.5 * jnp.vdot(y, y)

    def total(x: Array, kernel: Array) -> tuple[Array, Array]:
        def turn(summed: Array, x: Array) -> tuple[Array, Array]:
            dx, dkernel = jax.grad(loss, (0, 1))(x, kernel)
            return summed + dkernel, dx

        dkernel, dx = jax.lax.scan(turn, jnp.zeros_like(kernel), x)
        return dx, dkernel

    return total


def _finish(run: Callable[..., Any], args: tuple[Array, ...]) -> None:
    jax.block_until_ready(run(*args))


def _difference(one: Array, other: Array) -> float:
    return float(jnp.abs(one - other).max() / jnp.abs(other).max())


if __name__ == "__main__":
    sys.exit(main())
