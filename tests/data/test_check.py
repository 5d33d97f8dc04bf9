"""One run of the check names every fault, its file and its fix."""

import gzip
import json

import numpy as np
import pytest

from sss_jax.data.cases import load_split
from sss_jax.data.check import check_folder
from sss_jax.errors import DataError
from sss_jax.options import DataOptions

FAULTS = {
    "images/cut.nii.gz": "truncated",
    "images/crc.nii.gz": "damaged compression",
    "images/empty.nii.gz": "is empty",
    "images/text.nii.gz": "not gzip-compressed",
    "images/gzipped.nii": "is named .nii but",
    "images/picture.png": "is no NIfTI file by its name",
    "images/nan.nii.gz": "NaN or infinite",
    "images/flat.nii.gz": "is constant",
    "images/time.nii.gz": "time points or channels",
    "labels/shape.nii.gz": "has the shape",
    "labels/shift.nii.gz": "another affine",
    "labels/half.nii.gz": "not whole numbers: 0.5",
    "labels/range.nii.gz": "outside 0..2: 3, 7",
    "labels/orphan.nii.gz": "label without an image",
}


@pytest.fixture
def faulty(folder, nifti, scene):
    """A folder with two good cases and every fault once."""
    image, label = scene
    names = (
        "cut",
        "crc",
        "empty",
        "text",
        "nan",
        "flat",
        "time",
        "shape",
        "shift",
        "half",
        "range",
    )
    root = folder(["good", "fine"])
    for name in names:
        nifti(root / f"images/{name}.nii.gz", image, dtype=np.float32)
        nifti(root / f"labels/{name}.nii.gz", label, dtype=np.float32)
    nifti(root / "labels/orphan.nii.gz", label)
    images, labels = root / "images", root / "labels"
    whole = (images / "cut.nii.gz").read_bytes()
    (images / "cut.nii.gz").write_bytes(whole[:-100])
    (images / "crc.nii.gz").write_bytes(whole[:-8] + bytes(4) + whole[-4:])
    (images / "empty.nii.gz").write_bytes(b"")
    (images / "text.nii.gz").write_text("a note")
    (images / "gzipped.nii").write_bytes(gzip.compress(whole))
    (images / "picture.png").write_bytes(b"\x89PNG")
    (images / "good.json").write_text("{}")
    nifti(images / "nan.nii.gz", np.where(image > 800, np.nan, image), dtype=np.float32)
    nifti(images / "flat.nii.gz", image * 0)
    nifti(images / "time.nii.gz", np.stack([image, image], -1))
    nifti(labels / "shape.nii.gz", label[1:])
    nifti(labels / "shift.nii.gz", label, np.eye(4) + np.eye(4, k=3))
    nifti(labels / "half.nii.gz", label * 0.5, dtype=np.float32)
    nifti(labels / "range.nii.gz", label * 3.5)
    return root


@pytest.mark.parametrize("threads", [0, 4])
def test_all_faults_are_reported_in_one_run(faulty, threads):
    report = check_folder(faulty, None, DataOptions(threads=threads), 2)
    found = {str(p.file.relative_to(faulty)): p.problem for p in report.problems}
    assert found.keys() == FAULTS.keys()
    for file, message in FAULTS.items():
        assert message in found[file]
    assert all(p.fix for p in report.problems)
    text = report.render()
    assert all(file in text and message in text for file, message in FAULTS.items())
    assert f"{len(FAULTS)} problems" in text


def test_a_sound_folder_has_no_problem(folder):
    report = check_folder(folder(["a", "b"]), None, DataOptions())
    assert report.problems == ()
    assert "no problems" in report.render()


def test_an_empty_folder_is_an_error(tmp_path):
    with pytest.raises(DataError, match=r"holds no \.nii"):
        check_folder(tmp_path)


def test_faults_of_the_folder_itself_are_collected(folder, nifti, scene, tmp_path):
    root = folder(["a", "b"])
    nifti(root / "images/b.nii.gz", scene[0])
    nifti(root / "labels/b.nii.gz", scene[1])
    nifti(root / "images/b.nii", scene[0])
    outside = nifti(tmp_path / "x.nii.gz", scene[0])
    (root / "images/link.nii.gz").symlink_to(outside)
    problems = {p.file.name: p.problem for p in check_folder(root).problems}
    assert problems.keys() == {"b.nii.gz", "link.nii.gz"}
    assert "same case name" in problems["b.nii.gz"]
    assert "leads out" in problems["link.nii.gz"]


def test_every_bad_entry_of_dataset_json_is_collected(tmp_path, nifti, scene):
    nifti(tmp_path / "imagesTr/a.nii.gz", scene[0])
    training = [
        {"image": "imagesTr/a.nii.gz"},
        {"image": "../x.nii"},
        5,
        {"image": "imagesTr/b.nii"},
    ]
    (tmp_path / "dataset.json").write_text(json.dumps({"training": training}))
    problems = sorted(p.problem for p in check_folder(tmp_path).problems)
    assert len(problems) == 3
    assert "No such file" in problems[0]
    assert "entry 5" in problems[1]
    assert "leads out" in problems[2]


