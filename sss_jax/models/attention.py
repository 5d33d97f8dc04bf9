"""Scaled dot-product attention: whole, or streamed where logits are large.

Streamed attention never holds more than a block of logits, in neither pass: on TPUs and GPUs it is
a few kernels, elsewhere a loop over queries. Both keep the logarithm of the softmax's sums instead
of the weights and compute these again in the backward pass.
"""

import functools
import math
from collections.abc import Callable
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from sss_jax.axes import Array, Bool, Float
from sss_jax.models import attention_gpu_kernel, attention_kernel
from sss_jax.models.attention_kernel import OFF
from sss_jax.models.presets import Kernels

_KERNELS: dict[str, ModuleType] = {"tpu": attention_kernel, "gpu": attention_gpu_kernel}

CPU_LOGITS = 2**22
"""Logits that a CPU holds at once; more do not stay in its caches.

Up to here attention is whole everywhere.
"""

ACCELERATOR_LOGITS = 2**26
"""Logits that an accelerator holds at once: 256 MiB in float32.

Kept whole for the backward pass, those of nine objects on a 64 x 64 grid take 600 MiB in every
layer of memory attention.
"""

SMALLEST_BLOCK = 64
"""Queries per block at least: products with fewer columns are slow."""

ATTENDED = "attended"
"""Name of the results of attention, for policies of what a recomputed part keeps."""

_attended = jax.checkpoint_policies.save_only_these_names(ATTENDED)
KEEPS: dict[str, Any] = {
    "nothing": None,
    "attention": _attended,
    "products": jax.checkpoint_policies.save_from_both_policies(
        _attended, jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    ),
}
"""What a recomputed part keeps for the backward pass; attention is dearer than all the rest."""


def attention(
    q: Float[Array, "... N heads d"],
    k: Float[Array, "... M heads d"],
    v: Float[Array, "... M heads d"],
    valid: Bool[Array, "... M"] | None = None,
    times: Float[np.ndarray, " M"] | None = None,
) -> Float[Array, "... N heads d"]:
    """Attention with float32 softmax, all logits at once.

    Leading axes of size 1 broadcast without being copied. `valid` switches keys off; at least one
    key of every row must be on. `times` says how many equal keys each of them stands for.
    """
    q = q * q.shape[-1] ** -0.5
    q, k, v = (jnp.swapaxes(x, -2, -3) for x in (q, k, v))
    on = None if valid is None else valid[..., None, :]
    return jnp.swapaxes(_whole(q, k, v, on, times), -2, -3)


def large_attention(
    q: Float[Array, "B H N D"],
    k: Float[Array, "B H M D"],
    v: Float[Array, "B H M E"],
    valid: Bool[Array, "B H M"] | None = None,
    *,
    kernels: Kernels = "off",
) -> Float[Array, "B H N E"]:
    """Attention of scaled queries to many keys, with float32 softmax and bounded memory.

    Beyond CPU_LOGITS it is streamed, by the `kernels` of a platform where the sizes suit them.
    `valid` is as in `attention`.
    """
    if math.prod(k.shape[:3]) * q.shape[2] <= CPU_LOGITS:
        return checkpoint_name(_whole(q, k, v, valid), ATTENDED)
    *batch, count, _ = q.shape
    merge = functools.partial(_merge_batch, batch=len(batch))
    on = None if valid is None else merge(valid)
    kernels = kernels if _suits(kernels, q, v) else "off"
    out = _streamed(merge(q), merge(k), merge(v), on, kernels)
    return out.reshape(*batch, count, v.shape[-1])


def _suits(kernels: Kernels, q: Array, v: Array) -> bool:
    """Whether kernels take so many queries and channels."""
    queries, channels = q.shape[-2:]
    if kernels == "gpu":
        return attention_gpu_kernel.suits(queries, channels, v.shape[-1], q.dtype)
    return kernels == "tpu" and attention_kernel.suits(queries, channels)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _streamed(q: Array, k: Array, v: Array, valid: Array | None, kernels: Kernels) -> Array:
    return _streamed_forward(q, k, v, valid, kernels)[0]


