"""Counts and ratios against NumPy, one voxel at a time."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from sss_jax.metrics.overlap import Counts, class_counts, dice, jaccard

CLASSES = 3
SHAPE = (2, 4, 5)
count = jax.jit(lambda p, r, v: class_counts(p, r, CLASSES, v))


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    most=st.tuples(st.integers(0, CLASSES), st.integers(0, CLASSES)),
    share=st.sampled_from([0.0, 0.5, 1.0]),
)
def test_counts_and_ratios_equal_reference(seed, most, share):
    rng = np.random.default_rng(seed)
    p, r = (rng.integers(0, m + 1, SHAPE).astype(np.int32) for m in most)
    valid = rng.random(SHAPE) < share
    counts = count(p, r, valid)
    for k in range(1, CLASSES + 1):
        pairs = list(zip(p[valid].tolist(), r[valid].tolist(), strict=True))
        both = sum(a == k and b == k for a, b in pairs)
        guess, truth = sum(a == k for a, _ in pairs), sum(b == k for _, b in pairs)
        assert [int(c[k - 1]) for c in counts] == [both, guess, truth]
        if guess + truth == 0:
            assert np.isnan(dice(counts)[k - 1])
            assert np.isnan(jaccard(counts)[k - 1])
        else:
            np.testing.assert_allclose(dice(counts)[k - 1], 2 * both / (guess + truth), rtol=1e-6)
            expected = both / (guess + truth - both)
            np.testing.assert_allclose(jaccard(counts)[k - 1], expected, rtol=1e-6)


def test_conventions():
    counts = Counts(*(jnp.array(c, jnp.int32) for c in ([0, 0, 0, 3], [0, 5, 0, 3], [0, 0, 5, 3])))
    np.testing.assert_array_equal(dice(counts), [np.nan, 0, 0, 1])
    np.testing.assert_array_equal(jaccard(counts), [np.nan, 0, 0, 1])


def test_counts_add_up_and_map_over_volumes():
    rng = np.random.default_rng(0)
    p, r = (rng.integers(0, CLASSES + 1, (6, *SHAPE)).astype(np.int32) for _ in range(2))
    each = jax.vmap(lambda a, b: class_counts(a, b, CLASSES))(p, r)
    whole = class_counts(p, r, CLASSES)
    for part, total in zip(each, whole, strict=True):
        assert part.shape == (6, CLASSES)
        np.testing.assert_array_equal(part.sum(0), total)
    assert dice(each).shape == (6, CLASSES)


def test_large_counts_do_not_overflow():
    big = jnp.array([2**30 + 2**29], jnp.int32)
    counts = Counts(big, big, big)
    np.testing.assert_allclose(dice(counts), [1.0])
    np.testing.assert_allclose(jaccard(counts), [1.0])
