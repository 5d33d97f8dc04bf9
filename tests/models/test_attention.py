"""Attention against its definition: at once, in blocks, in kernels, with keys switched off."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax

from sss_jax import flops
from sss_jax.models import attention as module
from sss_jax.models import attention_gpu_kernel, attention_kernel
from sss_jax.models.attention import (
    ATTENDED,
    attention,
    block_size,
    gradients_in_blocks,
    in_blocks,
    large_attention,
)


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


def test_a_key_that_counts_often_is_as_many_keys():
    q, k, v = normal(0, 1, 3, 2, 4), normal(1, 1, 3, 2, 4), normal(2, 1, 3, 2, 4)
    times = np.array([1, 5, 2], np.float32)
    y = attention(q, k, v, times=times)
    many = (np.repeat(x, times.astype(int), axis=1) for x in (k, v))
    np.testing.assert_allclose(y, attention(q, *many), atol=2e-6)


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


def case(queries, keys=7, batch=6, channels=4):
    q, k = normal(0, batch, queries, channels), normal(1, batch, keys, channels)
    v = normal(2, batch, keys, 5)
    valid = np.random.default_rng(3).random((batch, keys)) < 0.6
    valid[..., 2] = True
    return q, k, v, valid


def by_definition(q, k, v, valid):
    """Attention and the logarithm of the sums, in float64."""
    q, k, v = (np.asarray(x, float) for x in (q, k, v))
    logits = np.where(valid[:, None], np.einsum("gnd,gmd->gnm", q, k), -np.inf)
    sums = np.log(np.exp(logits).sum(-1))
    return np.einsum("gnm,gme->gne", np.exp(logits - sums[..., None]), v), sums


def gradients_by_definition(q, k, v, valid, out_bar):
    """The same by differentiating the whole softmax."""

    def run(q, k, v):
        logits = jnp.where(valid[:, None], jnp.einsum("gnd,gmd->gnm", q, k), -jnp.inf)
        return jnp.sum(out_bar * jnp.einsum("gnm,gme->gne", jax.nn.softmax(logits), v))

    return jax.grad(run, argnums=(0, 1, 2))(q, k, v)


def close(found, expected, tolerance=1e-5):
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=tolerance)


@pytest.mark.parametrize("size", [1, 8, 24])
@pytest.mark.parametrize("masked", [False, True])
def test_blocks_of_queries_follow_the_definition(size, masked):
    q, k, v, valid = case(24)
    valid = valid if masked else np.ones_like(valid)
    on = jnp.asarray(valid) if masked else None
    expected, sums = by_definition(q, k, v, valid)
    close(in_blocks(q, k, v, on, size), (expected, sums))
    out_bar = normal(4, 6, 24, 5)
    shift = (expected * out_bar).sum(-1)
    found = gradients_in_blocks(q, k, v, on, sums, shift, out_bar, size)
    close(found, gradients_by_definition(q, k, v, valid, out_bar))


@pytest.fixture(params=[attention_kernel, attention_gpu_kernel], ids=["tpu", "gpu"])
def kernels(request):
    return request.param


# Keys that fill their blocks and that do not; queries in one block and in several; channels of both
# sizes of blocks that GPUs have.
@pytest.mark.parametrize(
    ("queries", "keys", "channels"), [(128, 128, 4), (256, 300, 4), (384, 130, 4), (256, 130, 130)]
)
def test_kernels_follow_the_definition(monkeypatch, kernels, queries, keys, channels):
    monkeypatch.setattr(attention_kernel, "QUERIES", 128)
    monkeypatch.setattr(attention_kernel, "KEYS", 128)
    q, k, v, valid = case(queries, keys, batch=2, channels=channels)
    q = q * np.float32(2 / np.sqrt(channels))
    valid[1, :129] = False  # a whole block of keys that are off comes first
    valid[1, 127] = True
    expected, sums = by_definition(q, k, v, valid)
    bias = jnp.where(valid, 0.0, -1e30)
    close(kernels.forward(q, k, v, bias, interpret=True), (expected, sums))
    out_bar = normal(4, 2, queries, 5)
    shift = jnp.asarray((expected * out_bar).sum(-1), jnp.float32)
    sums = jnp.asarray(sums, jnp.float32)
    found = kernels.backward(q, k, v, bias, sums, shift, out_bar, interpret=True)
    close(found, gradients_by_definition(q, k, v, valid, out_bar))


def test_kernels_sum_in_float32(kernels):
    q, k = (jnp.asarray(normal(i, 1, 128, 8), jnp.bfloat16) for i in range(2))
    ones = jnp.ones((1, 128, 8), jnp.bfloat16)
    out, sums = kernels.forward(q, k, ones, jnp.zeros((1, 128)), interpret=True)
    assert out.dtype == jnp.bfloat16
    assert sums.dtype == jnp.float32
    np.testing.assert_allclose(np.asarray(out, np.float32), 1.0, atol=1e-2)


def test_kernels_take_what_fits_their_memory():
    assert attention_kernel.suits(4096, 256)  # memory attention at 1024 px
    assert attention_kernel.suits(4096, 72)  # channels of a head of the trunk
    assert not attention_kernel.suits(4000, 256)
    assert not attention_kernel.suits(65536, 256)


def test_kernels_for_gpus_take_short_numbers_and_whole_blocks():
    suits = attention_gpu_kernel.suits
    assert suits(4096, 256, 64, jnp.bfloat16)  # memory attention at 1024 px
    assert suits(1024, 72, 72, jnp.float16)  # a head of large's trunk at 512 px
    assert not suits(4096, 256, 64, jnp.float32)
    assert not suits(4000, 256, 64, jnp.bfloat16)
    assert not suits(4096, 288, 64, jnp.bfloat16)
    assert not suits(4096, 64, 288, jnp.bfloat16)


def test_blocks_of_keys_are_large_and_add_few_keys():
    assert attention_kernel.block_of_keys(4096) == 1024
    assert attention_kernel.block_of_keys(12336) == 896
    assert attention_kernel.block_of_keys(100) == 128
    for keys in range(1, 30000, 97):
        size = attention_kernel.block_of_keys(keys)
        assert size % 128 == 0
        assert -keys % size < max(128, keys / 5)


@pytest.mark.parametrize("heads", [1, 3])
def test_large_attention_is_the_same_whole_and_streamed(monkeypatch, heads):
    q, k, v = (x.reshape(2, 3, *x.shape[1:]) for x in case(24)[:3])
    valid = case(24)[3].reshape(2, 3, -1)
    q, k, v, valid = (x[:, :heads] for x in (q, k, v, valid))
    weight = normal(4, 2, heads, 24, 5)

    def run(q, k, v):
        y = large_attention(q, k, v, jnp.asarray(valid))
        return jnp.sum(weight * y), y

    gradients = jax.grad(run, argnums=(0, 1, 2), has_aux=True)
    expected, whole = gradients(q, k, v)
    monkeypatch.setattr(module, "CPU_LOGITS", 1)
    monkeypatch.setattr(module, "SMALLEST_BLOCK", 6)
    found, streamed = jax.jit(gradients)(q, k, v)
    assert "while" in jax.jit(gradients).lower(q, k, v).as_text()
    close(found, expected)
    np.testing.assert_allclose(whole, plain_attention(q, k, v, valid), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(streamed, whole, rtol=1e-4, atol=1e-5)
    batched = jax.vmap(lambda a: run(a, k, v)[1])(q[None])
    np.testing.assert_allclose(batched[0], streamed, rtol=1e-5, atol=1e-6)


def test_a_layer_that_keeps_the_attention_does_not_run_it_again(monkeypatch):
    monkeypatch.setattr(module, "CPU_LOGITS", 1)
    q, k, v = (jnp.asarray(x)[None] for x in case(24)[:3])

    def count(policy):
        layer = jax.checkpoint(large_attention, policy=policy)
        loss = lambda q, k, v: jnp.sum(jnp.sin(layer(q, k, v)))  # noqa: E731
        return flops.count(jax.grad(loss, (0, 1, 2)), q, k, v)

    product = 2 * 6 * 24 * 7  # of one channel
    forward, backward = product * (4 + 6), product * (3 * 4 + 2 * 5) + 2 * 6 * 24 * 5
    names = jax.checkpoint_policies.save_only_these_names
    assert count(names(ATTENDED)) == forward + backward
    assert count(names("nothing")) == 2 * forward + backward


@pytest.mark.parametrize("platform", ["tpu", "gpu"])
def test_with_kernels_the_same_is_computed(monkeypatch, platform):
    """The kernels run interpreted here; what calls them, and what they keep, is the platform's."""
    monkeypatch.setattr(module, "CPU_LOGITS", 1)
    monkeypatch.setattr(attention_gpu_kernel, "suits", lambda *_: True)  # float32 numbers, here
    kernels, ran = module._KERNELS[platform], []

    def interpreted(run, *args):
        ran.append(run)
        return run(*args, interpret=True)

    for name in ("forward", "backward"):
        run = functools.partial(interpreted, getattr(kernels, name))
        monkeypatch.setattr(kernels, name, run)
    q, k, v, valid = (jnp.asarray(x)[None] for x in case(128, 9, batch=2))

    def gradients(kernels):
        run = lambda *a: jnp.sum(jnp.sin(large_attention(*a, valid, kernels=kernels)))  # noqa: E731
        return jax.value_and_grad(run, argnums=(0, 1, 2))(q, k, v)

    (found, bars), (expected, by_loop) = gradients(platform), gradients("off")
    assert len(ran) == 2
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    close(bars, by_loop)


def test_operations_of_the_model_leave_out_logits_that_are_computed_again(monkeypatch):
    monkeypatch.setattr(module, "CPU_LOGITS", 1)
    q, k, v = (jnp.asarray(x)[None] for x in case(24)[:3])
    gradient = jax.grad(lambda q: large_attention(q, k, v).sum())
    again = flops.count(gradient, q) - flops.count(gradient, q, again=False)
    assert again == 2 * 6 * 24 * 7 * 4


def test_blocks_divide_the_queries_and_respect_the_limit():
    assert block_size(4096, 4 * 4096, 2**22) == 256
    assert block_size(4096, 28736, 2**22) == 128
    assert block_size(4096, 10**9, 2**22) == 64
    assert block_size(49, 196, 2**22) == 49
    assert block_size(97, 10**9, 2**22) == 1
