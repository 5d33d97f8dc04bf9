"""Attention inside windows as two TPU kernels: projections in, attended values out.

The logits of a window are small, but XLA writes them, and every rearrangement of heads before and
after them, to main memory. The kernels read queries, keys and values once, as the projections
give them, and write the result once. The backward pass computes the weights again. Where windows
are small several make one block of rows, and tokens of other windows are switched off.

Axes: W windows; N queries and T keys of a window (fewer queries where they are pooled); C
channels of all heads.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from sss_jax.axes import Array, Float
from sss_jax.models.attention_kernel import (
    CORE_MEMORY,
    NN,
    NT,
    OFF,
    TN,
    Ref,
    largest_divisor,
    product,
)

TILE = 16
"""Rows that bfloat16 numbers fill at once; tokens of several windows merge without a copy."""
ROWS = 128
"""Rows that a product of the matrix unit has at least, where windows can be grouped."""
BLOCK = 16 * 2**20
"""Most bytes of a block of windows that a kernel takes at once, all arrays together."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def attend(
    q_WNC: Float[Array, "W N C"],
    kv_WTE: Float[Array, "W T 2C"],
    heads: int,
    interpret: bool = False,
) -> Float[Array, "W N C"]:
    """Attention of the queries of each window to its keys, which lie beside its values.

    `interpret` runs the kernels without a TPU.
    """
    (out,) = _call(_forward, (q_WNC, kv_WTE), (q_WNC,), heads, interpret)
    return out


def _attend_forward(
    q_WNC: Array, kv_WTE: Array, heads: int, interpret: bool
) -> tuple[Array, tuple[Array, Array]]:
    return attend(q_WNC, kv_WTE, heads, interpret), (q_WNC, kv_WTE)


def _attend_backward(
    heads: int, interpret: bool, kept: tuple[Array, Array], bar_WNC: Array
) -> tuple[Array, ...]:
    return _call(_backward, (*kept, bar_WNC), kept, heads, interpret)


attend.defvjp(_attend_forward, _attend_backward)


def _call(
    kernel: Any, arrays: tuple[Array, ...], like: tuple[Array, ...], heads: int, interpret: bool
) -> tuple[Array, ...]:
    """Run a kernel over windows; its results have the shapes of `like`."""
    (windows, queries, width), tokens = arrays[0].shape, arrays[1].shape[1]
    group = group_of_windows(windows, queries, tokens)
    groups = windows // group
    merged = [x.reshape(groups, -1, x.shape[-1]) for x in arrays]
    made: list[Any] = [
        jax.ShapeDtypeStruct((groups, group * x.shape[1], x.shape[2]), x.dtype) for x in like
    ]
    moved = sum(x.size * x.dtype.itemsize for x in (*merged, *made))
    count = largest_divisor(groups, BLOCK * groups // moved)
    blocks = [pl.BlockSpec((count, *x.shape[1:]), lambda i: (i, 0, 0)) for x in (*merged, *made)]
    products = 2 if kernel is _forward else 5
    found = pl.pallas_call(
        functools.partial(kernel, heads=heads, queries=queries, tokens=tokens),
        grid=(groups // count,),
        in_specs=blocks[: len(merged)],
        out_specs=blocks[len(merged) :],
        out_shape=made,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",), vmem_limit_bytes=CORE_MEMORY
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * products * windows * queries * tokens * width,
            transcendentals=windows * heads * queries * tokens,
            bytes_accessed=moved,
        ),
        interpret=interpret,
        name=f"window_attention{kernel.__name__}",
    )(*merged)
    return tuple(x.reshape(y.shape) for x, y in zip(found, like, strict=True))


def group_of_windows(windows: int, queries: int, tokens: int) -> int:
    """Windows per block of rows: as many as fill ROWS, where their tokens fill whole tiles."""
    if queries % TILE or tokens % TILE:
        return 1
    return largest_divisor(windows, ROWS // tokens)


def _forward(
    q_ref: Ref, kv_ref: Ref, out_ref: Ref, *, heads: int, queries: int, tokens: int
) -> None:
    bias = _others_off(q_ref.shape[1], kv_ref.shape[1], queries, tokens)

    def window(i: int, _: None) -> None:
        for head in range(heads):
            q, k, v, place, _ = _head(q_ref, kv_ref, i, head, heads)
            weights = _weights(q, k, bias)
            out_ref[i, :, place] = product(weights.astype(v.dtype), v, NN).astype(out_ref.dtype)

    jax.lax.fori_loop(0, q_ref.shape[0], window, None)


def _backward(
    q_ref: Ref,
    kv_ref: Ref,
    bar_ref: Ref,
    q_bar_ref: Ref,
    kv_bar_ref: Ref,
    *,
    heads: int,
    queries: int,
    tokens: int,
) -> None:
    bias = _others_off(q_ref.shape[1], kv_ref.shape[1], queries, tokens)

    def window(i: int, _: None) -> None:
        for head in range(heads):
            q, k, v, place, of_value = _head(q_ref, kv_ref, i, head, heads)
            weights, bar = _weights(q, k, bias), bar_ref[i, :, place]
            lean = product(bar, v, NT)
            lean = weights * (lean - jnp.sum(weights * lean, axis=1, keepdims=True))
            logits_bar = (lean * q.shape[-1] ** -0.5).astype(q.dtype)
            q_bar_ref[i, :, place] = product(logits_bar, k, NN).astype(q_bar_ref.dtype)
            kv_bar_ref[i, :, place] = product(logits_bar, q, TN).astype(kv_bar_ref.dtype)
            v_bar = product(weights.astype(bar.dtype), bar, TN)
            kv_bar_ref[i, :, of_value] = v_bar.astype(kv_bar_ref.dtype)

    jax.lax.fori_loop(0, q_ref.shape[0], window, None)


def _head(
    q_ref: Ref, kv_ref: Ref, i: int, head: int, heads: int
) -> tuple[Array, Array, Array, Any, Any]:
    """Queries, keys and values of one head, and where its channels lie: queries', values'."""
    width = q_ref.shape[-1]
    d = width // heads
    place, of_value = pl.ds(head * d, d), pl.ds(width + head * d, d)
    return q_ref[i, :, place], kv_ref[i, :, place], kv_ref[i, :, of_value], place, of_value


def _weights(q: Array, k: Array, bias: Array | None) -> Array:
    logits = product(q, k, NT) * q.shape[-1] ** -0.5
    logits = logits if bias is None else logits + bias
    weights = jnp.exp(logits - logits.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True)


def _others_off(rows: int, columns: int, queries: int, tokens: int) -> Array | None:
    """Added to the logits of a group: 0 inside a window; None where the group is one window."""
    if rows == queries:
        return None
    window_of = [
        jax.lax.div(jax.lax.broadcasted_iota(jnp.int32, (rows, columns), axis), jnp.int32(size))
        for axis, size in enumerate((queries, tokens))
    ]
    return jnp.where(window_of[0] == window_of[1], 0.0, OFF)
