"""Folders of writers that were killed go; those of anybody else stay."""

import contextlib
import os
import signal
import subprocess
import sys

import pytest

from sss_jax import atomic
from sss_jax.conversion import new_folder, sam2
from sss_jax.conversion.new_folder import folder_beside
from sss_jax.conversion.torch_zip import write_torch

FILES = ("a.bin", "b.json")
STRAY = f"{atomic.TEMPORARY_PREFIX}0123abcd-ours"

CHILD = """
import sys
from pathlib import Path
from sss_jax.conversion.new_folder import folder_beside
with folder_beside(Path(sys.argv[1]), sys.argv[2:]) as folder:
    (folder / sys.argv[2]).write_bytes(b"half")
    print("ready", flush=True)
    sys.stdin.read()
"""


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@contextlib.contextmanager
def writer(target, *files):
    """Another process that is filling a folder."""
    command = [sys.executable, "-c", CHILD, str(target), *files]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    child = subprocess.Popen(command, text=True, **pipes)
    try:
        assert child.stdout.readline() == "ready\n"
        yield child
    finally:
        child.communicate()


def kill(child):
    os.kill(child.pid, signal.SIGKILL)
    child.wait()


@pytest.mark.skipif(new_folder.fcntl is None, reason="needs locks on folders")
def test_a_killed_writer_is_cleaned_up_after_and_a_living_one_is_not(tmp_path):
    target = tmp_path / "ours"
    with writer(target, *FILES) as dead:
        kill(dead)
    assert len(names(tmp_path)) == 1
    with writer(target, *FILES):  # which sweeps the first one's folder
        (living,) = names(tmp_path)
        with folder_beside(target, FILES) as folder:
            assert sorted([living, folder.name]) == names(tmp_path)
        assert names(tmp_path) == [living]
    assert names(tmp_path) == []


@pytest.mark.skipif(new_folder.fcntl is None, reason="needs locks on folders")
def test_the_next_conversion_sweeps(tmp_path, micro, state):
    write_torch(tmp_path / "official.pt", state)
    with writer(tmp_path / "ours", sam2.PARAMS, sam2.ABOUT) as child:
        kill(child)
    (tmp_path / STRAY).mkdir()
    (tmp_path / STRAY / f"{atomic.TEMPORARY_PREFIX}89abcdef-{sam2.PARAMS}").write_bytes(b"half")
    assert len(names(tmp_path)) == 3
    sam2.convert(tmp_path / "official.pt", tmp_path / "ours")
    assert names(tmp_path) == ["official.pt", "ours"]


@pytest.mark.parametrize(
    "kind", ["file", "link", "strange content", "folder inside", "other target", "no mark", "long"]
)
def test_what_is_not_ours_stays(tmp_path, kind):
    there = tmp_path / "there"
    there.mkdir()
    name = {
        "other target": f"{STRAY}2",
        "no mark": f"{atomic.TEMPORARY_PREFIX}ours",
        "long": f"{atomic.TEMPORARY_PREFIX}0-{STRAY}",
    }.get(kind, STRAY)
    path = tmp_path / name
    if kind == "file":
        path.write_bytes(b"mine")
    elif kind == "link":
        path.symlink_to(there)
    else:
        path.mkdir()
        if kind == "folder inside":
            (path / FILES[0]).mkdir()
        else:
            (path / ("mine" if kind == "strange content" else FILES[0])).write_bytes(b"mine")
    before = names(tmp_path)
    with folder_beside(tmp_path / "ours", FILES):
        pass
    assert names(tmp_path) == before


def test_a_folder_is_made_again_if_it_is_swept_before_it_is_locked(tmp_path, monkeypatch):
    lock, swept = new_folder._locked, []

    def late(folder, *, wait):
        held = lock(folder, wait=wait)
        if wait and not swept:
            swept.append(folder)
            with contextlib.ExitStack() as stack:
                stack.enter_context(held)
                folder.rmdir()
                return stack.pop_all()
        return held

    monkeypatch.setattr(new_folder, "_locked", late)
    with folder_beside(tmp_path / "ours", FILES) as folder:
        assert folder.is_dir()
        assert folder not in swept
    assert names(tmp_path) == []
