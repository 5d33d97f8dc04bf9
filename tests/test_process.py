"""Fresh pages are large; or what a process frees stays with it, and is taken again."""

import os
import platform
import subprocess
import sys

import pytest

from sss_jax import process

CHURN = """
import resource, sys
import numpy as np
from sss_jax import process
if sys.argv[1] == "keep":
    assert process.keep_freed_memory()
before = 0
for _ in range(20):
    for size in (96, 40):
        np.ones(size << 17)  # MiB of float64, freed at once
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    before = before or faults
print(faults - before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


def churn(way):
    """Page faults of taking and freeing 136 MiB nineteen times after the first, and peak MiB."""
    command = [sys.executable, "-c", CHURN, way]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    return map(int, done.stdout.split())


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_freed_memory_is_taken_again_without_new_pages():
    faults, peak = churn("keep")
    usual, usual_peak = churn("usual")
    if usual < 100:
        pytest.skip("this system does not count page faults, or hands out no fresh pages")
    assert faults < 100
    assert peak < usual_peak + 64


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(process.ctypes, "CDLL", lambda name: object())
    assert process.keep_freed_memory() is False


@pytest.mark.parametrize(("value", "calls"), [("1", 1), ("0", 0), (None, 0)])
def test_memory_is_kept_only_where_asked(value, calls, monkeypatch):
    seen = []
    monkeypatch.setattr(process, "_is_ours", lambda: False)
    monkeypatch.setattr(process, "keep_freed_memory", lambda: seen.append(1))
    monkeypatch.setattr(process.gc, "set_threshold", lambda *numbers: None)
    monkeypatch.delenv(process.KEEP, raising=False)
    if value is not None:
        monkeypatch.setenv(process.KEEP, value)
    process.set_up()
    assert len(seen) == calls


OURS = """
import os, resource, sys
sys.argv[0] = sys.argv[0] if "elsewhere" in sys.argv else "/venv/bin/sss-jax"
from sss_jax import process
process.set_up()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
bytearray(256 << 20)
faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(os.environ.get("GLIBC_TUNABLES", ""), faults, *sys.argv[1:])
"""


def ours(*words, **changes):
    """Start a program as ours, with words of its own; its tunables, page faults, and words."""
    plain = {
        k: v for k, v in os.environ.items() if k not in ("GLIBC_TUNABLES", process.LARGE_PAGES)
    }
    done = subprocess.run(
        [sys.executable, "-c", OURS, *words],
        env=plain | changes,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    tunables, faults, *rest = done.stdout.rstrip("\n").split(" ")
    return tunables, int(faults), rest


@pytest.mark.skipif(
    not process.gives_large_pages({}), reason="this system gives no large pages on demand"
)
def test_a_program_of_ours_computes_on_large_pages():
    wanted = "glibc.malloc.hugetlb=1"
    tunables, faults, words = ours("train", "--json")
    assert (tunables, words) == (wanted, ["train", "--json"])
    other = "glibc.malloc.perturb=7"
    assert ours(GLIBC_TUNABLES=other)[0] == f"{other}:{wanted}"
    assert ours(GLIBC_TUNABLES="glibc.malloc.hugetlb=0")[0] == "glibc.malloc.hugetlb=0"
    off, usual, _ = ours(SSS_JAX_LARGE_PAGES="0")
    assert off == ours("elsewhere")[0] == ""
    if usual > 10_000:  # a system that counts page faults
        assert faults < usual / 50


@pytest.mark.parametrize(
    ("libc", "pages", "given"),
    [
        ("glibc 2.36", "always [madvise] never", True),
        ("glibc 2.35", "always [madvise] never", True),
        ("glibc 2.34", "always [madvise] never", False),
        ("glibc 2.36", "[always] madvise never", False),
        ("glibc 2.36", "always madvise [never]", False),
        ("musl 1.2", "always [madvise] never", False),
        ("glibc two", "always [madvise] never", False),
        (None, "always [madvise] never", False),
        ("glibc 2.36", None, False),
    ],
)
def test_systems_without_large_pages_are_left_alone(libc, pages, given, monkeypatch, tmp_path):
    monkeypatch.setattr(process.os, "confstr", lambda name: libc)
    monkeypatch.setattr(process, "_PAGES", tmp_path / "enabled")
    if pages is not None:
        (tmp_path / "enabled").write_text(pages)
    assert process.gives_large_pages({}) is given


def test_tests_and_notebooks_are_not_ours():
    assert not process._is_ours()
