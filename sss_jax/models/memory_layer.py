"""Both attentions of a layer of memory attention for TPUs, which main memory binds.

Norm, projections and rotation are one kernel, and so are the projection behind attention and its
shortcut (`projection_kernel`). The same results as `memory_attention` gives elsewhere. Axes as
there.
"""

from typing import NamedTuple

import jax.numpy as jnp

from sss_jax.axes import Array, Bool, Float
from sss_jax.models import attention_kernel, projection_kernel
from sss_jax.models.attention import large_attention
from sss_jax.models.projection_kernel import Form, Weights, project

Linear = tuple[Float[Array, "C D"], Float[Array, " D"]]
"""Kernel and bias."""
Norm = tuple[Float[Array, " D"], Float[Array, " D"]]
"""Scale and shift."""


class Around(NamedTuple):
    """The projections around attention.

    Attributes:
        q: to queries, scaled, pairs of channels half the width apart.
        k: to keys, likewise.
        v: to values.
        out: behind attention.
    """

    q: Linear
    k: Linear
    v: Linear
    out: Linear


def suits(positions: int, width: int, keys: int, dtype: jnp.dtype) -> bool:
    """Whether the kernels take this many positions and remembered keys."""
    sizes = [(positions, width, 3 * width), (keys, width, width)]
    return all(projection_kernel.suits(*size, dtype) for size in sizes)


def missing(keys: int) -> int:
    """How many keys to add, switched off, so that the kernels of attention need not."""
    return -keys % attention_kernel.block_of_keys(keys)


def look_at_itself(
    x: Float[Array, "B J P D"],
    around: Around,
    norm: Norm,
    table: projection_kernel.Table,
    epsilon: float,
) -> Float[Array, "B J P D"]:
    """Add attention of every position to all positions of its map."""
    tokens = x.reshape(1, -1, *x.shape[2:])
    kernels, biases = zip(around.q, around.k, around.v, strict=True)
    weights = Weights(jnp.concatenate(kernels, axis=1), jnp.concatenate(biases), *norm)
    form = Form(results=3, turned=2, through=True, epsilon=epsilon)
    q, k, v, shortcut = project(tokens, weights, table, None, form)
    y = large_attention(q, k, v, kernels="tpu")
    return project(y, Weights(*around.out), None, shortcut[0], Form())[0].reshape(x.shape)


def look_at_memory(
    x: Float[Array, "B J P D"],
    key: Float[Array, "B K N M"],
    value: Float[Array, "B K N M"],
    valid: Bool[Array, "B K N"],
    around: Around,
    norm: Norm,
    tables: tuple[projection_kernel.Table, projection_kernel.Table],
    epsilon: float,
) -> Float[Array, "B K P D"]:
    """Add attention to what is remembered; `tables` of positions and of keys."""
    b, k, n, m = key.shape
    form = Form(turned=1, through=True, epsilon=epsilon)
    tokens = x.reshape(1, -1, *x.shape[2:])
    q, shortcut = project(tokens, Weights(*around.q, *norm), tables[0], None, form)
    keys = project(key.reshape(1, b * k, n, m), Weights(*around.k), tables[1], None, Form(turned=1))
    q, shortcut = (
        jnp.broadcast_to(a.reshape(x.shape), (b, k, *x.shape[2:])) for a in (q, shortcut)
    )
    y = large_attention(q, keys[0].reshape(b, k, n, -1), value, valid, kernels="tpu")
    # Two linear layers with nothing between them are one.
    merged = around.v[0] @ around.out[0], around.v[1] @ around.out[0] + around.out[1]
    y, shortcut = (a.reshape(-1, *a.shape[2:]) for a in (y, shortcut))
    return project(y[None], Weights(*merged), None, shortcut, Form())[0].reshape(b, k, *x.shape[2:])
