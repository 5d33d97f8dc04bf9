"""Prediction: the input's grid, whatever its axes; bad files stay alone; nothing is redone."""

import dataclasses
import json
from pathlib import Path

import jax
import nibabel as nib
import numpy as np
import pytest

from sss_jax import config
from sss_jax.errors import CheckpointError, DataError
from sss_jax.predict import Predictor, load_predictor, predict_files, run_predict
from sss_jax.ssl import volume
from sss_jax.ssl.network import Network
from sss_jax.ssl.pcsw import volume_prompts
from sss_jax.ssl.prompts import tight_box
from sss_jax.ssl.self_sorting import empty_bank
from sss_jax.ssl.volume import make_volume_function, pad_slices
from sss_jax.train.checkpoint import Checkpointer
from sss_jax.train.state import init_all_params
from sss_jax.train.step import root_key


@pytest.fixture(scope="module")
def trained(micro):
    """(model, options, net): an untrained network is as good as any for grids and files."""
    model, options, _ = micro
    options = dataclasses.replace(
        options,
        data=dataclasses.replace(options.data, slice_axis=2),
        eval=dataclasses.replace(options.eval, slice_bucket=32, encode_batch=16),
    )
    net = jax.jit(lambda k: init_all_params(model, options, k))(root_key(0))["net"]
    return model, options, net


@pytest.fixture(scope="module")
def predictor(trained):
    model, options, net = trained
    return Predictor(options, net, make_volume_function(model, options), {"step": 0})


def write_image(path: Path, seed: int = 0, affine: np.ndarray | None = None) -> Path:
    array = np.random.default_rng(seed).integers(0, 900, (20, 24, 9)).astype(np.int16)
    image = nib.Nifti1Image(array, np.diag([2.0, 2.0, 4.0, 1.0]) if affine is None else affine)
    image.header.set_xyzt_units("mm")
    nib.save(image, path)
    return path


def test_images_without_order_look_at_the_bank(trained):
    """What the bank holds changes the masks, and only through the bank."""
    model, options, net = trained
    memory = dataclasses.replace(options.memory, kind="self_sorting", capacity=3, samples=2)
    options = dataclasses.replace(options, memory=memory)
    function = make_volume_function(model, options)
    rng = np.random.default_rng(0)
    image, mask = rng.random((16, 32, 32, 1), np.float32), np.arange(16) < 9
    empty = empty_bank(model, memory)["bank"]
    held = {k: rng.normal(size=v.shape).astype(np.float32) for k, v in empty.items()}
    held["count_K"] = np.full_like(empty["count_K"], 3)
    without = function({"net": net, "bank": empty}, image, mask).probability_SHWK1
    found = function({"net": net, "bank": held}, image, mask).probability_SHWK1
    assert np.isfinite(found).all()
    assert np.abs(found - without).max() > 1e-4
    held["count_K"] = np.zeros_like(empty["count_K"])
    same = function({"net": net, "bank": held}, image, mask).probability_SHWK1
    np.testing.assert_array_equal(same, without)


def test_features_kept_or_computed_twice(trained, predictor):
    model, options, net = trained
    rng = np.random.default_rng(0)
    image = rng.random((32, 32, 32, 1), np.float32)
    mask = np.arange(32) < 27
    again = dataclasses.replace(options, eval=dataclasses.replace(options.eval, keep_bytes=0))
    kept, *prompts = predictor.function(net, image, mask)
    computed, *same_prompts = make_volume_function(model, again)(net, image, mask)
    np.testing.assert_allclose(computed, kept, atol=1e-5)
    for one, other in zip(prompts, same_prompts, strict=True):
        np.testing.assert_array_equal(one, other)
    assert kept.shape == (32, 32, 32, options.model.num_classes + 1)
    np.testing.assert_allclose(np.asarray(kept).sum(-1), 1, atol=1e-5)
    # What lies in the padding slices reaches no real slice.
    image[27:] = 1
    changed = predictor.function(net, image, mask).probability_SHWK1
    np.testing.assert_allclose(changed[:27], kept[:27], atol=1e-5)


