"""Conversion as a whole: exact both ways, whole or not at all, and only from sound sources."""

import dataclasses
import errno
import hashlib
import json
import os
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from sss_jax import __version__, atomic
from sss_jax.conversion import keymap, official, safetensors_file, sam2, verify
from sss_jax.conversion.safetensors_file import read_safetensors, write_safetensors
from sss_jax.conversion.torch_zip import read_torch, write_torch
from sss_jax.errors import CheckpointError, ConfigError


@pytest.fixture
def source(tmp_path, state):
    path = tmp_path / "official.pt"
    write_torch(path, state)
    return path


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def equal(found, expected):
    return found.keys() == expected.keys() and all(
        found[n].dtype == np.float32 and np.array_equal(found[n], a) and found[n].shape == a.shape
        for n, a in expected.items()
    )


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("version", [0, 1], ids=official.VERSIONS)
def test_round_trip_is_exact(tmp_path, micro, draw, version) -> None:
    state = draw(official.shapes(micro[version]))
    write_torch(tmp_path / "a.pt", state)
    converted = sam2.convert(tmp_path / "a.pt", tmp_path / "ours")
    assert names(tmp_path) == ["a.pt", "ours"]
    assert names(tmp_path / "ours") == ["params.safetensors", "sam2.json"]
    with read_safetensors(tmp_path / "ours" / "params.safetensors") as params:
        assert equal(dict(params), keymap.flatten(keymap.to_ours(state)))
    info, loaded = sam2.load(tmp_path / "ours")
    assert info == converted.info
    assert equal(keymap.to_meta(loaded), state)
    assert sam2.write_back(tmp_path / "ours", tmp_path / "b.pt") == info
    with read_torch(tmp_path / "b.pt") as back:
        assert list(back) == list(official.shapes(micro[version]))
        assert equal(dict(back), state)
    assert (tmp_path / "b.pt").read_bytes() == (tmp_path / "a.pt").read_bytes()


def test_info_says_what_it_is_and_whence_it_came(tmp_path, source, state) -> None:
    info = sam2.convert(source, tmp_path / "ours").info
    assert info == sam2.Info(
        format=1,
        variant="micro",
        version="2.1",
        naming="meta",
        source="official.pt",
        source_sha256=sha256(source),
        source_dtypes=["float32"],
        tensors=len(state),
        parameters=sum(a.size for n, a in state.items() if "gaussian" not in n),
        params_sha256=sha256(tmp_path / "ours" / "params.safetensors"),
        product=__version__,
    )
    written = json.loads((tmp_path / "ours" / "sam2.json").read_text())
    assert written == dataclasses.asdict(info)


def test_every_container_and_naming_gives_the_same_weights(tmp_path, state, source) -> None:
    theirs = keymap.to_hugging_face(state)
    write_safetensors(tmp_path / "meta.bin", state, {"format": "pt"})
    write_safetensors(tmp_path / "model.safetensors", theirs)
    write_torch(tmp_path / "theirs.pt", theirs)
    write_torch(tmp_path / "parallel.pt", {f"module.{n}": a for n, a in state.items()})
    wanted = sam2.convert(source, tmp_path / "ours").info
    for i, (name, naming) in enumerate(
        [
            ("meta.bin", "meta"),
            ("model.safetensors", "hugging face"),
            ("theirs.pt", "hugging face"),
            ("parallel.pt", "meta"),
        ]
    ):
        info = sam2.convert(tmp_path / name, tmp_path / str(i)).info
        assert (info.params_sha256, info.naming) == (wanted.params_sha256, naming)
        assert info.tensors == wanted.tensors
        assert info.parameters == wanted.parameters


def test_narrow_types_are_widened_and_recorded(tmp_path, state) -> None:
    kinds = [np.float16, ml_dtypes.bfloat16, np.float32]
    mixed = {n: a.astype(kinds[i % 3]) for i, (n, a) in enumerate(state.items())}
    write_torch(tmp_path / "mixed.pt", mixed)
    converted = sam2.convert(tmp_path / "mixed.pt", tmp_path / "ours")
    assert converted.info.source_dtypes == ["bfloat16", "float16", "float32"]
    sam2.write_back(tmp_path / "ours", tmp_path / "back.pt")
    with read_torch(tmp_path / "back.pt") as back:
        assert equal(dict(back), {n: a.astype(np.float32) for n, a in mixed.items()})


