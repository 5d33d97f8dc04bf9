"""What a process frees stays with it, and is taken again without new pages."""

import platform
import subprocess
import sys

import pytest

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
    from sss_jax import process

    monkeypatch.setattr(process.ctypes, "CDLL", lambda name: object())
    assert process.keep_freed_memory() is False


@pytest.mark.parametrize(("value", "calls"), [("1", 1), ("0", 0), (None, 0)])
def test_memory_is_kept_only_where_asked(value, calls, monkeypatch):
    from sss_jax import process

    seen = []
    monkeypatch.setattr(process, "keep_freed_memory", lambda: seen.append(1))
    monkeypatch.setattr(process.gc, "set_threshold", lambda *numbers: None)
    monkeypatch.delenv(process.KEEP, raising=False)
    if value is not None:
        monkeypatch.setenv(process.KEEP, value)
    process.set_up()
    assert len(seen) == calls
