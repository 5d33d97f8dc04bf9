"""NIfTI volumes: bounded, verified reading and atomic writing.

nibabel parses headers only. Voxels are streamed by this module, because a reader that trusts the
header can be made to allocate any amount of memory, and nibabel stops before the checksum at the
end of a .nii.gz, so that damaged files load as wrong numbers without an error.
"""

import contextlib
import dataclasses
import gzip
import io
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from sss_jax.atomic import write_bytes
from sss_jax.data.faults import FileFault
from sss_jax.data.header import NIFTI2_SIZE, Declared, parse_header

SUFFIXES = (".nii.gz", ".nii")
_CHUNK = 2**20  # voxels
_SLACK = 2**20  # bytes tolerated after the last voxel
_BOMB_BYTES, _BOMB_RATIO = 2**26, 200
_DEFLATE_RATIO = 1040  # deflate cannot compress better
_NEAR = 1e-3
_AGAIN = "copy or export the file again; it is damaged"

Values = NDArray[Any]


@dataclasses.dataclass(frozen=True, eq=False)
class Volume:
    """A volume as it is stored.

    Attributes:
        array: float32 intensities or uint8 labels, [X, Y, Z] in storage order.
        affine: voxel indices to millimetres in (right, front, head), [4, 4].
        spacing: distance of neighbouring voxels along the stored axes, mm (voxels where unknown).
        oriented: False where the file gives no orientation (qform and sform codes both 0); the
            affine is then the spacing alone and means nothing.
        header: the nibabel header, for writing on the same grid.
        path: where it came from.
    """

    array: Values
    affine: NDArray[np.float64]
    spacing: tuple[float, float, float]
    oriented: bool
    header: Any
    path: Path


def stem(path: Path) -> str:
    """Return the file name without .nii or .nii.gz."""
    return path.name.removesuffix(".gz").removesuffix(".nii")


def is_nifti(path: Path) -> bool:
    """Tell from the name alone whether a file should be a NIfTI volume; hidden files are not."""
    return path.name.endswith(SUFFIXES) and not path.name.startswith(".")


def read_volume(path: Path, max_voxels: int) -> Volume:
    """Read an image as float32, with slope and intercept applied.

    Args:
        path: .nii or .nii.gz file.
        max_voxels: refuse a file that declares more.

    Raises:
        FileFault: damaged, too large, not 3-D, not finite, constant, or not NIfTI.
    """
    with _opened(path, max_voxels) as (stream, declared):
        if path.name.endswith(".gz"):
            _refuse_bomb(path, declared)
        array = _read_voxels(stream, declared, np.dtype(np.float32), _finite(path, declared), path)
    low, high = float(array.min()), float(array.max())
    if low == high:
        problem = f"is constant: every voxel is {low:g}"
        raise FileFault(path, problem, "leave the case out, or export the image again")
    return _volume(array, declared, path)


def read_labels(
    path: Path, num_classes: int | None, max_voxels: int, like: Volume | None = None
) -> Volume:
    """Read a label map as uint8; numbers stored as floats must be whole to 0.001.

    Args:
        path: .nii or .nii.gz file.
        num_classes: largest label allowed; None allows all that uint8 can hold.
        max_voxels: refuse a file that declares more.
        like: the image; a label map on another grid is refused from its header.

    Raises:
        FileFault: damaged, too large, on another grid, or labels that are not whole or out of
            range.
    """
    with _opened(path, max_voxels) as (stream, declared):
        if like is not None:
            refuse_other_grid(declared, path, like)
        convert = _whole(path, declared, 255 if num_classes is None else num_classes)
        array = _read_voxels(stream, declared, np.dtype(np.uint8), convert, path)
    return _volume(array, declared, path)


def refuse_other_grid(labels: Declared | Volume, path: Path, image: Volume) -> None:
    """Raise FileFault where labels and image differ in shape, orientation or place.

    A corner of the volume may be off by a tenth of the smallest voxel side, more than rounding
    in headers causes.
    """
    shape = labels.shape if isinstance(labels, Declared) else labels.array.shape
    if shape != image.array.shape:
        problem = f"has the shape {shape}, its image {image.array.shape}"
        raise FileFault(path, problem, "resample the labels to the grid of the image")
    if labels.oriented != image.oriented:
        lacking = "image" if labels.oriented else "label file"
        problem = f"only the {lacking} lacks an orientation (qform and sform codes are 0)"
        raise FileFault(path, problem, "copy the header's orientation from the other file")
    corners = np.array(np.meshgrid(*((0, n) for n in shape), (1,))).reshape(4, -1)
    shift = np.linalg.norm((labels.affine - image.affine)[:3] @ corners, axis=0).max()
    if shift > 0.1 * min(image.spacing):
        problem = f"has another affine than its image: corners are {shift:.3g} mm apart"
        raise FileFault(path, problem, "resample the labels to the grid of the image")


