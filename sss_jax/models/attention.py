"""Scaled dot-product attention: whole, or a block of queries at a time where logits are large."""

import functools
import math

import jax
import jax.numpy as jnp

from sss_jax.axes import Array, Bool, Float

CPU_LOGITS = 2**22
"""Logits that a CPU holds at once; more do not stay in its caches."""

ACCELERATOR_LOGITS = 2**26
"""Logits that an accelerator holds at once: 256 MiB in float32.

Kept whole for the backward pass, those of nine objects on a 64 x 64 grid take 600 MiB in every
layer of memory attention.
"""

SMALLEST_BLOCK = 64
"""Queries per block at least: products with fewer columns are slow."""

_OFF = -1e30  # logit of a key that is switched off


def attention(
    q: Float[Array, "... N heads d"],
    k: Float[Array, "... M heads d"],
    v: Float[Array, "... M heads d"],
    valid: Bool[Array, "... M"] | None = None,
) -> Float[Array, "... N heads d"]:
    """Attention with float32 softmax, all logits at once.

    Leading axes of size 1 broadcast without being copied. `valid` switches keys off; at least one
    key of every row must be on.
    """
    q = q * q.shape[-1] ** -0.5
    q, k, v = (jnp.swapaxes(x, -2, -3) for x in (q, k, v))
    return jnp.swapaxes(_whole(q, k, v, None if valid is None else valid[..., None, :]), -2, -3)


def large_attention(
    q: Float[Array, "B H N D"],
    k: Float[Array, "B H M D"],
    v: Float[Array, "B H M E"],
    valid: Bool[Array, "B H M"] | None = None,
) -> Float[Array, "B H N E"]:
    """Attention of scaled queries to many keys, with float32 softmax and bounded memory.

    Where a platform cannot hold all logits, it takes a block of queries at a time, and neither the
    forward nor the backward pass ever holds more. `valid` is as in `attention`.
    """
    run = functools.partial(_within, valid=valid)
    return jax.lax.platform_dependent(
        q,
        k,
        v,
        cpu=functools.partial(run, limit=CPU_LOGITS),
        default=functools.partial(run, limit=ACCELERATOR_LOGITS),
    )


def _within(q: Array, k: Array, v: Array, *, valid: Array | None, limit: int) -> Array:
    size = block_size(q.shape[2], math.prod(k.shape[:3]), limit)
    return _whole(q, k, v, valid) if size == q.shape[2] else in_blocks(q, k, v, valid, size)


def block_size(queries: int, keys: int, limit: int) -> int:
    """Largest divisor of the number of queries whose logits stay within the limit.

    It is at least SMALLEST_BLOCK, or the divisor next to that.
    """
    most = max(limit // keys, SMALLEST_BLOCK)
    return max(size for size in range(1, min(queries, most) + 1) if queries % size == 0)


def _whole(q: Array, k: Array, v: Array, valid: Array | None) -> Array:
    logits = _batched("...nd,...md->...nm", q, k, jnp.float32)
    if valid is not None:
        logits = jnp.where(valid[..., None, :], logits, _OFF)
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
    q: Float[Array, "B H N D"],
    k: Float[Array, "B H M D"],
    v: Float[Array, "B H M E"],
    valid: Bool[Array, "B H M"] | None,
    size: int,
) -> Float[Array, "B H N E"]:
    """Attention of `size` queries after `size` queries, which must divide N.

    Queries run along the last axis of the logits: the maximum over keys then takes whole vectors,
    and both products read their large operand as it lies. The sum of the weights is a row of the
    product with the values, not another pass over them.
    """
    *batch, count, width = q.shape
    merge = functools.partial(_merge_batch, batch=len(batch))
    q, k, v = merge(q), merge(k), merge(v)
    sums = jnp.ones((*v.shape[:-1], 1), v.dtype)
    values = jnp.swapaxes(jnp.concatenate([v, sums], axis=-1), 1, 2)
    on = None if valid is None else merge(valid)

    @jax.checkpoint
    def block(q_HnD: Array) -> Array:
        logits = jnp.einsum("hmd,hnd->hmn", k, q_HnD, preferred_element_type=jnp.float32)
        if on is not None:
            logits = jnp.where(on[:, :, None], logits, _OFF)
        top = jax.lax.stop_gradient(logits.max(axis=1, keepdims=True))
        weights = jnp.exp(logits - top).astype(v.dtype)
        total = jnp.einsum("hem,hmn->hen", values, weights, preferred_element_type=jnp.float32)
        return jnp.swapaxes(total[:, :-1] / total[:, -1:], 1, 2).astype(v.dtype)

    blocks = jnp.moveaxis(q.reshape(-1, count // size, size, width), 1, 0)
    out = jnp.moveaxis(jax.lax.map(block, blocks), 0, 1)
    return out.reshape(*batch, count, v.shape[-1])


def _merge_batch(x: Array, batch: int) -> Array:
    return x.reshape(-1, *x.shape[batch:])
