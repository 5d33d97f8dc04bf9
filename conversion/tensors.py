"""Named arrays that are read one at a time, and refusals that name the file.

A checkpoint is a table of names, shapes and types, which is cheap, and of values, which are not.
Everything here keeps the two apart: a file is judged by its table before any value is read.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from io import BufferedReader
from pathlib import Path
from typing import BinaryIO, NamedTuple, Self

import numpy as np

from sss_jax.errors import CheckpointError

MAX_TENSOR_BYTES = 2**26
"""Most bytes read for one tensor: three times the largest one of any published SAM-2."""

MAX_AXES = 8

_SHOWN = 80


class Refused(CheckpointError):
    """What is wrong with a checkpoint; `reading` adds the path of its file."""


class Spec(NamedTuple):
    """What a tensor is before it is read."""

    shape: tuple[int, ...]
    dtype: np.dtype


class Tensors(Mapping[str, np.ndarray]):
    """Arrays by name, each read when it is asked for.

    Args:
        specs: shape and type of every array.
        read: returns an array by its name; a KeyError says that there is none.
        close: releases what `read` needs; `with` calls it.
    """

    def __init__(
        self,
        specs: Mapping[str, Spec],
        read: Callable[[str], np.ndarray],
        close: Callable[[], None] = lambda: None,
    ) -> None:
        self.specs = dict(specs)
        self._read = read
        self.close = close

    def __getitem__(self, name: str) -> np.ndarray:
        return self._read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.specs)

    def __len__(self) -> int:
        return len(self.specs)

    def __contains__(self, name: object) -> bool:
        return name in self.specs  # the inherited test would read the array

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def lazy(tensors: Mapping[str, np.ndarray]) -> Tensors:
    """The same arrays with their table; a plain dict has all of them in memory already."""
    if isinstance(tensors, Tensors):
        return tensors
    specs = {name: Spec(array.shape, array.dtype) for name, array in tensors.items()}
    return Tensors(specs, tensors.__getitem__)


def open_file(path: Path) -> BufferedReader:
    """Open a regular file for reading.

    Raises:
        Refused: there is none; a pipe or a device would block or never end.
    """
    if not path.is_file():
        raise Refused("there is no such file; check the path")
    return path.open("rb")


def read_at(stream: BinaryIO, position: int, length: int) -> bytes:
    """Bytes from a position of a file, all of them.

    Raises:
        Refused: the file ends before.
    """
    stream.seek(position)
    data = stream.read(length)
    if len(data) != length:
        raise Refused("it is cut short; copy or download it again")
    return data


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn what goes wrong inside into an error that names the file."""
    try:
        yield
    except Refused as problem:
        raise CheckpointError(f"{path}: {problem}") from None
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be read ({error.strerror or error}); mend its permissions or its disk"
        ) from None


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn a failure of the disk inside into an error that names the target."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be written ({error.strerror or error}); nothing was kept. "
            "Free some space or choose another place"
        ) from None


def shown(text: object) -> str:
    """A name out of a file, safe to print: one line, no control characters, not too long."""
    name = str(text)
    return ascii(name if len(name) <= _SHOWN else name[: _SHOWN - 3] + "...")


def listed(names: list[str], limit: int = 10) -> str:
    """The first names of a list and how many more there are."""
    more = f", and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(shown(name) for name in names[:limit]) + more
