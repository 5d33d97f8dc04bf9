"""Folders and splits: what is found, what is refused, what training can never open."""

import json
import os

import pytest

from sss_jax.data.cases import Split, find_cases, find_images, load_split
from sss_jax.errors import DataError

NAMES = ["p1_a", "p1_b", "p2_a", "p3_a", "p4_a"]
SPLIT = {
    "labelled": ["p1"],
    "unlabelled": ["p2"],
    "val": ["p3"],
    "test": ["p4"],
    "cases": {
        "labelled": ["p1_a", "p1_b"],
        "unlabelled": ["p2_a"],
        "val": ["p3_a"],
        "test": ["p4_a"],
    },
}


def names(cases):
    return [case.name for case in cases]


def test_finds_pairs_by_name(folder, nifti, scene):
    root = folder(["b", "a"])
    nifti(root / "images/c.nii", scene[0])
    (root / "images/.hidden.nii.gz").touch()
    (root / "images/notes.txt").touch()
    (root / "labels/orphan.nii.gz").touch()
    cases = find_cases(root)
    assert list(cases) == ["a", "b", "c"]
    assert cases["a"].label == root / "labels/a.nii.gz"
    assert cases["c"].label is None
    assert cases["c"].subject == "c"


def test_subjects_come_from_the_table(folder):
    root = folder(["a", "b"])
    (root / "cases.csv").write_text("case,patient,age\na,anna,30\n")
    cases = find_cases(root)
    assert (cases["a"].subject, cases["b"].subject) == ("anna", "b")
    (root / "cases.csv").write_text("name,age\na,30\n")
    with pytest.raises(DataError, match=r"cases\.csv: lacks the columns"):
        find_cases(root)


def msd(root, nifti, scene, content):
    for name in ("imagesTr/a", "imagesTr/b", "imagesTs/t"):
        nifti(root / f"{name}.nii.gz", scene[0])
    for name in ("labelsTr/a", "labelsTr/b"):
        nifti(root / f"{name}.nii.gz", scene[1])
    (root / "dataset.json").write_text(json.dumps(content))
    return root


def test_reads_the_decathlon_layout(tmp_path, nifti, scene):
    training = [
        {"image": f"./imagesTr/{n}.nii.gz", "label": f"./labelsTr/{n}.nii.gz"} for n in "ab"
    ]
    root = msd(tmp_path, nifti, scene, {"training": training, "test": ["./imagesTs/t.nii"]})
    cases = find_cases(root)
    assert list(cases) == ["a", "b", "t"]
    assert cases["b"].label == root / "labelsTr/b.nii.gz"
    assert cases["t"].image == root / "imagesTs/t.nii.gz"  # the list leaves out .gz
    assert cases["t"].label is None


def test_reads_the_nnunet_layout(tmp_path, nifti, scene):
    root = msd(tmp_path, nifti, scene, {"channel_names": {"0": "MRI"}, "labels": {"background": 0}})
    for path in root.glob("images*/*"):
        path.rename(path.with_name(path.name.replace(".nii", "_0000.nii")))
    cases = find_cases(root)
    assert list(cases) == ["a", "b", "t"]
    assert cases["a"].image.name == "a_0000.nii.gz"
    assert cases["a"].label.name == "a.nii.gz"
    nifti(root / "imagesTr/a_0001.nii.gz", scene[0])
    with pytest.raises(DataError, match=r"2 channels \(0000, 0001\)"):
        find_cases(root)


def test_names_that_merely_start_alike_are_not_taken_for_channels(folder, nifti, scene):
    root = folder(["scan"])
    nifti(root / "images/scan12345.nii", scene[0])
    assert list(find_cases(root)) == ["scan", "scan12345"]


def test_numbered_cases_are_not_taken_for_channels(folder, tmp_path):
    assert list(find_cases(folder(["scan_0000", "scan_0001"]))) == ["scan_0000", "scan_0001"]
    bare = folder(["scan_0000", "scan_0001"], labels=False, root=tmp_path / "bare")
    assert list(find_cases(bare)) == ["scan_0000", "scan_0001"]


