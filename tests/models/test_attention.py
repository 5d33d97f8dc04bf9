"""Attention against its definition: at once, in blocks, with keys switched off."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax

from sss_jax.models.attention import attention, block_size, in_blocks, large_attention


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def attention_by_definition(q, k, v, valid):
    """One image, float64: loops over heads and queries, and drops the keys that are off."""
    out = np.zeros((q.shape[0], *v.shape[1:]))
    for head in range(q.shape[1]):
        for n in range(q.shape[0]):
            logits = k[valid, head].astype(float) @ q[n, head] / np.sqrt(q.shape[-1])
            out[n, head] = np.exp(log_softmax(logits)) @ v[valid, head]
    return out


@pytest.mark.parametrize("shared", [False, True])
def test_attention_follows_the_definition(shared):
    q, k, v = normal(0, 2, 3, 5, 2, 4), normal(1, 2, 3, 7, 2, 4), normal(2, 2, 3, 7, 2, 6)
    valid = np.random.default_rng(3).uniform(size=(2, 3, 7)) > 0.4
    valid[..., 0] = True
    if shared:
        k, v, valid = k[:, :1], v[:, :1], valid[:, :1]
    y = attention(q, k, v, valid)
    every = attention(q, k, v)
    for b, object_ in np.ndindex(2, 3):
        j = 0 if shared else object_
        args = q[b, object_], k[b, j], v[b, j]
        expected = attention_by_definition(*args, valid[b, j])
        np.testing.assert_allclose(y[b, object_], expected, atol=2e-6)
        expected = attention_by_definition(*args, np.ones(7, bool))
        np.testing.assert_allclose(every[b, object_], expected, atol=2e-6)


def test_attention_ignores_what_is_switched_off():
    q, k, v = normal(0, 1, 3, 1, 4), normal(1, 1, 6, 1, 4), normal(2, 1, 6, 1, 4)
    valid = np.array([[True, True, False, True, False, False]])
    y = attention(q, k, v, valid)
    np.testing.assert_array_equal(
        attention(q, k, np.where(valid[..., None, None], v, 1e30), valid), y
    )


def test_attention_softmax_is_float32_in_bfloat16():
    q, k = (jnp.asarray(normal(i, 1, 64, 1, 8), jnp.bfloat16) for i in range(2))
    ones = jnp.ones((1, 64, 1, 8), jnp.bfloat16)
    y = attention(q, k, ones)
    assert y.dtype == jnp.bfloat16
    # A bfloat16 sum of 64 weights is off by several per cent.
    np.testing.assert_allclose(np.asarray(y, np.float32), 1.0, atol=1e-2)


def plain_attention(q, k, v, valid):
    q = np.broadcast_to(q, (*k.shape[:2], *q.shape[2:]))  # objects may share their queries
    logits = np.where(valid[:, :, None], np.einsum("bhnd,bhmd->bhnm", q, k), -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return np.einsum("bhnm,bhme->bhne", weights / weights.sum(-1, keepdims=True), v)


def case(queries):
    q, k, v = normal(0, 2, 3, queries, 4), normal(1, 2, 3, 7, 4), normal(2, 2, 3, 7, 5)
    valid = np.random.default_rng(3).random((2, 3, 7)) < 0.6
    valid[..., 2] = True
    return q, k, v, valid


@pytest.mark.parametrize("size", [1, 8, 24])
def test_blocks_of_queries_follow_the_definition(size):
    q, k, v, valid = case(24)
    found = in_blocks(q, k, v, jnp.asarray(valid), size)
    np.testing.assert_allclose(found, plain_attention(q, k, v, valid), rtol=1e-4, atol=1e-5)
    everything = np.ones_like(valid)
    found = in_blocks(q, k, v, None, size)
    np.testing.assert_allclose(found, plain_attention(q, k, v, everything), rtol=1e-4, atol=1e-5)


def test_blocks_and_the_whole_have_the_same_gradient():
    q, k, v, valid = case(24)
    weight = normal(4, 2, 3, 24, 5)

    def gradients(run):
        return jax.grad(lambda *a: jnp.sum(weight * run(*a)), argnums=(0, 1, 2))(q, k, v)

    ours = gradients(lambda *a: in_blocks(*a, jnp.asarray(valid), 8))
    whole = gradients(lambda *a: large_attention(*a, jnp.asarray(valid)))
    for one, other in zip(ours, whole, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_large_attention_works_in_blocks_beyond_its_limit(monkeypatch):
    monkeypatch.setattr("sss_jax.models.attention.CPU_LOGITS", 1)
    monkeypatch.setattr("sss_jax.models.attention.SMALLEST_BLOCK", 6)
    q, k, v, valid = case(24)
    run = jax.jit(lambda *a: large_attention(*a, jnp.asarray(valid)))
    assert "while" in run.lower(q, k, v).as_text()
    np.testing.assert_allclose(run(q, k, v), plain_attention(q, k, v, valid), rtol=1e-4, atol=1e-5)
    batched = jax.vmap(lambda a: large_attention(a, k, v, jnp.asarray(valid)))(q[None])
    np.testing.assert_allclose(batched[0], run(q, k, v), rtol=1e-5, atol=1e-6)


def test_blocks_divide_the_queries_and_respect_the_limit():
    assert block_size(4096, 4 * 4096, 2**22) == 256
    assert block_size(4096, 28736, 2**22) == 128
    assert block_size(4096, 10**9, 2**22) == 64
    assert block_size(49, 196, 2**22) == 49
    assert block_size(97, 10**9, 2**22) == 1