def write_labels(path: Path, labels: Values, like: Volume) -> None:
    """Write labels on the grid of `like`, atomically; equal input gives equal bytes.

    Shape, affines, their codes, units and byte order are those of `like`. Labels are stored as
    uint8, or uint16 where one exceeds 255, without scaling. Header extensions and free text are
    left out, since they may name a patient.

    Args:
        path: target, .nii or .nii.gz.
        labels: whole numbers, [X, Y, Z] in storage order.
        like: the volume the labels belong to.
    """
    if not path.name.endswith(SUFFIXES):
        raise FileFault(path, "is not the name of a NIfTI file", "end it in .nii.gz or .nii")
    if labels.shape != like.array.shape:
        raise ValueError(f"labels have the shape {labels.shape}, the image {like.array.shape}")
    if labels.dtype.kind not in "iub" or labels.min(initial=0) < 0:
        raise ValueError("labels must be whole numbers from 0 on")
    dtype = np.dtype(np.uint8 if labels.max(initial=0) <= 255 else np.uint16)
    header = _label_header(like.header, dtype)
    stored = labels.astype(dtype.newbyteorder(header.endianness))
    content = header.binaryblock + bytes(4) + stored.tobytes(order="F")
    try:
        write_bytes(path, _compress(content) if path.name.endswith(".gz") else content)
    except OSError as error:
        needed = f"make it writable, with {len(content):,} bytes free at most"
        raise FileFault(path, f"cannot be written: {error.strerror}", needed) from error


def _label_header(source: Any, dtype: np.dtype[Any]) -> Any:
    header = source.copy()
    header.extensions = type(header.extensions)()
    header.set_data_dtype(dtype)
    header["vox_offset"] = 352 if int(header["sizeof_hdr"]) != NIFTI2_SIZE else 544
    for field, value in (("scl_slope", 1), ("scl_inter", 0), ("cal_min", 0), ("cal_max", 0)):
        header[field] = value
    for field in {"descrip", "aux_file", "intent_name", "db_name"} & set(header.keys()):
        header[field] = b""
    header["intent_code"] = nib.nifti1.intent_codes.code["none"]
    return header


def _compress(content: bytes) -> bytes:
    buffer = io.BytesIO()
    with gzip.GzipFile(filename="", mode="wb", compresslevel=6, fileobj=buffer, mtime=0) as file:
        file.write(content)
    return buffer.getvalue()


def _volume(array: Values, declared: Declared, path: Path) -> Volume:
    d = declared
    return Volume(array, d.affine, d.spacing, d.oriented, d.header, path)


@contextlib.contextmanager
def _opened(path: Path, max_voxels: int) -> Iterator[tuple[IO[bytes], Declared]]:
    """Yield a stream behind the header and what the header declares; errors become FileFault."""
    try:
        with open(path, "rb") as file:
            _refuse_wrong_name(path, file.peek(2)[:2])
            compressed = path.name.endswith(".gz")
            stream: Any = gzip.GzipFile(fileobj=file, mode="rb") if compressed else file
            block = stream.read(NIFTI2_SIZE)
            declared = parse_header(block, path, max_voxels)
            _refuse_short(path, declared, os.fstat(file.fileno()).st_size)
            stream.seek(declared.offset)
            yield stream, declared
    except EOFError as error:
        raise FileFault(path, "is truncated", _AGAIN) from error
    except (gzip.BadGzipFile, zlib.error) as error:
        raise FileFault(path, f"has damaged compression ({error})", _AGAIN) from error
    except MemoryError as error:
        problem = "does not fit into memory"
        raise FileFault(path, problem, "crop it, or lower data.max_voxels") from error
    except OSError as error:
        problem = f"cannot be read: {error.strerror or error}"
        raise FileFault(path, problem, "check the path and its permissions") from error


