"""A linear layer with what surrounds it as two TPU kernels.

Before it LayerNorm, behind it rotary positions, heads in arrays of their own, or the sum with a
shortcut: left to XLA each of these is a pass over main memory, and the gradients of kernel, bias
and tokens read the same array three times. These kernels read and write every token once.

Axes: H heads of the tokens, h of the results; M maps; N tokens of a map; C channels of a head, E
channels that go out, of all heads and results together.
"""

import functools
import itertools
from typing import Any, NamedTuple

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
    parameters,
    product,
)
from sss_jax.models.kernel_parts import CORES, piece, sum_rows, wide
from sss_jax.models.layers import padded_size

BLOCK = 4 * 2**20
"""Most bytes of a block of tokens and results in float32."""

Table = tuple[Float[Array, "N half"], Float[Array, "N half"]]
"""Cosines and sines of the angle that each pair of channels turns by."""


class Weights(NamedTuple):
    """Parameters of a linear layer, and of the LayerNorm before it if there is one."""

    kernel_CE: Float[Array, "H*C E"]
    bias_E: Float[Array, " E"]
    scale_C: Float[Array, " C"] | None = None
    shift_C: Float[Array, " C"] | None = None


class Form(NamedTuple):
    """What is computed.

    Attributes:
        results: number of results, which share the channels that go out.
        heads: of every result.
        turned: how many of the results turn with the position; they have one head.
        through: return the tokens too, so that the gradient of a shortcut is added here.
        epsilon: added to LayerNorm's variance.
    """

    results: int = 1
    heads: int = 1
    turned: int = 0
    through: bool = False
    epsilon: float = 1e-6


class _Cut(NamedTuple):
    """How the work is cut, and what there is: rows of a block, blocks of a core."""

    block: int
    rows: int
    steps: int
    normed: bool
    added: bool


def suits(tokens: int, channels: int, out: int, dtype: jnp.dtype) -> bool:
    """Whether tokens of a map divide into blocks for all cores, and parameters fit a core."""
    held = 2 * (jnp.dtype(dtype).itemsize + 4) * channels * padded_size(out, LANES)
    return tokens % (CORES * kernel_parts.TILE) == 0 and held <= CORE_MEMORY // 2


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def project(
    x_HMNC: Float[Array, "H M N C"],
    weights: Weights,
    table: Table | None,
    onto_MNE: Float[Array, "M N E"] | None,
    form: Form,
    interpret: bool = False,
) -> tuple[Float[Array, "h M N e"], ...]:
    """Multiply tokens by a matrix; `suits` says which.

    Products take numbers of the tokens' type; everything else is float32, as gradients of the
    weights are.

    Args:
        x_HMNC: tokens; of one head where they are normalised or go through.
        weights: parameters, float32.
        table: angles, where results turn; without a gradient.
        onto_MNE: what the only result is added to.
        form: what is computed.
        interpret: run the kernels without a TPU.
    """
    cut, held = _cut(x_HMNC, weights, onto_MNE), kernel_parts.held(weights, x_HMNC.dtype)
    _, m, n, _ = x_HMNC.shape
    angles = table if table and form.turned else ()
    onto = [] if onto_MNE is None else [onto_MNE[None]]
    width = weights.bias_E.size // form.results // form.heads
    out = jax.ShapeDtypeStruct((form.heads, m, n, width), x_HMNC.dtype)
    made = [out] * form.results
    found = pl.pallas_call(
        functools.partial(_forward, form=form, cut=cut),
        grid=(CORES, cut.steps, m),
        in_specs=[
            _tokens(x_HMNC, cut),
            *map(kernel_parts.whole, held),
            *(_angles(a, cut) for a in angles),
            *(_tokens(a, cut) for a in onto),
        ],
        out_specs=[_tokens(a, cut) for a in made],
        out_shape=made,
        scratch_shapes=[pltpu.VMEM((cut.rows, weights.bias_E.size), jnp.float32)],
        compiler_params=parameters("parallel", "arbitrary", "arbitrary"),
        cost_estimate=kernel_parts.cost(
            x_HMNC.size * weights.bias_E.size, 0, (x_HMNC, *held, *angles, *onto, *made)
        ),
        interpret=interpret,
        name="projection_forward",
    )(x_HMNC, *held, *angles, *onto)
    return (*found, x_HMNC) if form.through else tuple(found)


