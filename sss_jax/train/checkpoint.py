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
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from sss_jax.axes import PyTree
from sss_jax.errors import CheckpointError
from sss_jax.train import array_files as af
from sss_jax.train import manifest as mf
from sss_jax.train.identity import check_identity
from sss_jax.train.manifest import Damage, Manifest

__all__ = ["Checkpointer", "Restored", "check_identity", "set_aside"]

_LOG = logging.getLogger(__name__)
_DOOMED = ".deleted"
_SHOWN = 8
_LINE = 210


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
        try:
            self.close()
        except CheckpointError as late:
            if error is None:
                raise
            _LOG.warning("%s", late)

    # Listing.

    def steps(self) -> list[int]:
        """Committed steps, oldest first."""
        return [step for step in self._folders() if self._committed(step)]

    def latest_step(self) -> int | None:
        """Newest committed step."""
        return max(self.steps(), default=None)

    def best_step(self) -> int | None:
        """Committed step with the highest `metrics["dice"]`; the newer one of equals."""
        known = [(score, step) for step in self.steps() if (score := self._score(step)) is not None]
        return max(known)[1] if known else None

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
        started = step not in self._good
        if started:
            self._start(step, state, dict(meta), mf.finite_or_none(metrics))
        elif metrics is not None:
            self._add_metrics(step, mf.finite_or_none(metrics))
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
        if self._committed(self._pending[0]):
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

    def _folders(self) -> list[int]:
        if not self.folder.is_dir():
            return []
        names = [path.name for path in self.folder.iterdir()]
        return sorted(int(name) for name in names if name.isdecimal() and name == str(int(name)))

    def _committed(self, step: int) -> bool:
        return (self.folder / str(step) / af.COMMIT_FILE).exists()

    def _manifest(self, step: int) -> Manifest:
        manifest = mf.read(self.folder / str(step))
        if manifest.step != step:
            raise Damage(f"its manifest belongs to step {manifest.step}")
        return manifest

    def _score(self, step: int) -> float | None:
        try:
            return self._manifest(step).metrics.get("dice")
        except Damage as damage:
            _LOG.warning("checkpoint %s has no score: %s", self.folder / str(step), damage)
            return None

    def _start(
        self, step: int, state: PyTree, meta: dict[str, Any], metrics: dict[str, Any]
    ) -> None:
        leaves = mf.flatten(state)
        for path, leaf in leaves.items():
            _require_array(path, leaf)
        body = mf.new_body(step, meta, metrics)
        mf.seal(body)  # a value that JSON cannot hold is the caller's error, raised here
        self._sweep()
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
        self._prune()
        return None

    def _failed(self, error: Exception) -> CheckpointError:
        """Forget the running save, free its space, and say what happened."""
        assert self._pending is not None
        step, nbytes = self._pending
        self._pending = None
        path = self.folder / str(step)
        if jax.process_index() == 0 and not self._committed(step) and af.is_local(path):
            shutil.rmtree(path, ignore_errors=True)
        reason = str(error) if self._debug else _first_line(error)
        return CheckpointError(
            f"checkpoint {path} could not be saved: {reason}\n"
            f"It needs {nbytes:,} bytes{_free_space(self.folder)}. "
            "Earlier checkpoints are intact; free some space or mend the folder's permissions."
        )

    def _add_metrics(self, step: int, metrics: dict[str, Any]) -> None:
        if jax.process_index() == 0:
            path = self.folder / str(step) / mf.file_name(0)
            body = mf.unseal(path.read_bytes())
            af.write_text(path, mf.seal({**body, "metrics": {**body["metrics"], **metrics}}))

    def _sweep(self) -> None:
        """Remove once what a killed save or a killed removal left behind."""
        if self._swept or jax.process_index() != 0 or not self.folder.is_dir():
            return
        self._swept = True
        for path in self.folder.iterdir():
            unfinished = path.name.isdecimal() and not (path / mf.FILES).exists()
            if path.name.endswith(_DOOMED) or (unfinished and not (path / af.COMMIT_FILE).exists()):
                path.rmtree()

    def _prune(self) -> None:
        """Remove the steps that are neither among the newest whole ones nor the best."""
        if jax.process_index() != 0:
            return
        steps = self.steps()
        whole = [step for step in steps if step not in self._damaged]
        keep = {*whole[-self._keep_last :], self.best_step()}
        for step in steps:
            if step not in keep and step < whole[-1]:
                self._remove(self.folder / str(step))

    def _remove(self, path: epath.Path) -> None:
        """Remove a step so that no part of it can ever be taken for a whole one."""
        if af.is_local(path):
            path = path.rename(path.with_name(path.name + _DOOMED))
        else:
            (path / af.COMMIT_FILE).unlink()
        path.rmtree()

    def _warn_unfinished(self, committed: list[int]) -> None:
        unfinished = [step for step in self._folders() if step not in committed]
        if unfinished:
            _LOG.warning(
                "ignored checkpoints without %s in %s: %s", af.COMMIT_FILE, self.folder, unfinished
            )

    def _attempt(self, step: int, target: PyTree) -> tuple[Restored | None, str]:
        wanted = mf.flatten(target)
        arrays, damage = {}, ""
        try:
            manifest = self._manifest(step)
            _match(self.folder / str(step), manifest, wanted)
            arrays = self._read(step, manifest, list(wanted))
        except Damage as found:
            damage = str(found)
        if not _everywhere(not damage):
            self._damaged.add(step)
            self._good.discard(step)
            return None, damage or "another process cannot read it"
        self._good.add(step)
        leaves = [_place(arrays[path], like) for path, like in wanted.items()]
        state = jax.tree.unflatten(jax.tree.structure(target), leaves)
        return Restored(state, manifest.meta, step, manifest.metrics), ""

    def _read(
        self, step: int, manifest: Manifest, paths: list[mf.Path]
    ) -> dict[mf.Path, np.ndarray]:
        """Read and verify leaves on the host."""
        folder = self.folder / str(step)
        # Object storage checks its own transfers; elsewhere one process reads for all.
        if af.is_local(folder) and jax.process_index() == 0:
            mf.check_files(folder)
        rows = {path: manifest.leaves[path] for path in paths}
        wanted = {path: jax.ShapeDtypeStruct(row.shape, row.dtype) for path, row in rows.items()}
        try:
            arrays = self._handler.restore(folder, args=af.Restore(wanted))
        except MemoryError:
            raise
        except Exception as error:
            raise Damage(str(error) if self._debug else _first_line(error)) from None
        mf.verify(manifest, arrays)
        return arrays

    def _load_entry(self, step: int, key: str) -> tuple[dict[str, Any], dict[str, Any]]:
        manifest = self._manifest(step)
        paths = [path for path in manifest.leaves if path[0] == key]
        if not paths:
            held = ", ".join(sorted({path[0] for path in manifest.leaves}))
            raise CheckpointError(
                f"checkpoint {self.folder / str(step)} has no {key!r}, but {held}"
            )
        arrays = self._read(step, manifest, paths)
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
        if not self._committed(step):
            raise CheckpointError(f"no checkpoint {step} in {self.folder}; it has {self.steps()}")

    def _damage_error(self, step: int, damage: str) -> CheckpointError:
        others = [other for other in self.steps() if other != step]
        return CheckpointError(
            f"checkpoint {self.folder / str(step)} is damaged: {damage}\n"
            f"Choose another step {others} or restore a backup."
        )