def _streamed_forward(
    q: Array, k: Array, v: Array, valid: Array | None, kernels: Kernels
) -> tuple[Array, tuple[Array | None, ...]]:
    if kernels in _KERNELS:
        out, sums = _KERNELS[kernels].forward(q, k, v, _bias(k, valid))
    else:
        out, sums = _by_platform(in_blocks, q, k, v, valid)
    # Named here, so that a layer which keeps the result keeps what its backward pass needs.
    out, sums = checkpoint_name(out, ATTENDED), checkpoint_name(sums, ATTENDED)
    return out, (q, k, v, valid, out, sums)


def _streamed_backward(
    kernels: Kernels, kept: tuple[Array, Array, Array, Array | None, Array, Array], out_bar: Array
) -> tuple[Array, Array, Array, None]:
    q, k, v, valid, out, sums = kept
    shift = jnp.einsum("gne,gne->gn", out, out_bar, preferred_element_type=jnp.float32)
    others = (sums, shift, out_bar)
    if kernels in _KERNELS:
        bars = _KERNELS[kernels].backward(q, k, v, _bias(k, valid), *others)
    else:
        bars = _by_platform(gradients_in_blocks, q, k, v, valid, *others)
    return *bars, None


_streamed.defvjp(_streamed_forward, _streamed_backward)


def _by_platform(loop: Callable[..., Any], q: Array, k: Array, *others: Array | None) -> Any:
    """Run a loop over blocks of queries whose logits the platform can hold."""
    sizes = (
        block_size(q.shape[1], k.shape[0] * k.shape[1], limit)
        for limit in (CPU_LOGITS, ACCELERATOR_LOGITS)
    )
    cpu, default = (functools.partial(loop, size=size) for size in sizes)
    return jax.lax.platform_dependent(q, k, *others, cpu=cpu, default=default)


def _bias(k: Array, valid: Array | None) -> Array:
    on = jnp.ones(k.shape[:2], bool) if valid is None else valid
    return jnp.where(on, 0.0, OFF)