def with_value(value):
    def change(state):
        state["no_obj_ptr"][0, 3] = state["memory_attention.norm.bias"][1] = value

    return change


NORM = "memory_attention.norm.bias"


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda s: s.pop(NORM), rf"1 missing: '{NORM}'"),
        (lambda s: s.update(more=np.zeros(1, np.float32)), "1 extra: 'more'"),
        (lambda s: s.update(renamed=s.pop(NORM)), "1 missing: .*\n.*1 extra: 'renamed'"),
        (lambda s: s.update({NORM: s[NORM][:-1]}), rf"'{NORM} \(31,\) instead of \(32,\)'"),
        (lambda s: s.update({NORM: s[NORM].astype(np.int32)}), rf"'{NORM} int32'"),
        (lambda s: s.update({NORM: s[NORM].astype(np.float64)}), rf"'{NORM} float64'"),
        (with_value(np.nan), rf"2 tensors hold NaN or infinity: '{NORM}', 'no_obj_ptr'"),
        (with_value(np.inf), rf"2 tensors hold NaN or infinity: '{NORM}', 'no_obj_ptr'"),
        (lambda s: s.clear(), "holds 0 tables of tensors"),
    ],
    ids=["missing", "extra", "renamed", "shape", "integers", "double", "NaN", "infinity", "empty"],
)
def test_unfit_checkpoints_are_refused_and_nothing_is_written(
    tmp_path, state, change, problem
) -> None:
    change(state)
    path = tmp_path / "bad.pt"
    write_torch(path, state)
    with pytest.raises(CheckpointError, match=rf"(?s)bad.pt: .*{problem}"):
        sam2.convert(path, tmp_path / "ours")
    assert names(tmp_path) == ["bad.pt"]


def test_unfit_checkpoints_with_other_names_are_refused(tmp_path, state) -> None:
    theirs = keymap.to_hugging_face(state)
    path = tmp_path / "bad.safetensors"
    points = "prompt_encoder.point_embed.weight"
    for change, problem in [
        (lambda s: s.pop("no_memory_embedding"), "1 missing: 'no_mem_embed'"),
        (lambda s: s.update(extra=np.float32([1])), "not SAM-2's: 'extra'"),
        (lambda s: s.update({points: np.zeros((3, 32), np.float32)}), "point_embed.weight"),
    ]:
        changed = dict(theirs)
        change(changed)
        write_safetensors(path, changed)
        with pytest.raises(CheckpointError, match=f"bad.safetensors: .*(?s:.*){problem}"):
            sam2.convert(path, tmp_path / "ours")
        assert names(tmp_path) == ["bad.safetensors"]


def test_nothing_is_read_from_a_checkpoint_of_another_network(tmp_path, state, monkeypatch) -> None:
    path = tmp_path / "bad.safetensors"
    write_safetensors(path, state | {"no_obj_ptr": np.zeros((9, 9), np.float32)})

    def read(*_):
        raise AssertionError("a tensor was read")

    monkeypatch.setattr(safetensors_file, "_read_tensor", read)
    with pytest.raises(CheckpointError, match="of another shape"):
        sam2.convert(path, tmp_path / "ours")


def test_same_conversion_again_changes_nothing(tmp_path, source) -> None:
    first = sam2.convert(source, tmp_path / "ours")
    before = {p.name: (p.stat().st_ino, p.read_bytes()) for p in first.folder.iterdir()}
    assert sam2.convert(source, tmp_path / "ours") == first
    assert {p.name: (p.stat().st_ino, p.read_bytes()) for p in first.folder.iterdir()} == before
    assert names(tmp_path) == ["official.pt", "ours"]


def test_same_conversion_from_inside_the_target(tmp_path, source, monkeypatch) -> None:
    sam2.convert(source, tmp_path / "ours")
    monkeypatch.chdir(tmp_path / "ours")
    sam2.convert(source, Path("."))
    assert names(tmp_path) == ["official.pt", "ours"]


