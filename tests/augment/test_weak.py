"""The weak view against a pixel-by-pixel reference, and its distribution."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sss_jax.augment.keys import example_keys
from sss_jax.augment.weak import draw_transform, warp, weak_view
from sss_jax.errors import ConfigError
from sss_jax.options import WeakOptions

SLICES, SIDE = 3, 12
PERMUTE = WeakOptions(rot90_flip=1.0, scale_low=1.0, scale_high=1.0)

jitted_warp = jax.jit(warp)


def clip(seed=0, slices=SLICES, side=SIDE):
    rng = np.random.default_rng(seed)
    image = rng.random((slices, side, side, 1), dtype=np.float32)
    return image, rng.integers(1, 5, (slices, side, side), dtype=np.int32)


def reference_warp(image, label, matrix, shift):
    """Every output pixel on its own, in double precision; also the distance to the border."""
    slices, side = image.shape[:2]
    out, classes = np.zeros((slices, side, side)), np.zeros((slices, side, side), int)
    inside, margin = np.zeros((side, side), bool), np.zeros((side, side))
    centre = (side - 1) / 2
    for y, x in itertools.product(range(side), repeat=2):
        offset = np.array([y, x]) - centre - side * np.asarray(shift, np.float64)
        r, c = np.asarray(matrix, np.float64) @ offset + centre
        inside[y, x] = -0.5 <= r < side - 0.5 and -0.5 <= c < side - 0.5
        # How far the position is from where rounding changes the answer.
        to_border = min(abs(p - e) for p in (r, c) for e in (-0.5, side - 0.5))
        to_tie = min(abs(p + 0.5 - round(p + 0.5)) for p in (r, c))
        margin[y, x] = min(to_border, to_tie)
        if not inside[y, x]:
            continue
        r, c = min(max(r, 0), side - 1), min(max(c, 0), side - 1)
        for i, j in itertools.product(range(side), repeat=2):
            weight = max(0, 1 - abs(r - i)) * max(0, 1 - abs(c - j))
            out[:, y, x] += weight * image[:, i, j, 0]
        classes[:, y, x] = label[:, math.floor(r + 0.5), math.floor(c + 0.5)]
    return out, classes, inside, margin


@settings(max_examples=25, deadline=None)
@given(
    angle=st.floats(-math.pi, math.pi),
    zoom=st.sampled_from([0.25, 0.8, 1.0, 1.25, 5.0]),
    flip=st.booleans(),
    shift=st.tuples(st.floats(-0.5, 0.5), st.floats(-0.5, 0.5)),
    seed=st.integers(0, 100),
)
def test_warp_equals_reference(angle, zoom, flip, shift, seed):
    image, label = clip(seed)
    matrix = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    matrix = np.float32(matrix @ np.diag([-1 if flip else 1, 1]) / zoom)
    moved, classes, inside = jitted_warp(image, label, matrix, np.float32(shift))
    expected, expected_classes, expected_inside, margin = reference_warp(
        image, label, matrix, np.float32(shift)
    )
    sure = margin > 1e-4
    np.testing.assert_array_equal(np.asarray(inside)[sure], expected_inside[sure])
    np.testing.assert_allclose(np.asarray(moved)[..., 0][:, sure], expected[:, sure], atol=2e-5)
    np.testing.assert_array_equal(np.asarray(classes)[:, sure], expected_classes[:, sure])
    outside = ~np.asarray(inside)
    assert not np.asarray(moved)[:, outside].any()
    assert not np.asarray(classes)[:, outside].any()


@pytest.mark.parametrize("side", [1, 2])
def test_warp_of_a_tiny_clip_is_finite(side):
    image, label = clip(side=side)
    moved, classes, _ = warp(image, label, jnp.eye(2) / 1.1, jnp.array([0.1, -0.2]))
    assert np.isfinite(moved).all()
    assert moved.shape == image.shape
    assert set(np.unique(classes)) <= {0, *np.unique(label)}


def test_warp_refuses_what_is_not_a_square_clip():
    with pytest.raises(ValueError, match=r"\[S, side, side, 1\]"):
        warp(jnp.zeros((2, 4, 5, 1)), None, jnp.eye(2), jnp.zeros(2))
    with pytest.raises(ValueError, match=r"\[S, side, side, 1\]"):
        warp(jnp.zeros((2, 4, 4, 3)), None, jnp.eye(2), jnp.zeros(2))


@pytest.mark.parametrize("side", [12, 13])
def test_symmetries_move_pixels_exactly(side):
    image, label = clip(side=side)
    view = jax.jit(jax.vmap(lambda k: weak_view(k, image, label, PERMUTE)))
    images, labels, inside = view(jax.random.split(jax.random.key(1), 64))
    assert np.asarray(inside).all()
    symmetries = [
        (lambda x, k=k, f=f: np.rot90(x[:, ::-1] if f else x, k, axes=(1, 2)))
        for k in range(4)
        for f in (False, True)
    ]
    seen = set()
    for moved, classes in zip(np.asarray(images), np.asarray(labels), strict=True):
        found = [i for i, s in enumerate(symmetries) if np.array_equal(moved, s(image))]
        assert len(found) == 1
        np.testing.assert_array_equal(classes, symmetries[found[0]](label))
        seen.add(found[0])
    assert seen == set(range(8))


def test_nothing_drawn_leaves_the_clip_as_it_is():
    image, label = clip()
    still = WeakOptions(rot90_flip=0.0, rotate=0.0, scale_low=1.0, scale_high=1.0)
    for seed in range(4):
        moved, classes, inside = weak_view(jax.random.key(seed), image, label, still)
        np.testing.assert_array_equal(moved, image)
        np.testing.assert_array_equal(classes, label)
        assert np.asarray(inside).all()


def test_transform_statistics():
    options = WeakOptions()
    count = 6000
    keys = jax.random.split(jax.random.key(0), count)
    matrices, shifts = jax.jit(jax.vmap(lambda k: draw_transform(k, options)))(keys)
    matrices, shifts = np.asarray(matrices, np.float64), np.asarray(shifts, np.float64)
    scale = 1 / np.sqrt(np.abs(np.linalg.det(matrices)))
    assert scale.min() >= 0.8 - 1e-5
    assert scale.max() <= 1.25 + 1e-5
    assert abs(scale.mean() - 1.025) < 0.01
    unit = matrices * scale[:, None, None]
    np.testing.assert_allclose(
        unit @ unit.transpose(0, 2, 1), np.broadcast_to(np.eye(2), unit.shape), atol=1e-5
    )
    # A crop when zoomed in, a placement when zoomed out: never more than the frame allows.
    assert (np.abs(shifts) <= np.abs(scale - 1)[:, None] / 2 + 1e-6).all()
    share = np.abs(shifts) / np.maximum(np.abs(scale - 1)[:, None] / 2, 1e-9)
    assert abs(share.mean() - 0.5) < 0.02

    mirrored = np.linalg.det(unit) < 0
    degrees = np.degrees(np.arctan2(unit[:, 1, 0], unit[:, 0, 0]))
    right = np.abs(degrees / 90 - np.round(degrees / 90)) < 1e-4
    turned = ~mirrored & ~right
    # Mirrored: half of the symmetric half. Turned: half of the other half.
    assert abs(mirrored.mean() - 0.25) < 0.025
    assert abs(turned.mean() - 0.25) < 0.025
    assert np.abs(degrees[turned]).max() <= 20
    assert np.abs(degrees[turned]).max() > 19
    assert abs(degrees[turned].mean()) < 1


@pytest.mark.parametrize(
    ("zoom", "seen"),
    [(1.25, SIDE**2), (0.5, (SIDE // 2) ** 2)],
)
def test_crop_fills_the_frame_and_zoom_out_shows_the_whole_clip(zoom, seen):
    options = WeakOptions(rot90_flip=0.0, rotate=0.0, scale_low=zoom, scale_high=zoom)
    image, _ = clip()
    view = jax.jit(jax.vmap(lambda k: weak_view(k, image, None, options)[2]))
    inside = np.asarray(view(jax.random.split(jax.random.key(2), 50))).sum((1, 2))
    assert (np.abs(inside - seen) <= (0 if zoom > 1 else 2 * SIDE // 2 + 1)).all()


def test_image_and_label_stay_aligned_and_slices_move_together():
    rng = np.random.default_rng(3)
    blocks = np.kron(rng.integers(0, 2, (4, 4)), np.ones((6, 6), np.int32)).astype(np.int32)
    label = np.stack([blocks, blocks, 1 - blocks])
    image = label[..., None].astype(np.float32)
    view = jax.jit(jax.vmap(lambda k: weak_view(k, image, label, WeakOptions(shift=0.2))))
    images, labels, inside = (np.asarray(x) for x in view(jax.random.split(jax.random.key(4), 100)))
    np.testing.assert_array_equal(images[:, 0], images[:, 1])
    np.testing.assert_array_equal(labels[:, 0], labels[:, 1])
    np.testing.assert_array_equal(labels[:, 0], (1 - labels[:, 2]) * inside)
    # Where all four neighbours agree, the nearest one does too.
    flat = np.isin(images[..., 0], [0.0, 1.0])
    assert flat.mean() > 0.5
    np.testing.assert_array_equal(labels[flat], images[..., 0][flat])


def test_example_draws_the_same_in_every_batch_and_on_every_device():
    images = np.stack([clip(i)[0] for i in range(8)])
    ids = np.array([3, 11, 4, 90, 5, 7, 8, 1000], np.int32)
    root = jax.random.key(9)

    def views(id_B, image_B):
        keys = example_keys(root, id_B)
        return jax.vmap(lambda k, x: weak_view(k, x, None, WeakOptions())[0])(keys, image_B)

    whole = np.asarray(jax.jit(views)(ids, images))
    split = np.asarray(jax.pmap(views)(ids[:, None], images[:, None]))[:, 0]
    np.testing.assert_allclose(split, whole, atol=1e-6)
    order = np.array([6, 1, 0])
    np.testing.assert_allclose(jax.jit(views)(ids[order], images[order]), whole[order], atol=1e-6)
    assert len({x.tobytes() for x in np.asarray(jax.random.key_data(example_keys(root, ids)))}) == 8


def test_crossed_scales_are_refused():
    with pytest.raises(ConfigError, match=r"weak\.scale_low"):
        draw_transform(jax.random.key(0), WeakOptions(scale_low=1.2, scale_high=1.1))
