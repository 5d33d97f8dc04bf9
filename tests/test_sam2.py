"""The notebook's functions, and `predict --prompts`, on a small random network."""

import json

import jax
import nibabel as nib
import numpy as np
import pytest

from sss_jax import cli, sam2
from sss_jax.data.examples import scan
from sss_jax.data.geometry import make_frame, turn
from sss_jax.data.nifti import read_volume
from sss_jax.data.places import to_upright, to_voxels
from sss_jax.errors import DataError
from sss_jax.models.prompt_encoder import PADDING
from sss_jax.models.sam2 import Sam2
from sss_jax.options import DataOptions
from sss_jax.predict_prompts import data_options, predict_prompted, read_prompts
from tests.small_networks import TRACKING_CONFIG, params_that_find

MODEL = Sam2(TRACKING_CONFIG)
SHAPE = (40, 48, 7)


@pytest.fixture(scope="module")
def network():
    return sam2.Network(MODEL, params_that_find(MODEL, 3))


@pytest.fixture(scope="module")
def image():
    return np.random.default_rng(0).random((40, 48)).astype(np.float32)


# Images.


def test_box_and_points_are_scaled_to_the_square(network, image):
    found = sam2.predict_image(network, image, boxes=[[6, 5, 30, 20]], points=[[[12, 10]]])
    assert found.masks.shape == found.logits.shape == (1, 1, 40, 48)
    assert found.iou.shape == (1, 1)
    np.testing.assert_array_equal(found.masks, found.logits > 0)
    size = np.array([32 / 48, 32 / 40], np.float32)
    points = np.array([[6, 5], [30, 20], [12, 10]], np.float32)[None, None] * size
    labels = np.array([[[2, 3, 1]]], np.int32)
    features = sam2.encode_image(network, image)
    expected = MODEL.apply({"params": network.params}, features, points, labels, method="decode")
    low = np.asarray(expected.logits_BKMHW[0, :, :1])
    scale = np.abs(low).max()
    # Centres of the low-resolution pixels keep their values where grids coincide.
    full = jax.image.resize(low, (1, 1, 40, 48), "linear", antialias=True)
    np.testing.assert_allclose(found.logits, full, atol=1e-4 * scale)
    np.testing.assert_allclose(found.iou, expected.iou_BKM[0, :, :1], atol=1e-5)


def test_objects_are_independent_and_features_can_be_reused(network, image):
    boxes = [[6, 5, 30, 20], [2, 20, 18, 36]]
    features = sam2.encode_image(network, image)
    both = sam2.predict_image(network, image, boxes=boxes, features=features, multimask=True)
    assert both.masks.shape == (2, 3, 40, 48)
    one = sam2.predict_image(network, image, boxes=boxes[1:], multimask=True)
    np.testing.assert_allclose(both.logits[1:], one.logits, rtol=1e-3, atol=1e-3)
    assert np.abs(both.logits[0] - both.logits[1]).max() > 1e-2


def test_bytes_and_floats_and_colours_are_the_same_image(network, image):
    grey = np.round(image * 255).astype(np.uint8)
    one = sam2.encode_image(network, grey)
    other = sam2.encode_image(network, np.repeat((grey / np.float32(255))[..., None], 3, -1))
    for a, b in zip(one, other, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "give boxes"),
        ({"boxes": [[0, 0, 1, 1]], "points": np.zeros((2, 1, 2))}, "different numbers"),
        ({"points": [[[1, 1], [2, 2]]], "labels": [[1]]}, "labels have shape"),
    ],
)
def test_prompts_that_do_not_fit_are_refused(network, image, arguments, message):
    with pytest.raises(DataError, match=message):
        sam2.predict_image(network, image, **arguments)


@pytest.mark.parametrize(
    "bad", [np.full((4, 4), 2.0), np.full((4, 4), np.nan), np.zeros((4, 4, 2))]
)
def test_what_is_no_image_is_refused(network, bad):
    with pytest.raises(DataError):
        sam2.encode_image(network, bad)


# Volumes.


@pytest.fixture(scope="module")
def volume():
    return np.random.default_rng(1).random((7, 40, 48)).astype(np.float32)


