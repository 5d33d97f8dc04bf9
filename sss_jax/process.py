"""How a process that is ours alone is set up, before it computes.

A step takes its temporaries from the C library and frees them. By default glibc gives large blocks
back to the system at once, so that every step is handed fresh pages, each of which the system has
to find and to clear: a quarter of the time of a small step on CPUs, and three quarters of what it
takes to make a batch at 1024 pixels (docs/explanation/performance.md). Large pages are 512 times
fewer; or what is freed stays with the process, and the next step takes it again.
"""

import gc
import os
import sys
from collections.abc import Mapping
from pathlib import Path

COLLECT = (200_000, 50, 100)
"""Thresholds of Python's collector. Tracing makes millions of objects that stay, and the usual ones
let it look through them again and again: a fifth of the time until the first step."""

LARGE_PAGES = "SSS_JAX_LARGE_PAGES"
"""Environment variable; 0: no large pages."""
KEEP = "SSS_JAX_KEEP_MEMORY"
"""Environment variable; 1: keep freed memory. Not the default: all threads then share one arena,
since that of a thread cannot grow beyond 64 MiB, and the process never shrinks."""

HUGE = {"glibc.malloc.hugetlb": 1}
KEPT = {
    "glibc.malloc.arena_max": 1,
    "glibc.malloc.mmap_max": 0,  # blocks that are mapped by themselves are always given back
    "glibc.malloc.trim_threshold": 2**62,
}
"""Settings that glibc reads when a program starts."""

_TUNABLES = "GLIBC_TUNABLES"
_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_SINCE_HUGE, _SINCE_KEPT = (2, 35), (2, 26)  # versions of glibc


def set_up() -> None:
    """Have memory handed out as the environment says, collect garbage seldom. Call it first.

    glibc reads its settings when a program starts, so this program is started anew with them.
    """
    missing = missing_settings(os.environ) if _is_ours() else {}
    if missing:
        command = [sys.executable, *sys.orig_argv[1:]]
        os.execve(sys.executable, command, with_settings(os.environ, missing))
    gc.set_threshold(*COLLECT)


def missing_settings(environment: Mapping[str, str]) -> dict[str, int]:
    """Return the settings of glibc that a program should have and was not started with.

    None where the C library is not glibc. Large pages are asked for where the system gives them
    to programs that ask. What the user has set stays.
    """
    version, wanted = _glibc(), dict[str, int]()
    if environment.get(LARGE_PAGES) != "0" and version >= _SINCE_HUGE and _gives_large_pages():
        wanted |= HUGE
    if environment.get(KEEP) == "1" and version >= _SINCE_KEPT:
        wanted |= KEPT
    there = environment.get(_TUNABLES, "")
    return {name: value for name, value in wanted.items() if name not in there}


def with_settings(environment: Mapping[str, str], settings: Mapping[str, int]) -> dict[str, str]:
    """Return an environment in which a program starts with these settings of glibc, too."""
    wanted = [f"{name}={value}" for name, value in settings.items()]
    others = environment.get(_TUNABLES)
    return {**environment, _TUNABLES: ":".join([others, *wanted] if others else wanted)}


def _glibc() -> tuple[int, ...]:
    """Version of the C library; nothing where it is another."""
    try:
        name, _, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").partition(" ")
        return tuple(map(int, version.split("."))) if name == "glibc" else ()
    except (AttributeError, OSError, ValueError):
        return ()


def _gives_large_pages() -> bool:
    try:
        return "[madvise]" in _PAGES.read_text()
    except OSError:
        return False


def _is_ours() -> bool:
    """Whether this program is one of ours, not a notebook or script that calls us."""
    main = sys.modules["__main__"]
    name = main.__spec__.name if main.__spec__ else Path(sys.argv[0]).stem
    return name == "sss-jax" or name.startswith("sss_jax.")
