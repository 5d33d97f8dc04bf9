"""Prepared shards: resumed, verified and repaired to the same bytes; faults are found and named."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
import weakref

import numpy as np
import pytest

from sss_jax import cli
from sss_jax.data import prepare_shard, records
from sss_jax.data.cases import load_split
from sss_jax.data.folders import find_cases, find_images
from sss_jax.data.prepare import prepare_folder
from sss_jax.data.prepared import read_manifest, write_manifest
from sss_jax.data.prepared_source import PreparedSource
from sss_jax.errors import ConfigError, DataError
from sss_jax.options import DataOptions, ModelOptions, Options, TrainOptions
from tests.poison import nan_image, truncated_labels

NAMES = [f"s{i}_x" for i in range(5)]
SPLIT = {"labelled": ["s0", "s1"], "unlabelled": ["s2", "s3"], "val": ["s4"]}
OPTIONS = Options(model=ModelOptions(image_size=32, num_classes=2))


@pytest.fixture
def root(folder):
    return folder(NAMES, slices=[6, 4, 3, 5, 2], split=SPLIT)


@pytest.fixture
def out(root, tmp_path):
    prepare_folder(root, tmp_path / "out", shards=3)
    return tmp_path / "out"


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def read_all(folder):
    """Read every slice of every case."""
    source = PreparedSource(folder)
    split = source.split(DataOptions(), TrainOptions())
    return {c.name: source.read(c, None, DataOptions()).read() for c in split.cases}


def fault_of(folder):
    try:
        read_all(folder)
    except DataError as error:
        return str(error)
    return ""


def flip(path, position, bit=2):
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << bit
    path.write_bytes(data)


def test_a_folder_holds_shards_splits_and_a_manifest(root, out):
    shards = [f"{kind}-0000{i}-of-00003.array_record" for i in range(3) for kind in "il"]
    names = [n.replace("i-", "images-").replace("l-", "labels-") for n in shards]
    assert sorted(content(out)) == sorted([*names, "prepared.json", "split.json"])
    assert (out / "split.json").read_bytes() == (root / "split.json").read_bytes()
    manifest = read_manifest(out / "prepared.json")
    assert [[c.name for c in s.cases] for s in manifest.shards] == [
        NAMES[:2],
        NAMES[2:4],
        NAMES[4:],
    ]
    assert [s.images.records for s in manifest.shards] == [10, 8, 2]
    assert {c.image.dtype for s in manifest.shards for c in s.cases} == {"int16"}


def test_the_same_input_gives_the_same_bytes(root, out, tmp_path):
    again = prepare_folder(root, tmp_path / "again", shards=3)
    assert content(tmp_path / "again") == content(out)
    assert (again.written, again.cases, again.slices) == (3, 5, 20)


def test_a_finished_folder_is_verified_and_not_written(root, out):
    before = {p.name: p.stat().st_mtime_ns for p in out.iterdir()}
    said = []
    report = prepare_folder(root, out, say=said.append)
    assert report.written == 0
    assert len(said) == 3
    assert all("verified" in line for line in said)
    assert before == {p.name: p.stat().st_mtime_ns for p in out.iterdir()}


class Killed(BaseException):
    """Ends the process at once, as far as this code can tell."""


@pytest.mark.parametrize("after", range(3))
def test_stopped_between_shards_it_goes_on(root, out, tmp_path, monkeypatch, after):
    calls = []

    def write(*args):
        if len(calls) == after:
            raise Killed
        calls.append(args)
        return prepare_shard.write_shard(*args)

    other = tmp_path / "other"
    with monkeypatch.context() as patch:
        patch.setattr("sss_jax.data.prepare.write_shard", write)
        with pytest.raises(Killed):
            prepare_folder(root, other, shards=3)
    assert not (other / "prepared.json").exists()
    assert prepare_folder(root, other, shards=3).written == 3 - after
    assert content(other) == content(out)


@pytest.mark.parametrize("at", [0, 3, 9, 11, 20, 31, 39])
def test_stopped_within_a_shard_it_goes_on(root, out, tmp_path, monkeypatch, at):
    """Leftovers of a killed writer lie around, under no final name."""
    count = iter(range(1000))

    def pack(*args):
        if next(count) == at:
            raise Killed
        return records.pack(*args)

    other = tmp_path / "other"
    with monkeypatch.context() as patch:
        patch.setattr(prepare_shard, "pack", pack)
        with pytest.raises(Killed):
            prepare_folder(root, other, shards=3)
    assert not (other / "prepared.json").exists()
    left = content(other)
    left.pop("preparing.json")
    assert left == {name: content(out)[name] for name in left}, "what has a final name is whole"
    (other / ".tmp-0badcafe-images-00001-of-00003.array_record").write_bytes(b"cut")
    prepare_folder(root, other)
    assert content(other) == content(out)


@pytest.mark.parametrize("name", ["prepared.json", "preparing.json", "split.json"])
def test_stopped_before_a_small_file_it_goes_on(root, out, tmp_path, monkeypatch, name):
    from sss_jax import atomic

    def replace(source, target):
        if os.path.basename(target) == name:
            raise Killed
        os.rename(source, target)

    other = tmp_path / "other"
    with monkeypatch.context() as patch:
        patch.setattr(atomic.os, "replace", replace)
        with pytest.raises(Killed):
            prepare_folder(root, other, shards=3)
    prepare_folder(root, other, shards=3)
    assert content(other) == content(out)


@pytest.mark.slow
def test_killed_at_any_moment_it_goes_on(tmp_path, folder):
    names = [f"s{i}_x" for i in range(40)]
    root = folder(names, slices=120, split={"labelled": names[:20], "unlabelled": names[20:]})
    prepare_folder(root, tmp_path / "whole", shards=8)
    command = [sys.executable, "-m", "sss_jax.cli", "data", "prepare", str(root)]
    command += [str(tmp_path / "out"), "--shards", "8"]
    rng, kills = np.random.default_rng(0), 0
    for _ in range(40):
        process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
        first = process.stderr.readline()
        time.sleep(rng.uniform(0, 0.15))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        kills += process.returncode == -signal.SIGKILL
        assert not [p for p in (tmp_path / "out").glob("images*") if p.stat().st_size == 0], first
        if process.returncode == 0:
            break
    done = subprocess.run(command, check=True, capture_output=True)
    assert done.stdout
    assert kills >= 5
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_a_damaged_shard_is_written_again(root, out):
    want = content(out)
    flip(out / "images-00001-of-00003.array_record", 66_000)
    (out / "labels-00002-of-00003.array_record").unlink()
    said = []
    assert prepare_folder(root, out, say=said.append).written == 2
    assert ["verified" in line for line in said] == [True, False, False]
    assert content(out) == want


def test_every_flipped_bit_of_a_record_is_found(out):
    """array-record finds some, the seal the rest; the message names file and case."""
    path = out / "images-00000-of-00003.array_record"
    want, data = read_all(out), path.read_bytes()
    used = [i for i, byte in enumerate(data) if byte]
    rng, found = np.random.default_rng(0), 0
    for position in rng.choice(used, 60, replace=False):
        path.write_bytes(data)
        flip(path, int(position), int(rng.integers(8)))
        if fault := fault_of(out):
            assert re.match(rf"case s[01]_x: {path}: .* damaged", fault), fault
            assert "run the same `sss-jax data prepare` again" in fault
            found += 1
            continue
        for name, scan in read_all(out).items():
            np.testing.assert_array_equal(scan.image_SHW, want[name].image_SHW)
    assert found > 50


@pytest.mark.parametrize("kind", ["image", "label"])
def test_the_seal_alone_finds_a_flipped_bit(out, monkeypatch, kind):
    """A record that was damaged before array-record summed it, or in memory."""
    honest = records.Shard.read

    def read(self, number):
        record = bytearray(honest(self, number))
        if self.path.name.startswith(kind) and number == 4:
            record[-1] ^= 16
        return bytes(record)

    monkeypatch.setattr(records.Shard, "read", read)
    want = rf"case s0_x: .*{kind}s-00000-of-.*{kind} slice 4 differs from its checksum"
    with pytest.raises(DataError, match=want):
        read_all(out)


def test_a_good_record_in_a_wrong_place_is_found(out, monkeypatch):
    honest = records.Shard.read
    monkeypatch.setattr(records.Shard, "read", lambda self, number: honest(self, number ^ 1))
    with pytest.raises(DataError, match="slice 0 differs from its checksum"):
        read_all(out)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda p: p.write_bytes(p.read_bytes()[:-5]), r"has 131,067 bytes, 131,072 were written"),
        (lambda p: p.write_bytes(b""), "has 0 bytes"),
        (lambda p: p.write_bytes(b"x" * p.stat().st_size), "is damaged: 0 of 10 records"),
    ],
)
def test_cut_and_foreign_shards_are_named(out, harm, message):
    harm(out / "images-00000-of-00003.array_record")
    with pytest.raises(DataError, match=f"case s0_x: .*images-00000-of-00003.*{message}"):
        read_all(out)


def test_a_missing_shard_is_named(out):
    (out / "images-00001-of-00003.array_record").unlink()
    with pytest.raises(DataError, match="image cannot be read: s2_x, s3_x"):
        read_all(out)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"low": ', '"low": 1', "was edited: its checksum differs"),
        ('"format": 1', '"format": 2', "has the format 2, this version reads 1"),
        ('"first": 0', '"first": 3', "checksum differs"),
        ('"sha256": "', '"sha256": "0', "checksum differs"),
    ],
)
def test_an_edited_manifest_is_refused(root, out, old, new, message):
    path = out / "prepared.json"
    path.write_text(path.read_text().replace(old, new, 1))
    for use in (PreparedSource, lambda out: prepare_folder(root, out)):
        with pytest.raises(DataError, match=message):
            use(out)


def test_a_manifest_of_another_form_is_refused(out):
    path = out / "prepared.json"
    manifest = read_manifest(path)
    write_manifest(path, dataclasses.replace(manifest, shards=("text",)))
    with pytest.raises(DataError, match="no manifest of this package"):
        PreparedSource(out)
    write_manifest(path, dataclasses.replace(manifest, shards=(None, *manifest.shards[1:])))
    with pytest.raises(DataError, match="lacks shard 0"):
        PreparedSource(out)


def test_a_folder_with_other_things_is_refused(root, out, tmp_path):
    own = tmp_path / "own"
    own.mkdir()
    (own / "thesis.txt").write_text("years of work")
    for target in (own, root):
        before = content(own)
        with pytest.raises(DataError, match=r"not of this preparation.*new or empty folder"):
            prepare_folder(root, target)
        assert content(own) == before
    (out / "thesis.txt").write_text("years of work")
    with pytest.raises(DataError, match=r"thesis\.txt"):
        prepare_folder(root, out)


def test_other_shards_and_settings_are_refused(root, out):
    with pytest.raises(ConfigError, match="3 shards, 2 are asked for"):
        prepare_folder(root, out, shards=2)
    other = dataclasses.replace(OPTIONS, data=DataOptions(normalise="min_max"))
    with pytest.raises(ConfigError, match=r"normalise='percentile'.*says 'min_max'"):
        prepare_folder(root, out, other)
    with pytest.raises(ConfigError, match=r"--shards 500 is outside 1\.\.400"):
        prepare_folder(root, out, shards=500)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"normalise": "window"}, r"data\.normalise='percentile' .*says 'window'"),
        ({"slice_axis": 0}, r"data\.slice_axis=-1 .*says 0"),
        ({"percentile_high": 99.0}, r"data\.percentile_high=99\.5 .*says 99\.0"),
    ],
)
def test_training_with_other_baked_settings_is_refused(out, changes, words):
    source = PreparedSource(out)
    case = source.split(DataOptions(), TrainOptions()).val[0]
    with pytest.raises(ConfigError, match=words):
        source.read(case, None, DataOptions(**changes))


def test_settings_that_act_later_are_free(out):
    source = PreparedSource(out)
    case = source.split(DataOptions(), TrainOptions()).val[0]
    free = DataOptions(clip_slices=3, fit="stretch", window_low=-7, foreground_share=0, threads=0)
    assert source.read(case, 2, free).depth == 2


@pytest.mark.parametrize("name", ["images/s0_x.nii.gz", "labels/s4_x.nii.gz"])
def test_a_source_that_has_changed_is_refused(root, out, name):
    (root / name).write_bytes((root / name.replace(name[7:9], "s1")).read_bytes())
    with pytest.raises(DataError, match=f"{name}: has changed since .* was prepared from it"):
        prepare_folder(root, out)


def test_other_cases_are_refused(root, out, folder):
    folder(["t_x"], root=root)
    with pytest.raises(DataError, match="other cases"):
        prepare_folder(root, out)


def test_other_names_and_subjects_are_refused(root, out):
    (root / "cases.csv").write_text("case,subject\ns3_x,someone\n")
    with pytest.raises(DataError, match="other cases or subjects"):
        prepare_folder(root, out)
    (root / "cases.csv").unlink()
    for kind in ("images", "labels"):
        (root / kind / "s0_x.nii.gz").rename(root / kind / "r0_x.nii.gz")
    with pytest.raises(DataError, match="other cases or subjects"):
        prepare_folder(root, out)


def test_a_second_preparation_waits_outside(root, tmp_path, monkeypatch):
    def write(*args):
        prepare_folder(root, tmp_path / "out")

    monkeypatch.setattr("sss_jax.data.prepare.write_shard", write)
    with pytest.raises(DataError, match="is being prepared by another process"):
        prepare_folder(root, tmp_path / "out")


def test_all_damaged_cases_are_shown_at_once_and_good_shards_kept(root, out, tmp_path):
    good = {p.name: p.read_bytes() for p in (root / "images").iterdir()}
    nan_image(root, "s0_x")
    (root / "images/s1_x.nii.gz").write_bytes(b"damaged")
    label = (root / "labels/s4_x.nii.gz").read_bytes()
    truncated_labels(root, "s4_x", 2)
    other = tmp_path / "other"
    report = prepare_folder(root, other, shards=3)
    assert [p.file.name for p in report.problems] == ["s0_x.nii.gz", "s1_x.nii.gz", "s4_x.nii.gz"]
    assert [p.file.parent.name for p in report.problems] == ["images", "images", "labels"]
    assert "NaN" in report.render()
    assert not (other / "prepared.json").exists()
    assert [p.name[:12] for p in other.glob("*.array_record")].count("images-00001") == 1
    assert len(list(other.glob("*.array_record"))) == 2

    for name, data in good.items():
        (root / "images" / name).write_bytes(data)
    (root / "labels/s4_x.nii.gz").write_bytes(label)
    assert prepare_folder(root, other).written == 2
    assert content(other) == content(out)


@pytest.mark.parametrize("options", [None, OPTIONS])
def test_faults_of_the_folder_stop_it_before_it_writes(root, tmp_path, options):
    (root / "images/s0_x.nii").write_bytes(b"twin")
    nan_image(root, "s3_x")
    report = prepare_folder(root, tmp_path / "out", options)
    assert {p.file.name for p in report.problems} >= {"s0_x.nii.gz", "s3_x.nii.gz"}
    assert not (tmp_path / "out").exists()


def test_one_volume_is_in_memory_at_a_time(root, tmp_path, monkeypatch):
    alive, most = weakref.WeakSet(), []

    def read(path, limit):
        most.append(len(alive))
        volume = honest(path, limit)
        alive.add(volume)
        return volume

    honest = prepare_shard.read_volume
    monkeypatch.setattr(prepare_shard, "read_volume", read)
    prepare_folder(root, tmp_path / "out", shards=1)
    assert len(most) == 5
    assert max(most) == 0


def test_a_configuration_takes_its_split_and_no_withheld_label(root, tmp_path, folder):
    """A label that is not to be read can be garbage, and is not in the folder."""
    folder(["extra"], root=root)
    (root / "labels/extra.nii.gz").write_bytes(b"not read")
    truncated_labels(root, "s2_x", 2)
    report = prepare_folder(root, tmp_path / "out", OPTIONS)
    assert not report.problems
    cases = [c for s in read_manifest(tmp_path / "out/prepared.json").shards for c in s.cases]
    assert [c.name for c in cases] == NAMES
    assert [c.name for c in cases if c.label is None] == ["s2_x", "s3_x"]
    source = PreparedSource(tmp_path / "out")
    with pytest.raises(
        DataError, match=r"without a label file: s2_x, s3_x\. .*were not prepared need"
    ):
        source.split(DataOptions(), TrainOptions(all_labels=True))


def test_labels_beyond_the_classes_are_refused(root, out, tmp_path):
    source = PreparedSource(out)
    case = source.split(DataOptions(), TrainOptions()).labelled[0]
    with pytest.raises(DataError, match=r"case s0_x: .*outside 0\.\.1: 2.*num_classes"):
        source.read(case, 1, DataOptions())
    one = dataclasses.replace(OPTIONS, model=ModelOptions(image_size=32, num_classes=1))
    problems = prepare_folder(root, tmp_path / "one", one).problems
    assert [p.file.name[:2] for p in problems] == ["s0", "s1", "s4"]


def test_slices_beyond_the_canvas_are_named_before_training(out):
    source = PreparedSource(out)
    cases = source.split(DataOptions(), TrainOptions()).cases
    small, enough = (list(source.faults(cases, 2, DataOptions(canvas=c))) for c in (8, 9))
    assert all("larger than data.canvas=8" in str(fault) for _, (fault,) in small)
    assert len(small) == len(cases)
    assert not any(faults for _, faults in enough)


def test_a_prepared_folder_is_no_nifti_folder(out):
    for use in (find_cases, find_images, lambda o: load_split(o, "split.json")):
        with pytest.raises(DataError, match=r"no NIfTI file.*NIfTI folder that it was made from"):
            use(out)


def test_a_full_disk_leaves_no_shard(root, tmp_path):
    """A limit on the size of files stands in for a full disk."""
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (70_000, 70_000)); "
        "from sss_jax import cli; sys.exit(cli.main(sys.argv[1:]))"
    )
    words = ["data", "prepare", str(root), str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1, done.stderr
    assert "cannot be written" in done.stderr
    assert sorted(content(tmp_path / "out")) == ["preparing.json"]
    assert prepare_folder(root, tmp_path / "out").written == 1


def test_the_verb_speaks_on_both_streams(root, tmp_path, capsys):
    assert cli.main(["data", "prepare", str(root), str(tmp_path / "o"), "--json"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["slices"] == 20
    assert "shard 1 of 1: 5 cases, 20 slices" in said.err
    assert cli.main(["data", "prepare", str(root), str(tmp_path / "o")]) == 0
    assert "1 shards, 1 of them there before" in capsys.readouterr().out
    nan_image(root, "s0_x")
    assert cli.main(["data", "prepare", str(root), str(tmp_path / "p")]) == 1
    assert "NaN" in capsys.readouterr().out
    config = ["--config", "hippocampus:sss", "--config.data.normalise=window"]
    assert cli.main(["data", "prepare", str(root), str(tmp_path / "o"), *config]) == 2
    assert "says 'window'" in capsys.readouterr().err
    assert cli.main(["data", "prepare", str(root), str(tmp_path / "q"), *config[2:]]) == 2
    assert "changes nothing without --config" in capsys.readouterr().err
    assert not (tmp_path / "q").exists()


def test_numbers_keep_their_exact_value_in_the_smallest_type():
    cases = {
        "uint8": [0, 255],
        "int16": [-1, 255],
        "uint16": [0, 40_000],
        "float32": [-1, 40_000],
    }
    for name, values in cases.items():
        assert records.smallest_type(np.array([[values]], np.float32)) == name
    for odd in (0.5, -0.0, 1e9):
        assert records.smallest_type(np.array([[[0.0, odd]]], np.float32)) == "float32"