def test_a_volume_is_tracked_from_every_kind_of_prompt(network, volume):
    mask = np.zeros((40, 48), bool)
    mask[10:30, 10:30] = True
    prompts = {
        5: [sam2.Prompt(slice=3, box=(6, 5, 30, 20))],
        2: [sam2.Prompt(slice=1, points=[(9, 9)]), sam2.Prompt(slice=5, mask=mask)],
    }
    found = sam2.predict_volume(network, volume, prompts)
    assert found.logits.shape == (7, 2, 40, 48)
    assert found.objects == (5, 2)
    label = found.label()
    assert label.shape == (7, 40, 48)
    assert set(np.unique(label)) <= {0, 2, 5}
    np.testing.assert_array_equal(label == 0, found.logits.max(axis=1) <= 0)
    # The mask prompt is kept as it is, up to its resolution.
    kept = found.logits[5, 1] > 0
    assert (kept == mask).mean() > 0.9
    # A first prompt is the image prediction of its slice.
    alone = sam2.predict_image(network, volume[3], boxes=[[6, 5, 30, 20]], multimask=True)
    single = sam2.predict_image(network, volume[3], boxes=[[6, 5, 30, 20]])
    candidates = np.concatenate([single.logits, alone.logits], axis=1)[0]
    error = np.abs(candidates - found.logits[3, 0].astype(np.float32)).max(axis=(1, 2))
    assert error.min() <= 2e-3 * np.abs(candidates).max()


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ({}, "at least one prompt"),
        ({1: []}, "at least one prompt"),
        ({1: [sam2.Prompt(slice=7, box=(0, 0, 1, 1))]}, r"outside 0\.\.6"),
        ({1: [sam2.Prompt(slice=1, box=(0, 0, 1, 1))] * 2}, "into one prompt"),
    ],
)
def test_prompts_outside_the_volume_are_refused(network, volume, prompts, message):
    with pytest.raises(DataError, match=message):
        sam2.predict_volume(network, volume, prompts)


def test_prompts_check_themselves():
    with pytest.raises(DataError, match="needs a box"):
        sam2.Prompt(slice=0)
    with pytest.raises(DataError, match="beside it"):
        sam2.Prompt(slice=0, box=(0, 0, 1, 1), mask=np.ones((2, 2)))
    with pytest.raises(DataError, match="1 points have 2 labels"):
        sam2.Prompt(slice=0, points=[(0, 0)], labels=[1, 0])
    assert PADDING not in sam2.Prompt(slice=0, points=[(0, 0)]).tokens()[1]


# Files.

AFFINES = {
    "RAS": np.diag([1.5, 1.5, 4.0, 1.0]),
    "LPS": np.diag([-1.5, -1.5, 4.0, 1.0]),
    "ASR": np.array([[0, 0, 1.5, -20], [1.5, 0, 0, 7], [0, 4.0, 0, -3], [0, 0, 0, 1.0]]),
}


def write(path, affine, shape=SHAPE, seed=2):
    data = np.random.default_rng(seed).random(shape).astype(np.float32)
    image = nib.Nifti1Image(data, affine)
    image.header.set_xyzt_units("mm")
    image.set_sform(affine, 1)
    image.set_qform(affine, 1)
    nib.save(image, path)
    return path


@pytest.mark.parametrize("name", AFFINES)
def test_voxels_follow_the_turn_of_their_volume(tmp_path, name):
    """Mark one voxel in the array and find the mark where the coordinates say."""
    volume = read_volume(write(tmp_path / "a.nii.gz", AFFINES[name]), 2**20)
    frame = make_frame(volume, -1)
    for voxel in ((3, 5, 2), (39, 0, 6), (0, 47, 0)):
        mark = np.zeros(volume.array.shape)
        mark[voxel] = 1
        upright = to_upright(np.array([voxel], float), frame)[0]
        assert turn(mark, frame)[tuple(upright.astype(int))] == 1
        world = AFFINES[name] @ [*voxel, 1.0]
        np.testing.assert_allclose(to_voxels([world[:3]], volume.affine)[0], voxel, atol=1e-4)


def write_prompts(path, content):
    path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize("name", AFFINES)
