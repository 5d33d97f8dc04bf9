"""Checkpoints that are whole, verified and never restored in silence when damaged.

Orbax writes the arrays, asynchronously and in parallel from every process. Around it:

- a step counts only with its commit file, which is written last;
- manifests inside the step list every leaf and every file with a checksum; a step that does not
  match is skipped with one warning, and if none matches the run stops;
- the newest steps and the best one are kept.

A step folder is an ordinary Orbax checkpoint of nested dicts. All processes of a run must see the
same folder.
"""

import dataclasses
import logging
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np
from etils import epath

from sss_jax.axes import PyTree
from sss_jax.errors import CheckpointError, PeerLost
from sss_jax.train import array_files as af
from sss_jax.train import manifest as mf
from sss_jax.train import step_folders as sf
from sss_jax.train.identity import check_identity
from sss_jax.train.manifest import Damage, Manifest

__all__ = ["Checkpointer", "Restored", "check_identity"]

_LOG = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Restored:
    """A verified step: the state with the structure of the target, and what was saved with it."""

    state: PyTree
    meta: dict[str, Any]
    step: int
    metrics: dict[str, Any] = dataclasses.field(default_factory=dict)


class Checkpointer:
    """Saves, verifies, restores and prunes the steps below one folder.

    Args:
        folder: where the step folders live; local, network or object storage.
        keep_last: newest steps that are kept, besides the best one.
        debug: keep the array library's own error texts and logs.
        timeout: longest time a background save may take, seconds.
    """

    def __init__(
        self, folder: Any, *, keep_last: int = 2, debug: bool = False, timeout: int = 900
    ) -> None:
        if keep_last < 1:
            raise ValueError(f"keep_last must be at least 1, got {keep_last}")
        self.folder = epath.Path(folder).expanduser()
        if af.is_local(self.folder):
            self.folder = epath.Path(Path(self.folder).absolute())
        self._keep_last, self._debug = keep_last, debug
        self._handler = af.Handler()
        self._writer = af.open_writer(self._handler, timeout)
        self._pending: tuple[int, int] | None = None  # step and bytes of the running save
        self._good: set[int] = set()  # saved or verified by this object
        self._damaged: set[int] = set()
        self._swept = False
        af.quiet(not debug)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, PeerLost):
            return  # a save that waits for a process that is gone never ends
        try:
            self.close()
        except CheckpointError as late:
            if error is None:
                raise
            _LOG.warning("%s", late)

    # Listing.

    def steps(self) -> list[int]:
        """Committed steps, oldest first."""
        return sf.committed(self.folder)

    def latest_step(self) -> int | None:
        """Newest committed step."""
        return max(self.steps(), default=None)

    def best_step(self) -> int | None:
        """Committed step with the highest `metrics["dice"]`; the newer one of equals."""
        return sf.best(self.folder)

    # Saving.

    def save(
        self,
        step: int,
        state: PyTree,
        *,
        meta: Mapping[str, Any],
        metrics: Mapping[str, Any] | None = None,
    ) -> bool:
        """Start saving a state in the background; its buffers may be donated afterwards.

        A step that this object has saved or verified before is not written again, only its metrics
        are added. If the previous save failed, this one is started all the same and then the
        earlier failure is raised.

        Args:
            step: number of completed steps.
            state: pytree of arrays.
            meta: JSON values that belong to the state, such as its configuration.
            metrics: validation scores of this state; "dice" decides which step is best.

        Returns:
            Whether a save was started.
        """
        earlier = self._settle()
        started = step not in self._good or not sf.is_committed(self.folder, step)
        if started:
            self._start(step, state, dict(meta), mf.finite_or_none(metrics))
        elif metrics is not None and jax.process_index() == 0:
            sf.add_metrics(self.folder, step, mf.finite_or_none(metrics))
        if earlier is not None:
            raise earlier
        return started

    def check(self) -> None:
        """Raise the error of a background save that has failed; cheap, to be called every step."""
        if self._pending is None:
            return
        try:
            self._writer.check_for_errors()
        except Exception as error:  # the array libraries raise bare exceptions
            raise self._failed(error) from (error if self._debug else None)
        if sf.is_committed(self.folder, self._pending[0]):
            self.wait()

    def wait(self) -> None:
        """Wait for the running save; raise its error."""
        error = self._settle()
        if error is not None:
            raise error

    def close(self) -> None:
        """Wait for the running save, then release threads; raise the save's error."""
        error = self._settle()
        self._writer.close()
        if error is not None:
            raise error

    # Restoring.

    def restore(self, target: PyTree) -> Restored | None:
        """Restore the newest step that is whole, or None where nothing was ever committed.

        Args:
            target: pytree of arrays or `jax.ShapeDtypeStruct`; a sharding is honoured, whatever
                the sharding was at the time of the save.
        """
        self.wait()
        steps = self.steps()
        self._warn_unfinished(steps)
        tried = []
        for step in reversed(steps):
            restored, damage = self._attempt(step, target)
            if restored is not None:
                return restored
            tried.append(f"{self.folder / str(step)}: {damage}")
            _LOG.warning("damaged checkpoint skipped: %s", tried[-1])
        if tried:
            raise _all_damaged(tried)
        return None

    def restore_step(self, step: int, target: PyTree) -> Restored:
        """Restore one step; a damaged or missing one is an error."""
        self.wait()
        self._require(step)
        restored, damage = self._attempt(step, target)
        if restored is None:
            raise self._damage_error(step, damage)
        return restored

    def load_params(
        self, step: int | str = "best", key: str = "ema"
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Load one entry of the state without knowing the rest, for prediction.

        Args:
            step: a step, "latest" (the newest whole one) or "best" (the latest where no step has a
                score). A damaged step or a damaged best one is an error.
            key: entry of the state, such as "ema" or "params".

        Returns:
            The entry as nested dicts of numpy arrays, and the meta of its step with the step
            number and the metrics under "step" and "metrics".
        """
        self.wait()
        candidates = self._candidates(step)
        tried = []
        for number in candidates:
            try:
                return self._load_entry(number, key)
            except Damage as damage:
                tried.append(f"{self.folder / str(number)}: {damage}")
                if len(candidates) == 1:
                    raise self._damage_error(number, str(damage)) from None
                _LOG.warning("damaged checkpoint skipped: %s", tried[-1])
        raise _all_damaged(tried)

    # Inside.

    def _start(
        self, step: int, state: PyTree, meta: dict[str, Any], metrics: dict[str, Any]
    ) -> None:
        leaves = mf.flatten(state)
        for path, leaf in leaves.items():
            sf.require_array(path, leaf)
        body = mf.new_body(step, meta, metrics)
        mf.seal(body)  # a value that JSON cannot hold is the caller's error, raised here
        if not self._swept:
            self._tidy(lambda: sf.sweep(self.folder))
            self._swept = True
        self._pending = (step, sum(leaf.nbytes for leaf in leaves.values()))
        try:
            self._writer.save(
                self.folder / str(step), args=af.Save(leaves=leaves, body=body), force=True
            )
        except Exception as error:
            raise self._failed(error) from (error if self._debug else None)

    def _settle(self) -> CheckpointError | None:
        """Wait for the running save; return its error."""
        if self._pending is None:
            return None
        try:
            self._writer.wait_until_finished()
        except Exception as error:
            return self._failed(error)
        step, _ = self._pending
        self._pending = None
        self._good.add(step)
        self._damaged.discard(step)
        self._tidy(self._prune)
        return None

    def _failed(self, error: Exception) -> CheckpointError:
        """Forget the running save, free its space, and say what happened."""
        assert self._pending is not None
        step, nbytes = self._pending
        self._pending = None
        path = self.folder / str(step)
        if not sf.is_committed(self.folder, step) and af.is_local(path):
            self._tidy(lambda: shutil.rmtree(path, ignore_errors=True))
        reason = str(error) if self._debug else sf.first_line(error)
        return CheckpointError(
            f"checkpoint {path} could not be saved: {reason}\n"
            f"It needs {nbytes:,} bytes{sf.free_space(self.folder)}. "
            "Earlier checkpoints are intact; free some space or mend the folder's permissions."
        )

    def _tidy(self, remove: Callable[[], None]) -> None:
        """Remove folders from one process; a folder that stays is no reason to stop a run."""
        if jax.process_index() == 0:
            try:
                remove()
            except OSError as error:
                _LOG.warning("old checkpoints in %s stay: %s", self.folder, error)

    def _prune(self) -> None:
        """Remove the steps that are neither among the newest whole ones nor the best."""
        steps = self.steps()
        whole = [step for step in steps if step not in self._damaged]
        keep = {*whole[-self._keep_last :], self.best_step()}
        for step in steps:
            if step not in keep and step < max(whole, default=0):
                sf.remove(self.folder / str(step))

    def _warn_unfinished(self, committed: list[int]) -> None:
        unfinished = [step for step in sf.numbered(self.folder) if step not in committed]
        if unfinished:
            _LOG.warning(
                "ignored checkpoints without %s in %s: %s", af.COMMIT_FILE, self.folder, unfinished
            )

    def _attempt(self, step: int, target: PyTree) -> tuple[Restored | None, str]:
        wanted = mf.flatten(target)
        arrays, damage = {}, ""
        try:
            manifest = sf.read_manifest(self.folder, step)
            sf.match(self.folder / str(step), manifest, wanted)
            arrays = self._read(manifest, wanted)
        except Damage as found:
            damage = str(found)
        if not _everywhere(not damage):
            self._damaged.add(step)
            self._good.discard(step)
            return None, damage or "another process cannot read it"
        self._good.add(step)
        leaves = [sf.place(arrays[path], like) for path, like in wanted.items()]
        state = jax.tree.unflatten(jax.tree.structure(target), leaves)
        return Restored(state, manifest.meta, step, manifest.metrics), ""

    def _read(self, manifest: Manifest, paths: Iterable[mf.Path]) -> dict[mf.Path, np.ndarray]:
        return sf.read_arrays(self.folder, manifest, paths, self._handler, debug=self._debug)

    def _load_entry(self, step: int, key: str) -> tuple[dict[str, Any], dict[str, Any]]:
        manifest = sf.read_manifest(self.folder, step)
        paths = [path for path in manifest.leaves if path[0] == key]
        if not paths:
            held = ", ".join(sorted({path[0] for path in manifest.leaves}))
            raise CheckpointError(
                f"checkpoint {self.folder / str(step)} has no {key!r}, but {held}"
            )
        arrays = self._read(manifest, paths)
        params = mf.nest({path[1:]: array for path, array in arrays.items()})
        return params, {**manifest.meta, "step": step, "metrics": manifest.metrics}

    def _candidates(self, step: int | str) -> list[int]:
        """Steps to try, in this order."""
        steps = self.steps()
        if not steps:
            raise CheckpointError(f"no checkpoint in {self.folder}; train first")
        if isinstance(step, int):
            self._require(step)
            return [step]
        if step not in ("best", "latest"):
            raise CheckpointError(f"step {step!r}: expected a number, 'best' or 'latest'")
        best = self.best_step() if step == "best" else None
        if best is not None:
            return [best]
        if step == "best":
            _LOG.warning("no checkpoint in %s has a score; the latest is used", self.folder)
        return steps[::-1]

    def _require(self, step: int) -> None:
        if not sf.is_committed(self.folder, step):
            raise CheckpointError(f"no checkpoint {step} in {self.folder}; it has {self.steps()}")

    def _damage_error(self, step: int, damage: str) -> CheckpointError:
        others = [other for other in self.steps() if other != step]
        return CheckpointError(
            f"checkpoint {self.folder / str(step)} is damaged: {damage}\n"
            f"Choose another step {others} or restore a backup."
        )


def _all_damaged(tried: list[str]) -> CheckpointError:
    return CheckpointError(
        "every checkpoint is damaged:\n  "
        + "\n  ".join(tried)
        + "\nRestore a backup of one of them, or start from scratch with --fresh."
    )


def _everywhere(ok: bool) -> bool:
    """Whether every process agrees, so that all of them fall back to the same step."""
    if jax.process_count() == 1:
        return ok
    from jax.experimental import multihost_utils

    return bool(np.all(multihost_utils.process_allgather(np.asarray(ok))))
