"""Prompt points, tight boxes and their jitter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sss_jax.models.prompt_encoder import no_prompts
from sss_jax.ssl import prompts

SIZE = 32
jitter = jax.jit(prompts.jitter, static_argnums=(2, 3))


def some_prompts(seed, shape=(4, 3)):
    rng = np.random.default_rng(seed)
    box = jnp.asarray(rng.uniform(0, SIZE, (*shape, 4)), jnp.float32)
    point = jnp.asarray(rng.uniform(0, SIZE, (*shape, 2)), jnp.float32)
    return box, point, jnp.asarray(rng.random(shape) < 0.5)


def test_points_are_two_corners_and_a_click():
    box, point, valid = some_prompts(0)
    got = prompts.to_prompts(box, point, valid)
    assert got.labels_BKQ.dtype == jnp.int32
    for b, k in np.ndindex(4, 3):
        if valid[b, k]:
            x0, y0, x1, y1 = box[b, k]
            np.testing.assert_array_equal(got.points_BKQ2[b, k], [[x0, y0], [x1, y1], point[b, k]])
            np.testing.assert_array_equal(got.labels_BKQ[b, k], [2, 3, 1])
        else:
            np.testing.assert_array_equal(got.points_BKQ2[b, k], np.zeros((3, 2)))
            np.testing.assert_array_equal(got.labels_BKQ[b, k], [-1, -1, -1])


def test_no_prompts_equal_invalid_ones():
    box, point, _ = some_prompts(1)
    invalid = prompts.to_prompts(box, point, jnp.zeros((4, 3), bool))
    jax.tree.map(np.testing.assert_array_equal, no_prompts(4, 3), invalid)


def test_boxes_come_back_from_clip_prompts():
    box, point, valid = some_prompts(4, (4 * 5, 3))
    flat = prompts.to_prompts(box, point, valid)
    got_box, got_valid = prompts.of_clips(flat, 5, jnp.zeros((4, 3), jnp.int32)).boxes()
    np.testing.assert_array_equal(got_valid, valid.reshape(4, 5, 3))
    np.testing.assert_array_equal(got_box, jnp.where(valid[..., None], box, 0).reshape(4, 5, 3, 4))
    assert not prompts.no_clip_prompts(jnp.ones((4, 5), bool), 3).boxes()[1].any()


def test_select_takes_each_class_from_its_side():
    flat = prompts.to_prompts(*some_prompts(2, (4 * 5, 3))[:2], jnp.ones((4 * 5, 3), bool))
    start = jnp.arange(12).reshape(4, 3) % 5
    one = prompts.ClipPrompts(*(prompts.images_to_clips(x, 5) for x in flat), start)
    other = prompts.no_clip_prompts(jnp.ones((4, 5), bool), 3)
    condition = jnp.asarray(np.random.default_rng(3).random((4, 3)) < 0.5)
    got = prompts.select(condition, one, other)
    for b, k in np.ndindex(4, 3):
        source = one if condition[b, k] else other
        np.testing.assert_array_equal(got.points_BSKQ2[b, :, k], source.points_BSKQ2[b, :, k])
        np.testing.assert_array_equal(got.labels_BSKQ[b, :, k], source.labels_BSKQ[b, :, k])
        assert got.start_BK[b, k] == source.start_BK[b, k]


def test_without_prompts_a_class_starts_in_the_middle_of_the_true_slices():
    mask = jnp.arange(6)[None] < jnp.array([6, 3, 1])[:, None]
    none = prompts.no_clip_prompts(mask, 2)
    np.testing.assert_array_equal(none.start_BK, [[3, 3], [1, 1], [0, 0]])
    jax.tree.map(np.testing.assert_array_equal, none.images(), no_prompts(18, 2))


def test_clips_and_images():
    array = jnp.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5)
    images = prompts.clips_to_images(array)
    np.testing.assert_array_equal(images[1 * 3 + 2], array[1, 2])
    np.testing.assert_array_equal(prompts.images_to_clips(images, 3), array)


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 2**32 - 1), density=st.sampled_from([0.0, 0.02, 0.1, 1.0]))
def test_tight_box(seed, density):
    mask = np.random.default_rng(seed).random((3, 5, 8)) < density
    box, valid = jax.jit(prompts.tight_box)(mask)
    for index, plane in enumerate(mask):
        y, x = np.nonzero(plane)
        assert valid[index] == bool(len(x))
        expected = [x.min(), y.min(), x.max(), y.max()] if len(x) else [0, 0, 7, 4]
        np.testing.assert_array_equal(box[index], expected)


@settings(deadline=None, max_examples=50)
@given(
    seed=st.integers(0, 2**32 - 1),
    spread=st.sampled_from([0.1, 3.0]),
    corners=st.tuples(*[st.integers(0, SIZE - 1)] * 4),
)
def test_jittered_boxes_stay_inside_and_ordered(seed, spread, corners):
    (x0, x1), (y0, y1) = sorted(corners[:2]), sorted(corners[2:])
    boxes = jnp.tile(jnp.array([[x0, y0, x1, y1]], jnp.float32), (6, 1))
    box, centre = jitter(jax.random.key(seed), boxes, spread, SIZE)
    assert (box >= 0).all()
    assert (box <= SIZE - 1).all()
    assert (box[:, :2] <= box[:, 2:]).all()
    np.testing.assert_allclose(centre, (box[:, :2] + box[:, 2:]) / 2, rtol=1e-6)


def test_jitter_of_nothing_changes_nothing():
    box = jnp.array([[3.0, 4.0, 20.0, 9.0]])
    got, centre = jitter(jax.random.key(0), box, 0.0, SIZE)
    np.testing.assert_array_equal(got, box)
    np.testing.assert_array_equal(centre, [[11.5, 6.5]])


def test_noise_is_a_share_of_each_side():
    size = 1000
    box = jnp.tile(jnp.array([[400.0, 450.0, 599.0, 549.0]]), (4000, 1))
    got, _ = jitter(jax.random.key(1), box, 0.1, size)
    shift = np.asarray(got - box)
    np.testing.assert_allclose(shift.std(axis=0), [20, 10, 20, 10], rtol=0.05)
    np.testing.assert_allclose(shift.mean(axis=0), np.zeros(4), atol=1.5)
    assert np.abs(np.corrcoef(shift.T) - np.eye(4)).max() < 0.08


def test_the_side_of_one_pixel_is_one():
    box = jnp.full((4000, 4), 500.0)
    got, _ = jitter(jax.random.key(3), box, 0.1, 1000)
    # Noise has a spread of 0.1 pixels; the larger of two such numbers has a mean of 0.056.
    np.testing.assert_allclose((got[:, 2:] - box[:, 2:]).mean(), 0.1 / np.pi**0.5, rtol=0.1)


@pytest.mark.parametrize("chosen", [[0, 1, 2], [2, 0], [1]])
def test_noise_of_an_example_does_not_depend_on_the_batch(chosen):
    keys = jax.random.split(jax.random.key(2), 3)
    box = jnp.asarray(np.random.default_rng(4).uniform(5, 20, (3, 2, 4)), jnp.float32)
    many = jax.vmap(lambda key, box: prompts.jitter(key, box, 0.1, SIZE)[0])
    chosen = np.array(chosen)
    np.testing.assert_array_equal(many(keys[chosen], box[chosen]), many(keys, box)[chosen])
