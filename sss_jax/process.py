"""How a process that is ours alone is set up, before it computes.

A step takes its temporaries from the C library and frees them. By default glibc gives large blocks
back to the system at once, so that every step is handed fresh pages, each of which the system has
to find and to clear: half of the time of a small step on CPUs, and three quarters of what it takes
to make a batch at 1024 pixels (docs/explanation/performance.md). Large pages are 512 times fewer;
or what is freed stays with the process, and the next step takes it again.
"""

import ctypes
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
"""Environment variable; 1: keep freed memory. Not the default: where several threads compute, the
one arena that it needs made training half as fast."""

_TUNABLES, _HUGETLB = "GLIBC_TUNABLES", "glibc.malloc.hugetlb"
_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_SINCE = (2, 35)  # version of glibc

# Names and values of glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8
_NEVER = -1


def set_up() -> bool:
    """Take large pages, collect garbage seldom, keep freed memory if asked to. Call it first.

    glibc reads its settings when a program starts, so this program is started anew with them.

    Returns:
        Whether freed memory is kept.
    """
    if _is_ours() and gives_large_pages(os.environ):
        command = [sys.executable, *sys.orig_argv[1:]]
        os.execve(sys.executable, command, with_large_pages(os.environ))
    gc.set_threshold(*COLLECT)
    return os.environ.get(KEEP) == "1" and keep_freed_memory()


def gives_large_pages(environment: Mapping[str, str]) -> bool:
    """Whether this system gives large pages to programs that ask, and this one may and did not."""
    if environment.get(LARGE_PAGES) == "0" or _HUGETLB in environment.get(_TUNABLES, ""):
        return False
    try:
        name, _, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").partition(" ")
        recent = name == "glibc" and tuple(map(int, version.split("."))) >= _SINCE
        return recent and "[madvise]" in _PAGES.read_text()
    except (OSError, ValueError, AttributeError):  # no glibc, no Linux, another form
        return False


def with_large_pages(environment: Mapping[str, str]) -> dict[str, str]:
    """Return an environment in which glibc asks for large pages."""
    others = environment.get(_TUNABLES)
    wanted = f"{_HUGETLB}=1"
    return {**environment, _TUNABLES: f"{others}:{wanted}" if others else wanted}


def _is_ours() -> bool:
    """Whether this program is one of ours, not a notebook or script that calls us."""
    main = sys.modules["__main__"]
    name = main.__spec__.name if main.__spec__ else Path(sys.argv[0]).stem
    return name == "sss-jax" or name.startswith("sss_jax.")


def keep_freed_memory() -> bool:
    """Let this process keep what it frees; call it before threads start.

    What the process holds does not shrink any more until it ends. Where the C library is not
    glibc nothing changes.

    Returns:
        Whether the C library agreed.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    # Blocks that are mapped by themselves are always given back: map none. Threads share one
    # arena, because that of a thread cannot grow beyond 64 MiB.
    wanted = ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, _NEVER), (_ARENA_MAX, 1))
    return sum(mallopt(name, value) for name, value in wanted) == len(wanted)