def test_a_bad_split_is_one_problem_among_the_others(faulty):
    missing = check_folder(faulty, "split.json", num_classes=2)
    found = {p.file.name: p.problem for p in missing.problems}
    assert "is missing" in found["split.json"]
    assert len(found) == len(FAULTS) + 1


def test_with_a_split_no_label_of_an_unlabelled_case_is_opened(folder):
    root = folder(["a", "b", "c"], split={"labelled": ["a"], "unlabelled": ["b"]})
    (root / "labels/b.nii.gz").write_text("damaged")
    (root / "images/c.nii.gz").write_text("damaged, and in no part")
    report = check_folder(root, "split.json")
    assert report.problems == ()
    assert [bool(c.voxels) for c in report.cases] == [True, False]
    assert check_folder(root, load_split(root, "split.json")) == report
    assert {p.file.name for p in check_folder(root).problems} == {"b.nii.gz", "c.nii.gz"}


def test_a_window_that_misses_an_image_is_a_problem(folder):
    options = DataOptions(normalise="window", window_low=5000, window_high=6000)
    problems = check_folder(folder(["a"]), None, options).problems
    assert [p.problem[:11] for p in problems] == ["intensities"]


def test_a_canvas_too_small_for_an_image_is_a_problem(folder):
    root = folder(["a"])  # slices of 8 x 9
    assert not check_folder(root, None, DataOptions(canvas=9)).problems
    (problem,) = check_folder(root, None, DataOptions(canvas=8)).problems
    assert "larger than data.canvas=8" in problem.problem
    assert problem.file.name == "a.nii.gz"


def test_the_summary_counts_what_is_there(folder, nifti, scene):
    root = folder(["a"])
    lying = np.eye(4)[[1, 0, 2, 3]] * np.array((-1, -3.0, 1, 1))
    nifti(root / "images/b.nii", scene[0] - 1000, lying)
    nifti(root / "labels/b.nii", scene[1], lying)
    report = check_folder(root)
    facts = {c.name: c for c in report.cases}
    assert facts["a"].orientation == "RAS"
    assert facts["b"].orientation == "PLS"
    assert facts["b"].spacing == (1.0, 3.0, 1.0)
    assert (facts["b"].slice_axis, facts["b"].slices, facts["b"].plane) == (0, 10, (6, 12))
    assert facts["b"].voxels == {k: int((scene[1] == k).sum()) for k in range(3)}
    assert sum(report.voxels.values()) == 9 * 8 * 6 + 720
    plain = report.to_json()
    assert plain == json.loads(json.dumps(plain, allow_nan=False))
    assert plain["labels"]["1"]["cases"] == 2
    assert sum(entry["share"] for entry in plain["labels"].values()) == pytest.approx(1)
    assert any("coarsest axis differs" in note for note in report.notes)
    assert "RAS (1), PLS (1)" in report.render()


def test_settings_are_suggested(folder):
    report = check_folder(folder(["a", "b", "c"], slices=[9, 13, 30]))
    assert report.suggestion == {
        "model.num_classes": 2,
        "model.image_size": 64,
        "data.slice_axis": 2,
        "data.clip_slices": 8,
        "data.normalise": "percentile",
    }
    assert "--config.data.clip_slices=8" in report.render()


def test_a_window_is_suggested_for_ct(tmp_path, nifti, scene):
    rng = np.random.default_rng(0)
    for name in "ab":
        image = np.where(rng.random((20, 20, 9)) < 0.5, -1000, rng.normal(40, 60, (20, 20, 9)))
        nifti(tmp_path / f"images/{name}.nii.gz", image)
    suggestion = check_folder(tmp_path).suggestion
    assert suggestion["data.normalise"] == "window"
    assert suggestion["data.window_low"] == -1000
    assert 150 <= suggestion["data.window_high"] <= 250
    assert "model.num_classes" not in suggestion


def test_classes_that_no_labelled_case_shows_are_noted(folder, nifti, scene):
    root = folder(["a", "b"], split={"labelled": ["a"], "val": ["b"]})
    nifti(root / "images/a.nii.gz", scene[0])
    nifti(root / "labels/a.nii.gz", np.minimum(scene[1], 1))
    assert "no labelled case shows label 2 of 1..2" in check_folder(root, "split.json").notes


def test_volumes_without_orientation_are_noted(folder, nifti, scene):
    root = folder(["a"], labels=False)
    nifti(root / "images/b.nii.gz", scene[0], sform=0)
    notes = " ".join(check_folder(root).notes)
    assert "1 images carry no orientation" in notes
    assert "mixed" in notes


def test_hostile_names_are_shown_harmlessly(folder, nifti, scene):
    root = folder(["a"])
    (root / "images/\x1b[2J\n.nii").write_text("no volume, but a name that clears the screen")
    report = check_folder(root)
    assert "\x1b" not in report.render()
    assert "\\x1b[2J\\n" in report.render()


@pytest.mark.parametrize("name", ["torso_ct_mr", "hippocampus"])
def test_real_folders_are_sound(real_data, name):
    report = check_folder(real_data / name, "split_small.json" if name == "hippocampus" else None)
    assert report.problems == ()
    assert report.suggestion["model.num_classes"] == {"torso_ct_mr": 117, "hippocampus": 2}[name]
