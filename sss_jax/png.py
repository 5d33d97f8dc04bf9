"""A writer of grey-scale PNG images, so that a report needs no imaging library."""

import struct
import zlib

import numpy as np
from numpy.typing import NDArray


def grey_png(image: NDArray[np.uint8]) -> bytes:
    """Return a grey-scale image [rows, columns] as the bytes of a PNG file."""
    if image.ndim != 2 or image.dtype != np.uint8 or image.size == 0:
        raise ValueError(f"expected a non-empty uint8 image, got {image.dtype} {image.shape}")
    rows, columns = image.shape
    # Filter 2 stores each row as its difference from the row above: smooth images shrink.
    above = np.vstack((np.zeros((1, columns), np.uint8), image[:-1]))
    filtered = np.hstack((np.full((rows, 1), 2, np.uint8), image - above))
    header = struct.pack(">IIBBBBB", columns, rows, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + _chunk(b"IHDR", header)
        + _chunk(b"IDAT", zlib.compress(filtered.tobytes(), 9))
        + _chunk(b"IEND", b"")
    )


def _chunk(kind: bytes, content: bytes) -> bytes:
    checksum = zlib.crc32(kind + content)
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)
