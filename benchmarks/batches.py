"""Batches to measure with: drawn, or the first that training would take from a folder."""

import numpy as np

from sss_jax.data.pipeline import Loader
from sss_jax.data.sources import open_source
from sss_jax.options import Options

Batch = dict[str, dict[str, np.ndarray]]


def first_batch(options: Options, data: str | None) -> Batch:
    """Return the first batch that training takes from `data`; a synthetic one without.

    Raises:
        DataError: the folder cannot be read, or holds too few cases.
    """
    if data is None:
        return synthetic_batch(options)
    source = open_source(data, options)
    split = source.split(options.data, options.train)
    o = options
    loader = Loader(split, o.model, o.data, o.train, read=source.read, semi=o.semi.enabled)
    return loader.batch(0)


def synthetic_batch(options: Options) -> Batch:
    """Draw clips with a ball of every class in noise."""
    rng = np.random.default_rng(0)
    canvas, side, slices = options.data.canvas, options.model.image_size, options.data.clip_slices
    size = canvas or side
    away = np.linspace(-1, 1, size)
    batch = {}
    counts = {"labelled": options.train.labelled_batch}
    if options.semi.enabled:
        counts["unlabelled"] = options.train.unlabelled_batch
    for stream, count in counts.items():
        label = np.zeros((count, slices, size, size), np.int32)
        for k in range(options.model.num_classes):
            y, x = rng.uniform(-0.5, 0.5, (2, count, slices, 1, 1))
            near = (away[:, None] - y) ** 2 + (away - x) ** 2 < 0.1
            label[near] = k + 1
        image = 0.3 * label + rng.random(label.shape)
        batch[stream] = {
            "image": (image / image.max())[..., None].astype(np.float32),
            "slice_mask": np.ones((count, slices), bool),
            "id": np.arange(count, dtype=np.int32),
        }
        if canvas:
            batch[stream]["placement"] = np.tile(np.int32([canvas, side, 0] * 2), (count, 1))
        if stream == "labelled":
            batch[stream]["label"] = label
    return batch
