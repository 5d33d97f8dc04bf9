"""Large attention three ways: `python -m sss_jax.benchmarks.attention_speed -o FILE`.

The loop over blocks of queries, the kernels of this platform where there are some, and
`jax.nn.dot_product_attention` (cuDNN's on GPUs that have it, else XLA's), forward and backward at
the sizes of SAM-2's large attention, in turn. All must agree, or nothing is written.
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

from sss_jax import compiling
from sss_jax.axes import Array
from sss_jax.benchmarks import result
from sss_jax.models.attention import large_attention
from sss_jax.models.presets import kernels_here

TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2}
"""Largest difference over the largest number, from float32's loop."""
DTYPES = tuple(TOLERANCE)


class Size(NamedTuple):
    """Where attention stands, and its shapes for a map of one cell."""

    name: str
    images: int
    heads: int
    slices: int
    pointers: int
    channels: int
    values: int


SIZES = (
    Size("global block, tiny and small", 4, 4, 1, 0, 96, 96),
    Size("global block, base_plus", 4, 8, 1, 0, 56, 56),
    Size("global block, large", 4, 8, 1, 0, 72, 72),
    Size("memory attention, own slice", 9, 1, 1, 0, 256, 256),
    Size("memory attention, 2 memories", 9, 1, 2, 8, 256, 64),
    Size("memory attention, 7 memories", 1, 1, 7, 64, 256, 64),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Time all sides at every size, in turn."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=1024, help="pixels of the image's side")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args(argv)
    rows = []
    for size in SIZES:
        rows.append(compare(size, args.size // 16, args.dtype, args.repeats))
        print(rows[-1], file=sys.stderr, flush=True)
    result.write(args.output, "attention_speed", rows, size=args.size, dtype=args.dtype)
    return 0


def compare(size: Size, side: int, dtype: str, repeats: int) -> dict[str, Any]:
    """Time one size on a map of `side` x `side` cells, after all sides gave the same numbers.

    Raises:
        SystemExit: they did not.
    """
    arrays = [x.astype(dtype) for x in draw(size, side**2)]
    calls = {name: compiling.jit(gradients(side)) for name, side in ways().items()}
    exact = calls["loop"](*(x.astype(jnp.float32) for x in arrays))
    away = {name: apart(call(*arrays), exact) for name, call in calls.items()}
    wrong = {name: d for name, d in away.items() if d > TOLERANCE[dtype]}
    if wrong:
        raise SystemExit(f"{size.name}: attention differs by {wrong} of the largest number")
    waiting = {n: functools.partial(_finish, call, arrays) for n, call in calls.items()}
    times = {n: result.summary(t) for n, t in result.alternate(waiting, repeats).items()}
    loop = times["loop"]["median"]
    speedups = {n: round(loop / t["median"], 2) for n, t in times.items() if n != "loop"}
    return {"name": size.name, "times_s": times, "speedup": speedups, "differ_by": away}


def draw(size: Size, cells: int) -> tuple[Array, Array, Array]:
    """Draw scaled queries, keys and values, [B, heads, tokens, channels]."""
    keys = size.slices * cells + size.pointers
    tokens = ((cells, size.channels), (keys, size.channels), (keys, size.values))
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(size.images, size.heads, *t))) for t in tokens)
    return q / np.sqrt(size.channels), k, v


def ways() -> dict[str, Callable[..., Array]]:
    """Return the sides by name."""
    found = {"loop": large_attention, "jax": by_jax}
    if (kernels := kernels_here()) != "off":
        found["kernels"] = functools.partial(large_attention, kernels=kernels)
    return found


def by_jax(q: Array, k: Array, v: Array) -> Array:
    """Attend as JAX does; it wants values as wide as keys."""
    wide = jnp.pad(v, (*[(0, 0)] * 3, (0, k.shape[-1] - v.shape[-1])))
    rows = [jnp.swapaxes(x, 1, 2) for x in (q, k, wide)]
    short = jax.default_backend() == "gpu" and q.dtype == jnp.bfloat16
    how: Any = "cudnn" if short else "xla"
    y = jax.nn.dot_product_attention(*rows, scale=1.0, implementation=how)
    return jnp.swapaxes(y, 1, 2)[..., : v.shape[-1]]


def gradients(attend: Callable[..., Array]) -> Callable[..., Any]:
    """Return the attention, and the gradients of half its square."""

    def run(*arrays: Array) -> Any:
        y, pull = jax.vjp(attend, *arrays)
        return y, *pull(y)

    return run


def apart(found: Sequence[Array], exact: Sequence[Array]) -> float:
    """Largest difference over the largest number, the worst of all arrays."""
    pairs = zip(found, exact, strict=True)
    return max(float(jnp.abs(a.astype(b.dtype) - b).max() / jnp.abs(b).max()) for a, b in pairs)


def _finish(run: Callable[..., Any], args: Sequence[Array]) -> None:
    jax.block_until_ready(run(*args))


if __name__ == "__main__":
    sys.exit(main())
