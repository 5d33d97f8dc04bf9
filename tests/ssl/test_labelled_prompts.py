"""Prompts of the labelled branch: each reading, on the slices that it is meant for."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sss_jax.options import ModelOptions, Options, SemiOptions
from sss_jax.ssl.labelled_prompts import choose, volumes_to_search
from sss_jax.ssl.pcsw import volume_prompts
from sss_jax.ssl.prompts import no_clip_prompts

BATCH, SLICES, SIZE, STRIDE, CLASSES = 64, 4, 16, 2, 2
MASK = jnp.ones((BATCH, SLICES), bool)


def make_options(kind):
    return Options(
        model=ModelOptions(preset="nano", image_size=SIZE, num_classes=CLASSES),
        semi=dataclasses.replace(SemiOptions(), labelled_prompts=kind),
    )


@pytest.fixture(scope="module")
def label():
    """Class 1 begins on slice 2 and is largest there, class 2 is in no clip."""
    label = np.zeros((BATCH, SLICES, SIZE, SIZE), np.int32)
    label[:, 2:4, 4:10, 6:12] = 1
    label[:, 2, 4:12, 6:12] = 1
    return jnp.asarray(label)


@pytest.fixture(scope="module")
def prompts(label):
    """Function (kind, key) -> prompts; the coarse head sees class 1 on slice 0, in the corner."""
    coarse = jnp.zeros((BATCH, SLICES, SIZE // STRIDE, SIZE // STRIDE, CLASSES))
    coarse = coarse.at[:, 0, :2, :2, 0].set(0.9)
    search = jax.jit(lambda v: volume_prompts(v, MASK, STRIDE, Options().pcsw)[0])
    ids, none = jnp.arange(BATCH), no_clip_prompts(MASK, CLASSES)

    def draw(kind, key=0):
        options = make_options(kind)
        volumes = volumes_to_search(label, coarse, options)
        found = [search(v) for v in volumes]
        return choose(jax.random.key(key), found, volumes, ids, none, options)

    return draw


def test_none_and_pcsw(prompts):
    none = prompts("none")
    assert (none.labels_BSKQ == -1).all()
    own = prompts("pcsw")
    assert (own.start_BK[:, 0] == 0).all()
    np.testing.assert_array_equal(own.points_BSKQ2[0, 0, 0, :2], [[0, 0], [3, 3]])
    assert (own.labels_BSKQ[:, 1:] == -1).all()


def test_a_ground_truth_box_is_near_the_object_on_its_largest_slice(prompts):
    box = prompts("gt_box")
    assert (box.start_BK[:, 0] == 2).all()
    given = np.asarray(box.labels_BSKQ[..., 0] >= 0)
    assert given[:, 2, 0].all()
    assert given.sum() == BATCH
    corners = np.asarray(box.points_BSKQ2[:, 2, 0, :2]).reshape(BATCH, 4)
    np.testing.assert_allclose(corners.mean(axis=0), [6, 4, 11, 11], atol=0.5)
    assert corners.std(axis=0).min() > 0.2, "boxes are jittered"


def test_a_ground_truth_mask_is_the_truth_on_that_slice(prompts, label):
    mask = prompts("gt_mask")
    assert (mask.labels_BSKQ == -1).all()
    assert (mask.start_BK[:, 0] == 2).all()
    given = np.asarray(mask.mask_given_BSK)
    assert given[:, 2, 0].all()
    assert given.sum() == BATCH
    truth = np.asarray(label[:, 2, ::STRIDE, ::STRIDE] == 1)
    np.testing.assert_array_equal(mask.mask_BSKHW[:, 2, 0], np.where(truth, 10.0, -10.0))


def test_mixed_draws_each_kind_in_its_share(prompts):
    """Half boxes on the true slice, a quarter PCSW's on slice 0, a quarter none; per class."""
    drawn = [prompts("mixed", key) for key in range(20)]
    given = np.stack([np.asarray(d.labels_BSKQ[..., 0] >= 0) for d in drawn])
    share = given.mean(axis=(0, 1))[:, 0]
    np.testing.assert_allclose(share, [0.25, 0, 0.5, 0], atol=0.04)
    starts = np.stack([np.asarray(d.start_BK[:, 0]) for d in drawn])
    # Without a prompt a class begins in the middle, which is slice 2 here, too.
    np.testing.assert_allclose((starts == 0).mean(), 0.25, atol=0.04)
    assert ((starts == 0) | (starts == 2)).all()
