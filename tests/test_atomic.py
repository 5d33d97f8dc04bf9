"""A file is old or new, never in between."""

import json
import os
import signal
import stat
import subprocess
import sys
import time

import pytest

from sss_jax import atomic


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("content", [b"", b"\x00\xff\r\n", b"x" * 100_000])
def test_bytes_are_written_and_replaced(tmp_path, content):
    path = tmp_path / "a.bin"
    atomic.write_bytes(path, b"old")
    atomic.write_bytes(str(path), content)
    assert path.read_bytes() == content
    assert names(tmp_path) == ["a.bin"]


def test_text_keeps_its_line_ends_and_is_utf8(tmp_path):
    atomic.write_text(tmp_path / "a.txt", "é\r\n\n")
    assert (tmp_path / "a.txt").read_bytes() == b"\xc3\xa9\r\n\n"


def test_json_is_strict_and_a_refused_value_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.json"
    atomic.write_json(path, {"a": [1, None]})
    assert json.loads(path.read_text()) == {"a": [1, None]}
    assert path.read_bytes().endswith(b"\n")
    before = path.read_bytes()
    for bad in (float("nan"), {1, 2}):
        with pytest.raises((ValueError, TypeError)):
            atomic.write_json(path, bad)
    assert path.read_bytes() == before
    assert names(tmp_path) == ["a.json"]


def test_error_in_the_block_keeps_the_old_file_and_leaves_nothing(tmp_path):
    path = tmp_path / "label.nii.gz"
    path.write_bytes(b"old")

    def work():
        with atomic.replacing(path) as temporary:
            assert temporary.name.endswith("label.nii.gz")
            assert temporary.parent == path.parent
            temporary.write_bytes(b"half")
            assert path.read_bytes() == b"old"
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work()
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["label.nii.gz"]


def test_writer_that_writes_nothing_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError), atomic.replacing(tmp_path / "a"):
        pass
    assert names(tmp_path) == []


def test_content_reaches_the_disk_before_the_name(tmp_path, monkeypatch):
    events = []
    fsync, replace = os.fsync, os.replace

    def recorded_fsync(descriptor):
        folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        events.append("flush folder" if folder else f"flush {os.fstat(descriptor).st_size} bytes")
        fsync(descriptor)

    def recorded_replace(source, target):
        events.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(os, "replace", recorded_replace)
    atomic.write_bytes(tmp_path / "a", b"12345")
    assert events == ["flush 5 bytes", "rename", "flush folder"]


def test_failed_flush_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a"
    path.write_bytes(b"old")

    def fail(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space"):
        atomic.write_bytes(path, b"new")
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["a"]


def test_permissions_are_kept_and_new_files_follow_the_umask(tmp_path):
    path = tmp_path / "a"
    old = os.umask(0o027)
    try:
        atomic.write_bytes(path, b"1")
    finally:
        os.umask(old)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    path.chmod(0o604)
    atomic.write_bytes(path, b"2")
    assert stat.S_IMODE(path.stat().st_mode) == 0o604


def test_symbolic_link_stays_a_link(tmp_path):
    (tmp_path / "there").mkdir()
    target = tmp_path / "there" / "a"
    target.write_bytes(b"old")
    link = tmp_path / "link"
    link.symlink_to(target)
    atomic.write_bytes(link, b"new")
    assert link.is_symlink()
    assert target.read_bytes() == b"new"


def test_missing_folder_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        atomic.write_bytes(tmp_path / "absent" / "a", b"")


def test_kill_at_any_moment_leaves_a_whole_file(tmp_path):
    path = tmp_path / "a"
    program = (
        "import sys, itertools\nfrom sss_jax import atomic\n"
        "for i in itertools.count():\n"
        "    atomic.write_bytes(sys.argv[1], bytes([i % 256]) * 300_000)\n"
        "    if i == 0: print('ready', flush=True)\n"
    )
    for pause in (0.0, 0.013, 0.029, 0.05):
        child = subprocess.Popen(
            [sys.executable, "-c", program, str(path)], stdout=subprocess.PIPE, text=True
        )
        try:
            assert child.stdout.readline() == "ready\n"
            time.sleep(pause)
        finally:
            os.kill(child.pid, signal.SIGKILL)
            child.communicate()
        content = path.read_bytes()
        assert len(content) == 300_000
        assert len(set(content)) == 1
    strays = [name for name in names(tmp_path) if name != "a"]
    assert all(name.startswith(atomic.TEMPORARY_PREFIX) for name in strays)
