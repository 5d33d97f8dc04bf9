"""Attention as two TPU kernels, forward and backward, that never write logits to main memory.

Source: FlashAttention (Dao et al. 2022) and FlashAttention-2 (Dao 2023): the softmax runs along
with the blocks of keys, and the backward pass computes the weights again from the logarithm of
their sums. Differs from the paper: one backward kernel instead of two. It walks over keys, then
over queries, and keeps the gradient of all queries of a head in the core's own memory (4 MiB for
4,096 queries of 256 channels), so that logits are computed once per pass and not twice.

Axes: G heads of all objects and images; N queries; M keys; D channels of both; E of the values.
"""

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from sss_jax.axes import Array, Float
from sss_jax.models.layers import padded_size

Ref = Any
"""Part of an array, or scratch, in a core's memory."""

LANES = 128
QUERIES = 512
"""Queries per block."""
KEYS = 1024
"""Most keys per block."""
CORE_MEMORY = 48 * 2**20
"""Bytes of a core's memory that a kernel may take; the smallest of the chips has 64 MiB."""

OFF = -1e30  # added to the logit of a key that is switched off
NN = (((1,), (0,)), ((), ()))  # x @ y
NT = (((1,), (1,)), ((), ()))  # x @ y.T
TN = (((0,), (0,)), ((), ()))  # x.T @ y
_PER_BLOCK = 64  # what a block costs beside its products, as keys


def suits(queries: int, channels: int) -> bool:
    """Whether queries divide into blocks and their gradient fits the core's memory."""
    return queries % LANES == 0 and 8 * queries * max(channels, LANES) <= CORE_MEMORY // 2


