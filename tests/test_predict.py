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


def test_features_kept_or_computed_twice(trained, predictor):
    model, options, net = trained
    rng = np.random.default_rng(0)
    image = rng.random((32, 32, 32, 1), np.float32)
    mask = np.arange(32) < 27
    again = dataclasses.replace(options, eval=dataclasses.replace(options.eval, keep_bytes=0))
    kept = predictor.function(net, image, mask)
    np.testing.assert_allclose(
        make_volume_function(model, again)(net, image, mask), kept, atol=1e-5
    )
    assert kept.shape == (32, 32, 32, options.model.num_classes + 1)
    np.testing.assert_allclose(np.asarray(kept).sum(-1), 1, atol=1e-5)
    # What lies in the padding slices reaches no real slice.
    image[27:] = 1
    changed = predictor.function(net, image, mask)
    np.testing.assert_allclose(changed[:27], kept[:27], atol=1e-5)


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