@pytest.mark.parametrize(
    "listed",
    ["../secret.nii.gz", "/etc/passwd", "imagesTr/../../secret.nii.gz", "a\0b"],
)
def test_dataset_json_cannot_leave_the_folder(tmp_path, nifti, scene, listed):
    nifti(tmp_path / "secret.nii.gz", scene[0])
    for entry in ({"image": listed}, {"image": "imagesTr/a.nii.gz", "label": listed}):
        root = msd(tmp_path / "data", nifti, scene, {"training": [entry]})
        with pytest.raises(DataError, match=r"dataset\.json: names the file .*leads out of"):
            find_cases(root)


@pytest.mark.parametrize(
    "content", [{"training": 5}, {"training": [7]}, {"training": [{"image": ["a", "b"]}]}]
)
def test_strange_dataset_json_is_refused(tmp_path, nifti, scene, content):
    with pytest.raises(DataError, match=r"dataset\.json"):
        find_cases(msd(tmp_path, nifti, scene, content))


@pytest.mark.parametrize("where", ["file", "folder", "label"])
def test_links_out_of_the_folder_are_refused(folder, tmp_path, nifti, scene, where):
    root = folder(["a"])
    outside = nifti(tmp_path / "outside/x.nii.gz", scene[0])
    if where == "folder":
        (root / "labels").rename(tmp_path / "moved")
        (root / "labels").symlink_to(tmp_path / "moved")
    else:
        (root / {"file": "images", "label": "labels"}[where] / "x.nii.gz").symlink_to(outside)
    with pytest.raises(DataError, match="leads out of the data folder"):
        find_cases(root)


def test_a_link_to_the_folder_itself_is_fine(folder, tmp_path):
    (tmp_path / "link").symlink_to(folder(["a"]))
    assert list(find_cases(tmp_path / "link")) == ["a"]


def test_two_files_of_one_name_are_refused(folder, nifti, scene):
    root = folder(["a"])
    nifti(root / "images/a.nii", scene[0])
    with pytest.raises(DataError, match=r"same case name as a\.nii"):
        find_cases(root)
    with pytest.raises(DataError, match=r"same case name as a\.nii"):
        find_images(root / "images")


def test_empty_and_missing_folders_say_what_to_do(tmp_path):
    with pytest.raises(DataError, match=r"holds no \.nii .*put volumes into images/"):
        find_cases(tmp_path)
    with pytest.raises(DataError, match="is no folder"):
        find_cases(tmp_path / "absent")


def test_finds_images_to_predict(folder, nifti, scene, tmp_path):
    root = folder(["b", "a"])
    assert [p.name for p in find_images(root)] == ["a.nii.gz", "b.nii.gz"]
    assert [p.name for p in find_images(root / "images")] == ["a.nii.gz", "b.nii.gz"]
    assert find_images(root / "images/a.nii.gz") == [root / "images/a.nii.gz"]
    with pytest.raises(DataError, match="does not exist"):
        find_images(root / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"holds no \.nii"):
        find_images(tmp_path / "empty")


def test_loads_a_split(folder):
    split = load_split(folder(NAMES, split=SPLIT), "split.json")
    assert names(split.labelled) == ["p1_a", "p1_b"]
    assert {c.subject for c in split.labelled} == {"p1"}
    assert names(split.cases) == NAMES
    assert [c.label is None for c in split.cases] == [False, False, True, False, False]


def test_unlabelled_labels_need_not_exist(folder):
    root = folder(NAMES, split=SPLIT)
    (root / "labels/p2_a.nii.gz").unlink()
    assert load_split(root, "split.json").unlabelled[0].label is None
    with pytest.raises(DataError, match="without a label file: p2_a"):
        load_split(root, "split.json", all_labels=True)


def test_subjects_alone_or_cases_alone_are_enough(folder):
    whole = load_split(folder(NAMES, split=SPLIT), "split.json")
    subjects = {k: v for k, v in SPLIT.items() if k != "cases"}
    assert load_split(folder(NAMES, split=subjects), "split.json") == whole
    alone = load_split(folder(NAMES, split={"cases": SPLIT["cases"]}), "split.json")
    assert names(alone.cases) == names(whole.cases)


