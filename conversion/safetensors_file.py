"""Safetensors files, read within fixed bounds and written.

Source: the format's specification: eight bytes with the length of a JSON header, the header
(name -> dtype, shape, data_offsets), then the numbers, little-endian, without gaps or overlaps.
"""

import collections
import contextlib
import json
import math
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from sss_jax import atomic
from sss_jax.conversion.tensors import (
    MAX_AXES,
    MAX_TENSOR_BYTES,
    Refused,
    Spec,
    Tensors,
    lazy,
    listed,
    open_file,
    read_at,
    reading,
    shown,
    writing,
)

MAX_HEADER = 2**21
_ABOUT = "__metadata__"

DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}


def read_safetensors(path: Path) -> Tensors:
    """Open a file; its tensors are read one by one.

    Raises:
        CheckpointError: the file is damaged or inconsistent.
    """
    with reading(path), contextlib.ExitStack() as undo:
        stream = undo.enter_context(open_file(path))
        header, start = _read_header(stream)
        header.pop(_ABOUT, None)
        rows = {name: _parse_row(name, row) for name, row in header.items()}
        end = stream.seek(0, 2) - start
        _check_cover([place for _, place in rows.values()], end)
        specs = {name: spec for name, (spec, _) in rows.items()}
        close = undo.pop_all().close

    def read(name: str) -> np.ndarray:
        with reading(path):
            spec, (first, last) = rows[name]
            return _read_tensor(stream, spec, start + first, last - first)

    return Tensors(specs, read, close)


def _read_header(stream: BinaryIO) -> tuple[dict[str, Any], int]:
    """Header and the position after it."""
    length = int.from_bytes(stream.read(8), "little")
    if not 0 < length <= MAX_HEADER:
        raise Refused(f"it is no safetensors file: a header of {length:,} bytes")
    text = stream.read(length)
    if len(text) != length:
        raise Refused("its header is cut short; copy or download it again")
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError):
        raise Refused("its header is no JSON; copy or download it again") from None
    if not isinstance(header, dict):
        raise Refused("its header is no table")
    return header, 8 + length


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        counts = collections.Counter(name for name, _ in pairs)
        raise Refused(f"its header holds twice: {listed([n for n in table if counts[n] > 1])}")
    return table


def _parse_row(name: str, row: Any) -> tuple[Spec, tuple[int, int]]:
    """Shape and type of a tensor, and where its bytes start and end."""
    if not isinstance(row, dict) or row.keys() != {"dtype", "shape", "data_offsets"}:
        raise Refused(f"its entry {shown(name)} is no description of a tensor")
    kind, shape, place = row["dtype"], row["shape"], row["data_offsets"]
    if not isinstance(kind, str) or kind not in DTYPES:
        raise Refused(f"{shown(name)} has an unknown type")
    if not _are_counts(shape) or len(shape) > MAX_AXES or not _are_counts(place):
        raise Refused(f"{shown(name)} has no proper shape or place")
    size = math.prod(shape) * DTYPES[kind].itemsize
    if len(place) != 2 or place[1] - place[0] != size:
        raise Refused(f"{shown(name)} declares {size:,} bytes, but its place has another length")
    return Spec(tuple(shape), DTYPES[kind]), (place[0], place[1])


def _are_counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(v) is int and 0 <= v < 2**63 for v in values)


def _check_cover(places: Iterable[tuple[int, int]], size: int) -> None:
    """Refuse gaps, overlaps, and bytes that belong to no tensor."""
    end = 0
    for first, last in sorted(places):
        if first != end:
            raise Refused(f"its tensors overlap or leave a gap at byte {min(first, end):,}")
        end = last
    if end != size:
        raise Refused(f"it holds {size:,} bytes of numbers, its header describes {end:,}")


def _read_tensor(stream: BinaryIO, spec: Spec, position: int, size: int) -> np.ndarray:
    if size > MAX_TENSOR_BYTES:
        raise Refused(f"it declares a tensor of {size:,} bytes; at most {MAX_TENSOR_BYTES:,}")
    return np.frombuffer(read_at(stream, position, size), spec.dtype).reshape(spec.shape)


def write_safetensors(
    path: Path, tensors: Mapping[str, np.ndarray], about: Mapping[str, str] | None = None
) -> None:
    """Write arrays, wide types first and then by name, one in memory at a time.

    The same arrays give the same bytes. The file appears whole or not at all.

    Raises:
        CheckpointError: the disk refuses.
    """
    with writing(path), atomic.replacing(path) as temporary:
        write_file(temporary, lazy(tensors), about)


def write_file(path: Path, tensors: Tensors, about: Mapping[str, str] | None = None) -> None:
    """Write the file itself; errors of the disk stay bare."""
    specs = tensors.specs
    order = sorted(specs, key=lambda name: (-specs[name].dtype.itemsize, name))
    header = _compose_header(specs, order, dict(about or {}))
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", len(header)) + header)
        for name in order:
            stream.write(np.ascontiguousarray(tensors[name]).tobytes())


def _compose_header(specs: Mapping[str, Spec], order: list[str], about: dict[str, str]) -> bytes:
    names = {dtype: name for name, dtype in DTYPES.items()}
    header: dict[str, Any] = {_ABOUT: about} if about else {}
    position = 0
    for name in order:
        shape, dtype = specs[name]
        end = position + math.prod(shape) * dtype.itemsize
        row = {"dtype": names[dtype], "shape": list(shape), "data_offsets": [position, end]}
        header[name] = row
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % 8)
