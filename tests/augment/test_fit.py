"""Resizing on the device against the host's, which is the definition."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sss_jax.augment.fit import fit, resize_weights
from sss_jax.config import load
from sss_jax.data.examples import Scan, lay, place
from sss_jax.data.geometry import Frame
from sss_jax.data.resize import resize_matrix
from sss_jax.errors import ConfigError, DataError
from sss_jax.options import DataOptions, ModelOptions, Options
from sss_jax.ssl.views import labelled_view, unlabelled_views
from sss_jax.train.step import root_key

CLASSES = 3
SIDES = st.integers(1, 40)


def scan_of(rng, rows, columns, slices=2, spacing=(1.0, 1.0)):
    """Smooth labels in a noisy image, as a volume would have them."""
    shape = (slices, rows, columns)
    coarse = rng.integers(0, CLASSES + 1, (slices, rows // 4 + 1, columns // 4 + 1))
    label = coarse.repeat(4, 1).repeat(4, 2)[:, :rows, :columns].astype(np.uint8)
    frame = Frame(shape, (0, 1, 2), (False, False, False), (1.0, *spacing), 0)
    return Scan(rng.random(shape, np.float32), label, frame)


def options_of(size, canvas, way="letterbox"):
    return Options(
        model=ModelOptions(image_size=size, num_classes=CLASSES),
        data=DataOptions(canvas=canvas, fit=way, clip_slices=2),
    )


def clips_of(scans, options, *, on_device):
    """A stream of the batch as the loader makes it."""
    size, data = options.model.image_size, options.data
    stream = {"id": np.arange(len(scans)), "slice_mask": np.ones((len(scans), 2), bool)}
    if on_device:
        image, label, placement = zip(*(lay(s, size, data) for s in scans), strict=True)
        stream["placement"] = np.stack(placement)
    else:
        placed = [place(s, size, data) for s in scans]
        image, label = [p.image_SHW for p in placed], [p.label_SHW for p in placed]
    labels = np.stack(label, dtype=np.int32)
    return jax.tree.map(
        jax.numpy.asarray, stream | {"image": np.stack(image)[..., None], "label": labels}
    )


@given(source=SIDES, target=SIDES, before=st.integers(0, 9), after=st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_weights_are_those_of_the_host(source, target, before, after):
    size = before + target + after
    expected = np.zeros((size, 48), np.float32)
    expected[:, :source] = resize_matrix(source, target, before, size)
    found = jax.jit(resize_weights, static_argnums=(1, 2))(
        np.int32([source, target, before]), size, 48
    )
    np.testing.assert_allclose(found, expected, rtol=2e-7, atol=1e-8)


@pytest.mark.parametrize("way", ["letterbox", "stretch"])
@pytest.mark.parametrize("size", [16, 32, 64])
def test_clips_are_those_of_the_host(size, way):
    rng = np.random.default_rng(size)
    planes = [(24, 40, (1.0, 1.0)), (40, 40, (1.0, 1.0)), (31, 17, (0.8, 1.7)), (5, 33, (1.0, 1.0))]
    scans = [scan_of(rng, h, w, spacing=spacing) for h, w, spacing in planes]
    options = options_of(size, 40, way)
    found = jax.jit(lambda clips: fit(clips, options))(clips_of(scans, options, on_device=True))
    expected = clips_of(scans, options, on_device=False)
    assert set(found) == set(expected)
    np.testing.assert_allclose(found["image"], expected["image"], atol=2e-6)
    np.testing.assert_array_equal(found["label"], expected["label"])
    assert set(np.unique(expected["label"])) == set(range(CLASSES + 1))


def test_the_views_are_those_of_clips_that_were_resized_before():
    rng = np.random.default_rng(0)
    options = options_of(32, 24)
    scans = [scan_of(rng, 24, 20), scan_of(rng, 17, 24)]
    there, here = (clips_of(scans, options, on_device=way) for way in (True, False))
    views = jax.jit(lambda clips: labelled_view(root_key(1), clips, options))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), views(there), views(here)
    )
    views = jax.jit(lambda clips: unlabelled_views(root_key(1), clips, options, None))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), views(there), views(here)
    )


def test_slices_larger_than_the_canvas_are_refused():
    scan = scan_of(np.random.default_rng(0), 24, 40)
    with pytest.raises(DataError, match=r"24 x 40 pixels, larger than data.canvas=32.*raise"):
        lay(scan, 16, DataOptions(canvas=32))


def test_a_canvas_is_not_cut_over_devices():
    with pytest.raises(ConfigError, match=r"data.canvas=0"):
        load("acdc:sss", ["data.canvas=256", "mesh.context=2"])
