"""Attention of a trunk's block inside windows as two TPU kernels: tokens in, tokens out.

LayerNorm, the projection to queries, keys and values, pooling, attention, the projection behind it
and the shortcut are one kernel: what is three times as wide as the tokens never reaches main
memory. The backward kernel computes all of it again and sums the gradients of the parameters while
it walks over the windows.

Axes: G groups of windows; N tokens of a group, n of them left where it pools; C channels that come
in, D that go out.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from sss_jax.axes import Array, Float
from sss_jax.models import kernel_parts, window_kernel
from sss_jax.models.attention_kernel import (
    CORE_MEMORY,
    LANES,
    NN,
    NT,
    TN,
    Ref,
    largest_divisor,
    parameters,
    product,
)
from sss_jax.models.kernel_parts import CORES, TILE, sum_rows, wide
from sss_jax.models.layers import padded_size

BLOCK = 2 * 2**20
"""Most bytes of an array that come from main memory at once, where a group is not larger."""


class Weights(NamedTuple):
    """Parameters of LayerNorm, of the projections around attention, and of the shortcut's."""

    scale_C: Float[Array, " C"]
    shift_C: Float[Array, " C"]
    qkv_CE: Float[Array, "C 3*D"]
    qkv_bias_E: Float[Array, " 3*D"]
    proj_DD: Float[Array, "D D"]
    proj_bias_D: Float[Array, " D"]
    short_CD: Float[Array, "C D"] | None = None
    short_bias_D: Float[Array, " D"] | None = None


class Form(NamedTuple):
    """How windows lie, and what is computed in them.

    Attributes:
        side: of a window.
        windows: in a group, side by side.
        down: rows of windows that a map is cut into.
        across: groups in such a row.
        height: of the map; rows of windows behind it are padding.
        width: of the map.
        heads: attention heads.
        epsilon: added to LayerNorm's variance.
        pool: keep the maxima of 2 x 2 queries; the shortcut is projected and pooled likewise.
    """

    side: int
    windows: int
    down: int
    across: int
    height: int
    width: int
    heads: int
    epsilon: float
    pool: bool


class _Scratch(NamedTuple):
    """What is known of one group, in a core's memory, in the tokens' type."""

    projected: Ref
    pooled: Ref
    attended: Ref
    projected_bar: Ref
    pooled_bar: Ref