def _project_forward(
    x: Array,
    weights: Weights,
    table: Table | None,
    onto: Array | None,
    form: Form,
    interpret: bool,
) -> tuple[tuple[Array, ...], Any]:
    kept = (x, weights, table, onto is not None)
    return project(x, weights, table, onto, form, interpret), kept


def _project_backward(
    form: Form, interpret: bool, kept: Any, bars: tuple[Array, ...]
) -> tuple[Array, Weights, Table | None, Array | None]:
    x, weights, table, added = kept
    cut, held = _cut(x, weights, None), kernel_parts.held(weights, x.dtype)
    angles = table if table and form.turned else ()
    sums = kernel_parts.sums_of(held, CORES)
    x_bar, *gradients = pl.pallas_call(
        functools.partial(_backward, form=form, cut=cut),
        grid=(CORES, cut.steps, x.shape[1]),
        in_specs=[
            _tokens(x, cut),
            *map(kernel_parts.whole, held),
            *(_angles(a, cut) for a in angles),
            *(_tokens(a, cut) for a in bars),
        ],
        out_specs=[_tokens(x, cut), *map(kernel_parts.part, sums)],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype), *sums],
        scratch_shapes=[pltpu.VMEM((cut.rows, weights.bias_E.size), x.dtype)],
        compiler_params=parameters("parallel", "arbitrary", "arbitrary"),
        cost_estimate=kernel_parts.cost(
            2 * x.size * weights.bias_E.size, 0, (x, x, *held, *angles, *bars, *sums)
        ),
        interpret=interpret,
        name="projection_backward",
    )(x, *held, *angles, *bars)
    no_bar = None if table is None else jax.tree.map(jnp.zeros_like, table)
    return x_bar, kernel_parts.added_up(gradients, weights), no_bar, bars[0][0] if added else None


project.defvjp(_project_forward, _project_backward)


