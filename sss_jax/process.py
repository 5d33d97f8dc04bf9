"""How a process that is ours alone is set up, before it computes.

A step takes its temporaries from the C library and frees them. By default glibc gives large blocks
back to the system at once, so that every step is handed fresh pages, each of which the system has
to find and to clear: a third of the time of a small step on CPUs, and three quarters of what it
takes to make a batch at 1024 pixels (docs/explanation/performance.md). What is freed can stay with
the process instead, and the next step takes it again.
"""

import ctypes
import gc
import os

COLLECT = (200_000, 50, 100)
"""Thresholds of Python's collector. Tracing makes millions of objects that stay, and the usual ones
let it look through them again and again: a fifth of the time until the first step."""

# Names and values of glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8
_NEVER = -1

KEEP = "SSS_JAX_KEEP_MEMORY"
"""Environment variable; 1: keep freed memory. Not the default: where several threads compute, the
one arena that it needs made training half as fast."""


def set_up() -> bool:
    """Collect garbage seldom; keep freed memory if asked to. Call it first.

    Returns:
        Whether freed memory is kept.
    """
    gc.set_threshold(*COLLECT)
    return os.environ.get(KEEP) == "1" and keep_freed_memory()


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
