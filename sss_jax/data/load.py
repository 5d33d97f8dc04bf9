"""Read cases into scans and examples, and keep decoded scans in bounded memory."""

import collections
import threading
from collections.abc import Callable

from sss_jax.data.cases import Case
from sss_jax.data.examples import Example, Scan, place, scan
from sss_jax.data.faults import shown
from sss_jax.data.nifti import read_labels, read_volume
from sss_jax.errors import DataError
from sss_jax.options import DataOptions, ModelOptions


def load_scan(case: Case, num_classes: int | None, options: DataOptions) -> Scan:
    """Read a case, upright and scaled, at its native resolution.

    Args:
        case: what to read; labels too where it names them.
        num_classes: largest label allowed, None for any.
        options: intensity scaling, slice axis, size limit.

    Raises:
        DataError: naming the case, a file, what is wrong and how to mend it.
    """
    try:
        volume = read_volume(case.image, options.max_voxels)
        if case.label is None:
            return scan(volume, None, options)
        labels = read_labels(case.label, num_classes, options.max_voxels, volume)
        return scan(volume, labels, options)
    except DataError as error:
        raise DataError(f"case {shown(case.name)}: {error}") from error


def load_example(case: Case, model: ModelOptions, options: DataOptions) -> Example:
    """Read a whole case for validation or prediction.

    Returns:
        Slices fitted to the network's square, labels where the case names them, and the way back.
    """
    return place(load_scan(case, model.num_classes, options), model.image_size, options)


class ScanCache:
    """Decoded scans, the least recently used dropped first; safe to share between threads.

    Threads that ask for one case at one time share a single decoding. A scan larger than the
    whole limit is returned and not kept.
    """

    def __init__(self, read: Callable[[Case], Scan], limit: int) -> None:
        self._read, self._limit = read, limit
        self._lock = threading.Lock()
        self._scans: collections.OrderedDict[Case, Scan] = collections.OrderedDict()
        self._turns: dict[Case, threading.Lock] = {}
        self._held = 0

    @property
    def nbytes(self) -> int:
        """Memory of the scans that are kept, bytes."""
        return self._held

    def __call__(self, case: Case) -> Scan:
        """Return a scan, from memory or from its file."""
        while True:
            with self._lock:
                if case in self._scans:
                    self._scans.move_to_end(case)
                    return self._scans[case]
                turn = self._turns.get(case)
                if turn is None:
                    turn = self._turns[case] = threading.Lock()
                    turn.acquire()
                    break
            with turn:
                pass
        return self._decode(case, turn)

    def _decode(self, case: Case, turn: threading.Lock) -> Scan:
        """Read a case while others wait for `turn`."""
        try:
            scan = self._read(case)
            with self._lock:
                self._keep(case, scan)
            return scan
        finally:
            with self._lock:
                del self._turns[case]
            turn.release()

    def _keep(self, case: Case, scan: Scan) -> None:
        if scan.nbytes > self._limit:
            return
        while self._held + scan.nbytes > self._limit:
            self._held -= self._scans.popitem(last=False)[1].nbytes
        self._scans[case] = scan
        self._held += scan.nbytes
