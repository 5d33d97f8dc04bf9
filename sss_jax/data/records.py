"""Slices as records of array-record files, each sealed with a checksum of its own.

The seal covers the bytes of a slice and what the slice is (case, source file, position), so that a
record that was damaged, or that belongs elsewhere, is found when it is read.
"""

import contextlib
import threading
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python import array_record_module
from numpy.typing import NDArray

from sss_jax.atomic import replacing
from sss_jax.data.faults import FileFault

# One record a group: a random slice costs one read. zstd:1 halves 12-bit scans; 3 gains 5 % more
# and writes at half the speed, both are read equally fast.
_WRITING = "group_size:1,zstd:1"
_READING = "readahead_buffer_size:0,max_parallelism:0"
_READ_BUFFER = 2**15
_SEAL_BYTES = 4
_TYPES = ("uint8", "int16", "uint16", "float32")
AGAIN = "run the same `sss-jax data prepare` again: it finds and replaces damaged shards"


def smallest_type(array_SHW: NDArray[np.float32]) -> str:
    """Return the name of the smallest type that holds every number of a volume exactly."""
    return next(t for t in _TYPES if all(_holds(np.dtype(t), plane) for plane in array_SHW))


def _holds(dtype: np.dtype[Any], plane: NDArray[np.float32]) -> bool:
    if dtype.kind == "f":
        return True
    bounds = np.iinfo(dtype)
    if plane.min() < bounds.min or plane.max() > bounds.max:
        return False
    # Bits, not values: -0.0 is no integer.
    back = plane.astype(dtype).astype(np.float32)
    return bool(np.array_equal(back.view(np.uint32), np.ascontiguousarray(plane).view(np.uint32)))


def identity(kind: str, name: str, source: str, position: int) -> bytes:
    """Return what a record is: image or label, of which case, from which source, which slice."""
    return "\0".join((kind, name, source, str(position))).encode("utf-8", "surrogatepass")


def pack(array_HW: NDArray[Any], dtype: str, what: bytes) -> bytes:
    """Return the record of a slice: seal, then numbers row by row, little-endian."""
    content = np.ascontiguousarray(array_HW, np.dtype(dtype).newbyteorder("<")).tobytes()
    return _seal(content, what).to_bytes(_SEAL_BYTES, "little") + content


def unpack(record: bytes, dtype: str, plane: tuple[int, int], what: bytes) -> NDArray[Any]:
    """Return the slice of a record, [H, W].

    Raises:
        ValueError: the record is not what it should be.
    """
    content = memoryview(record)[_SEAL_BYTES:]
    stored = np.dtype(dtype).newbyteorder("<")
    if len(content) != plane[0] * plane[1] * stored.itemsize:
        raise ValueError("has another length than its case")
    if _seal(content, what) != int.from_bytes(record[:_SEAL_BYTES], "little"):
        raise ValueError("differs from its checksum")
    return np.frombuffer(content, stored).reshape(plane)


def _seal(content: bytes | memoryview, what: bytes) -> int:
    return zlib.crc32(content, zlib.crc32(what))


@contextlib.contextmanager
def new_shard(path: Path) -> Iterator[Callable[[bytes], None]]:
    """Yield a function that appends records; the file takes its name when all of it is written.

    Raises:
        FileFault: the disk refuses.
    """
    try:
        with replacing(path) as temporary:
            writer = array_record_module.ArrayRecordWriter(str(temporary), _WRITING)
            try:
                yield writer.write
            finally:
                writer.close()
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        fix = "make the folder writable, with room for all images unpacked"
        raise FileFault(path, f"cannot be written: {reason}", fix) from error


class Shard:
    """A file of records, opened at the first read; safe to share between threads.

    Args:
        path: array-record file.
        size: its bytes, as written.
        count: its records, as written.
    """

    def __init__(self, path: Path, size: int, count: int) -> None:
        self.path, self._size, self._count = path, size, count
        self._lock = threading.Lock()
        self._reader: Any = None

    def read(self, number: int) -> bytes:
        """Return a record.

        Raises:
            FileFault: the file is missing, cut off or damaged here.
        """
        with self._lock:
            if self._reader is None:
                self._reader = self._opened()
        try:
            return self._reader.read([number])[0]
        except (RuntimeError, IndexError, ValueError) as error:
            problem = f"is damaged at record {number} ({_first_words(error)})"
            raise FileFault(self.path, problem, AGAIN) from error

    def _opened(self) -> Any:
        try:
            size = self.path.stat().st_size
            if size != self._size:
                problem = f"has {size:,} bytes, {self._size:,} were written"
                raise FileFault(self.path, problem, AGAIN)
            reader = array_record_module.ArrayRecordReader(
                str(self.path), _READING, file_reader_buffer_size=_READ_BUFFER
            )
            count = reader.num_records()
        except (OSError, RuntimeError) as error:
            problem = f"cannot be read: {_first_words(error)}"
            raise FileFault(self.path, problem, f"check the path; {AGAIN}") from error
        if count != self._count:
            problem = f"is damaged: {count:,} of {self._count:,} records are found"
            raise FileFault(self.path, problem, AGAIN)
        return reader


def _first_words(error: Exception) -> str:
    """Return the gist of a library's message, which goes on with offsets and paths."""
    return str(error).splitlines()[0].split(" (")[0].split(";")[0][:80] if str(error) else "unknown"