def test_the_ceiling_uses_all_labels(folder):
    split = load_split(folder(NAMES, split=SPLIT), "split.json", all_labels=True)
    assert names(split.labelled) == ["p1_a", "p1_b", "p2_a"]
    assert all(c.label is not None for c in split.labelled)
    assert split.unlabelled == ()


def test_fewer_labelled_subjects(folder):
    wider = SPLIT | {"labelled": ["p2", "p1"], "unlabelled": []}
    wider["cases"] = SPLIT["cases"] | {"labelled": ["p1_a", "p1_b", "p2_a"], "unlabelled": []}
    root = folder(NAMES, split=wider)
    split = load_split(root, "split.json", labelled_subjects=1)
    assert names(split.labelled) == ["p2_a"]  # the order of the file counts
    assert names(split.unlabelled) == ["p1_a", "p1_b"]
    assert all(c.label is None for c in split.unlabelled)
    both = load_split(root, "split.json", labelled_subjects=1, all_labels=True)
    assert sorted(names(both.labelled)) == ["p1_a", "p1_b", "p2_a"]
    with pytest.raises(DataError, match="has 2 labelled subjects; 3 are asked for"):
        load_split(root, "split.json", labelled_subjects=3)


def test_fewer_subjects_need_to_be_known(folder):
    strange = SPLIT | {"labelled": ["anna"]}
    root = folder(NAMES, split=strange)
    with pytest.raises(DataError, match=r"subject of labelled cases: p1_a, p1_b.*cases\.csv"):
        load_split(root, "split.json", labelled_subjects=1)
    (root / "cases.csv").write_text("case,subject\np1_a,anna\np1_b,anna\n")
    assert len(load_split(root, "split.json", labelled_subjects=1).labelled) == 2


def test_the_longest_subject_name_wins(folder):
    split = {"labelled": ["p"], "unlabelled": ["p_1"], "val": ["p_12"]}
    found = load_split(folder(["p_1_x", "p_12_x", "p-x", "px_1"], split=split), "split.json")
    assert names(found.labelled) == ["p-x"]
    assert names(found.unlabelled) == ["p_1_x"]
    assert names(found.val) == ["p_12_x"]


LEAKS = {
    "case": ({"cases": SPLIT["cases"] | {"val": ["p3_a", "p1_a"]}}, r"p1_a \(labelled, val\)"),
    "subject": ({"test": ["p4", "p1"]}, r"subjects in two parts: p1 \(labelled, test\)"),
    "hidden": (
        {"cases": SPLIT["cases"] | {"labelled": ["p1_a"], "test": ["p1_b"]}},
        r"subjects in two parts: p1 \(labelled, test\)",
    ),
    "twice": ({"val": ["p3", "p3"]}, "twice under 'val': p3"),
    "number": ({"val": [3]}, "no list of names under 'val'"),
    "string": ({"val": "p3"}, "no list of names under 'val'"),
    "cases": ({"cases": ["p1_a"]}, "no object under 'cases'"),
    "none": ({"cases": {}}, "lists no case"),
    "absent": (
        {"cases": SPLIT["cases"] | {"val": ["p3_a", "p9", "p8"]}},
        "cases without an image: p9, p8",
    ),
    "traversal": ({"cases": SPLIT["cases"] | {"val": ["../p3_a"]}}, r"without an image: \.\./p3_a"),
}


@pytest.mark.parametrize("leak", LEAKS)
def test_wrong_splits_are_refused(folder, leak):
    change, message = LEAKS[leak]
    root = folder(NAMES, split=SPLIT | change)
    with pytest.raises(DataError, match=message):
        load_split(root, "split.json")


def test_subjects_without_images_are_listed(folder):
    split = {"labelled": ["p1", "p7"], "unlabelled": ["p2", "p8"]}
    with pytest.raises(DataError, match="subjects without an image: p7, p8"):
        load_split(folder(NAMES, split=split), "split.json")