def set_aside(folder: Any) -> Path | None:
    """Rename a local checkpoint folder so that a run starts from scratch; None if there is none."""
    path = Path(folder).absolute()
    if not path.exists():
        return None
    number = 1
    while (aside := path.with_name(f"{path.name}.old-{number}")).exists():
        number += 1
    return path.rename(aside)


def _all_damaged(tried: list[str]) -> CheckpointError:
    return CheckpointError(
        "every checkpoint is damaged:\n  "
        + "\n  ".join(tried)
        + "\nRestore a backup of one of them, or start from scratch with --fresh."
    )


def _require_array(path: mf.Path, leaf: Any) -> None:
    plain = isinstance(leaf, (jax.Array, np.ndarray)) and not jnp.issubdtype(
        leaf.dtype, jax.dtypes.extended
    )
    if not plain:
        raise TypeError(f"{mf.name(path)}: cannot save {type(leaf).__name__}, only plain arrays")


def _match(folder: Any, manifest: Manifest, wanted: Mapping[mf.Path, Any]) -> None:
    """Refuse a target that is not the state that was saved; this is not damage."""
    saved = {path: (leaf.shape, leaf.dtype) for path, leaf in manifest.leaves.items()}
    here = {path: (tuple(leaf.shape), leaf.dtype.name) for path, leaf in wanted.items()}
    lines = [
        f"{mf.name(path)}: saved {_form(saved.get(path))}, now {_form(here.get(path))}"
        for path in sorted({*saved, *here})
        if saved.get(path) != here.get(path)
    ]
    if lines:
        more = [f"... and {len(lines) - _SHOWN} more"] if len(lines) > _SHOWN else []
        raise CheckpointError(
            f"checkpoint {folder} holds another state:\n  "
            + "\n  ".join(lines[:_SHOWN] + more)
            + "\nUse the model and optimizer it was saved with, another --workdir, or --fresh."
        )


def _form(row: tuple[tuple[int, ...], str] | None) -> str:
    return "nothing" if row is None else f"{row[1]}{list(row[0])}"


def _place(array: np.ndarray, like: Any) -> Any:
    """Put a host array where its target lies."""
    if isinstance(like, np.ndarray):
        return array
    sharding = getattr(like, "sharding", None)
    if sharding is None or not getattr(like, "committed", True):
        return jnp.asarray(array)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def _everywhere(ok: bool) -> bool:
    """Whether every process agrees, so that all of them fall back to the same step."""
    if jax.process_count() == 1:
        return ok
    from jax.experimental import multihost_utils

    return bool(np.all(multihost_utils.process_allgather(np.asarray(ok))))


def _first_line(error: BaseException) -> str:
    """Kind and first line of an error, without the libraries' dumps; its end tells the cause."""
    text = str(error).split("[tensorstore_spec=")[0].strip().splitlines()
    line = text[0] if text else ""
    short = line if len(line) <= _LINE else f"{line[: _LINE // 3]} ... {line[-_LINE * 2 // 3 :]}"
    return f"{type(error).__name__}: {short}"


def _free_space(folder: epath.Path) -> str:
    if not af.is_local(folder):
        return ""
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    return f", {shutil.disk_usage(existing).free:,} are free"
