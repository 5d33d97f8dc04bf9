"""A folder to fill beside the target, and the folders that killed writers left there.

Whoever fills such a folder holds a lock on it, which the system takes back when the process ends,
however it ends. A folder that can be locked belongs to nobody any more.
"""

import contextlib
import os
import re
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path

from sss_jax import atomic

try:
    import fcntl
except ImportError:  # not on Windows; there strays stay
    fcntl = None  # type: ignore[assignment]

_MARK = re.escape(atomic.TEMPORARY_PREFIX) + "[0-9a-f]{8}-"


@contextlib.contextmanager
def folder_beside(final: Path, content: Collection[str]) -> Iterator[Path]:
    """Yield a new folder beside `final` that goes when the block ends, unless it was renamed.

    Args:
        final: what it is to become.
        content: names of the files that are going to be in it. Folders that were left for `final`
            and hold nothing else are removed first.
    """
    with contextlib.suppress(OSError):
        _sweep(final, content)
    with contextlib.ExitStack() as undo:
        yield _make(final, undo)


def _make(final: Path, undo: contextlib.ExitStack) -> Path:
    while True:
        temporary = atomic.temporary_beside(final)
        temporary.mkdir(parents=True)
        undo.callback(shutil.rmtree, temporary, ignore_errors=True)
        undo.enter_context(_locked(temporary, wait=True))
        if temporary.is_dir():  # else somebody swept it up before it was locked
            return temporary


def _sweep(final: Path, content: Collection[str]) -> None:
    for path in final.parent.iterdir():
        ours = re.fullmatch(_MARK + re.escape(final.name), path.name)
        if ours and path.is_dir() and not path.is_symlink() and _holds_only(path, content):
            with _locked(path, wait=False) as free:
                if free:
                    shutil.rmtree(path, ignore_errors=True)


def _holds_only(folder: Path, content: Collection[str]) -> bool:
    """Whether a folder holds only these files, finished or not."""
    allowed = re.compile(f"({_MARK})?({'|'.join(map(re.escape, content))})")
    return all(allowed.fullmatch(p.name) and p.is_file() for p in folder.iterdir())


@contextlib.contextmanager
def _locked(folder: Path, *, wait: bool) -> Iterator[bool]:
    """Hold a folder; yields whether that worked, which it does not on every file system."""
    descriptor = os.open(folder, os.O_RDONLY) if fcntl else None
    try:
        yield descriptor is not None and _lock(descriptor, wait)
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _lock(descriptor: int, wait: bool) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        return False
    return True