def test_missing_labels_are_all_listed(folder):
    root = folder(NAMES, split=SPLIT)
    for name in ("p1_b", "p4_a", "p2_a"):
        (root / f"labels/{name}.nii.gz").unlink()
    with pytest.raises(DataError, match=r"without a label file: p1_b, p4_a\."):
        load_split(root, "split.json")


def test_broken_links_and_missing_listed_files_are_named(folder, tmp_path, nifti, scene):
    root = folder(NAMES, split=SPLIT)
    (root / "images/p3_a.nii.gz").unlink()
    (root / "images/p3_a.nii.gz").symlink_to(root / "images/gone.nii.gz")
    with pytest.raises(DataError, match="image cannot be read: p3_a"):
        load_split(root, "split.json")


def test_a_missing_split_shows_the_form_or_the_choice(folder):
    root = folder(NAMES)
    with pytest.raises(DataError, match=r'(?s)is missing.*write one:.*"labelled"'):
        load_split(root, "split.json")
    (root / "split_small.json").write_text(json.dumps(SPLIT))
    with pytest.raises(DataError, match=r"set data\.split to one of split_small\.json"):
        load_split(root, "split.json")


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"{", "not valid JSON"), (b"[]", "no JSON object"), (b"\xff\xfe\x00", "not UTF-8"),
     (b"[" * 10**6, "not valid JSON")],
)  # fmt: skip
def test_broken_split_files_are_refused(folder, content, message):
    root = folder(NAMES)
    (root / "split.json").write_bytes(content)
    with pytest.raises(DataError, match=message):
        load_split(root, "split.json")


def test_a_split_file_elsewhere_must_be_named_in_full(folder, tmp_path):
    root = folder(NAMES)
    (tmp_path / "mine.json").write_text(json.dumps(SPLIT))
    with pytest.raises(DataError, match="leads out of the data folder"):
        load_split(root, "../mine.json")
    assert len(load_split(root, str(tmp_path / "mine.json")).cases) == 5


def test_the_digest_follows_the_cases(folder):
    root = folder(NAMES, split=SPLIT)
    split = load_split(root, "split.json")
    assert split.digest == load_split(root, "split.json").digest
    assert split.digest != load_split(root, "split.json", all_labels=True).digest
    fewer = split.without(["p2_a", "absent"])
    assert names(fewer.cases) == ["p1_a", "p1_b", "p3_a", "p4_a"]
    assert fewer.digest != split.digest
    moved = Split(split.unlabelled, split.labelled, split.val, split.test)
    assert moved.digest != split.digest


@pytest.mark.skipif(os.name != "posix", reason="file names of any bytes")
def test_file_names_of_any_bytes_are_found(folder, nifti, scene):
    root = folder(["a"])
    odd = os.fsdecode(b"caf\xe9")
    nifti(root / f"images/{odd}.nii.gz", scene[0])
    assert odd in find_cases(root)
    (root / "split.json").write_text(json.dumps({"cases": {"labelled": ["a", odd]}}))
    with pytest.raises(DataError, match=r"caf\\udce9"):
        load_split(root, "split.json")


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("acdc/split.json", (14, 106, 20, 20)),
        ("acdc/split_small.json", (6, 30, 10, 10)),
        ("acdc/split_paper_1.json", (2, 138, 20, 0)),
        ("hippocampus/split.json", (10, 123, 20, 47)),
        ("torso_ct_mr/split.json", (0, 0, 0, 2)),
    ],
)
def test_published_splits_load(real_data, name, counts):
    folder, file = name.split("/")
    split = load_split(real_data / folder, file)
    assert tuple(map(len, (split.labelled, split.unlabelled, split.val, split.test))) == counts


def test_real_subjects_are_known(real_data):
    split = load_split(real_data / "hippocampus", "split.json", labelled_subjects=1)
    assert names(split.labelled) == ["hippocampus_089", "hippocampus_090"]
    acdc = load_split(real_data / "acdc", "split.json", labelled_subjects=3)
    assert {c.subject for c in acdc.labelled} == {"patient021", "patient038", "patient049"}
    assert len(acdc.unlabelled) == 106 + 8
