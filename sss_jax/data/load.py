"""Read cases into scans and examples, and keep decoded scans in bounded memory."""

import collections
import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from sss_jax.data.cases import Case
from sss_jax.data.examples import Example, Scan, place, scan
from sss_jax.data.faults import shown
from sss_jax.data.geometry import Frame
from sss_jax.data.nifti import read_labels, read_volume
from sss_jax.errors import DataError
from sss_jax.options import DataOptions, ModelOptions


class Stack(Protocol):
    """The slices of one case, upright and scaled; a `Scan` holds all, others read when asked."""

    @property
    def frame(self) -> Frame:
        """The way back to storage order."""

    @property
    def depth(self) -> int:
        """Number of slices."""

    @property
    def with_label(self) -> NDArray[np.int64] | None:
        """Slices that show a label, ascending; None where labels are not known."""

    @property
    def nbytes(self) -> int:
        """Memory it holds, bytes."""

    def read(self, slices: NDArray[np.int64] | None = None) -> Scan:
        """Return the listed slices, or all."""


Read = Callable[[Case, int | None, DataOptions], Stack]
"""Gives the slices of a case. Takes the largest label allowed (None for any) and the settings."""


def load_scan(case: Case, num_classes: int | None, options: DataOptions) -> Scan:
    """Read a case, upright and scaled, at its native resolution.

    Args:
        case: what to read; labels too where it names them.
        num_classes: largest label allowed, None for any.
        options: intensity scaling, slice axis, size limit.

    Raises:
        DataError: naming the case, a file, what is wrong and how to mend it.
    """
    with naming(case.name):
        volume = read_volume(case.image, options.max_voxels)
        if case.label is None:
            return scan(volume, None, options)
        labels = read_labels(case.label, num_classes, options.max_voxels, volume)
        return scan(volume, labels, options)


@contextlib.contextmanager
def naming(case: str) -> Iterator[None]:
    """Begin the message of a data error with the name of the case it is about."""
    try:
        yield
    except DataError as error:
        raise DataError(f"case {shown(case)}: {error}") from error


def load_example(case: Case, model: ModelOptions, options: DataOptions) -> Example:
    """Read a whole case for validation or prediction.

    Returns:
        Slices fitted to the network's square, labels where the case names them, and the way back.
    """
    return place(load_scan(case, model.num_classes, options), model.image_size, options)


class StackCache:
    """Opened stacks, the least recently used dropped first; safe to share between threads.

    Threads that ask for one case at one time share a single decoding. A stack larger than the
    whole limit is returned and not kept.
    """

    def __init__(self, read: Callable[[Case], Stack], limit: int) -> None:
        self._read, self._limit = read, limit
        self._lock = threading.Lock()
        self._stacks: collections.OrderedDict[Case, Stack] = collections.OrderedDict()
        self._turns: dict[Case, threading.Lock] = {}
        self._held = 0

    @property
    def nbytes(self) -> int:
        """Memory of the stacks that are kept, bytes."""
        return self._held

    def __call__(self, case: Case) -> Stack:
        """Return a stack, from memory or from its source."""
        while True:
            with self._lock:
                if case in self._stacks:
                    self._stacks.move_to_end(case)
                    return self._stacks[case]
                turn = self._turns.get(case)
                if turn is None:
                    turn = self._turns[case] = threading.Lock()
                    turn.acquire()
                    break
            with turn:
                pass
        return self._decode(case, turn)

    def _decode(self, case: Case, turn: threading.Lock) -> Stack:
        """Read a case while others wait for `turn`."""
        try:
            stack = self._read(case)
            with self._lock:
                self._keep(case, stack)
            return stack
        finally:
            with self._lock:
                del self._turns[case]
            turn.release()

    def _keep(self, case: Case, stack: Stack) -> None:
        if stack.nbytes > self._limit:
            return
        while self._held + stack.nbytes > self._limit:
            self._held -= self._stacks.popitem(last=False)[1].nbytes
        self._stacks[case] = stack
        self._held += stack.nbytes