def test_label_lies_on_the_images_grid_and_world_is_voxel(network, tmp_path, name):
    source = write(tmp_path / "image.nii.gz", AFFINES[name])
    volume = read_volume(source, 2**20)
    corner, other = [6, 5, 3], [30, 20, 3]
    if name == "ASR":
        corner, other = [6, 3, 2], [30, 3, 5]
    world = [(AFFINES[name] @ [*v, 1.0])[:3].tolist() for v in (corner, other)]
    boxes = {"voxel": [corner, other], "world": world}
    written = []
    for space, box in boxes.items():
        prompts = write_prompts(
            tmp_path / f"{space}.json", {"space": space, "objects": {"4": [{"box": box}]}}
        )
        target = tmp_path / f"{space}.nii.gz"
        result = predict_prompted(network, source, prompts, target, DataOptions())
        label = nib.load(target)
        np.testing.assert_allclose(label.affine, volume.affine, atol=1e-5)
        data = np.asarray(label.dataobj)
        assert data.shape == SHAPE
        assert set(np.unique(data)) == {0, 4}
        assert result["objects"]["4"]["voxels"] == (data == 4).sum() > 0
        written.append(data)
    np.testing.assert_array_equal(*written)
    with pytest.raises(DataError, match="exists"):
        predict_prompted(network, source, prompts, target, DataOptions())


@pytest.mark.parametrize("name", ["LPS", "ASR"])
def test_objects_on_several_slices_from_voxels_and_millimetres(network, tmp_path, name):
    """A file is what the same prompts are in Python, on the upright volume, options and all."""
    affine = AFFINES[name]
    source = write(tmp_path / "image.nii.gz", affine)
    volume = read_volume(source, 2**20)
    frame = make_frame(volume, -1)
    # Slice, row and column of the upright volume, and what they are in the file.
    slices, rows, columns = turn(volume.array, frame).shape
    assert min(slices, rows, columns) == 7
    last = np.array([slices, rows, columns]) - 1
    share = {
        "box": [[0.2, 0.1, 0.1], [0.2, 0.7, 0.8]],
        "late box": [[0.8, 0.2, 0.2], [0.8, 0.9, 0.7]],
        "points": [[0.5, 0.3, 0.4], [0.5, 0.8, 0.9], [1.0, 0.5, 0.5]],
    }
    upright = {key: np.rint(np.array(value) * last) for key, value in share.items()}
    where = np.argwhere(np.ones(volume.array.shape, bool))
    moved = {tuple(p): v for p, v in zip(np.rint(to_upright(where, frame)), where, strict=True)}
    stored = {key: [moved[tuple(p)] for p in value] for key, value in upright.items()}

    def content(places, space):
        entries = {
            "2": [{"box": places["box"]}, {"box": places["late box"]}],
            "9": [{"points": places["points"], "labels": [1, 0, 1]}],
        }
        return {"space": space, "objects": entries}

    world = {k: [(affine @ [*p, 1.0])[:3].tolist() for p in v] for k, v in stored.items()}
    voxel = {k: np.array(v).tolist() for k, v in stored.items()}
    found = {}
    for space, places in (("voxel", voxel), ("world", world)):
        path = write_prompts(tmp_path / f"{space}.json", content(places, space))
        target = tmp_path / f"{space}.nii.gz"
        options = {"clean_area": 4, "overlap": False}
        result = predict_prompted(network, source, path, target, DataOptions(), **options)
        assert list(result["objects"]) == ["2", "9"]
        found[space] = np.asarray(nib.load(target).dataobj)
        prompts = read_prompts(path, volume, frame, DataOptions())
        assert [p.slice for p in prompts[2]] == [upright[key][0, 0] for key in ("box", "late box")]
        assert [p.slice for p in prompts[9]] == [upright["points"][0, 0], last[0]]
        np.testing.assert_allclose(prompts[9][0].points, upright["points"][:2, :0:-1], atol=1e-4)
    np.testing.assert_array_equal(*found.values())
    image = scan(volume, None, DataOptions()).image_SHW
    expected = sam2.predict_volume(network, image, prompts, **options).label()
    np.testing.assert_array_equal(turn(found["world"], frame), expected)
    assert {2, 9} <= set(np.unique(expected))