def test_prompts_of_a_volume_are_those_of_its_coarse_masks(trained):
    model, options, net = trained
    image = np.random.default_rng(1).random((16, 32, 32, 1), np.float32)
    mask = np.arange(16) < 11
    network = Network(model, net)
    coarse = jax.jit(lambda x: network.coarse_foreground(network.encode(x)))(image)
    # An untrained network is sure of nothing; this threshold leaves the upper part of its masks.
    pcsw = dataclasses.replace(options.pcsw, threshold=float(np.quantile(coarse, 0.7)))
    memory = dataclasses.replace(options.memory, kind="none")
    options = dataclasses.replace(options, pcsw=pcsw, memory=memory)
    _, found = volume_prompts(coarse[None], mask[None], 32 // coarse.shape[2], pcsw)
    got = make_volume_function(model, options)(net, image, mask)
    np.testing.assert_array_equal(got.prompted_SK, found.valid_S[0].T)
    assert got.prompted_SK.sum() == options.model.num_classes
    stride = 32 // coarse.shape[2]
    corners = np.swapaxes(np.asarray(found.box_S4[0]), 0, 1) * stride
    corners += np.array([0, 0, stride - 1, stride - 1], np.float32)
    prompted = np.asarray(got.prompted_SK)
    np.testing.assert_array_equal(np.asarray(got.box_SK4)[prompted], corners[prompted])
    assert not np.asarray(got.box_SK4)[~prompted].any()


def test_flipped_views_are_averaged_and_prompts_are_those_of_the_upright_one(trained, monkeypatch):
    """With a network that marks the brightest pixel and puts its box there."""
    model, options, _ = trained

    def mark(model, params, image, mask, options):
        brightest = image[..., 0] == image.max()
        box, _ = tight_box(brightest[:, None])
        return volume.VolumeOutput(brightest[..., None], box, brightest.any(axis=(1, 2))[:, None])

    monkeypatch.setattr(volume, "_segment_volume", mark)
    image = np.random.default_rng(2).random((4, 32, 32, 1), np.float32)
    average = dataclasses.replace(options.eval, flip_average=True)
    options = dataclasses.replace(options, eval=average)
    got = make_volume_function(model, options)({}, image, np.ones(4, bool))
    np.testing.assert_array_equal(got.probability_SHWK1, image == image.max())
    s, y, x, _ = np.argwhere(image == image.max())[0]
    np.testing.assert_array_equal(got.box_SK4[s, 0], [x, y, x, y])
    assert np.flatnonzero(got.prompted_SK).tolist() == [s]


def test_volumes_share_few_shapes(trained):
    options = trained[1]
    shapes = {len(pad_slices(np.zeros((n, 32, 32)), options)[0]) for n in range(1, 65)}
    assert shapes == {32, 64}


@pytest.mark.parametrize("name", ["torso_ct", "torso_mr"])
def test_predictions_lie_on_the_inputs_grid(predictor, real_data, tmp_path, name):
    """The MR volume has two negative axes."""
    sitk = pytest.importorskip("SimpleITK")
    source = real_data / "torso_ct_mr" / "images" / f"{name}.nii.gz"
    target = tmp_path / source.name
    predictor.predict_file(source, target)
    image, labels = nib.load(source), nib.load(target)
    assert labels.shape == image.shape
    np.testing.assert_array_equal(labels.affine, image.affine)
    for field in ("qform_code", "sform_code", "xyzt_units"):
        assert labels.header[field] == image.header[field]
    assert labels.get_data_dtype() == np.uint8
    a, b = sitk.ReadImage(str(source)), sitk.ReadImage(str(target))
    assert a.GetSize() == b.GetSize()
    corner = [n - 1 for n in a.GetSize()]
    for index in ([0, 0, 0], corner, [corner[0], 0, 3]):
        np.testing.assert_allclose(
            a.TransformIndexToPhysicalPoint(index),
            b.TransformIndexToPhysicalPoint(index),
            atol=1e-3,
        )


def test_a_turned_volume_is_segmented_the_same(predictor, tmp_path):
    """The same scene stored with other axes gets the same labels at the same places."""
    plain = nib.load(write_image(tmp_path / "plain.nii.gz"))
    orientation = nib.orientations.axcodes2ornt("LPI")
    turned = plain.as_reoriented(
        nib.orientations.ornt_transform(nib.orientations.io_orientation(plain.affine), orientation)
    )
    nib.save(turned, tmp_path / "turned.nii.gz")
    for name in ("plain", "turned"):
        predictor.predict_file(tmp_path / f"{name}.nii.gz", tmp_path / f"{name}_label.nii.gz")
    back = nib.as_closest_canonical(nib.load(tmp_path / "turned_label.nii.gz"))
    labels = nib.load(tmp_path / "plain_label.nii.gz")
    np.testing.assert_array_equal(np.asarray(back.dataobj), np.asarray(labels.dataobj))
    assert len(np.unique(np.asarray(labels.dataobj))) > 1, "a constant map would prove nothing"


def test_one_bad_file_does_not_stop_the_others(predictor, tmp_path):
    images, output = tmp_path / "in", tmp_path / "out"
    images.mkdir()
    output.mkdir()
    files = [write_image(images / f"case_{i}.nii.gz", i) for i in range(3)]
    content = files[1].read_bytes()
    files[1].write_bytes(content[:-30])
    lines: list[str] = []
    failures = predict_files(predictor, files, output, lines.append)
    assert list(failures) == ["case_1.nii.gz"]
    assert json.loads((output / "failures.json").read_text()) == failures
    assert {p.name for p in output.glob("*.nii.gz")} == {"case_0.nii.gz", "case_2.nii.gz"}

    files[1].write_bytes(content)
    before = {p.name: p.stat().st_mtime_ns for p in output.glob("*.nii.gz")}
    assert predict_files(predictor, files, output, lines.append) == {}
    assert not (output / "failures.json").exists()
    assert (output / "case_1.nii.gz").exists()
    assert all((output / name).stat().st_mtime_ns == t for name, t in before.items())


def test_a_run_folder_predicts(tmp_path):
    """From the checkpoint and the JSON beside it; the labels of two networks do not mix."""
    options = config.load("demo:sss", ["model.image_size=32", "eval.slice_bucket=16"])
    from sss_jax.models.sss import build_model, init_params

    net = init_params(build_model(options), root_key(0))
    workdir = tmp_path / "run"
    workdir.mkdir()
    (workdir / "config.json").write_text(config.to_json(options))
    with pytest.raises(CheckpointError):
        load_predictor(workdir)
    with Checkpointer(workdir / "checkpoints") as checkpointer:
        for step in (1, 2):
            checkpointer.save(step, {"ema": net}, meta={"step": step}, metrics={"dice": 1.0 / step})
    write_image(tmp_path / "image.nii.gz")
    output = tmp_path / "out"
    assert run_predict(workdir, tmp_path / "image.nii.gz", output) == {}
    stamp = json.loads((output / "predict.json").read_text())
    assert stamp["step"] == 1, "the best one"
    assert stamp["class_names"] == ["organ", "wall", "vessel"]
    assert nib.load(output / "image.nii.gz").shape == (20, 24, 9)
    with pytest.raises(DataError, match="other weights"):
        run_predict(workdir, tmp_path / "image.nii.gz", output, which="latest")