def test_a_target_that_differs_is_not_overwritten(tmp_path, source, state) -> None:
    sam2.convert(source, tmp_path / "ours")
    state["no_obj_ptr"] += 1
    write_torch(source, state)
    before = (tmp_path / "ours" / "params.safetensors").read_bytes()
    with pytest.raises(CheckpointError, match="ours exists and holds something else"):
        sam2.convert(source, tmp_path / "ours")
    assert (tmp_path / "ours" / "params.safetensors").read_bytes() == before
    assert names(tmp_path) == ["official.pt", "ours"]


def test_a_target_that_lacks_its_numbers_is_not_completed(tmp_path, source) -> None:
    sam2.convert(source, tmp_path / "ours")
    (tmp_path / "ours" / "params.safetensors").unlink()
    with pytest.raises(CheckpointError, match="ours exists and holds something else"):
        sam2.convert(source, tmp_path / "ours")
    assert names(tmp_path / "ours") == ["sam2.json"]


@pytest.mark.parametrize("kind", ["file", "folder", "empty folder"])
def test_a_target_that_is_something_else_is_not_touched(tmp_path, source, kind) -> None:
    target = tmp_path / "ours"
    if kind == "file":
        target.write_text("mine")
    else:
        target.mkdir()
        if kind == "folder":
            (target / "mine").write_text("mine")
    with pytest.raises(CheckpointError, match="ours exists and holds something else"):
        sam2.convert(source, target)
    assert names(tmp_path) == ["official.pt", "ours"]
    assert target.is_file() == (kind == "file")
    with pytest.raises(CheckpointError, match="ours exists"):  # before the source is looked at
        sam2.convert(tmp_path / "absent.pt", target)


def test_folders_above_the_target_are_made_and_go_again_after_an_error(
    tmp_path, source, state
) -> None:
    (tmp_path / "there").mkdir()
    sam2.convert(source, tmp_path / "there" / "a" / "b" / "ours")
    assert names(tmp_path / "there" / "a" / "b") == ["ours"]
    with_value(np.nan)(state)
    write_torch(tmp_path / "bad.pt", state)
    (tmp_path / "empty").mkdir()
    for target in ("x/y/ours", "empty/ours", "there/a/more/ours"):
        with pytest.raises(CheckpointError, match="NaN or infinity"):
            sam2.convert(tmp_path / "bad.pt", tmp_path / target)
    assert names(tmp_path) == ["bad.pt", "empty", "official.pt", "there"]
    assert names(tmp_path / "there" / "a") == ["b"]


def test_a_file_is_no_folder_above_the_target(tmp_path, source) -> None:
    with pytest.raises(CheckpointError, match=r"ours: cannot be written \(Not a directory"):
        sam2.convert(source, source / "ours")
    assert names(tmp_path) == ["official.pt"]


@pytest.mark.parametrize("stage", ["numbers", "description", "rename"])
def test_a_full_disk_leaves_nothing_behind(tmp_path, source, monkeypatch, stage) -> None:
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if stage == "numbers":
        monkeypatch.setattr(safetensors_file, "_compose_header", full)
    elif stage == "description":
        monkeypatch.setattr(atomic, "write_json", full)
    else:
        monkeypatch.setattr(os, "rename", full)
    with pytest.raises(CheckpointError, match=r"ours: cannot be written \(No space left"):
        sam2.convert(source, tmp_path / "ours")
    assert names(tmp_path) == ["official.pt"]


def test_an_interruption_leaves_nothing_behind(tmp_path, source, monkeypatch) -> None:
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(atomic, "write_json", interrupt)
    with pytest.raises(KeyboardInterrupt):
        sam2.convert(source, tmp_path / "ours")
    assert names(tmp_path) == ["official.pt"]


# Folders of ours that are damaged.


def flip(path):
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def edit(**values):
    def change(folder):
        path = folder / "sam2.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change