def test_masks_and_points_are_read_on_their_slices(tmp_path):
    affine = AFFINES["LPS"]
    source = read_volume(write(tmp_path / "image.nii.gz", affine), 2**20)
    frame = make_frame(source, -1)
    drawn = np.zeros(SHAPE, np.uint8)
    drawn[4:9, 5:12, 2], drawn[4:9, 5:12, 4] = 3, 3
    label = nib.Nifti1Image(drawn, affine)
    label.set_sform(affine, 1)
    label.set_qform(affine, 1)
    label.header.set_xyzt_units("mm")
    nib.save(label, tmp_path / "drawn.nii.gz")
    entries = [
        {"mask": "drawn.nii.gz", "label": 3},
        {"points": [[1, 2, 0], [3, 4, 0], [5, 6, 6]], "labels": [1, 0, 1]},
    ]
    path = write_prompts(tmp_path / "p.json", {"objects": {"1": entries}})
    prompts = read_prompts(path, source, frame, DataOptions())[1]
    assert [p.slice for p in prompts] == [0, 2, 4, 6]
    assert [p.mask is not None for p in prompts] == [False, True, True, False]
    np.testing.assert_array_equal(prompts[1].mask, turn(drawn, frame)[2] == 3)
    assert list(prompts[0].labels) == [1, 0]
    row, column = to_upright(np.array([[1.0, 2, 0]]), frame)[0, 1:]
    assert tuple(prompts[0].points[0]) == (column, row)


BAD = {
    "not JSON": "{",
    "a list": "[]",
    "no object": '{"objects": {}}',
    "space": '{"space": "pixels", "objects": {"1": [{"box": [[0,0,0],[1,1,0]]}]}}',
    "name": '{"objects": {"liver": [{"box": [[0,0,0],[1,1,0]]}]}}',
    "unknown key": '{"objects": {"1": [{"bbox": [[0,0,0],[1,1,0]]}]}}',
    "two slices": '{"objects": {"1": [{"box": [[0,0,0],[1,1,3]]}]}}',
    "outside": '{"objects": {"1": [{"points": [[0,0,99]]}]}}',
    "not finite": '{"objects": {"1": [{"points": [[0,0,NaN]]}]}}',
    "flat point": '{"objects": {"1": [{"points": [[0,0]]}]}}',
    "labels": '{"objects": {"1": [{"points": [[0,0,0]], "labels": [2]}]}}',
    "nothing": '{"objects": {"1": [{}]}}',
    "climbing mask": '{"objects": {"1": [{"mask": "../image.nii.gz"}]}}',
    "mask beside box": '{"objects": {"1": [{"box": [[0,0,2],[1,1,2]], "mask": "drawn.nii.gz"}]}}',
}


@pytest.mark.parametrize("name", BAD)
def test_bad_prompt_files_are_refused_and_nothing_is_written(network, tmp_path, name):
    folder = tmp_path / "prompts"
    folder.mkdir()
    source = write(tmp_path / "image.nii.gz", AFFINES["RAS"])
    drawn = nib.Nifti1Image(np.ones(SHAPE, np.uint8), AFFINES["RAS"])
    drawn.set_sform(AFFINES["RAS"], 1)
    drawn.set_qform(AFFINES["RAS"], 1)
    drawn.header.set_xyzt_units("mm")
    nib.save(drawn, folder / "drawn.nii.gz")
    path = folder / "prompts.json"
    path.write_text(BAD[name])
    target = tmp_path / "out.nii.gz"
    with pytest.raises(DataError):
        predict_prompted(network, source, path, target, DataOptions())
    assert not target.exists()


def test_flags_reach_the_prediction(monkeypatch, tmp_path):
    given = []

    def record(*_, **options):
        given.append(options)
        return {"target": "labels.nii.gz", "objects": {}}

    monkeypatch.setattr(sam2, "load", lambda *_, **__: None)
    monkeypatch.setattr("sss_jax.predict_prompts.predict_prompted", record)
    files = ["--prompts", "p.json", "-i", "a.nii.gz", "-o", "b.nii.gz"]
    command = ["predict", "--checkpoint", "c", *files]
    assert cli.main(command) == 0
    assert cli.main([*command, "--clean-area", "8", "--no-overlap"]) == 0
    assert given == [{"clean_area": 0, "overlap": True}, {"clean_area": 8, "overlap": False}]


def test_a_window_replaces_percentiles():
    options = data_options((-160.0, 240.0))
    assert (options.normalise, options.window_low, options.window_high) == ("window", -160, 240)
    assert data_options(None) == DataOptions()
