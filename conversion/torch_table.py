"""Tables of tensors as torch describes them: checked when read, composed when written.

Source: the files that torch writes, and the signatures of its rebuilding functions.
"""

import math
import struct
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from sss_jax.conversion.tensors import MAX_AXES, Refused, Spec

STORAGES: dict[str, np.dtype] = {
    "torch.FloatStorage": np.dtype(np.float32),
    "torch.DoubleStorage": np.dtype(np.float64),
    "torch.HalfStorage": np.dtype(np.float16),
    "torch.BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "torch.LongStorage": np.dtype(np.int64),
    "torch.IntStorage": np.dtype(np.int32),
    "torch.ShortStorage": np.dtype(np.int16),
    "torch.CharStorage": np.dtype(np.int8),
    "torch.ByteStorage": np.dtype(np.uint8),
    "torch.BoolStorage": np.dtype(np.bool_),
}


class StorageRef(NamedTuple):
    """A block of numbers in a member of the archive."""

    dtype: np.dtype
    key: str
    numel: int


class TensorRef(NamedTuple):
    """A view of a storage; offset and strides count elements."""

    storage: StorageRef
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def span(self) -> int:
        """Elements of the storage from the first to the last one that is used."""
        if 0 in self.shape:
            return 0
        return 1 + sum((n - 1) * step for n, step in zip(self.shape, self.stride, strict=True))


class Name(NamedTuple):
    """Something a pickle knows by name; never the thing itself."""

    name: str


def storage_of(record: Any) -> StorageRef:
    """The storage that a persistent id names: ('storage', type, key, device, elements)."""
    if type(record) is tuple and len(record) == 5:
        word, kind, key, _, numel = record
        dtype = STORAGES.get(kind.name) if isinstance(kind, Name) else None
        if word == "storage" and dtype is not None and type(key) is str and _is_count(numel):
            return StorageRef(dtype, key, numel)
    raise Refused("its table describes a storage in an unknown way")


def _tensor(arguments: tuple[Any, ...]) -> TensorRef:
    """(storage, offset, shape, stride, requires_grad, hooks[, metadata]) as a checked view."""
    if len(arguments) not in (6, 7) or not isinstance(arguments[0], StorageRef):
        raise Refused("its table describes a tensor in an unknown way")
    storage, offset, shape, stride = arguments[:4]
    if not _is_count(offset) or not _are_counts(shape) or not _are_counts(stride):
        raise Refused("its table describes a tensor without sizes")
    if len(shape) != len(stride) or len(shape) > MAX_AXES:
        raise Refused(f"its table describes a tensor with {len(shape)} axes")
    tensor = TensorRef(storage, offset, shape, stride)
    numel = math.prod(shape)
    if numel > storage.numel or offset + tensor.span > storage.numel:
        raise Refused(
            f"it declares a tensor of {numel:,} elements from position {offset:,} on in a storage "
            f"of {storage.numel:,}"
        )
    return tensor


def _parameter(arguments: tuple[Any, ...]) -> TensorRef:
    if len(arguments) != 3 or not isinstance(arguments[0], TensorRef):
        raise Refused("its table describes a parameter in an unknown way")
    return arguments[0]


def _ordered(arguments: tuple[Any, ...]) -> dict[Any, Any]:
    if arguments:
        raise Refused("its table fills an ordered table in an unknown way")
    return {}


BUILDERS: dict[str, Callable[[tuple[Any, ...]], Any]] = {
    "collections.OrderedDict": _ordered,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": _parameter,
}


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _are_counts(values: Any) -> bool:
    return type(values) is tuple and all(map(_is_count, values))


def compose(specs: Mapping[str, Spec]) -> bytes:
    """Pickle of `{"model": ordered table}` whose n-th tensor is all of storage n.

    Args:
        specs: shape and type of every tensor, in the order of the table.
    """
    kinds = {dtype: name for name, dtype in STORAGES.items()}
    parts = [b"\x80\x02}", _text("model"), _global("collections.OrderedDict"), b")R("]
    for key, (name, spec) in enumerate(specs.items()):
        parts += [_text(name), _tensor_call(str(key), kinds[spec.dtype], spec.shape)]
    return b"".join([*parts, b"us."])


def _tensor_call(key: str, storage: str, shape: tuple[int, ...]) -> bytes:
    stride: list[int] = []
    numel = 1
    for size in reversed(shape):
        stride.insert(0, numel)
        numel *= size
    record = b"(" + _text("storage") + _global(storage) + _text(key) + _text("cpu")
    return b"".join(
        [
            _global("torch._utils._rebuild_tensor_v2"),
            b"(" + record + _integer(numel) + b"tQ",
            _integer(0),
            _integers(shape),
            _integers(stride),
            b"\x89" + _global("collections.OrderedDict") + b")RtR",
        ]
    )


def _text(value: str) -> bytes:
    raw = value.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def _global(name: str) -> bytes:
    module, _, attribute = name.rpartition(".")
    return f"c{module}\n{attribute}\n".encode()


def _integer(value: int) -> bytes:
    return b"J" + struct.pack("<i", value)


def _integers(values: Any) -> bytes:
    return b"(" + b"".join(map(_integer, values)) + b"t"
