"""What stops a run: signals, a second run in the same folder, and numbers that are not finite."""

import contextlib
import json
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any, Self

import jax
import numpy as np

from sss_jax.axes import Array, Bool, PyTree
from sss_jax.errors import DataError, NonFiniteError

try:
    import fcntl
except ImportError:  # Windows: the lock file alone has to do
    fcntl = None  # type: ignore[assignment]

_LOG = logging.getLogger(__name__)


# Finite numbers.


def apply_if_finite(finite: Bool[Array, ""], update: Callable[[], PyTree], old: PyTree) -> PyTree:
    """Return `update()` where `finite`, else `old`; usable inside jit.

    A branch, not a select over all of the state: that took as long as the update.
    """
    return jax.lax.cond(finite, update, lambda: old)


def _nonfinite(step: int, terms: Iterable[str], names: Iterable[str]) -> NonFiniteError:
    said = ", ".join(terms) or "a gradient"
    cases = ", ".join(dict.fromkeys(names)) or "unknown"
    return NonFiniteError(
        f"step {step}: not finite: {said}. Cases: {cases}. The update was not applied. "
        "Look at these cases with `data check`, lower optimizer.rate, or use float32."
    )


class NonFiniteGuard:
    """Remembers on the device which steps were not finite, and stops the run at the limit.

    Watching does not wait for the device. Every process of a run sees the same flags and reads
    them at the same step, so that all of them stop together.

    Args:
        limit: non-finite steps at which the run stops.
        names: cases of a step, for the message.
    """

    def __init__(self, limit: int, names: Callable[[int], Iterable[str]]) -> None:
        self._limit, self._names = limit, names
        self._watched: list[tuple[int, Any, Mapping[str, Any]]] = []
        self._count = 0

    def watch(self, step: int, finite: Any, terms: Mapping[str, Any] | None = None) -> None:
        """Remember the flag of a step and, for the message, its loss terms."""
        self._watched.append((step, finite, terms or {}))

    def check(self, scalars: Mapping[str, Any] | None = None) -> None:
        """Read the remembered flags; raise `NonFiniteError` at the limit, warn below it.

        Args:
            scalars: loss terms of the newest step, where `watch` was not given them.
        """
        watched, self._watched = self._watched, []
        flags = jax.device_get([finite for _, finite, _ in watched])
        bad = [row for row, finite in zip(watched, flags, strict=True) if not finite]
        for step, _, terms in bad:
            self._count += 1
            newest = step == watched[-1][0]
            known = jax.device_get(dict(terms or (scalars if newest and scalars else {})))
            listed = [f"{k} {float(v)}" for k, v in known.items() if not np.isfinite(v)]
            error = _nonfinite(step, listed, self._names(step))
            if self._count >= self._limit:
                raise error
            _LOG.warning("%s (%d of %d allowed)", error, self._count, self._limit - 1)


# Signals.