def forward(
    q: Float[Array, "G N D"],
    k: Float[Array, "G M D"],
    v: Float[Array, "G M E"],
    bias: Float[Array, "G M"],
    interpret: bool = False,
) -> tuple[Float[Array, "G N E"], Float[Array, "G N"]]:
    """Return attention of scaled queries and the logarithm of the sum of each one's weights.

    `bias` is added to the logits of a key: 0, or -1e30 to switch it off. At least one key of every
    G must be on. N is a multiple of 128. `interpret` runs the kernel without a TPU.
    """
    k, v, bias, keys = _whole_blocks(k, v, bias)
    (g, n, d), m, e = q.shape, k.shape[1], v.shape[2]
    queries = LANES * largest_divisor(n // LANES, QUERIES // LANES)
    by_query = pl.BlockSpec((1, queries, d), lambda g, i, j: (g, i, 0))
    out, lse = pl.pallas_call(
        _forward,
        grid=(g, n // queries, m // keys),
        in_specs=[
            by_query,
            pl.BlockSpec((1, keys, d), lambda g, i, j: (g, j, 0)),
            pl.BlockSpec((1, keys, e), lambda g, i, j: (g, j, 0)),
            pl.BlockSpec((1, 1, keys), lambda g, i, j: (g, 0, j)),
        ],
        out_specs=[
            pl.BlockSpec((1, queries, e), lambda g, i, j: (g, i, 0)),
            pl.BlockSpec((1, 1, queries), lambda g, i, j: (g, 0, i)),
        ],
        out_shape=[
            jax.ShapeDtypeStruct((g, n, e), v.dtype),
            jax.ShapeDtypeStruct((g, 1, n), jnp.float32),
        ],
        scratch_shapes=[
            pltpu.VMEM((queries, LANES), jnp.float32),
            pltpu.VMEM((queries, LANES), jnp.float32),
            pltpu.VMEM((queries, e), jnp.float32),
        ],
        compiler_params=parameters("parallel", "parallel", "arbitrary"),
        cost_estimate=pl.CostEstimate(
            flops=2 * g * n * m * (d + e),
            transcendentals=g * n * m,
            # Every block of queries reads all keys again.
            bytes_accessed=g * (n + n // queries * m) * (d + e) * q.dtype.itemsize,
        ),
        interpret=interpret,
        name="attention_forward",
    )(q, k, v, bias[:, None])
    return out, lse[:, 0]


def _forward(
    q_ref: Ref,
    k_ref: Ref,
    v_ref: Ref,
    bias_ref: Ref,
    out_ref: Ref,
    lse_ref: Ref,
    top_ref: Ref,
    sum_ref: Ref,
    total_ref: Ref,
) -> None:
    """One block of keys for one block of queries; the scratch carries what is known so far."""
    block = pl.program_id(2)

    @pl.when(block == 0)
    def _() -> None:
        top_ref[...] = jnp.full_like(top_ref, -jnp.inf)
        sum_ref[...] = jnp.zeros_like(sum_ref)
        total_ref[...] = jnp.zeros_like(total_ref)

    logits = product(q_ref[0], k_ref[0], NT) + bias_ref[0]
    before = top_ref[:, :1]
    top = jnp.maximum(before, logits.max(axis=1, keepdims=True))
    weights, fade = jnp.exp(logits - top), jnp.exp(before - top)
    sums = sum_ref[:, :1] * fade + weights.sum(axis=1, keepdims=True)
    total_ref[...] = total_ref[...] * fade + product(weights.astype(v_ref.dtype), v_ref[0], NN)
    top_ref[...] = jnp.broadcast_to(top, top_ref.shape)
    sum_ref[...] = jnp.broadcast_to(sums, sum_ref.shape)

    @pl.when(block == pl.num_programs(2) - 1)
    def _() -> None:
        out_ref[0] = (total_ref[...] / sum_ref[:, :1]).astype(out_ref.dtype)
        lse_ref[0] = (top_ref[...] + jnp.log(sum_ref[...])).T[:1]


def backward(
    q: Float[Array, "G N D"],
    k: Float[Array, "G M D"],
    v: Float[Array, "G M E"],
    bias: Float[Array, "G M"],
    lse: Float[Array, "G N"],
    shift: Float[Array, "G N"],
    out_bar: Float[Array, "G N E"],
    interpret: bool = False,
) -> tuple[Float[Array, "G N D"], Float[Array, "G M D"], Float[Array, "G M E"]]:
    """Return the gradients of q, k and v.

    `lse` is what `forward` returned, `shift` the sum of output times its gradient per query.
    """
    length = k.shape[1]
    k, v, bias, keys = _whole_blocks(k, v, bias)
    (g, n, d), m, e = q.shape, k.shape[1], v.shape[2]
    queries = LANES * largest_divisor(n // LANES, QUERIES // LANES)
    row = pl.BlockSpec((1, 1, queries), lambda g, j, i: (g, 0, i))
    by_query = [pl.BlockSpec((1, queries, w), lambda g, j, i: (g, i, 0)) for w in (d, e)]
    by_key = [pl.BlockSpec((1, keys, w), lambda g, j, i: (g, j, 0)) for w in (d, e)]
    q_bar, k_bar, v_bar = pl.pallas_call(
        _backward,
        grid=(g, m // keys, n // queries),
        in_specs=[
            by_query[0],
            *by_key,
            pl.BlockSpec((1, 1, keys), lambda g, j, i: (g, 0, j)),
            row,
            row,
            by_query[1],
        ],
        out_specs=[pl.BlockSpec((1, n, d), lambda g, j, i: (g, 0, 0)), *by_key],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, k, v)],
        scratch_shapes=[
            pltpu.VMEM((n, d), jnp.float32),
            pltpu.VMEM((keys, d), jnp.float32),
            pltpu.VMEM((keys, e), jnp.float32),
            pltpu.VMEM((keys, LANES), jnp.float32),
        ],
        compiler_params=parameters("parallel", "arbitrary", "arbitrary"),
        cost_estimate=pl.CostEstimate(
            flops=2 * g * n * m * (3 * d + 2 * e),
            transcendentals=g * n * m,
            # Every block of keys reads all queries again.
            bytes_accessed=g
            * (m // keys * n * (d + e) + n * d + 2 * m * (d + e))
            * q.dtype.itemsize,
        ),
        interpret=interpret,
        name="attention_backward",
    )(q, k, v, bias[:, None], lse[:, None], shift[:, None], out_bar)
    return q_bar, k_bar[:, :length], v_bar[:, :length]


def _backward(
    q_ref: Ref,
    k_ref: Ref,
    v_ref: Ref,
    bias_ref: Ref,
    lse_ref: Ref,
    shift_ref: Ref,
    out_bar_ref: Ref,
    q_bar_ref: Ref,
    k_bar_ref: Ref,
    v_bar_ref: Ref,
    q_sum_ref: Ref,
    k_sum_ref: Ref,
    v_sum_ref: Ref,
    bias_column_ref: Ref,
) -> None:
    """One block of queries for one block of keys; logits lie with queries along the lanes."""
    j, i = pl.program_id(1), pl.program_id(2)

    @pl.when(i == 0)
    def _() -> None:
        k_sum_ref[...] = jnp.zeros_like(k_sum_ref)
        v_sum_ref[...] = jnp.zeros_like(v_sum_ref)
        rows = jnp.broadcast_to(bias_ref[0], bias_column_ref.shape[::-1])
        bias_column_ref[...] = rows.T

    q, k, v, out_bar = q_ref[0], k_ref[0], v_ref[0], out_bar_ref[0]
    logits = product(k, q, NT) + bias_column_ref[:, :1]
    weights = jnp.exp(logits - lse_ref[0])
    v_sum_ref[...] += product(weights.astype(v.dtype), out_bar, NN)
    logits_bar = (weights * (product(v, out_bar, NT) - shift_ref[0])).astype(q.dtype)
    k_sum_ref[...] += product(logits_bar, q, NN)
    here = pl.ds(pl.multiple_of(i * q.shape[0], q.shape[0]), q.shape[0])
    part = product(logits_bar, k, TN)

    @pl.when(j == 0)
    def _() -> None:
        q_sum_ref[here] = part

    @pl.when(j > 0)
    def _() -> None:
        q_sum_ref[here] += part

    @pl.when(i == pl.num_programs(2) - 1)
    def _() -> None:
        k_bar_ref[0] = k_sum_ref[...].astype(k_bar_ref.dtype)
        v_bar_ref[0] = v_sum_ref[...].astype(v_bar_ref.dtype)

    @pl.when(j == pl.num_programs(1) - 1)
    def _() -> None:
        q_bar_ref[0, here] = q_sum_ref[here].astype(q_bar_ref.dtype)


def product(x: Array, y: Array, dims: jax.lax.DotDimensionNumbers) -> Array:
    """Product of two matrices, summed in float32.

    A compiler that is asked for more than bfloat16 numbers hold refuses; float32 numbers are
    multiplied as `jax_default_matmul_precision` says.
    """
    exact = jax.lax.Precision.DEFAULT if x.dtype == jnp.bfloat16 else None
    return jax.lax.dot_general(x, y, dims, precision=exact, preferred_element_type=jnp.float32)


def _whole_blocks(k: Array, v: Array, bias: Array) -> tuple[Array, Array, Array, int]:
    """Add keys that are off until blocks of keys, the returned number, divide them."""
    keys = block_of_keys(k.shape[1])
    missing = -k.shape[1] % keys
    pad = functools.partial(jnp.pad, pad_width=((0, 0), (0, missing), (0, 0)))
    return pad(k), pad(v), jnp.pad(bias, ((0, 0), (0, missing)), constant_values=OFF), keys


def block_of_keys(keys: int) -> int:
    """Keys per block: few blocks, and few keys added to fill the last one."""
    most = min(KEYS, padded_size(keys, LANES))
    sizes = range(LANES, most + 1, LANES)
    return min(sizes, key=lambda size: -(-keys // size) * (size + _PER_BLOCK))


def largest_divisor(number: int, most: int) -> int:
    """Return the largest divisor that is not above `most`, at least 1."""
    return max(n for n in range(1, max(min(number, most), 1) + 1) if number % n == 0)


def parameters(*order: Literal["parallel", "arbitrary"]) -> pltpu.CompilerParams:
    """Which axes of the grid cores may share, and the memory that they may take."""
    return pltpu.CompilerParams(dimension_semantics=order, vmem_limit_bytes=CORE_MEMORY)
