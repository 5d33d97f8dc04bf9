"""Checkpoints of torch, read and written without torch.

Source: the zip layout that torch has written since version 1.6: `NAME/data.pkl` describes the
tensors, `NAME/data/N` hold their numbers. A pickle can run any code when it is loaded the usual
way; here it is only interpreted (see `torch_pickle`), and no number is read before the table of
all tensors is known.
"""

import contextlib
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from sss_jax import atomic
from sss_jax.conversion.tensors import (
    MAX_TENSOR_BYTES,
    Refused,
    Spec,
    Tensors,
    lazy,
    listed,
    open_file,
    reading,
    shown,
    writing,
)
from sss_jax.conversion.torch_pickle import interpret
from sss_jax.conversion.torch_table import TensorRef, compose
from sss_jax.conversion.zip_members import StoredZip

WRAPPERS = ("model", "state_dict", "model_state_dict")
"""Entries under which training programs save the weights beside other state."""

_PARALLEL = "module."
_TABLE = "data.pkl"
_KNOWN = re.compile(
    r"data\.pkl|byteorder|version|\.format_version|\.storage_alignment"
    r"|\.data/serialization_id|data/\d+"
)
_ALIGNMENT = 64
_FIRST_DAY = (1980, 1, 1, 0, 0, 0)


def read_torch(path: Path) -> Tensors:
    """Open a checkpoint; its tensors are read one by one and copied to C order.

    `{"model": table}` and its kin are unwrapped, other entries such as an optimiser's are never
    read, and the "module." that parallel training puts before every name is taken off.

    Raises:
        CheckpointError: the file is damaged, holds more than tensors and plain values, or has
            no table of tensors. Nothing was executed.
    """
    with reading(path), contextlib.ExitStack() as undo:
        stream = undo.enter_context(open_file(path))
        archive, root = _open_archive(stream)
        swapped = _is_swapped(archive, root)
        refs = _unwrap(interpret(archive.read(f"{root}/{_TABLE}")))
        for name, ref in refs.items():
            _check_storage(archive, f"{root}/data/{ref.storage.key}", name, ref)
        specs = {name: Spec(ref.shape, ref.storage.dtype) for name, ref in refs.items()}
        close = undo.pop_all().close

    def read(name: str) -> np.ndarray:
        with reading(path):
            ref = refs[name]
            return _read_tensor(archive, f"{root}/data/{ref.storage.key}", ref, swapped)

    return Tensors(specs, read, close)


def _open_archive(stream: BinaryIO) -> tuple[StoredZip, str]:
    """Archive and the folder inside it that holds everything."""
    start = stream.read(4)
    if start != b"PK\3\4":
        raise Refused(
            "it is no torch checkpoint in the zip layout; torch files from before version 1.6 "
            "must be loaded and saved again with a current torch"
        )
    archive = StoredZip(stream)
    roots = [n.rpartition("/")[0] for n in archive.members if n.endswith(f"/{_TABLE}")]
    if len(roots) != 1 or "/" in roots[0]:
        raise Refused(f"it is no torch checkpoint: it holds {len(roots)} tables of tensors, not 1")
    unknown = [name for name in archive.members if not _is_known(name, roots[0])]
    if unknown:
        raise Refused(f"it holds what no table of tensors needs: {listed(unknown)}")
    return archive, roots[0]


def _is_known(name: str, root: str) -> bool:
    return name.startswith(f"{root}/") and bool(_KNOWN.fullmatch(name[len(root) + 1 :]))


def _is_swapped(archive: StoredZip, root: str) -> bool:
    """Whether the numbers are big-endian."""
    member = archive.members.get(f"{root}/byteorder")
    if member is None:
        return False
    order = archive.read(member.name, 0, None if member.size < 16 else 16)
    if order not in (b"little", b"big"):
        raise Refused(f"its byte order is {shown(order)}")
    return order == b"big"


def _unwrap(value: Any) -> dict[str, TensorRef]:
    """The table of tensors inside what the pickle holds."""
    tables = [value] if _is_table(value) else []
    if not tables and isinstance(value, dict):
        tables = [value[key] for key in WRAPPERS if _is_table(value.get(key))]
    if len(tables) != 1:
        raise Refused(
            f"it holds {len(tables)} tables of tensors where one is expected, at the top or under "
            + ", ".join(map(repr, WRAPPERS))
        )
    (table,) = tables
    odd = [str(n) for n, ref in table.items() if not isinstance(ref, TensorRef)]
    if odd:
        raise Refused(f"these entries beside its tensors are none: {listed(odd)}")
    if all(name.startswith(_PARALLEL) for name in table):
        return {name.removeprefix(_PARALLEL): ref for name, ref in table.items()}
    return table


def _is_table(value: Any) -> bool:
    """Whether a value is a dict that holds tensors by name."""
    if not isinstance(value, dict) or not all(type(name) is str for name in value):
        return False
    return any(isinstance(ref, TensorRef) for ref in value.values())


def _check_storage(archive: StoredZip, member: str, name: str, ref: TensorRef) -> None:
    if member not in archive.members:
        raise Refused(f"the numbers of {shown(name)} are missing")
    size, declared = archive.members[member].size, ref.storage.numel * ref.storage.dtype.itemsize
    if size != declared:
        raise Refused(f"the numbers of {shown(name)} take {size:,} bytes, not {declared:,}")


def _read_tensor(archive: StoredZip, member: str, ref: TensorRef, swapped: bool) -> np.ndarray:
    dtype = ref.storage.dtype
    size = ref.span * dtype.itemsize
    if size > MAX_TENSOR_BYTES:
        raise Refused(f"it declares a tensor of {size:,} bytes; at most {MAX_TENSOR_BYTES:,}")
    raw = np.frombuffer(archive.read(member, ref.offset * dtype.itemsize, size), np.uint8)
    if swapped:
        raw = raw.view(f"u{dtype.itemsize}").byteswap()
    steps = [step * dtype.itemsize for step in ref.stride]
    view = np.lib.stride_tricks.as_strided(raw.view(dtype), ref.shape, steps, writeable=False)
    return np.ascontiguousarray(view).reshape(ref.shape)


def write_torch(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Write `{"model": tensors}` so that `torch.load(path, weights_only=True)` reads it.

    The same tensors give the same bytes. The file appears whole or not at all.

    Raises:
        CheckpointError: the disk refuses.
    """
    with writing(path), atomic.replacing(path) as temporary:
        write_file(temporary, lazy(tensors))


def write_file(path: Path, tensors: Tensors) -> None:
    """Write the file itself; errors of the disk stay bare."""
    with path.open("wb") as stream, zipfile.ZipFile(stream, "w") as archive:
        _add(archive, stream, _TABLE, compose(tensors.specs))
        _add(archive, stream, "byteorder", b"little")
        for key, array in enumerate(tensors.values()):
            _add(archive, stream, f"data/{key}", np.ascontiguousarray(array).tobytes())
        _add(archive, stream, "version", b"3\n")


def _add(archive: zipfile.ZipFile, stream: BinaryIO, name: str, content: bytes) -> None:
    """Add a member whose content starts at a multiple of 64 bytes, as torch aligns it."""
    member = zipfile.ZipInfo(f"archive/{name}", _FIRST_DAY)
    member.create_system = 3
    header = stream.tell() + 30 + len(member.filename) + 4
    padding = -header % _ALIGNMENT
    member.extra = b"FB" + padding.to_bytes(2, "little") + b"Z" * padding
    archive.writestr(member, content)
