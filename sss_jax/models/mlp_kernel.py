"""A normalised MLP as two TPU kernels: tokens in, tokens out, nothing wider in main memory.

The hidden layer is four to eight times as wide as the tokens. XLA writes it, and the normalised
tokens, to main memory and reads them again for every product and every bias. The forward kernel
reads a token once and writes it once. The backward kernel computes the hidden layer again and sums
the gradients of all parameters while it walks over the tokens.

Axes: N tokens; C channels; H channels of the hidden layer.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from sss_jax.axes import Array, Float
from sss_jax.models import kernel_parts
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
from sss_jax.models.kernel_parts import CORES, ROWS, TILE, piece, sum_rows, wide
from sss_jax.models.layers import padded_size

BLOCK = 2048
"""Most tokens that come from main memory at once."""
HIDDEN = 512
"""Most channels of the hidden layer in work at once, where they divide."""


class Weights(NamedTuple):
    """Parameters of LayerNorm and of two linear layers."""

    scale_C: Float[Array, " C"]
    shift_C: Float[Array, " C"]
    first_CH: Float[Array, "C H"]
    first_bias_H: Float[Array, " H"]
    second_HC: Float[Array, "H C"]
    second_bias_C: Float[Array, " C"]


class Form(NamedTuple):
    """What is computed.

    Attributes:
        activation: returns the activations and, for the backward pass, their derivative.
        epsilon: added to LayerNorm's variance.
        shortcut: add the tokens to the result.
    """

    activation: Callable[[Array], tuple[Array, Array]]
    epsilon: float
    shortcut: bool


class _Cut(NamedTuple):
    """How the work is cut: blocks of tokens, rows of a block, channels of the hidden layer."""

    block: int
    rows: int
    hidden: int


def suits(tokens: int, width: int, hidden: int, dtype: jnp.dtype) -> bool:
    """Whether tokens divide into blocks for all cores, and parameters and gradients fit a core."""
    return tokens % (CORES * TILE) == 0 and _most_tokens(width, hidden, dtype) >= ROWS


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def transform(
    x_NC: Float[Array, "N C"], weights: Weights, form: Form, interpret: bool = False
) -> Float[Array, "N C"]:
    """Normalise tokens, transform each by two linear layers, and add it where `form` says so.

    Products take numbers of the tokens' type; everything else is float32, as gradients of the
    weights are.

    Args:
        x_NC: tokens; `suits` says which numbers of them.
        weights: parameters, float32.
        form: what is computed.
        interpret: run the kernels without a TPU.
    """
    (n, c), h = x_NC.shape, weights.first_bias_H.size
    cut = _cut(n, c, h, x_NC.dtype)
    held = kernel_parts.held(weights, x_NC.dtype)
    tokens = pl.BlockSpec((cut.block, c), lambda i: (i, 0))
    y: Array = pl.pallas_call(
        functools.partial(_forward, form=form, cut=cut),
        grid=(n // cut.block,),
        in_specs=[tokens, *map(kernel_parts.whole, held)],
        out_specs=tokens,
        out_shape=jax.ShapeDtypeStruct(x_NC.shape, x_NC.dtype),
        scratch_shapes=[pltpu.VMEM((cut.rows, c), jnp.float32)],
        compiler_params=parameters("parallel"),
        cost_estimate=kernel_parts.cost(2 * n * c * h, n * h, (x_NC, x_NC, *held)),
        interpret=interpret,
        name="mlp_forward",
    )(x_NC, *held)
    return y


def _transform_forward(
    x: Array, weights: Weights, form: Form, interpret: bool
) -> tuple[Array, tuple[Array, Weights]]:
    return transform(x, weights, form, interpret), (x, weights)


def _transform_backward(
    form: Form, interpret: bool, kept: tuple[Array, Weights], bar: Array
) -> tuple[Array, Weights]:
    x, weights = kept
    (n, c), h = x.shape, weights.first_bias_H.size
    cut = _cut(n, c, h, x.dtype)
    held = kernel_parts.held(weights, x.dtype)
    steps = n // cut.block // CORES
    tokens = pl.BlockSpec((cut.block, c), lambda p, i: (p * steps + i, 0))
    sums = kernel_parts.sums_of(held, CORES)
    x_bar, *gradients = pl.pallas_call(
        functools.partial(_backward, form=form, cut=cut),
        grid=(CORES, steps),
        in_specs=[tokens, tokens, *map(kernel_parts.whole, held)],
        out_specs=[tokens, *map(kernel_parts.part, sums)],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype), *sums],
        scratch_shapes=[pltpu.VMEM((cut.rows, c), jnp.float32)],
        compiler_params=parameters("parallel", "arbitrary"),
        cost_estimate=kernel_parts.cost(5 * n * c * h, 2 * n * h, (x, x, x, *held, *sums)),
        interpret=interpret,
        name="mlp_backward",
    )(x, bar, *held)
    return x_bar, kernel_parts.added_up(gradients, weights)


transform.defvjp(_transform_forward, _transform_backward)


def _cut(tokens: int, width: int, hidden: int, dtype: jnp.dtype) -> _Cut:
    block, rows = kernel_parts.cut_tokens(tokens, _most_tokens(width, hidden, dtype), CORES)
    whole = hidden % LANES or hidden <= HIDDEN
    lanes = hidden if whole else LANES * largest_divisor(hidden // LANES, HIDDEN // LANES)
    return _Cut(block, rows, lanes)


def _most_tokens(width: int, hidden: int, dtype: jnp.dtype) -> int:
    """Tokens of a block beside which the backward kernel's parameters and gradients fit."""
    lanes = padded_size(width, LANES)
    # Twice, because the next block comes while one is in work: two matrices, their gradients in
    # float32, and three arrays of tokens.
    itemsize = jnp.dtype(dtype).itemsize
    weights = 2 * (itemsize + 4) * 2 * lanes * hidden
    work = ROWS * 4 * (8 * lanes + 8 * max(HIDDEN, LANES))
    free = CORE_MEMORY - weights - work
    return max(0, min(BLOCK, free // (2 * 3 * itemsize * lanes)))


def _forward(
    x_ref: Ref,
    scale_ref: Ref,
    shift_ref: Ref,
    first_ref: Ref,
    first_bias_ref: Ref,
    second_ref: Ref,
    second_bias_ref: Ref,
    y_ref: Ref,
    sum_ref: Ref,
    *,
    form: Form,
    cut: _Cut,
) -> None:
    def some(number: int, _: None) -> None:
        here = piece(number, cut.rows)
        x = x_ref[here]
        normal = kernel_parts.normalise(x, form.epsilon)[0]
        token = (normal * scale_ref[...] + shift_ref[...]).astype(x.dtype)
        y = jnp.broadcast_to(second_bias_ref[...], x.shape)
        sum_ref[...] = y + wide(x) if form.shortcut else y

        def some_hidden(number: int, _: None) -> None:
            lanes = piece(number, cut.hidden)
            h = product(token, first_ref[:, lanes], NN) + first_bias_ref[:, lanes]
            active = form.activation(h)[0].astype(x.dtype)
            sum_ref[...] += product(active, second_ref[lanes], NN)

        jax.lax.fori_loop(0, first_ref.shape[1] // cut.hidden, some_hidden, None)
        y_ref[here] = sum_ref[...].astype(x.dtype)

    jax.lax.fori_loop(0, cut.block // cut.rows, some, None)


def _backward(
    x_ref: Ref,
    bar_ref: Ref,
    scale_ref: Ref,
    shift_ref: Ref,
    first_ref: Ref,
    first_bias_ref: Ref,
    second_ref: Ref,
    second_bias_ref: Ref,
    x_bar_ref: Ref,
    *rest: Ref,
    form: Form,
    cut: _Cut,
) -> None:
    *sums, token_bar_ref = rest
    scale_bar, shift_bar, first_bar, first_bias_bar, second_bar, second_bias_bar = (
        whole.at[0] for whole in sums
    )

    kernel_parts.clear_at(pl.program_id(1) == 0, sums)

    def some(number: int, _: None) -> None:
        here = piece(number, cut.rows)
        x, bar = x_ref[here], bar_ref[here]
        normal, inverse = kernel_parts.normalise(x, form.epsilon)
        token = (normal * scale_ref[...] + shift_ref[...]).astype(x.dtype)
        token_bar_ref[...] = jnp.zeros_like(token_bar_ref)

        def some_hidden(number: int, _: None) -> None:
            lanes = piece(number, cut.hidden)
            h = product(token, first_ref[:, lanes], NN) + first_bias_ref[:, lanes]
            active, slope = form.activation(h)
            second_bar[lanes] += product(active.astype(x.dtype), bar, TN)
            h_bar = product(bar, second_ref[lanes], NT) * slope
            first_bias_bar[:, lanes] += sum_rows(h_bar)
            h_bar = h_bar.astype(x.dtype)
            first_bar[:, lanes] += product(token, h_bar, TN)
            token_bar_ref[...] += product(h_bar, first_ref[:, lanes], NT)

        jax.lax.fori_loop(0, first_ref.shape[1] // cut.hidden, some_hidden, None)
        token_bar = token_bar_ref[...]
        second_bias_bar[...] += sum_rows(bar)
        scale_bar[...] += sum_rows(token_bar * normal)
        shift_bar[...] += sum_rows(token_bar)
        x_bar = kernel_parts.normalise_backward(token_bar * scale_ref[...], normal, inverse)
        x_bar_ref[here] = (x_bar + wide(bar) if form.shortcut else x_bar).astype(x.dtype)

    jax.lax.fori_loop(0, cut.block // cut.rows, some, None)
