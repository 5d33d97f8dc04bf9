"""Batches are equal bit for bit, whether scans come from NIfTI files or from prepared shards."""

import dataclasses
import shutil

import numpy as np
import pytest

from sss_jax.data.examples import place
from sss_jax.data.generated import GeneratedSource
from sss_jax.data.pipeline import Loader
from sss_jax.data.prepare import prepare_folder
from sss_jax.data.prepared_source import PreparedSource
from sss_jax.data.sources import FolderSource, open_source
from sss_jax.data.synthetic import SplitSizes, write_phantoms
from sss_jax.errors import ConfigError
from sss_jax.options import DataOptions, ModelOptions, Options, TrainOptions
from tests.poison import garbage_labels

OPTIONS = Options(
    model=ModelOptions(image_size=32, num_classes=3),
    data=DataOptions(clip_slices=4, max_stride=2),
    train=TrainOptions(steps=4, labelled_batch=4, unlabelled_batch=4),
)
SPLIT = {"labelled": ["s0", "s1", "s2"], "unlabelled": ["s3", "s4"], "val": ["s5"]}
NAMES = [f"s{i}_x" for i in range(6)]


def changed(options=OPTIONS, **groups):
    parts = {g: dataclasses.replace(getattr(options, g), **new) for g, new in groups.items()}
    return dataclasses.replace(options, **parts)


def batches(source, options, **hosts):
    split = source.split(options.data, options.train)
    semi = bool(split.unlabelled)
    groups = (options.model, options.data, options.train)
    return list(Loader(split, *groups, read=source.read, semi=semi, **hosts).iterate())


def assert_same_bits(got, want):
    assert len(got) == len(want) > 0
    for mine, other in zip(got, want, strict=True):
        assert mine.keys() == other.keys()
        for stream, fields in other.items():
            assert mine[stream].keys() == fields.keys()
            for name, array in fields.items():
                assert mine[stream][name].dtype == array.dtype
                assert mine[stream][name].tobytes() == array.tobytes(), (stream, name)


def both(root, tmp_path, options=OPTIONS, shards=2):
    report = prepare_folder(root, tmp_path / "prepared", options, shards=shards)
    assert not report.problems
    sources = open_source(root, options), open_source(tmp_path / "prepared", options)
    assert [type(s) for s in sources] == [FolderSource, PreparedSource]
    return sources


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory):
    """Volumes stored along several orientations, some oblique."""
    sizes = SplitSizes(labelled=3, unlabelled=4, val=2, test=0)
    return write_phantoms(tmp_path_factory.mktemp("data") / "phantoms", subjects=sizes, seed=2)


@pytest.mark.parametrize(
    "data",
    [
        {},
        {"normalise": "min_max", "slice_axis": 0},
        {"normalise": "window", "window_low": 50.0, "window_high": 700.0, "fit": "stretch"},
        {"percentile_low": 3.0, "percentile_high": 90.0, "slice_axis": 1, "max_stride": 5},
        {"clip_slices": 30, "foreground_share": 0.0},
        {"cache_bytes": 0, "threads": 4},
    ],
)
def test_batches_are_equal_bit_for_bit(phantoms, tmp_path, data):
    options = changed(data=data)
    nifti, prepared = both(phantoms, tmp_path, options)
    splits = [source.split(options.data, options.train) for source in (nifti, prepared)]
    assert splits[0].digest == splits[1].digest
    assert_same_bits(batches(prepared, options), batches(nifti, options))


@pytest.fixture
def odd(folder, nifti):
    """Floats, scaled integers, big-endian and flipped volumes, and one shorter than a clip."""
    root = folder(NAMES, slices=[6, 9, 3, 6, 12, 5], split=SPLIT)
    rng = np.random.default_rng(1)
    flipped = np.diag([-1.5, 1.0, -4.0, 1.0])
    stored = {
        "s0_x": (rng.normal(0, 300, (9, 8, 6)), None, np.float32, {}),
        "s1_x": (rng.integers(0, 4000, (9, 8, 9)), flipped, np.int16, {"slope": 0.37}),
        "s2_x": (rng.integers(0, 60_000, (9, 8, 3)), None, np.uint16, {"endian": ">"}),
        "s3_x": (rng.integers(0, 3000, (9, 8, 6)), None, np.int16, {"slope": 1, "inter": -1024}),
        "s4_x": (rng.normal(0, 1e-3, (9, 8, 12)), flipped, np.float64, {}),
        "s5_x": (rng.integers(0, 255, (9, 8, 5)), flipped, np.uint8, {"sform": 0}),
    }
    for name, (array, affine, dtype, more) in stored.items():
        nifti(root / f"images/{name}.nii.gz", array, affine, dtype, **more)
        if name not in ("s3_x", "s4_x"):
            label = rng.integers(0, 3, array.shape)
            kept = {k: v for k, v in more.items() if k == "sform"}
            nifti(root / f"labels/{name}.nii.gz", label, affine, np.uint8, **kept)
    return root


