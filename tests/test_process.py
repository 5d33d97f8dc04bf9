"""Programs of ours take large pages, or take again what they freed; others are left alone."""

import os
import subprocess
import sys

import pytest

from sss_jax import process

HUGE = "glibc.malloc.hugetlb=1"
OURS = """
import os, resource, sys
sys.argv[0] = sys.argv[0] if "elsewhere" in sys.argv else "/venv/bin/sss-jax"
from sss_jax import process
process.set_up()
faults = []
for turn in range(5):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    bytearray(128 << 20)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(os.environ.get("GLIBC_TUNABLES", ""), faults[0], faults[-1], *sys.argv[1:])
"""


def ours(*words, **changes):
    """Start a program as ours; its settings of glibc, page faults of two allocations, its words."""
    names = ("GLIBC_TUNABLES", process.LARGE_PAGES, process.KEEP)
    plain = {name: value for name, value in os.environ.items() if name not in names}
    command = [sys.executable, "-c", OURS, *words]
    done = subprocess.run(
        command, env=plain | changes, capture_output=True, text=True, check=True, timeout=60
    )
    settings, first, last, *rest = done.stdout.rstrip("\n").split(" ")
    return settings, int(first), int(last), rest


@pytest.fixture(scope="module")
def usual():
    """Page faults of an allocation without any of this."""
    settings, first, last, _ = ours(SSS_JAX_LARGE_PAGES="0")
    assert settings == ""
    return min(first, last)


@pytest.mark.skipif(not process.missing_settings({}), reason="no large pages on demand here")
def test_a_program_of_ours_computes_on_large_pages(usual):
    settings, first, _, words = ours("train", "--json")
    assert (settings, words) == (HUGE, ["train", "--json"])
    assert ours("elsewhere")[0] == ""
    if usual > 10_000:  # a system that counts page faults
        assert first < usual / 50


@pytest.mark.skipif(process._glibc() < (2, 26), reason="the C library is not glibc")
def test_freed_memory_is_taken_again_without_new_pages(usual):
    settings, first, last, _ = ours(SSS_JAX_KEEP_MEMORY="1", SSS_JAX_LARGE_PAGES="0")
    assert settings == ":".join(f"{name}={value}" for name, value in process.KEPT.items())
    if usual > 10_000:
        assert first > 10_000
        assert last < 100


def test_settings_of_the_user_stay(monkeypatch):
    monkeypatch.setattr(process, "_glibc", lambda: (2, 36))
    monkeypatch.setattr(process, "_gives_large_pages", lambda: True)
    mine = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0:glibc.malloc.perturb=7", "HOME": "/"}
    assert process.missing_settings(mine) == {}
    assert process.missing_settings(mine | {process.KEEP: "1"}) == process.KEPT
    assert process.missing_settings({process.KEEP: "1"}) == process.HUGE | process.KEPT
    assert process.missing_settings({process.LARGE_PAGES: "0"}) == {}
    found = process.with_settings(mine, {"a": 1, "b": 2})
    assert found == mine | {"GLIBC_TUNABLES": mine["GLIBC_TUNABLES"] + ":a=1:b=2"}
    assert process.missing_settings(process.with_settings({}, process.HUGE)) == {}


@pytest.mark.parametrize(
    ("libc", "pages", "huge", "kept"),
    [
        ("glibc 2.36", "always [madvise] never", True, True),
        ("glibc 2.35", "always [madvise] never", True, True),
        ("glibc 2.34", "always [madvise] never", False, True),
        ("glibc 2.36", "[always] madvise never", False, True),
        ("glibc 2.36", "always madvise [never]", False, True),
        ("glibc 2.36", None, False, True),
        ("glibc 2.25", "always [madvise] never", False, False),
        ("glibc two", "always [madvise] never", False, False),
        ("musl 1.2", "always [madvise] never", False, False),
        (None, "always [madvise] never", False, False),
    ],
)
def test_other_systems_are_left_alone(libc, pages, huge, kept, monkeypatch, tmp_path):
    monkeypatch.setattr(process.os, "confstr", lambda name: libc)
    monkeypatch.setattr(process, "_PAGES", tmp_path / "enabled")
    if pages is not None:
        (tmp_path / "enabled").write_text(pages)
    wanted = (process.HUGE if huge else {}) | (process.KEPT if kept else {})
    assert process.missing_settings({process.KEEP: "1"}) == wanted


def test_tests_and_notebooks_are_not_ours():
    assert not process._is_ours()