def other_weights(folder):
    """Weights of another network under a description that was made to match."""
    path = folder / "params.safetensors"
    path.unlink()
    write_safetensors(path, {"no_obj_ptr": np.zeros((1, 32), np.float32)})
    edit(params_sha256=sha256(path))(folder)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda f: flip(f / "params.safetensors"), "params.safetensors: its bytes do not match"),
        (
            lambda f: (f / "params.safetensors").unlink(),
            "params.safetensors: there is no such file",
        ),
        (lambda f: (f / "sam2.json").unlink(), "sam2.json: there is no such file"),
        (lambda f: (f / "sam2.json").write_text("{"), "sam2.json: it is damaged"),
        (lambda f: (f / "sam2.json").write_text("[1]"), "sam2.json: it is damaged"),
        (lambda f: (f / "sam2.json").write_text('{"format": 1}'), "sam2.json: it is damaged"),
        (lambda f: (f / "sam2.json").write_text("[" * 10**5), "sam2.json: it is damaged"),
        (edit(more=1), "sam2.json: it is damaged"),
        (edit(format=2), "format 2, this version reads format 1"),
        (edit(version="2.0"), "it holds SAM 2.1 micro, but sam2.json says otherwise"),
        (edit(variant=["micro"]), "sam2.json says otherwise"),
        (other_weights, "it is no published SAM-2"),
    ],
)
def test_damaged_folders_are_refused(tmp_path, source, change, problem) -> None:
    folder = sam2.convert(source, tmp_path / "ours").folder
    change(folder)
    for use in (sam2.load, lambda f: sam2.write_back(f, tmp_path / "back.pt")):
        with pytest.raises(CheckpointError, match=problem):
            use(folder)
    assert names(tmp_path) == ["official.pt", "ours"]


# Back to torch.


def test_back_to_torch_does_not_overwrite(tmp_path, source) -> None:
    folder = sam2.convert(source, tmp_path / "ours").folder
    (tmp_path / "mine.pt").write_text("mine")
    for target in ("mine.pt", "ours"):
        with pytest.raises(CheckpointError, match=f"{target} exists and holds something else"):
            sam2.write_back(folder, tmp_path / target)
    assert (tmp_path / "mine.pt").read_text() == "mine"
    sam2.write_back(folder, source)  # the same bytes
    with pytest.raises(CheckpointError, match="cannot be written"):
        sam2.write_back(folder, tmp_path / "absent" / "x.pt")
    assert names(tmp_path) == ["mine.pt", "official.pt", "ours"]


# What the command line calls.


def test_run_goes_both_ways(tmp_path, source) -> None:
    lines: list[str] = []
    result = sam2.run(source, tmp_path / "ours", report=lines.append)
    assert json.loads(json.dumps(result)) == result
    assert result["target"] == str(tmp_path / "ours")
    assert (result["variant"], result["version"]) == ("micro", "2.1")
    assert "parity" not in result
    back = sam2.run(tmp_path / "ours", tmp_path / "b.pt", to_torch=True, report=lines.append)
    assert back == result | {"target": str(tmp_path / "b.pt")}
    assert (tmp_path / "b.pt").read_bytes() == source.read_bytes()
    count = f"{result['parameters']:,}"
    assert lines == [f"{tmp_path / n}: SAM 2.1 micro, {count} parameters" for n in ("ours", "b.pt")]


def test_contradictory_arguments_are_refused(tmp_path, source) -> None:
    sam2.convert(source, tmp_path / "ours")
    with pytest.raises(ConfigError, match="converted already, and --to-torch goes back"):
        sam2.run(tmp_path / "ours", tmp_path / "again")
    with pytest.raises(ConfigError, match=r"must be the file of a checkpoint$"):
        sam2.run(tmp_path, tmp_path / "again")
    with pytest.raises(ConfigError, match="must be a folder of converted weights"):
        sam2.run(source, tmp_path / "b.pt", to_torch=True)
    with pytest.raises(CheckpointError, match=r"absent.pt: there is no such file"):
        sam2.run(tmp_path / "absent.pt", tmp_path / "again")
    assert names(tmp_path) == ["official.pt", "ours"]


def test_verifying_needs_its_packages_before_anything_is_written(
    tmp_path, source, monkeypatch
) -> None:
    monkeypatch.setattr(verify.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="torch and transformers cannot be imported"):
        sam2.run(source, tmp_path / "ours", verify=True)
    assert names(tmp_path) == ["official.pt"]
