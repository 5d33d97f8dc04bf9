"""Folders of labels in, tables out: pairing, grids, units, conventions and hostile names."""

import csv
import json
import math
import os

import nibabel as nib
import numpy as np
import pytest

from sss_jax.data.folders import PREDICTION_STAMP
from sss_jax.errors import ConfigError, DataError
from sss_jax.evaluate import evaluate, plain_cell

SHAPE = (8, 7, 5)
AFFINE = np.diag((1.5, 2.0, 4.0, 1.0))


def block(label=1, shift=0):
    array = np.zeros(SHAPE, np.uint8)
    array[2 + shift : 4 + shift, 2:5, 1:3] = label
    return array


def save(folder, name, array, affine=AFFINE, code=1, unit="mm"):
    folder.mkdir(exist_ok=True, parents=True)
    image = nib.Nifti1Image(array, affine)
    image.header.set_xyzt_units(unit, "sec")
    image.set_sform(affine, code)
    image.set_qform(affine, code)
    nib.save(image, folder / f"{name}.nii.gz")


@pytest.fixture
def folders(tmp_path):
    return tmp_path / "pred", tmp_path / "ref", tmp_path / "out"


def table(folder):
    with open(folder / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_scores_and_files(folders):
    pred, ref, out = folders
    save(pred, "a", block(shift=1))
    save(ref, "a", block())
    save(pred, "b", block(2))
    save(ref, "b", block(2))
    save(ref, "train", block(3))
    summary = evaluate(pred, ref, out, tolerance=1.5)

    rows = table(out)
    assert [(r["case"], r["class"], r["status"]) for r in rows] == [
        ("a", "1", "found"),
        ("a", "2", "absent"),
        ("b", "1", "absent"),
        ("b", "2", "found"),
    ]
    assert float(rows[0]["dice"]) == 0.5
    assert float(rows[0]["hd95_mm"]) == 1.5  # one voxel along the first axis
    assert float(rows[0]["nsd"]) == 1.0
    assert (rows[0]["voxels_prediction"], rows[0]["voxels_reference"]) == ("12", "12")
    assert rows[1]["dice"] == rows[1]["hd95_mm"] == ""

    written = json.loads((out / "summary.json").read_text())
    assert written == json.loads(json.dumps(summary.to_json()))
    assert written["cases"] == 2
    assert written["references_without_prediction"] == 1
    assert written["nsd_tolerance"] == 1.5
    assert [c["dice"]["mean"] for c in written["classes"]] == [0.5, 1.0]
    assert [c["absent"] for c in written["classes"]] == [1, 1]
    assert written["classes"][0]["hd95_mm"]["mean"] == 1.5
    assert written["mean"]["dice"] == 0.75
    assert any("diagonal" in line for line in written["conventions"])
    assert len(written["files"]["a"]["prediction"]) == 64
    assert written["files"]["b"]["prediction"] == written["files"]["b"]["reference"]
    assert {p.name for p in out.iterdir()} == {"metrics.csv", "summary.json"}


def test_missed_and_spurious_cost_the_diagonal(folders):
    pred, ref, out = folders
    empty = np.zeros(SHAPE, np.uint8)
    save(pred, "missed", empty)
    save(ref, "missed", block())
    save(pred, "spurious", block())
    save(ref, "spurious", empty)
    save(pred, "absent", empty)
    save(ref, "absent", empty)
    summary = evaluate(pred, ref, out).to_json()
    diagonal = math.hypot(8 * 1.5, 7 * 2.0, 5 * 4.0)
    rows = {r["case"]: r for r in table(out)}
    for case in ("missed", "spurious"):
        assert rows[case]["status"] == case
        assert float(rows[case]["dice"]) == 0
        assert float(rows[case]["hd95_mm"]) == pytest.approx(diagonal, rel=1e-5)
    assert rows["absent"]["dice"] == ""
    (row,) = summary["classes"]
    assert (row["counted"], row["missed"], row["spurious"], row["absent"]) == (2, 1, 1, 1)
    assert row["dice"]["mean"] == 0
    assert row["asd_mm"]["mean"] == pytest.approx(diagonal)
    assert "1 missed, 1 spurious, 1 absent" in evaluate(pred, ref).render()


def test_unknown_voxel_size_gives_voxels(folders):
    pred, ref, out = folders
    for folder, shift in ((pred, 1), (ref, 0)):
        save(folder, "a", block(shift=shift), code=0, unit="unknown")
    summary = evaluate(pred, ref, out)
    assert summary.unit == "voxel"
    assert float(table(out)[0]["hd95_voxel"]) == 1.0  # pixdim is 1.5 and means nothing
    assert "HD95 voxel" in summary.render()
    assert "hd95_voxel" in summary.to_json()["mean"]
    for folder in (pred, ref):
        save(folder, "b", block())
    with pytest.raises(DataError, match="1 of 2 cases do not state their voxel size, such as a"):
        evaluate(pred, ref)
    assert evaluate(pred, ref, cases=["b"]).unit == "mm"


@pytest.mark.parametrize(("code", "unit"), [(1, "unknown"), (0, "mm")])
def test_one_hint_of_millimetres_is_enough(folders, code, unit):
    pred, ref, _ = folders
    for folder in (pred, ref):
        save(folder, "a", block(), code=code, unit=unit)
    assert evaluate(pred, ref).unit == "mm"


def test_metres_and_microns_become_millimetres(folders):
    pred, ref, out = folders
    for unit, factor in (("meter", 1e-3), ("micron", 1e3)):
        for folder, shift in ((pred, 1), (ref, 0)):
            save(folder, "a", block(shift=shift), AFFINE * factor, unit=unit)
        evaluate(pred, ref, out)
        assert float(table(out)[0]["hd95_mm"]) == pytest.approx(1.5)


def test_all_problems_are_listed_at_once_and_nothing_is_written(folders):
    pred, ref, out = folders
    save(pred, "shape", block()[1:])
    save(ref, "shape", block())
    moved = AFFINE.copy()
    moved[0, 3] = 0.3
    save(pred, "moved", block(), moved)
    save(ref, "moved", block())
    save(pred, "flipped", block(), AFFINE @ np.diag((-1.0, 1, 1, 1)))
    save(ref, "flipped", block())
    save(pred, "lost", block(), code=0)
    save(ref, "lost", block())
    save(pred, "cut", block())
    save(ref, "cut", block())
    path = pred / "cut.nii.gz"
    path.write_bytes(path.read_bytes()[:-20])
    save(pred, "float", block().astype(np.float32) * 1.5)
    save(ref, "float", block())
    save(pred, "fine", block())
    save(ref, "fine", block())
    with pytest.raises(DataError) as caught:
        evaluate(pred, ref, out)
    message = str(caught.value)
    assert "6 problems" in message
    for name in ("shape", "moved", "flipped", "lost", "cut", "float"):
        assert f"{name}.nii.gz" in message
    assert "fine.nii.gz" not in message
    assert not out.exists()


def test_tiny_rounding_of_the_affine_is_accepted(folders):
    pred, ref, _ = folders
    save(pred, "a", block(), AFFINE + np.eye(4) * (1e-4, 1e-4, 1e-4, 0))
    save(ref, "a", block())
    assert evaluate(pred, ref).to_json()["mean"]["dice"] == 1.0


def test_pairing_problems(folders):
    pred, ref, _ = folders
    with pytest.raises(DataError, match="is no folder"):
        evaluate(pred, ref)
    pred.mkdir()
    ref.mkdir()
    with pytest.raises(DataError, match=r"no \.nii"):
        evaluate(pred, ref)
    save(pred, "a", block())
    with pytest.raises(DataError, match="a: no reference in"):
        evaluate(pred, ref)
    save(ref, "a", block())
    with pytest.raises(DataError, match="b: no prediction in"):
        evaluate(pred, ref, cases=["a", "b"])
    (pred / "a.nii").write_bytes(b"")
    with pytest.raises(DataError, match="has the same name"):
        evaluate(pred, ref)


def test_number_and_names_of_classes(folders):
    pred, ref, out = folders
    save(pred, "a", block(2))
    save(ref, "a", block(2))
    named = evaluate(pred, ref, out, class_names=["liver", "=HYPERLINK(1)", "x"])
    assert named.to_json()["classes"][0]["name"] == "liver"
    assert [r["name"] for r in table(out)] == ["liver", "'=HYPERLINK(1)", "x"]
    assert [c["counted"] for c in named.to_json()["classes"]] == [0, 1, 0]
    with pytest.raises(DataError, match=r"outside 0\.\.1"):
        evaluate(pred, ref, num_classes=1)
    with pytest.raises(ConfigError, match="2 class names for 3"):
        evaluate(pred, ref, num_classes=3, class_names=["a", "b"])
    for wrong in (-1.0, math.nan, math.inf):
        with pytest.raises(ConfigError, match="tolerance"):
            evaluate(pred, ref, tolerance=wrong)


def test_names_come_from_the_predictions_own_record(folders):
    pred, ref, _ = folders
    save(pred, "a", block())
    save(ref, "a", block())
    stamp = pred / PREDICTION_STAMP
    stamp.write_text(json.dumps({"class_names": ["liver", "spleen"]}))
    assert evaluate(pred, ref).class_names == ("liver", "spleen")
    assert evaluate(pred, ref, num_classes=1).class_names == ("class 1",)
    stamp.write_text("{}")
    with pytest.raises(DataError, match=r"predict\.json does not name the classes"):
        evaluate(pred, ref)


def test_nothing_but_background_anywhere(folders):
    pred, ref, out = folders
    empty = np.zeros(SHAPE, np.uint8)
    save(pred, "a", empty)
    save(ref, "a", empty)
    summary = evaluate(pred, ref, out)
    assert summary.to_json()["mean"] == dict.fromkeys(
        ("dice", "jaccard", "nsd", "hd95_mm", "asd_mm")
    )
    json.loads((out / "summary.json").read_text(), parse_constant=pytest.fail)
    assert "1 absent" in summary.render()


@pytest.mark.parametrize("name", ["=cmd|' /C calc'!A0", "@SUM(1)", "+1", "-1", "\tx", "a,b", '"q"'])
def test_case_names_cannot_become_formulas(folders, name):
    if os.name == "nt":
        pytest.skip("not a file name on Windows")
    name = name.replace("/", "_")
    pred, ref, out = folders
    save(pred, name, block())
    save(ref, name, block())
    evaluate(pred, ref, out)
    (row,) = table(out)
    assert row["case"] == plain_cell(name)
    assert not row["case"].startswith(("=", "+", "-", "@", "\t"))
    assert row["status"] == "found"


def test_render_is_aligned(folders):
    pred, ref, _ = folders
    for name, shift in (("a", 1), ("b", 0)):
        save(pred, name, block(shift=shift))
        save(ref, name, block())
    lines = (
        evaluate(pred, ref, class_names=["myocardium of the left ventricle"]).render().split("\n")
    )
    assert lines[0] == "2 cases"
    assert "0.750 ± 0.354" in lines[2]
    assert lines[1].index("Dice") + len("Dice") == lines[2].index("0.354") + len("0.354")
    assert lines[3].startswith("mean")
