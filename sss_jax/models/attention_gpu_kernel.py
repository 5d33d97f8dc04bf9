"""Attention as GPU kernels that never write logits to main memory.

Source: FlashAttention-2 (Dao 2023): the softmax runs along with the blocks of keys, and the
backward pass computes the weights again from the logarithm of their sums, once for the gradient of
the queries and once for those of keys and values. No sum depends on the order in which blocks
finish, so results are the same every time.

Written for Triton through Pallas, which compiles it for GPUs from NVIDIA's Ampere on. Axes as in
`attention_kernel`: G heads of all objects and images; N queries; M keys; D channels of both; E of
the values.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from sss_jax.axes import Array, Float
from sss_jax.models.attention_kernel import NN, NT, OFF, Ref, product

CAPABILITIES = ("8.0", "9.0")
"""Compute capabilities whose cores have the memory for the blocks: A100, H100 and H200."""
WIDEST = 256
"""Most channels: a block of them stays in the registers."""
_NARROWEST = 16


class Blocks(NamedTuple):
    """How a kernel is cut: queries and keys of a block, threads by 32, loads in flight."""

    queries: int
    keys: int
    warps: int = 8
    stages: int = 2


# As large as registers and shared memory allow, by the wider one of D and E.
FORWARD = {128: Blocks(128, 64), 256: Blocks(128, 32)}
BACKWARD_QUERIES = {128: Blocks(128, 64), 256: Blocks(64, 32)}
BACKWARD_KEYS = {128: Blocks(64, 64), 256: Blocks(32, 64)}
_LARGEST = 128
"""What every block divides."""


def suits(queries: int, channels: int, values: int, dtype: jnp.dtype) -> bool:
    """Whether blocks divide the queries and fit the registers; float32 numbers do not."""
    small = max(channels, values) <= WIDEST and jnp.dtype(dtype).itemsize == 2
    return small and queries % _LARGEST == 0


def forward(
    q: Float[Array, "G N D"],
    k: Float[Array, "G M D"],
    v: Float[Array, "G M E"],
    bias: Float[Array, "G M"],
    interpret: bool = False,
) -> tuple[Float[Array, "G N E"], Float[Array, "G N"]]:
    """Return attention of scaled queries and the logarithm of the sum of each one's weights.

    `bias` is as in `attention_kernel.forward`. `interpret` runs the kernel without a GPU.
    """
    wide, (q, k, v, bias) = v.shape[-1], _padded(q, k, v, bias)
    (g, n, d), m, e = q.shape, k.shape[1], v.shape[2]
    blocks = _of(FORWARD, d, e)
    out, lse = pl.pallas_call(
        functools.partial(_forward, keys=blocks.keys),
        grid=(n // blocks.queries, g),
        in_specs=[_block(blocks.queries, d), _whole(m, d), _whole(m, e), _whole(m)],
        out_specs=[_block(blocks.queries, e), _block(blocks.queries)],
        out_shape=[
            jax.ShapeDtypeStruct((g, n, e), v.dtype),
            jax.ShapeDtypeStruct((g, n), jnp.float32),
        ],
        compiler_params=_parameters(blocks),
        cost_estimate=_cost((q, k, v), d + e),
        interpret=interpret,
        name="attention_forward",
    )(q, k, v, bias)
    return out[..., :wide], lse


def _forward(
    q_ref: Ref, k_ref: Ref, v_ref: Ref, bias_ref: Ref, out_ref: Ref, lse_ref: Ref, *, keys: int
) -> None:
    """All keys, block after block, for one block of queries."""
    q = q_ref[...]

    def turn(j: Array, known: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        before, sums, total = known
        here = pl.ds(j * keys, keys)
        logits = product(q, k_ref[here, :], NT) + bias_ref[here][None]
        top = jnp.maximum(before, logits.max(axis=1))
        weights, fade = jnp.exp(logits - top[:, None]), jnp.exp(before - top)
        seen = product(weights.astype(v_ref.dtype), v_ref[here, :], NN)
        return top, sums * fade + weights.sum(axis=1), total * fade[:, None] + seen

    top = jnp.full(q.shape[0], -jnp.inf, jnp.float32)
    nothing = top, jnp.zeros_like(top), jnp.zeros(out_ref.shape, jnp.float32)
    top, sums, total = jax.lax.fori_loop(0, k_ref.shape[0] // keys, turn, nothing)
    out_ref[...] = (total / sums[:, None]).astype(out_ref.dtype)
    lse_ref[...] = top + jnp.log(sums)


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
    length, widths = k.shape[1], (k.shape[2], v.shape[2])
    q, k, v, bias = _padded(q, k, v, bias)
    arrays = q, k, v, bias, lse, shift, _widened(out_bar, v.shape[2])
    q_bar = _gradient_of_queries(arrays, interpret)[..., : widths[0]]
    bars = _gradients_of_keys(arrays, interpret)
    k_bar, v_bar = (x[:, :length, :width] for x, width in zip(bars, widths, strict=True))
    return q_bar, k_bar, v_bar


def _gradient_of_queries(arrays: tuple[Array, ...], interpret: bool) -> Array:
    q, k, v, *_, out_bar = arrays
    (g, n, d), m, e = q.shape, k.shape[1], v.shape[2]
    blocks = _of(BACKWARD_QUERIES, d, e)
    return pl.pallas_call(
        functools.partial(_queries_backward, keys=blocks.keys),
        grid=(n // blocks.queries, g),
        in_specs=[
            *(_block(blocks.queries, d), _whole(m, d), _whole(m, e), _whole(m)),
            *(_block(blocks.queries), _block(blocks.queries), _block(blocks.queries, e)),
        ],
        out_specs=_block(blocks.queries, d),
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        compiler_params=_parameters(blocks),
        cost_estimate=_cost((q, k, v, out_bar), 2 * d + e),
        interpret=interpret,
        name="attention_backward_queries",
    )(*arrays)


def _queries_backward(
    q_ref: Ref,
    k_ref: Ref,
    v_ref: Ref,
    bias_ref: Ref,
    lse_ref: Ref,
    shift_ref: Ref,
    out_bar_ref: Ref,
    q_bar_ref: Ref,
    *,
    keys: int,
) -> None:
    """All keys, block after block, for one block of queries."""
    q, out_bar = q_ref[...], out_bar_ref[...]
    lse, shift = lse_ref[...][:, None], shift_ref[...][:, None]

    def turn(j: Array, total: Array) -> Array:
        here = pl.ds(j * keys, keys)
        k = k_ref[here, :]
        weights = jnp.exp(product(q, k, NT) + bias_ref[here][None] - lse)
        logits_bar = weights * (product(out_bar, v_ref[here, :], NT) - shift)
        return total + product(logits_bar.astype(k.dtype), k, NN)

    nothing = jnp.zeros(q.shape, jnp.float32)
    total = jax.lax.fori_loop(0, k_ref.shape[0] // keys, turn, nothing)
    q_bar_ref[...] = total.astype(q_bar_ref.dtype)


def _gradients_of_keys(arrays: tuple[Array, ...], interpret: bool) -> tuple[Array, Array]:
    q, k, v, *_, out_bar = arrays
    (g, n, d), m, e = q.shape, k.shape[1], v.shape[2]
    blocks = _of(BACKWARD_KEYS, d, e)
    return pl.pallas_call(
        functools.partial(_keys_backward, queries=blocks.queries),
        grid=(m // blocks.keys, g),
        in_specs=[
            *(_whole(n, d), _block(blocks.keys, d), _block(blocks.keys, e), _block(blocks.keys)),
            *(_whole(n), _whole(n), _whole(n, e)),
        ],
        out_specs=[_block(blocks.keys, d), _block(blocks.keys, e)],
        out_shape=tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (k, v)),
        compiler_params=_parameters(blocks),
        cost_estimate=_cost((q, k, v, out_bar), 2 * d + 2 * e),
        interpret=interpret,
        name="attention_backward_keys",
    )(*arrays)


def _keys_backward(
    q_ref: Ref,
    k_ref: Ref,
    v_ref: Ref,
    bias_ref: Ref,
    lse_ref: Ref,
    shift_ref: Ref,
    out_bar_ref: Ref,
    k_bar_ref: Ref,
    v_bar_ref: Ref,
    *,
    queries: int,
) -> None:
    """All queries, block after block, for one block of keys, which lie along the rows."""
    k, v, bias = k_ref[...], v_ref[...], bias_ref[...][:, None]

    def turn(i: Array, totals: tuple[Array, Array]) -> tuple[Array, Array]:
        here = pl.ds(i * queries, queries)
        q, out_bar = q_ref[here, :], out_bar_ref[here, :]
        weights = jnp.exp(product(k, q, NT) + bias - lse_ref[here][None])
        v_total = totals[1] + product(weights.astype(v.dtype), out_bar, NN)
        logits_bar = weights * (product(v, out_bar, NT) - shift_ref[here][None])
        return totals[0] + product(logits_bar.astype(q.dtype), q, NN), v_total

    nothing = tuple(jnp.zeros(x.shape, jnp.float32) for x in (k, v))
    totals = jax.lax.fori_loop(0, q_ref.shape[0] // queries, turn, nothing)
    k_bar_ref[...] = totals[0].astype(k_bar_ref.dtype)
    v_bar_ref[...] = totals[1].astype(v_bar_ref.dtype)


def _padded(q: Array, k: Array, v: Array, bias: Array) -> tuple[Array, Array, Array, Array]:
    """Widen channels to powers of two, which Triton wants, and fill the last block of keys."""
    missing = -k.shape[1] % _LARGEST
    fill = functools.partial(jnp.pad, pad_width=((0, 0), (0, missing), (0, 0)))
    d, e = (max(pl.next_power_of_2(x.shape[-1]), _NARROWEST) for x in (k, v))
    bias = jnp.pad(bias, ((0, 0), (0, missing)), constant_values=OFF)
    return _widened(q, d), _widened(fill(k), d), _widened(fill(v), e), bias


def _widened(x: Array, channels: int) -> Array:
    return jnp.pad(x, ((0, 0), (0, 0), (0, channels - x.shape[-1])))


def _block(*shape: int) -> pl.BlockSpec:
    """The block of rows that a place in the grid works on, of one G."""
    return pl.BlockSpec((None, *shape), lambda i, g: (g, i, 0)[: len(shape) + 1])


def _whole(*shape: int) -> pl.BlockSpec:
    """All rows of one G."""
    return pl.BlockSpec((None, *shape), lambda i, g: (g, 0, 0)[: len(shape) + 1])


def _of(sizes: dict[int, Blocks], *channels: int) -> Blocks:
    return sizes[max(*channels, min(sizes))]


def _parameters(blocks: Blocks) -> plgpu.CompilerParams:
    return plgpu.CompilerParams(num_warps=blocks.warps, num_stages=blocks.stages)


def _cost(arrays: tuple[Array, ...], channels: int) -> pl.CostEstimate:
    """Products of so many channels for every logit; what is read again is in the cache."""
    (g, n, _), m = arrays[0].shape, arrays[1].shape[1]
    return pl.CostEstimate(
        flops=2 * g * n * m * channels,
        transcendentals=g * n * m,
        bytes_accessed=sum(x.size * x.dtype.itemsize for x in arrays),
    )
