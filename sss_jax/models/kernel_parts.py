"""What the TPU kernels of whole layers share."""

from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from sss_jax.axes import Array, Float, PyTree
from sss_jax.models.attention_kernel import Ref, largest_divisor

TILE = 16
"""Rows that bfloat16 numbers fill at once; windows that fill them merge without a copy."""
ROWS = 256
"""Most tokens that are in work at once; code is written out for each of them."""
CORES = 2
"""Cores of a device that share the tokens; where there is one, it does both parts."""


def cut_tokens(tokens: int, most: int, parts: int = 1) -> tuple[int, int]:
    """Tokens of a block and tokens in work at once, in whole tiles.

    Args:
        tokens: in all.
        most: of a block.
        parts: that the number of blocks must divide into.
    """
    block = TILE * largest_divisor(tokens // TILE // parts, most // TILE)
    return block, TILE * largest_divisor(block // TILE, ROWS // TILE)


def held(weights: PyTree, dtype: jnp.dtype) -> tuple[Array, ...]:
    """Matrices in the type of the products, vectors as rows."""
    leaves = jax.tree.leaves(weights)
    return tuple(a.astype(dtype) if a.ndim == 2 else a[None] for a in leaves)


def sums_of(arrays: Iterable[Array], parts: int) -> list[jax.ShapeDtypeStruct]:
    """Shapes of the gradients of parameters, one for each part of the tokens."""
    return [jax.ShapeDtypeStruct((parts, *a.shape), jnp.float32) for a in arrays]


def added_up(sums: Sequence[Array], weights: PyTree) -> PyTree:
    """Gradients of all parts, in the shapes of the parameters."""
    leaves, structure = jax.tree.flatten(weights)
    # TPU's compiler would join a loop's stack of gradients with the kernel, and then grant it less
    # memory than it asked for.
    sums = jax.lax.optimization_barrier(tuple(sums))
    shaped = [a.sum(0).reshape(like.shape) for a, like in zip(sums, leaves, strict=True)]
    return jax.tree.unflatten(structure, shaped)


def clear_at(start: Any, refs: Sequence[Ref]) -> None:
    """Set sums to zero where a part begins."""

    @pl.when(start)
    def _() -> None:
        for ref in refs:
            ref[...] = jnp.zeros_like(ref)


def cost(products: int, exponentials: int, moved: Iterable[Any]) -> pl.CostEstimate:
    """Multiplications, exponentials and arrays that are moved once."""
    return pl.CostEstimate(
        flops=2 * products,
        transcendentals=exponentials,
        bytes_accessed=sum(a.size * a.dtype.itemsize for a in moved),
    )


def whole(a: Any) -> pl.BlockSpec:
    """A matrix that every step of the grid reads."""
    return pl.BlockSpec(a.shape, lambda *_: (0, 0))


def part(a: Any) -> pl.BlockSpec:
    """A matrix of gradients for each part of the tokens, the first axis of the grid."""
    return pl.BlockSpec((1, *a.shape[1:]), lambda number, *_: (number, 0, 0))


def piece(number: Any, size: int) -> Any:
    """Place of a piece among equal ones."""
    return pl.ds(pl.multiple_of(number * size, size), size)


def wide(x: Array) -> Float[Array, "..."]:
    """Widen to float32."""
    return x.astype(jnp.float32)


def sum_rows(x: Float[Array, "N C"]) -> Float[Array, "1 C"]:
    """Sum in float32."""
    return wide(x).sum(0, keepdims=True)


def normalise(
    x: Float[Array, "N C"], epsilon: float
) -> tuple[Float[Array, "N C"], Float[Array, "N 1"]]:
    """Return rows without mean, of variance 1, and what they were divided by, inverted."""
    centred = wide(x) - wide(x).mean(axis=1, keepdims=True)
    inverse = jax.lax.rsqrt(jnp.square(centred).mean(axis=1, keepdims=True) + epsilon)
    return centred * inverse, inverse


def normalise_backward(
    bar: Float[Array, "N C"], normal: Float[Array, "N C"], inverse: Float[Array, "N 1"]
) -> Float[Array, "N C"]:
    """Return the gradient of rows, given that of what `normalise` made of them."""
    along = (bar * normal).mean(axis=1, keepdims=True)
    return (bar - bar.mean(axis=1, keepdims=True) - normal * along) * inverse
