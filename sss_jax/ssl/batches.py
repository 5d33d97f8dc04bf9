"""Several batches in one call of the network: join them, and cut what comes out."""

import jax
import jax.numpy as jnp

from sss_jax.axes import PyTree


def join(trees: list[PyTree]) -> PyTree:
    """Join trees of equal structure along every leaf's first axis."""
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *trees)


def cut(tree: PyTree, sizes: list[int]) -> list[PyTree]:
    """Cut every leaf along its first axis into pieces of these sizes."""
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return [
        jax.tree.map(lambda x, a=end - size, b=end: x[a:b], tree)
        for size, end in zip(sizes, ends, strict=True)
    ]
