"""Complementary dropout: its algebra, its statistics, and eight devices."""

import jax
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from sss_jax.ssl.dropout import complementary_masks

WIDTH = 64


def draw(key, ids, level=0, width=WIDTH):
    masks = complementary_masks(key, np.asarray(ids, np.int32), width, None, level)
    return tuple(np.asarray(m) for m in masks)


jitted = jax.jit(complementary_masks, static_argnums=(2, 3, 4))


def kept(mask):
    return (mask == 1).all(1)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), batch=st.sampled_from([1, 5]))
def test_factors_complement_and_half_of_the_batch_is_kept(seed, batch):
    ids = np.arange(batch, dtype=np.int32) + 3 * seed % 1000
    first, second = (np.asarray(m) for m in jitted(jax.random.key(seed), ids, WIDTH, None))
    np.testing.assert_array_equal(first + second, np.full((batch, WIDTH), 2.0))
    assert kept(first).sum() == batch // 2
    assert np.isin(first[~kept(first)], [0.0, 2.0]).all()


def test_statistics():
    keys = jax.random.split(jax.random.key(0), 400)
    ids = np.arange(4, dtype=np.int32)
    first, _ = jax.jit(jax.vmap(lambda k: complementary_masks(k, ids, WIDTH, None)))(keys)
    first = np.asarray(first)
    dropped = ~(first == 1).all(-1)
    # Every place of the batch is kept half of the time, every channel doubled half of the time.
    np.testing.assert_allclose(dropped.mean(0), np.full(4, 0.5), atol=0.1)
    np.testing.assert_allclose(first[dropped].mean(0), np.full(WIDTH, 1.0), atol=0.15)
    assert abs(first[dropped].mean() - 1) < 0.02
    per_example = first[dropped].mean(1)
    assert abs(per_example.std() - 1 / np.sqrt(WIDTH)) < 0.02  # channels are independent


def test_levels_are_independent_but_keep_the_same_clips():
    ids = np.arange(8)
    a, b = (draw(jax.random.key(1), ids, level)[0] for level in (0, 1))
    np.testing.assert_array_equal(kept(a), kept(b))
    agree = (a == b)[~kept(a)].mean()
    assert 0.35 < agree < 0.65


def test_examples_and_keys_differ():
    a = draw(jax.random.key(1), np.arange(8))[0]
    assert len({row.tobytes() for row in a[~kept(a)]}) == 4
    assert not np.array_equal(a, draw(jax.random.key(2), np.arange(8))[0])


def test_eight_devices_equal_one():
    ids = np.arange(100, 116, dtype=np.int32)
    key = jax.random.key(4)
    split = jax.pmap(lambda i: complementary_masks(key, i, WIDTH, "data"), axis_name="data")(
        ids.reshape(8, 2)
    )
    for parts, whole in zip(split, draw(key, ids), strict=True):
        np.testing.assert_array_equal(np.asarray(parts).reshape(whole.shape), whole)