def test_odd_files_give_equal_batches(odd, tmp_path):
    nifti, prepared = both(odd, tmp_path)
    assert_same_bits(batches(prepared, OPTIONS), batches(nifti, OPTIONS))
    types = {name: facts.image.dtype for name, facts in prepared._facts.items()}
    assert types == {
        "s0_x": "float32",
        "s1_x": "float32",
        "s2_x": "uint16",
        "s3_x": "int16",
        "s4_x": "float32",
        "s5_x": "uint8",
    }


def test_validation_cases_are_equal(odd, tmp_path):
    sources = both(odd, tmp_path)
    scans = [
        s.read(s.split(OPTIONS.data, OPTIONS.train).val[0], 3, OPTIONS.data).read() for s in sources
    ]
    assert scans[0].frame == scans[1].frame
    assert scans[0].image_SHW.tobytes() == scans[1].image_SHW.tobytes()
    assert scans[0].label_SHW.tobytes() == scans[1].label_SHW.tobytes()
    examples = [place(scan, 32, OPTIONS.data) for scan in scans]
    assert examples[0].placement == examples[1].placement


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_hosts_read_parts_of_one_batch(odd, tmp_path, hosts):
    nifti, prepared = both(odd, tmp_path)
    parts = [batches(prepared, OPTIONS, process_index=i, process_count=hosts) for i in range(hosts)]
    joined = [
        {
            stream: {k: np.concatenate([p[stream][k] for p in step]) for k in step[0][stream]}
            for stream in step[0]
        }
        for step in zip(*parts, strict=True)
    ]
    assert_same_bits(joined, batches(nifti, OPTIONS))


@pytest.mark.parametrize(
    "train", [{"all_labels": True}, {"labelled_subjects": 1}, {"labelled_subjects": 2, "seed": 5}]
)
def test_a_folder_prepared_without_configuration_serves_all_splits(phantoms, tmp_path, train):
    labelled = write_phantoms(
        tmp_path / "all", subjects=SplitSizes(3, 4, 2, 0), seed=2, all_labels=True
    )
    prepare_folder(labelled, tmp_path / "out", shards=3)
    options = changed(train=train)
    nifti, prepared = FolderSource(labelled), PreparedSource(tmp_path / "out")
    assert_same_bits(batches(prepared, options), batches(nifti, options))


@pytest.mark.parametrize("harm", ["destroy", "remove"])
def test_withheld_labels_reach_no_batch(folder, tmp_path, harm):
    """Shards of one case each: those with labels that are withheld are never opened."""
    root = folder(NAMES, split=SPLIT)
    prepare_folder(root, tmp_path / "out", shards=len(NAMES))
    want = batches(PreparedSource(tmp_path / "out"), OPTIONS)
    for index in (3, 4):
        path = tmp_path / f"out/labels-0000{index}-of-00006.array_record"
        if harm == "destroy":
            path.write_bytes(b"poison")
        else:
            path.unlink()
    source = PreparedSource(tmp_path / "out")
    split = source.split(OPTIONS.data, OPTIONS.train)
    assert [case.label for case in split.unlabelled] == [None, None]
    stacks = [source.read(case, 3, OPTIONS.data) for case in split.unlabelled]
    assert [(s.labels, s.with_label, s.read().label_SHW) for s in stacks] == [(None,) * 3] * 2
    assert_same_bits(batches(source, OPTIONS), want)


