"""Files that appear whole or not at all.

A reader, or a crash at any moment, sees either the old content or the new one: the bytes go to a
temporary file in the same folder, are flushed to the disk, and take the final name in one rename.
"""

import contextlib
import json
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TEMPORARY_PREFIX = ".tmp-"


def write_bytes(path: str | os.PathLike[str], content: bytes) -> None:
    """Write `content` to `path` atomically."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: str | os.PathLike[str], content: str) -> None:
    """Write `content` to `path` atomically, as UTF-8 with its line ends as they are."""
    write_bytes(path, content.encode("utf-8"))


def write_json(path: str | os.PathLike[str], content: Any, indent: int | None = 2) -> None:
    """Write `content` to `path` atomically as strict JSON (NaN and infinity are refused)."""
    write_text(path, json.dumps(content, indent=indent, allow_nan=False) + "\n")


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path that becomes `path` when the block ends without an error.

    The temporary name ends in the final name, so writers that look at the extension work. A
    symbolic link is followed, and the permissions of a file that is replaced are kept.
    """
    final = Path(os.path.realpath(path))
    temporary = temporary_beside(final)
    try:
        yield temporary
        _keep_mode(final, temporary)
        flush(temporary)
        os.replace(temporary, final)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    flush(final.parent)


def temporary_beside(final: Path) -> Path:
    """Return an unused name in the folder of `final`, whose end is that of `final`."""
    return final.with_name(f"{TEMPORARY_PREFIX}{secrets.token_hex(4)}-{final.name}")


def _keep_mode(old: Path, new: Path) -> None:
    with contextlib.suppress(OSError):
        os.chmod(new, old.stat().st_mode & 0o7777)


def flush(path: Path) -> None:
    """Force a file or a folder to the disk."""
    if path.is_dir():
        # Some file systems cannot flush a folder; the rename is still atomic there.
        with contextlib.suppress(OSError):
            _flush_descriptor(path)
    else:
        _flush_descriptor(path)


def _flush_descriptor(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