def _refuse_wrong_name(path: Path, magic: bytes) -> None:
    if not path.name.endswith(SUFFIXES):
        raise FileFault(path, "is not named .nii or .nii.gz", "convert it to NIfTI")
    if not magic:
        raise FileFault(path, "is empty", _AGAIN)
    if path.name.endswith(".gz") and magic != b"\x1f\x8b":
        problem = "is named .gz but is not gzip-compressed"
        raise FileFault(path, problem, "rename it to .nii if it is NIfTI, or compress it")
    if path.name.endswith(".nii") and magic == b"\x1f\x8b":
        problem = "is named .nii but is gzip-compressed"
        raise FileFault(path, problem, "rename it to .nii.gz")


def _refuse_short(path: Path, declared: Declared, size: int) -> None:
    """Refuse a file that cannot hold what it declares, before memory is set aside for it."""
    most = size * _DEFLATE_RATIO if path.name.endswith(".gz") else size
    if declared.bytes > most:
        problem = f"is truncated: {size:,} bytes cannot hold {declared.voxels:,} voxels"
        raise FileFault(path, problem, _AGAIN)


def _refuse_bomb(path: Path, declared: Declared) -> None:
    size = path.stat().st_size
    if declared.bytes > _BOMB_BYTES and declared.bytes > _BOMB_RATIO * size:
        ratio = declared.bytes // max(size, 1)
        problem = f"would grow {ratio}-fold to {declared.bytes:,} bytes, as no scan does"
        raise FileFault(path, problem, "unpack it with gunzip first if you trust it")


def _read_voxels(
    stream: IO[bytes],
    declared: Declared,
    dtype: np.dtype[Any],
    convert: Callable[[Values], Values],
    path: Path,
) -> Values:
    """Stream all voxels through `convert`, then go to the end of the file, where the CRC is.

    A wrong value is raised last: in a damaged file the damage is what the reader should know.
    """
    flat = np.empty(declared.voxels, dtype)
    fault: FileFault | None = None
    for start in range(0, declared.voxels, _CHUNK):
        stop = min(start + _CHUNK, declared.voxels)
        want = (stop - start) * declared.dtype.itemsize
        raw = stream.read(want)
        if len(raw) < want:
            problem = f"is truncated: {declared.voxels:,} voxels are declared, fewer are there"
            raise FileFault(path, problem, _AGAIN)
        try:
            flat[start:stop] = convert(np.frombuffer(raw, declared.dtype))
        except FileFault as found:
            fault = fault or found
    if len(stream.read(_SLACK + 1)) > _SLACK:
        raise FileFault(path, "holds more data than its header declares", _AGAIN)
    if fault is not None:
        raise fault
    return flat.reshape(declared.shape, order="F")


def _scaled(values: Values, declared: Declared) -> Values:
    if (declared.slope, declared.inter) == (1.0, 0.0):
        return values
    return values.astype(np.float64) * declared.slope + declared.inter


def _finite(path: Path, declared: Declared) -> Callable[[Values], Values]:
    def convert(values: Values) -> Values:
        with np.errstate(over="ignore", invalid="ignore"):
            result = _scaled(values, declared).astype(np.float32)
        if not np.isfinite(result).all():
            problem = "has NaN or infinite voxels"
            raise FileFault(path, problem, "replace them, e.g. by the smallest intensity")
        return result

    return convert


def _whole(path: Path, declared: Declared, largest: int) -> Callable[[Values], Values]:
    def convert(values: Values) -> Values:
        labels = _scaled(values, declared)
        if labels.dtype.kind == "f":
            with np.errstate(invalid="ignore"):
                off = ~(np.abs(labels - np.round(labels)) <= _NEAR)
            if off.any():
                problem = f"has labels that are not whole numbers: {_some(labels[off])}"
                raise FileFault(path, problem, "resample or export it again with nearest-neighbour")
            labels = np.round(labels)
        out = (labels < 0) | (labels > largest)
        if out.any():
            problem = f"has labels outside 0..{largest}: {_some(labels[out])}"
            raise FileFault(path, problem, "set model.num_classes, or map the labels to 0..K")
        return labels.astype(np.uint8)

    return convert


def _some(values: Values) -> str:
    found = np.unique(values)
    text = ", ".join(f"{v:g}" for v in found[:5])
    return text + (", ..." if len(found) > 5 else "")