class StopSignal:
    """Turns SIGTERM, SIGINT and SIGUSR1 into a flag that is read between steps.

    The first Ctrl-C finishes the step and saves; a second one raises KeyboardInterrupt at once.
    With several processes `agreed` makes all of them stop after the same step.
    """

    SIGNALS = ("SIGTERM", "SIGINT", "SIGUSR1")

    def __init__(self) -> None:
        self.reason: str | None = None
        self._old: dict[int, Any] = {}
        self._service = False

    @property
    def requested(self) -> bool:
        """Whether this process was asked to stop."""
        return self.reason is not None

    def agreed(self, step: int) -> bool:
        """Whether to stop after `step`; the same answer in every process of the run.

        All processes must call it for every step.
        """
        if jax.process_count() == 1:
            return self.requested
        from jax.experimental import multihost_utils

        if self._service:
            stop = bool(multihost_utils.reached_preemption_sync_point(step))
        else:
            flags = multihost_utils.process_allgather(np.asarray(self.requested))
            stop = bool(np.any(flags))
        if stop and self.reason is None:
            self.reason = "a signal to another process or to the preemption service"
        return stop

    def __enter__(self) -> Self:
        self._service = _has_preemption_service()
        if threading.current_thread() is threading.main_thread():
            for name in self.SIGNALS:
                # JAX's preemption service listens to SIGTERM itself, through a C handler.
                if hasattr(signal, name) and not (self._service and name == "SIGTERM"):
                    number = getattr(signal, name)
                    self._old[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        self._old.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.reason == "SIGINT":
            raise KeyboardInterrupt
        self.reason = signal.Signals(number).name
        # print() is not safe here: the signal may have come in the middle of another print.
        with contextlib.suppress(OSError):
            os.write(2, f"\n{self.reason}: stopping after this step\n".encode())
        if self._service:
            os.kill(os.getpid(), signal.SIGTERM)


def _has_preemption_service() -> bool:
    """Whether JAX's own preemption service runs in this process."""
    enabled = getattr(jax.config, "jax_enable_preemption_service", True)
    return jax.distributed.is_initialized() and bool(enabled)


# The lock of a run folder.


class WorkdirLock:
    """Keeps a second run out of a folder; the lock of a dead process is taken over.

    Where the file system offers locks the kernel decides, and a crash frees the folder. Where it
    does not, the process named in the lock file decides. Object storage cannot be locked.

    Args:
        folder: existing run folder.

    Raises:
        DataError: on entering, if another run holds the folder or it cannot be written.
    """

    NAME = ".lock"

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.path = Path(folder) / self.NAME
        self._remote = "://" in str(folder)
        self._descriptor: int | None = None

    def __enter__(self) -> Self:
        if self._remote:
            return self
        # Another run may remove the file between our opening and locking it; then try again.
        for _ in range(20):
            if self._take():
                return self
            time.sleep(0.01)
        raise DataError(f"{self.path}: changes all the time; are several runs being started?")

    def __exit__(self, *_: object) -> None:
        if self._descriptor is not None:
            with contextlib.suppress(OSError):
                self.path.unlink()
            os.close(self._descriptor)
            self._descriptor = None

    def _take(self) -> bool:
        try:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise DataError(
                f"{self.path}: cannot be written ({error.strerror}); choose a --workdir that can"
            ) from None
        try:
            self._refuse_if_held(descriptor)
            if not _same_file(descriptor, self.path):
                os.close(descriptor)
                return False
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps(_myself()).encode() + b"\n", 0)
        except BaseException:
            os.close(descriptor)
            raise
        self._descriptor = descriptor
        return True

    def _refuse_if_held(self, descriptor: int) -> None:
        locked = _flock(descriptor)
        holder = _parse(os.pread(descriptor, 4096, 0))
        if locked is True or (locked is None and (holder is None or _is_gone(holder))):
            return
        who = "another process"
        if holder is not None:
            who = f"process {holder['pid']} on {holder['host']}"
        hint = "" if locked is False else f", or remove {self.path} if that run has ended"
        raise DataError(
            f"{self.path.parent} is in use by {who}; wait for it, choose another --workdir{hint}"
        )


def _flock(descriptor: int) -> bool | None:
    """Take the lock: True if taken, False if somebody has it, None if there are no locks here."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _myself() -> dict[str, Any]:
    pid = os.getpid()
    return {"pid": pid, "host": socket.gethostname(), "started": _start_time(pid)}


def _parse(content: bytes) -> dict[str, Any] | None:
    try:
        holder = json.loads(content)
        return holder if {"pid", "host", "started"} <= set(holder) else None
    except (ValueError, TypeError):
        return None


def _is_gone(holder: Mapping[str, Any]) -> bool:
    """Whether the holder is known to be dead; a process of another host is not."""
    if holder["host"] != socket.gethostname():
        return False
    try:
        os.kill(holder["pid"], 0)
    except ProcessLookupError:
        return True
    except (PermissionError, OverflowError):
        return False
    # The number may have been given to a new process since.
    return _start_time(holder["pid"]) != holder["started"]


def _start_time(pid: int) -> str | None:
    """Start of a process: boot id and clock ticks since boot (Linux); None elsewhere."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return f"{boot}/{fields[19]}"