def suits(tokens: int, channels: int, pool: bool, dtype: jnp.dtype) -> bool:
    """Whether parameters, gradients and a group of tokens fit a core; `channels` that go out.

    Where a group is pooled its corners must be whole tiles of tokens.
    """
    size = (tokens, channels, jnp.dtype(dtype).itemsize)
    fits = _held_bytes(*size) + 6 * _bytes(*size) <= CORE_MEMORY
    return fits and not (pool and tokens % (4 * TILE))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def attend(
    x_GNC: Float[Array, "G N C"], weights: Weights, form: Form, interpret: bool = False
) -> Float[Array, "G n D"]:
    """Add to every token what attention inside its window gives it.

    Tokens outside the map are zero once they are normalised, and keys all the same: SAM-2 was
    trained so. What is returned in their place means nothing. Products take numbers of the tokens'
    type; everything else is float32, as gradients of the weights are.

    Args:
        x_GNC: groups of windows, line by line through all windows of a group; where it pools, all
            first corners of cells of 2 x 2 in this order, then all second ones, and so on.
        weights: parameters, float32; those of the shortcut where it pools.
        form: how windows lie.
        interpret: run the kernels without a TPU.
    """
    (g, n, _), width = x_GNC.shape, weights.proj_bias_D.size
    count = _count(g, n, width, x_GNC.dtype)
    held = kernel_parts.held(weights, x_GNC.dtype)
    out = jax.ShapeDtypeStruct((g, n // 4 if form.pool else n, width), x_GNC.dtype)
    blocks = [pl.BlockSpec((count, *a.shape[1:]), lambda i: (i, 0, 0)) for a in (x_GNC, out)]
    y: Array = pl.pallas_call(
        functools.partial(_forward, form=form),
        grid=(g // count,),
        in_specs=[blocks[0], *map(kernel_parts.whole, held)],
        out_specs=blocks[1],
        out_shape=out,
        scratch_shapes=_scratch(n, out),
        compiler_params=parameters("parallel"),
        cost_estimate=_cost((1, 1, 2), form, x_GNC, out, (x_GNC, out, *held)),
        interpret=interpret,
        name="window_block_forward",
    )(x_GNC, *held)
    return y


def _attend_forward(
    x: Array, weights: Weights, form: Form, interpret: bool
) -> tuple[Array, tuple[Array, Weights]]:
    return attend(x, weights, form, interpret), (x, weights)


def _attend_backward(
    form: Form, interpret: bool, kept: tuple[Array, Weights], bar: Array
) -> tuple[Array, Weights]:
    x, weights = kept
    g, n, _ = x.shape
    count = _count(g, n, bar.shape[2], x.dtype)
    held = kernel_parts.held(weights, x.dtype)
    parts = CORES if g // count % CORES == 0 else 1
    steps = g // count // parts
    tokens = [
        pl.BlockSpec((count, *a.shape[1:]), lambda p, i: (p * steps + i, 0, 0)) for a in (x, bar)
    ]
    sums = kernel_parts.sums_of(held, parts)
    x_bar, *gradients = pl.pallas_call(
        functools.partial(_backward, form=form),
        grid=(parts, steps),
        in_specs=[*tokens, *map(kernel_parts.whole, held)],
        out_specs=[tokens[0], *map(kernel_parts.part, sums)],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype), *sums],
        scratch_shapes=_scratch(n, bar),
        compiler_params=parameters("parallel", "arbitrary"),
        cost_estimate=_cost((3, 2, 6), form, x, bar, (x, x, bar, *held, *sums)),
        interpret=interpret,
        name="window_block_backward",
    )(x, bar, *held)
    return x_bar, kernel_parts.added_up(gradients, weights)


attend.defvjp(_attend_forward, _attend_backward)


def _bytes(tokens: int, channels: int, itemsize: int) -> int:
    """Bytes of a group of tokens in a core's memory."""
    return itemsize * padded_size(tokens, TILE) * padded_size(channels, LANES)


def _held_bytes(tokens: int, channels: int, itemsize: int) -> int:
    """Parameters and gradients, twice, and what is in work of one group, in float32."""
    lanes = padded_size(channels, LANES)
    return 2 * (itemsize + 4) * 4 * channels * lanes + 4 * tokens * (16 * lanes + 6 * tokens)


def _count(groups: int, tokens: int, channels: int, dtype: jnp.dtype) -> int:
    """Groups that come from main memory at once."""
    size = (tokens, channels, jnp.dtype(dtype).itemsize)
    free = (CORE_MEMORY - _held_bytes(*size)) // 6
    return largest_divisor(groups, min(free, BLOCK) // _bytes(*size))


def _scratch(tokens: int, out: Any) -> list[Any]:
    _, left, width = out.shape
    projected, narrow = (tokens, 3 * width), (left, width)
    shapes = _Scratch(projected, narrow, narrow, projected, narrow)
    return [pltpu.VMEM(shape, out.dtype) for shape in shapes]


def _cost(
    times: tuple[int, int, int], form: Form, x: Array, out: Any, moved: Sequence[Any]
) -> pl.CostEstimate:
    """So many products with the matrices before attention, with that behind it, with logits.

    Logits between windows of a group are computed too.
    """
    (g, n, c), (_, left, width) = x.shape, out.shape
    sizes = (n * c * (4 if form.pool else 3), left * width, left * n)
    products = g * width * sum(a * b for a, b in zip(times, sizes, strict=True))
    return kernel_parts.cost(products, form.heads * g * left * n, moved)


def _forward(x_ref: Ref, *refs: Ref, form: Form) -> None:
    held, (out_ref, *scratch) = _split(refs, form)
    known, width = _Scratch(*scratch), out_ref.shape[-1]
    first = pl.program_id(0) * len(x_ref)

    def group(i: int, _: None) -> None:
        x = x_ref[i]
        token = _project(x, first + i, held, known, form)[2]
        for of_q, of_k, of_v in _heads(width, form):
            weights = _softmax(known, of_q, of_k, form)
            v = known.projected[:, of_v]
            known.attended[:, of_q] = product(weights.astype(v.dtype), v, NN).astype(x.dtype)
        y = product(known.attended[...], held.proj_DD[...], NN) + held.proj_bias_D[...]
        short = _maximum(_quarters(_shortcut(token, held))) if form.pool else wide(x)
        out_ref[i] = (short + y).astype(x.dtype)

    jax.lax.fori_loop(0, len(x_ref), group, None)


def _backward(x_ref: Ref, bar_ref: Ref, *refs: Ref, form: Form) -> None:
    held, (x_bar_ref, *rest) = _split(refs, form)
    sums, known = rest[: -len(_Scratch._fields)], _Scratch(*rest[-len(_Scratch._fields) :])
    bars: Ref = Weights(*(whole.at[0] for whole in sums))
    first = (pl.program_id(0) * pl.num_programs(1) + pl.program_id(1)) * len(x_ref)

    kernel_parts.clear_at(pl.program_id(1) == 0, sums)

    def group(i: int, _: None) -> None:
        x, bar = x_ref[i], bar_ref[i]
        normal, inverse, token = _project(x, first + i, held, known, form)
        _attention_backward(bar, held, bars, known, form)
        projected_bar = known.projected_bar[...]
        bars.qkv_CE[...] += product(token, projected_bar, TN)
        bars.qkv_bias_E[...] += sum_rows(projected_bar)
        token_bar = product(projected_bar, held.qkv_CE[...], NT)
        if form.pool:
            parts = _first_maxima(_quarters(_shortcut(token, held)), wide(bar))
            short_bar = jnp.concatenate(parts, axis=0).astype(x.dtype)
            bars.short_CD[...] += product(token, short_bar, TN)
            bars.short_bias_D[...] += sum_rows(short_bar)
            token_bar += product(short_bar, held.short_CD[...], NT)
        token_bar = _inside(token_bar, first + i, form)
        bars.scale_C[...] += sum_rows(token_bar * normal)
        bars.shift_C[...] += sum_rows(token_bar)
        x_bar = kernel_parts.normalise_backward(token_bar * held.scale_C[...], normal, inverse)
        x_bar_ref[i] = (x_bar if form.pool else x_bar + wide(bar)).astype(x.dtype)

    jax.lax.fori_loop(0, len(x_ref), group, None)


def _split(refs: tuple[Ref, ...], form: Form) -> tuple[Ref, tuple[Ref, ...]]:
    """Parameters, as `Weights`, and what follows."""
    number = 8 if form.pool else 6
    return Weights(*refs[:number]), refs[number:]


def _project(
    x: Array, group: Array, held: Ref, known: _Scratch, form: Form
) -> tuple[Array, Array, Array]:
    """Fill in queries, keys and values; return normal rows, their factor, and the tokens."""
    normal, inverse = kernel_parts.normalise(x, form.epsilon)
    token = normal * held.scale_C[...] + held.shift_C[...]
    token = _inside(token, group, form).astype(x.dtype)
    projected = product(token, held.qkv_CE[...], NN) + held.qkv_bias_E[...]
    known.projected[...] = projected.astype(x.dtype)
    if form.pool:
        known.pooled[...] = _maximum(_queries(known)).astype(x.dtype)
    return normal, inverse, token


def _attention_backward(bar: Array, held: Ref, bars: Ref, known: _Scratch, form: Form) -> None:
    """Fill in the gradients of queries, keys and values; add that of the projection behind."""
    dtype, width = bar.dtype, bar.shape[-1]
    known.attended[...] = product(bar, held.proj_DD[...], NT).astype(dtype)
    for of_q, of_k, of_v in _heads(width, form):
        q = _queries_of(known, of_q, form)
        k, v = known.projected[:, of_k], known.projected[:, of_v]
        y_bar = known.attended[:, of_q]
        weights = _softmax(known, of_q, of_k, form)
        short = weights.astype(dtype)
        # What attention gave takes the place of its gradient, which is read.
        known.attended[:, of_q] = product(short, v, NN).astype(dtype)
        lean = product(y_bar, v, NT)
        lean = weights * (lean - jnp.sum(weights * lean, axis=1, keepdims=True))
        logits_bar = (lean * q.shape[1] ** -0.5).astype(dtype)
        q_bar = known.pooled_bar if form.pool else known.projected_bar
        q_bar[:, of_q] = product(logits_bar, k, NN).astype(dtype)
        known.projected_bar[:, of_k] = product(logits_bar, q, TN).astype(dtype)
        known.projected_bar[:, of_v] = product(short, y_bar, TN).astype(dtype)
    if form.pool:
        parts = _first_maxima(_queries(known), wide(known.pooled_bar[...]))
        for i, part in enumerate(parts):
            known.projected_bar[i * len(bar) : (i + 1) * len(bar), :width] = part.astype(dtype)
    bars.proj_DD[...] += product(known.attended[...], bar, TN)
    bars.proj_bias_D[...] += sum_rows(bar)


def _heads(width: int, form: Form) -> list[Any]:
    """Where queries, keys and values of each head lie."""
    places = window_kernel.channels_of
    return [places(head, form.heads, width, 3 * width) for head in range(form.heads)]


def _queries_of(known: _Scratch, of_q: Any, form: Form) -> Array:
    q: Array = (known.pooled if form.pool else known.projected)[:, of_q]
    return q


def _softmax(known: _Scratch, of_q: Any, of_k: Any, form: Form) -> Array:
    q, k = _queries_of(known, of_q, form), known.projected[:, of_k]
    return window_kernel.softmax(q, k, window_kernel.others_off(len(q), len(k), form.windows))


def _shortcut(token: Array, held: Ref) -> Array:
    """Project the shortcut, rounded as what is compared."""
    short = product(token, held.short_CD[...], NN) + held.short_bias_D[...]
    return short.astype(token.dtype)


def _queries(known: _Scratch) -> list[Array]:
    """Queries by corner of their cells, float32."""
    left, width = known.pooled.shape
    return [wide(known.projected[i * left : (i + 1) * left, :width]) for i in range(4)]


def _quarters(x: Array) -> list[Array]:
    """Rows by corner of their cells, float32."""
    left = len(x) // 4
    return [wide(x[i * left : (i + 1) * left]) for i in range(4)]


def _maximum(parts: list[Array]) -> Array:
    return functools.reduce(jnp.maximum, parts)


def _first_maxima(parts: list[Array], bar: Array) -> list[Array]:
    """Hand a gradient to the first of the largest."""
    best = _maximum(parts)
    taken = jnp.zeros_like(bar)
    found = []
    for part in parts:
        mine = jnp.where(part == best, 1.0 - taken, 0.0)
        taken += mine
        found.append(mine * bar)
    return found


def _inside(x_NC: Array, group: Array, form: Form) -> Array:
    """Set tokens outside the map to zero."""
    line = form.windows * form.side
    if (form.down * form.side, form.across * line) == (form.height, form.width):
        return x_NC
    row = jax.lax.broadcasted_iota(jnp.int32, (len(x_NC), 1), 0)
    y, x = _places(row, line, len(x_NC) if form.pool else 0)
    y += jax.lax.rem(jax.lax.div(group, form.across), form.down) * form.side
    x += jax.lax.rem(group, form.across) * line
    return jnp.where((y < form.height) & (x < form.width), x_NC, 0.0)


def _places(row: Array, line: int, corners: int) -> tuple[Array, Array]:
    """Row and column inside a group of so many columns.

    Of tokens by corner, of which there are `corners`, those of their cell: a map has even sides.
    """
    over = lambda a, b: (jax.lax.div(a, jnp.int32(b)), jax.lax.rem(a, jnp.int32(b)))  # noqa: E731
    if not corners:
        return over(row, line)
    down, across = over(jax.lax.rem(row, jnp.int32(corners // 4)), line // 2)
    return 2 * down, 2 * across