def test_garbage_in_withheld_labels_changes_no_batch(folder, tmp_path):
    root = folder(NAMES, split=SPLIT)
    prepare_folder(root, tmp_path / "clean", shards=2)
    for seed, name in enumerate(("s3_x", "s4_x")):
        garbage_labels(root, name, 3, seed)
    prepare_folder(root, tmp_path / "poisoned", shards=2)
    sources = [PreparedSource(tmp_path / name) for name in ("clean", "poisoned")]
    assert sources[0]._facts["s3_x"].label != sources[1]._facts["s3_x"].label
    assert_same_bits(batches(sources[1], OPTIONS), batches(sources[0], OPTIONS))
    garbage_labels(root, "s1_x", 3, 9)
    shutil.rmtree(tmp_path / "poisoned")
    prepare_folder(root, tmp_path / "poisoned", shards=2)
    got, want = (batches(PreparedSource(tmp_path / n), OPTIONS) for n in ("poisoned", "clean"))
    with pytest.raises(AssertionError):
        assert_same_bits(got, want)


def test_synthetic_batches_are_a_function_of_seed_and_step():
    options = changed(data={"threads": 2})
    want = batches(open_source("synthetic:", options), options)
    again = changed(options, data={"threads": 0})
    assert_same_bits(batches(open_source("synthetic:", again), again), want)
    halves = [
        batches(open_source("synthetic:", options), options, process_index=i, process_count=2)
        for i in (0, 1)
    ]
    first = np.concatenate([half[0]["labelled"]["image"] for half in halves])
    assert first.tobytes() == want[0]["labelled"]["image"].tobytes()
    other = changed(options, train={"seed": 1})
    image = batches(open_source("synthetic:", other), other)[0]["labelled"]["image"]
    assert image.tobytes() != want[0]["labelled"]["image"].tobytes()
    images = [row for batch in want for row in batch["unlabelled"]["image"]]
    assert 0 <= min(map(np.min, images)) < max(map(np.max, images)) <= 1
    assert len({row.tobytes() for row in images}) > 12


@pytest.mark.parametrize("classes", [1, 2, 3, 9, 254])
def test_synthetic_labels_have_all_classes(classes):
    options = changed(model={"num_classes": classes, "image_size": 256})
    source = GeneratedSource("synthetic:", options)
    case = source.split(options.data, options.train).val[0]
    stack = source.read(case, classes, options.data)
    scan = stack.read()
    assert scan.image_SHW.shape == (8, 256, 256)
    assert stack.depth == scan.depth == 8
    np.testing.assert_array_equal(stack.with_label, scan.with_label)
    found = set(np.unique(scan.label_SHW)) - {0}
    assert found <= set(range(1, classes + 1))
    assert len(found) > 0.6 * classes


@pytest.mark.parametrize(
    ("text", "shape", "count"),
    [
        ("synthetic:", (8, 32, 32), 32),
        ("synthetic:40x24x7", (7, 40, 24), 32),
        ("synthetic:16x64x1,4", (1, 16, 64), 4),
    ],
)
@pytest.mark.parametrize(
    "train", [{}, {"all_labels": True}, {"labelled_subjects": 1}, {"labelled_subjects": 99}]
)
def test_synthetic_sizes_and_splits(text, shape, count, train):
    options = changed(train=train)
    source = open_source(text, options)
    split = source.split(options.data, options.train)
    assert len({case.name for case in split.cases}) == count
    assert len(split.val) == 2
    assert bool(split.unlabelled) != options.train.all_labels
    assert all(case.label is None for case in split.unlabelled)
    scan = source.read(split.labelled[0], 3, options.data).read()
    assert scan.image_SHW.shape == scan.label_SHW.shape == shape
    if split.unlabelled:
        stack = source.read(split.unlabelled[0], 3, options.data)
        assert stack.with_label is None
        assert stack.read().label_SHW is None
    assert batches(source, options)
    assert open_source(source.name, options).name == source.name


@pytest.mark.parametrize(
    "text", ["synthetic:12", "synthetic:0x4x4", "synthetic:9x9x9,3", "synthetic:axbxc"]
)
def test_other_forms_of_synthetic_are_refused(text):
    with pytest.raises(ConfigError, match="ROWSxCOLUMNSxSLICES"):
        open_source(text, OPTIONS)


def test_synthetic_slices_beyond_the_canvas_are_refused():
    options = changed(data={"canvas": 40})
    GeneratedSource("synthetic:40x24x7", options)
    with pytest.raises(ConfigError, match=r"24 x 41 pixels do not fit on data\.canvas=40"):
        GeneratedSource("synthetic:24x41x7", options)