def block_size(queries: int, keys: int, limit: int) -> int:
    """Largest divisor of the number of queries whose logits stay within the limit.

    It is at least SMALLEST_BLOCK, or the divisor next to that.
    """
    return attention_kernel.largest_divisor(queries, max(limit // keys, SMALLEST_BLOCK))


def _whole(
    q: Array, k: Array, v: Array, valid: Array | None, times: np.ndarray | None = None
) -> Array:
    logits = _batched("...nd,...md->...nm", q, k, jnp.float32)
    if times is not None:
        logits = logits + np.log(times).reshape((1,) * (logits.ndim - 1) + times.shape)
    if valid is not None:
        logits = jnp.where(valid[..., None, :], logits, OFF)
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    return _batched("...nm,...md->...nd", weights, v, v.dtype)


def _batched(product: str, x: Array, y: Array, dtype: jnp.dtype) -> Array:
    """Product of stacks of matrices; one batch axis where no axis broadcasts (faster on CPUs)."""
    batch = x.shape[:-2]
    if batch == y.shape[:-2]:
        x, y = (a.reshape(-1, *a.shape[-2:]) for a in (x, y))
    z = jnp.einsum(product, x, y, preferred_element_type=dtype)
    return z.reshape(*batch, *z.shape[-2:]) if z.ndim == 3 else z


def in_blocks(
    q: Float[Array, "G N D"],
    k: Float[Array, "G M D"],
    v: Float[Array, "G M E"],
    valid: Bool[Array, "G M"] | None,
    size: int,
) -> tuple[Float[Array, "G N E"], Float[Array, "G N"]]:
    """Attention of `size` queries after `size` queries, which must divide N.

    Queries run along the last axis of the logits: the maximum over keys then takes whole vectors,
    and both products read their large operand as it lies. The sum of the weights is a row of the
    product with the values, not another pass over them.

    Returns:
        The attention, and the logarithm of the sum of every query's weights.
    """
    ones = jnp.ones((*v.shape[:-1], 1), v.dtype)
    values = jnp.swapaxes(jnp.concatenate([v, ones], axis=-1), 1, 2)

    def block(q_GnD: Array) -> tuple[Array, Array]:
        logits = _logits(k, q_GnD, valid)
        top = logits.max(axis=1, keepdims=True)
        weights = jnp.exp(logits - top).astype(v.dtype)
        total = jnp.einsum("gem,gmn->gen", values, weights, preferred_element_type=jnp.float32)
        out, sums = total[:, :-1] / total[:, -1:], total[:, -1]
        return jnp.swapaxes(out, 1, 2).astype(v.dtype), top[:, 0] + jnp.log(sums)

    out, sums = jax.lax.map(block, _split(q, size))
    return _join(out), _join(sums)


def gradients_in_blocks(
    q: Float[Array, "G N D"],
    k: Float[Array, "G M D"],
    v: Float[Array, "G M E"],
    valid: Bool[Array, "G M"] | None,
    sums: Float[Array, "G N"],
    shift: Float[Array, "G N"],
    out_bar: Float[Array, "G N E"],
    size: int,
) -> tuple[Float[Array, "G N D"], Float[Array, "G M D"], Float[Array, "G M E"]]:
    """Gradients of q, k and v from that of the attention, `size` queries at a time.

    `sums` is what `in_blocks` returned, `shift` the sum over channels of output times gradient.
    """
    einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)

    def block(totals: tuple[Array, ...], parts: tuple[Array, ...]) -> tuple[Any, Array]:
        q, sums, shift, out_bar = parts
        weights = jnp.exp(computed_again(k, q, valid) - sums[:, None])
        v_bar = einsum("gmn,gne->gme", weights.astype(v.dtype), out_bar)
        lean = einsum("gme,gne->gmn", v, out_bar) - shift[:, None]
        logits_bar = (weights * lean).astype(q.dtype)
        k_bar = einsum("gmn,gnd->gmd", logits_bar, q)
        q_bar = einsum("gmn,gmd->gnd", logits_bar, k).astype(q.dtype)
        return (totals[0] + k_bar, totals[1] + v_bar), q_bar

    nothing = tuple(jnp.zeros(x.shape, jnp.float32) for x in (k, v))
    parts = tuple(_split(x, size) for x in (q, sums, shift, out_bar))
    (k_bar, v_bar), q_bar = jax.lax.scan(block, nothing, parts)
    return _join(q_bar), k_bar.astype(k.dtype), v_bar.astype(v.dtype)


def _logits(k_GMD: Array, q_GnD: Array, valid: Array | None) -> Array:
    logits = jnp.einsum("gmd,gnd->gmn", k_GMD, q_GnD, preferred_element_type=jnp.float32)
    return logits if valid is None else jnp.where(valid[:, :, None], logits, OFF)


@jax.jit
def computed_again(k_GMD: Array, q_GnD: Array, valid: Array | None) -> Array:
    """Logits in the backward pass; a function, for counts of operations to know them by name."""
    return _logits(k_GMD, q_GnD, valid)


def _split(x: Array, size: int) -> Array:
    """Cut axis 1 into blocks, which become the first axis."""
    return jnp.moveaxis(x.reshape(x.shape[0], -1, size, *x.shape[2:]), 1, 0)


def _join(blocks: Array) -> Array:
    """Undo `_split`."""
    x = jnp.moveaxis(blocks, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])


def _merge_batch(x: Array, batch: int) -> Array:
    return x.reshape(-1, *x.shape[batch:])
