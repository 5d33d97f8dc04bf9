"""Attention inside windows as two TPU kernels: projections in, attended values out.

The logits of a window are small, but XLA writes them, and every rearrangement of heads before and
after them, to main memory. The kernels read queries, keys and values once, as the projections
give them, and write the result once. The backward pass computes the weights again. Where windows
are small several make one block of rows, and tokens of other windows are switched off.

Axes: G groups of windows; N queries and T keys of a group (fewer queries where they are pooled); C
channels of all heads.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from sss_jax.axes import Array, Float
from sss_jax.models import kernel_parts
from sss_jax.models.attention_kernel import (
    NN,
    NT,
    OFF,
    TN,
    Ref,
    largest_divisor,
    parameters,
    product,
)
from sss_jax.models.kernel_parts import TILE

ROWS = 128
"""Rows that a product of the matrix unit has at least, where windows can be grouped."""
BLOCK = 16 * 2**20
"""Most bytes of a block of windows that a kernel takes at once, all arrays together."""


Projections = tuple[Array, ...]
"""Queries, keys and values in one array, [G, N, 3C]; or [G, N, C] and [G, T, 2C]."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def attend(
    projections: Projections, heads: int, windows: int, interpret: bool = False
) -> Float[Array, "G N C"]:
    """Attention of the queries of each window to its keys.

    Args:
        projections: of groups of square windows that lie side by side, line by line; where there
            are several times as many keys as queries, each N of them lie like the queries.
        heads: attention heads.
        windows: windows in a group.
        interpret: run the kernels without a TPU.
    """
    q = projections[0]
    like = jax.ShapeDtypeStruct((*q.shape[:2], _width(projections)), q.dtype)
    (out,) = _call(_forward, projections, (), (like,), heads, windows, interpret)
    return out


def _width(projections: Projections) -> int:
    """Channels of all heads."""
    return sum(x.shape[-1] for x in projections) // 3


def _attend_forward(
    projections: Projections, heads: int, windows: int, interpret: bool
) -> tuple[Array, Projections]:
    return attend(projections, heads, windows, interpret), projections


def _attend_backward(
    heads: int, windows: int, interpret: bool, projections: Projections, bar_GNC: Array
) -> tuple[Projections]:
    return (_call(_backward, projections, (bar_GNC,), projections, heads, windows, interpret),)


attend.defvjp(_attend_forward, _attend_backward)


def _call(
    kernel: Any,
    projections: Projections,
    more: tuple[Array, ...],
    like: Sequence[Any],
    heads: int,
    windows: int,
    interpret: bool,
) -> tuple[Array, ...]:
    """Run a kernel over groups; its results have the shapes of `like`."""
    arrays = (*projections, *more)
    made: list[Any] = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in like]
    (groups, queries, _), tokens = projections[0].shape, projections[-1].shape[1]
    moved = sum(x.size * x.dtype.itemsize for x in (*arrays, *made))
    count = largest_divisor(groups, BLOCK * groups // moved)
    blocks = [pl.BlockSpec((count, *x.shape[1:]), lambda i: (i, 0, 0)) for x in (*arrays, *made)]
    logits = groups * queries * tokens
    products = 2 if kernel is _forward else 5
    found = pl.pallas_call(
        functools.partial(kernel, heads=heads, windows=windows),
        grid=(groups // count,),
        in_specs=blocks[: len(arrays)],
        out_specs=blocks[len(arrays) :],
        out_shape=made,
        compiler_params=parameters("parallel"),
        cost_estimate=kernel_parts.cost(
            products * logits * _width(projections), heads * logits, (*arrays, *made)
        ),
        interpret=interpret,
        name=f"window_attention{kernel.__name__}",
    )(*arrays)
    return tuple(found)


def group_of_windows(windows: int, queries: int, tokens: int) -> int:
    """How many of some windows make a group: as many as fill ROWS, and whole tiles.

    Args:
        windows: windows side by side.
        queries: of each.
        tokens: of each.
    """
    group = largest_divisor(windows, max(1, ROWS // tokens))
    return group if group * queries % TILE == 0 else 1


def _forward(*refs: Ref, heads: int, windows: int) -> None:
    *projections, out_ref = refs
    q_ref, kv_ref = projections[0], projections[-1]
    bias = others_off(q_ref.shape[1], kv_ref.shape[1], windows)

    def window(i: int, _: None) -> None:
        for head in range(heads):
            of_q, of_k, of_v = channels_of(head, heads, out_ref.shape[-1], kv_ref.shape[-1])
            q, k, v = q_ref[i, :, of_q], kv_ref[i, :, of_k], kv_ref[i, :, of_v]
            weights = softmax(q, k, bias)
            out_ref[i, :, of_q] = product(weights.astype(v.dtype), v, NN).astype(out_ref.dtype)

    jax.lax.fori_loop(0, q_ref.shape[0], window, None)


def _backward(*refs: Ref, heads: int, windows: int) -> None:
    count = len(refs) // 2
    projections, bar_ref, bars = refs[:count], refs[count], refs[count + 1 :]
    q_ref, kv_ref, q_bar_ref, kv_bar_ref = projections[0], projections[-1], bars[0], bars[-1]
    bias = others_off(q_ref.shape[1], kv_ref.shape[1], windows)

    def window(i: int, _: None) -> None:
        for head in range(heads):
            of_q, of_k, of_v = channels_of(head, heads, bar_ref.shape[-1], kv_ref.shape[-1])
            q, k, v = q_ref[i, :, of_q], kv_ref[i, :, of_k], kv_ref[i, :, of_v]
            weights, bar = softmax(q, k, bias), bar_ref[i, :, of_q]
            lean = product(bar, v, NT)
            lean = weights * (lean - jnp.sum(weights * lean, axis=1, keepdims=True))
            logits_bar = (lean * q.shape[-1] ** -0.5).astype(q.dtype)
            q_bar_ref[i, :, of_q] = product(logits_bar, k, NN).astype(q_bar_ref.dtype)
            kv_bar_ref[i, :, of_k] = product(logits_bar, q, TN).astype(kv_bar_ref.dtype)
            v_bar = product(weights.astype(bar.dtype), bar, TN)
            kv_bar_ref[i, :, of_v] = v_bar.astype(kv_bar_ref.dtype)

    jax.lax.fori_loop(0, q_ref.shape[0], window, None)


def channels_of(head: int, heads: int, width: int, held: int) -> tuple[Any, Any, Any]:
    """Where queries, keys and values of a head lie; keys and values end the `held` channels."""
    d = width // heads
    first = held - 2 * width
    of_q, of_k, of_v = (pl.ds(start + head * d, d) for start in (0, first, first + width))
    return of_q, of_k, of_v


def softmax(q: Array, k: Array, bias: Array | None) -> Array:
    """Attention weights of the queries, [N, T], float32; `bias` is added to the logits."""
    logits = product(q, k, NT) * q.shape[-1] ** -0.5
    logits = logits if bias is None else logits + bias
    weights = jnp.exp(logits - logits.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True)


def others_off(queries: int, keys: int, windows: int) -> Array | None:
    """Added to the logits of a group: 0 inside a window; None where the group is one window."""
    if windows == 1:
        return None
    side = math.isqrt(queries // windows)
    window_of = [
        jax.lax.div(jax.lax.rem(row, jnp.int32(windows * side)), jnp.int32(side))
        for row in (jax.lax.broadcasted_iota(jnp.int32, (queries, keys), axis) for axis in range(2))
    ]
    return jnp.where(window_of[0] == window_of[1], 0.0, OFF)