def _cut(x: Array, weights: Weights, onto: Array | None) -> _Cut:
    heads, _, tokens, channels = x.shape
    lanes = heads * padded_size(channels, LANES) + 2 * weights.bias_E.size
    block, rows = kernel_parts.cut_tokens(tokens, BLOCK // (4 * lanes), CORES)
    steps = tokens // block // CORES
    return _Cut(block, rows, steps, weights.scale_C is not None, onto is not None)


def _tokens(a: Any, cut: _Cut) -> pl.BlockSpec:
    """Maps run fastest, so that angles are read once for all of them."""
    shape = (a.shape[0], 1, cut.block, a.shape[3])
    return pl.BlockSpec(shape, lambda p, i, m: (0, m, p * cut.steps + i, 0))


def _angles(a: Array, cut: _Cut) -> pl.BlockSpec:
    return pl.BlockSpec((cut.block, a.shape[1]), lambda p, i, m: (p * cut.steps + i, 0))


def _split(refs: tuple[Ref, ...], form: Form, cut: _Cut) -> tuple[Ref, tuple[Ref, ...], Any]:
    """Parameters, as `Weights`, angles, and the rest one after the other."""
    rest = iter(refs)
    held = Weights(*itertools.islice(rest, 4 if cut.normed else 2))
    return held, tuple(itertools.islice(rest, 2 if form.turned else 0)), rest


def _forward(x_ref: Ref, *refs: Ref, form: Form, cut: _Cut) -> None:
    held, table, rest = _split(refs, form, cut)
    onto_ref = next(rest) if cut.added else None
    results, y_ref = list(itertools.islice(rest, form.results)), next(rest)

    def some(number: int, _: None) -> None:
        here = piece(number, cut.rows)
        y = jnp.broadcast_to(held.bias_E[...], y_ref.shape)
        for token, kernel in _by_head(x_ref, here, held, form, cut):
            y = y + product(token, held.kernel_CE[kernel], NN)
        y_ref[...] = y if onto_ref is None else y + wide(onto_ref[0, 0, here])
        for i, result in enumerate(results):
            heads, _, _, width = result.shape
            for head in range(heads):
                first = (i * heads + head) * width
                if i < form.turned:
                    turned = _turn(y_ref, first, width, [a[here] for a in table])
                else:
                    turned = y_ref[:, first : first + width]
                result[head, 0, here] = turned.astype(result.dtype)

    jax.lax.fori_loop(0, cut.block // cut.rows, some, None)


def _backward(x_ref: Ref, *refs: Ref, form: Form, cut: _Cut) -> None:
    held, table, rest = _split(refs, form, cut)
    bars = list(itertools.islice(rest, form.results))
    through = next(rest) if form.through else None
    x_bar_ref, *sums, bar_ref = rest
    weight_bars: Ref = Weights(*(whole.at[0] for whole in sums))
    kernel_parts.clear_at((pl.program_id(1) == 0) & (pl.program_id(2) == 0), sums)

    def some(number: int, _: None) -> None:
        here = piece(number, cut.rows)
        for i, given in enumerate(bars):
            back = [a[here] for a in table] if i < form.turned else None
            _gather(given, here, bar_ref, i, back)
        bar = bar_ref[...]
        weight_bars.bias_E[...] += sum_rows(bar)
        for head, (token, kernel) in enumerate(_by_head(x_ref, here, held, form, cut)):
            weight_bars.kernel_CE[kernel] += product(token, bar, TN)
            token_bar = product(bar, held.kernel_CE[kernel], NT)
            if cut.normed:
                normal, inverse = kernel_parts.normalise(x_ref[0, 0, here], form.epsilon)
                weight_bars.scale_C[...] += sum_rows(token_bar * normal)
                weight_bars.shift_C[...] += sum_rows(token_bar)
                scaled = token_bar * held.scale_C[...]
                token_bar = kernel_parts.normalise_backward(scaled, normal, inverse)
            if through is not None:
                token_bar = token_bar + wide(through[0, 0, here])
            x_bar_ref[head, 0, here] = token_bar.astype(x_bar_ref.dtype)

    jax.lax.fori_loop(0, cut.block // cut.rows, some, None)


def _by_head(x_ref: Ref, here: Any, held: Ref, form: Form, cut: _Cut) -> list[tuple[Array, slice]]:
    """Tokens as they are multiplied, and the rows of the kernel that are theirs."""
    heads, _, _, width = x_ref.shape
    if not cut.normed:
        return [(x_ref[h, 0, here], slice(h * width, (h + 1) * width)) for h in range(heads)]
    normal = kernel_parts.normalise(x_ref[0, 0, here], form.epsilon)[0]
    token = normal * held.scale_C[...] + held.shift_C[...]
    return [(token.astype(x_ref.dtype), slice(0, width))]


def _turn(y_ref: Ref, first: int, width: int, table: list[Array]) -> Array:
    """Turn pairs, which lie half the width apart, as `position.rotate` does."""
    cos, sin = table
    half = width // 2
    one, other = (wide(y_ref[:, first + i * half : first + (i + 1) * half]) for i in range(2))
    return jnp.concatenate([one * cos - other * sin, one * sin + other * cos], axis=1)


def _gather(given: Ref, here: Any, bar_ref: Ref, number: int, table: list[Array] | None) -> None:
    """Write the gradients of a result's heads side by side, and turn them back."""
    heads, _, _, width = given.shape
    for head in range(heads):
        first = (number * heads + head) * width
        bar_ref[:, first : first + width] = given[head, 0, here]
        if table is not None:
            back = _turn(bar_ref, first, width, [table[0], -table[1]])
            bar_ref[:, first : first + width] = back.astype(bar_ref.dtype)
