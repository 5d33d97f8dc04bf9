"""A run reads every case before its first step, and begins without bad ones only where asked."""

import dataclasses
import json
import re

import nibabel as nib
import numpy as np
import pytest

from sss_jax import cli
from sss_jax.config import load
from sss_jax.data.generated import GeneratedSource
from sss_jax.data.prepare import prepare_folder
from sss_jax.data.prepared_source import PreparedSource
from sss_jax.data.sources import FolderSource
from sss_jax.errors import CheckpointError, DataError
from sss_jax.train import bad_cases, hosts, loop

PARTS = {"labelled": ["a", "b"], "unlabelled": ["c", "d"], "val": ["e"], "test": ["f"]}
OPTIONS = load("hippocampus:unimatch_v2", [])


@pytest.fixture
def data(tmp_path):
    """A folder with one case of each part that can be read and one that cannot."""
    root = tmp_path / "data"
    rng = np.random.default_rng(0)
    for name in "abcdef":
        for kind, array in (
            ("images", rng.integers(0, 500, (9, 8, 6)).astype(np.int16)),
            ("labels", rng.integers(0, 3, (9, 8, 6)).astype(np.uint8)),
        ):
            path = root / kind / f"{name}.nii.gz"
            path.parent.mkdir(parents=True, exist_ok=True)
            nib.save(nib.Nifti1Image(array, np.eye(4)), path)
    (root / "split.json").write_text(json.dumps({"cases": PARTS}))
    return root


@pytest.fixture
def runs(monkeypatch):
    """Splits that runs began with; nothing is trained."""
    begun = []

    class Run:
        def __init__(self, options, source, split, *_):
            begun.append({part: [c.name for c in getattr(split, part)] for part in PARTS})

        def to_the_end(self):
            return {"steps": 0}

    monkeypatch.setattr(loop, "_Run", Run)
    return begun


def damage(data, *names):
    for name in names:
        path = data / name
        path.write_bytes(path.read_bytes()[:-9])


def train(data, workdir, **more):
    return loop.train(OPTIONS, data, workdir, **more)


def test_a_whole_folder_is_used_whole(data, runs, tmp_path):
    train(data, tmp_path / "run")
    assert runs == [PARTS]
    assert bad_cases.left_out(tmp_path / "run") == []


def test_all_bad_files_are_named_before_the_first_step(data, runs, tmp_path):
    damage(data, "images/a.nii.gz", "labels/b.nii.gz", "images/d.nii.gz", "labels/e.nii.gz")
    with pytest.raises(DataError) as raised:
        train(data, tmp_path / "run")
    named = re.findall(r"(\w+/\w)\.nii\.gz: is truncated", str(raised.value))
    assert named == ["images/a", "labels/b", "images/d", "labels/e"]
    assert "--skip-bad" in str(raised.value)
    assert not runs
    assert not (tmp_path / "run/run.json").exists()


def test_what_a_run_does_not_read_may_be_bad(data, runs, tmp_path):
    damage(data, "labels/c.nii.gz", "images/f.nii.gz", "labels/f.nii.gz")
    train(data, tmp_path / "run")
    assert runs == [PARTS]


def test_bad_cases_are_left_out_where_asked_and_for_good(data, runs, tmp_path, capsys):
    damage(data, "images/a.nii.gz", "images/d.nii.gz")
    run = tmp_path / "run"
    train(data, run, skip_bad=True)
    assert "left out, because they cannot be read: a, d" in capsys.readouterr().err
    noted = json.loads((run / "skipped.json").read_text())
    assert set(noted) == {"a", "d"}
    assert "images/a.nii.gz: is truncated" in noted["a"][0]
    assert json.loads((run / "run.json").read_text())["cases"]["labelled"] == 1
    train(data, run)  # goes on, without asking again
    assert runs == [PARTS | {"labelled": ["b"], "unlabelled": ["c"]}] * 2


def test_a_run_that_knows_all_cases_does_not_go_on_without_some(data, runs, tmp_path):
    train(data, tmp_path / "run")
    (tmp_path / "run/skipped.json").write_text('{"a": []}')
    with pytest.raises(CheckpointError, match="split_digest"):
        train(data, tmp_path / "run")


def test_mended_files_are_used_by_a_fresh_run(data, runs, tmp_path):
    whole = (data / "images/a.nii.gz").read_bytes()
    damage(data, "images/a.nii.gz")
    train(data, tmp_path / "run", skip_bad=True)
    (data / "images/a.nii.gz").write_bytes(whole)
    train(data, tmp_path / "run", fresh=True)
    assert runs[1] == PARTS


def test_too_little_left_is_refused(data, runs, tmp_path):
    damage(data, "images/a.nii.gz", "images/b.nii.gz")
    with pytest.raises(DataError, match="no labelled case that can be used"):
        train(data, tmp_path / "run", skip_bad=True)
    assert not runs
    assert not (tmp_path / "run/run.json").exists()


def test_the_command_line_has_it(data, runs, tmp_path):
    damage(data, "images/a.nii.gz")
    words = ["train", "--config", "hippocampus:unimatch_v2", "--data", str(data)]
    words += ["--workdir", str(tmp_path / "run")]
    assert cli.main(words) == 1
    assert cli.main([*words, "--skip-bad"]) == 0
    assert runs == [PARTS | {"labelled": ["b"]}]


def test_prepared_cases_are_held_against_the_classes(data, tmp_path):
    prepare_folder(data, tmp_path / "out", OPTIONS)
    source = PreparedSource(tmp_path / "out")
    one = dataclasses.replace(OPTIONS, model=dataclasses.replace(OPTIONS.model, num_classes=1))
    split = source.split(one.data, one.train)
    with pytest.raises(DataError, match=r"has labels outside 0\.\.1: 2"):
        bad_cases.settle(bad_cases.find(source, split, one), tmp_path, skip=False)
    assert bad_cases.find(source, split, OPTIONS) == {}


def test_synthetic_cases_are_never_bad(tmp_path):
    source = GeneratedSource("synthetic:", OPTIONS)
    split = source.split(OPTIONS.data, OPTIONS.train)
    assert bad_cases.find(source, split, OPTIONS) == {}


def test_processes_share_the_reading(data, monkeypatch):
    damage(data, "images/a.nii.gz", "images/b.nii.gz", "images/c.nii.gz")
    source, asked = FolderSource(data), []
    split = source.split(OPTIONS.data, OPTIONS.train)
    monkeypatch.setattr(bad_cases.jax, "process_count", lambda: 2)
    monkeypatch.setattr(bad_cases.jax, "process_index", lambda: 1)
    theirs = {"c": ["is truncated"], "a": ["is truncated"]}  # of process 0: a, c and e
    monkeypatch.setattr(hosts, "gathered", lambda found: asked.append(found) or [theirs, found])
    assert list(bad_cases.find(source, split, OPTIONS)) == ["a", "b", "c"]
    assert list(asked[0]) == ["b"]
