"""Validation rows: the prompts of a volume against its labels, on the network's grid."""

import dataclasses

import jax
import numpy as np
import pytest

from sss_jax.data.cases import load_split
from sss_jax.data.load import load_example
from sss_jax.data.synthetic import SplitSizes, write_phantoms
from sss_jax.metrics.boxes import score_boxes
from sss_jax.options import ModelOptions, Options, PCSWOptions
from sss_jax.ssl.pcsw import volume_prompts
from sss_jax.ssl.volume import VolumeOutput
from sss_jax.train.validate import validate

OPTIONS = Options(model=ModelOptions(image_size=32, num_classes=3))


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    sizes = SplitSizes(labelled=1, unlabelled=0, val=2, test=0)
    root = write_phantoms(tmp_path_factory.mktemp("data") / "phantoms", subjects=sizes, seed=3)
    return load_split(root, "split.json").val


def prompting(boxes):
    """A volume function that knows nothing but where to put boxes: {(case, slice, class): box}."""
    count = iter(range(100))

    def function(params, image, mask):
        case, slices = next(count), len(image)
        probability = np.full((slices, 32, 32, 4), 0.25, np.float32)
        box, prompted = np.zeros((slices, 3, 4), np.float32), np.zeros((slices, 3), bool)
        for (at, s, k), corners in boxes.items():
            if at == case:
                box[s, k - 1], prompted[s, k - 1] = corners, True
        return VolumeOutput(probability, box, prompted)

    return function


def largest_slice(case, k):
    """Slice with most of a class, and its box there, on the network's grid."""
    label = load_example(case, OPTIONS.model, OPTIONS.data).label_SHW == k
    s = int(label.sum(axis=(1, 2)).argmax())
    y, x = np.nonzero(label[s])
    return s, (x.min(), y.min(), x.max(), y.max())


def test_prompts_are_scored_on_the_networks_grid(cases):
    s, (x0, y0, x1, y1) = largest_slice(cases[0], 1)
    exact = prompting({(0, s, 1): (x0, y0, x1, y1)})
    row = validate(exact, {}, cases, OPTIONS)
    assert row["prompt_iou"] == 1.0
    assert row["prompts_found"] == pytest.approx(1 / 6), "one of three classes in one of two cases"

    height = y1 - y0 + 1
    other, box = largest_slice(cases[1], 3)
    tall = prompting({(0, s, 1): (x0, y0, x1, y1 + height), (1, other, 3): box})
    row = validate(tall, {}, cases, OPTIONS)
    assert row["prompt_iou"] == pytest.approx((1 / 2 + 1) / 2)
    assert row["prompts_found"] == pytest.approx(2 / 6)


def test_prompts_of_perfect_masks_fit(cases):
    """PCSW and the score mean the same by a box; the coarse grid costs up to a pixel a side."""
    model = dataclasses.replace(OPTIONS.model, image_size=64)
    label_SHW = load_example(cases[0], model, OPTIONS.data).label_SHW
    truth = np.stack([label_SHW == k for k in (1, 2, 3)], axis=-1)
    slices = len(truth)
    coarse = truth.reshape(slices, 32, 2, 32, 2, 3).max(axis=(2, 4)).astype(np.float32)
    search = jax.jit(volume_prompts, static_argnums=(2, 3))
    prompts, _ = search(coarse[None], np.ones((1, slices), bool), 2, OPTIONS.pcsw)
    box, valid = (np.asarray(x)[0] for x in prompts.boxes())
    scores = score_boxes(box, valid, label_SHW)
    assert scores.found_K.all()
    assert scores.iou_K.min() > 0.5
    assert scores.iou_K.max() > 0.9
    mirrored = score_boxes(box, valid, label_SHW[:, :, ::-1])
    assert np.nanmin(mirrored.iou_K) < 0.5


def test_without_prompts_there_is_nothing_to_say_of_them(cases):
    row = validate(prompting({}), {}, cases, OPTIONS)
    assert row["prompts_found"] == 0.0
    assert "prompt_iou" not in row
    off = dataclasses.replace(OPTIONS, pcsw=PCSWOptions(enabled=False))
    assert not {"prompts_found", "prompt_iou"} & set(validate(prompting({}), {}, cases, off))
