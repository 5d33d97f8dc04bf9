"""Step folders of a run: which of them count, what they hold, and how they go.

A step counts only with its commit file, which is written last.
"""

import logging
import shutil
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from sss_jax.errors import CheckpointError
from sss_jax.train import array_files as af
from sss_jax.train import manifest as mf
from sss_jax.train.manifest import Damage, Manifest
from sss_jax.train.sharding import spread

_LOG = logging.getLogger(__name__)
_DOOMED = ".deleted"
_SHOWN = 8
_LINE = 210


def numbered(folder: epath.Path) -> list[int]:
    """Numbers of all step folders, committed or not, in order."""
    if not folder.is_dir():
        return []
    names = [path.name for path in folder.iterdir()]
    return sorted(int(name) for name in names if name.isdecimal() and name == str(int(name)))


def is_committed(folder: epath.Path, step: int) -> bool:
    """Whether a step was written to its end."""
    return (folder / str(step) / af.COMMIT_FILE).exists()


def committed(folder: epath.Path) -> list[int]:
    """Committed steps, oldest first."""
    return [step for step in numbered(folder) if is_committed(folder, step)]


def read_manifest(folder: epath.Path, step: int) -> Manifest:
    """Manifest of a step; raises `Damage`."""
    manifest = mf.read(folder / str(step))
    if manifest.step != step:
        raise Damage(f"its manifest belongs to step {manifest.step}")
    return manifest


def best(folder: epath.Path) -> int | None:
    """Committed step with the highest `metrics["dice"]`; the newer one of equals."""
    scores = {step: _score(folder, step) for step in committed(folder)}
    known = [(score, step) for step, score in scores.items() if score is not None]
    return max(known)[1] if known else None


def _score(folder: epath.Path, step: int) -> float | None:
    try:
        return read_manifest(folder, step).metrics.get("dice")
    except Damage as damage:
        _LOG.warning("checkpoint %s has no score: %s", folder / str(step), damage)
        return None


def add_metrics(folder: epath.Path, step: int, metrics: Mapping[str, Any]) -> None:
    """Add scores to a committed step, atomically."""
    path = folder / str(step) / mf.file_name(0)
    body = mf.unseal(path.read_bytes())
    af.write_text(path, mf.seal({**body, "metrics": {**body["metrics"], **metrics}}))


def read_arrays(
    folder: epath.Path,
    manifest: Manifest,
    paths: Iterable[mf.Path],
    handler: af.Handler,
    *,
    debug: bool = False,
) -> dict[mf.Path, np.ndarray]:
    """Read leaves of a step to the host and verify them; raises `Damage`."""
    step_folder = folder / str(manifest.step)
    # Object storage checks its own transfers; elsewhere one process reads the files for all.
    if af.is_local(step_folder) and jax.process_index() == 0:
        mf.check_files(step_folder)
    rows = {path: manifest.leaves[path] for path in paths}
    wanted = {path: jax.ShapeDtypeStruct(row.shape, row.dtype) for path, row in rows.items()}
    try:
        arrays = handler.restore(step_folder, args=af.Restore(wanted))
    except MemoryError:
        raise
    except Exception as error:  # the array libraries raise bare exceptions
        raise Damage(str(error) if debug else first_line(error)) from None
    mf.verify(manifest, arrays)
    return arrays


def remove(path: epath.Path) -> None:
    """Remove a step so that no part of it can ever be taken for a whole one."""
    if af.is_local(path):
        path = path.rename(path.with_name(path.name + _DOOMED))
    else:
        (path / af.COMMIT_FILE).unlink()
    path.rmtree()


def sweep(folder: epath.Path) -> None:
    """Remove what a killed save or a killed removal left behind.

    A step without its commit file but otherwise whole stays: it may be somebody's copy.
    """
    for path in folder.iterdir() if folder.is_dir() else ():
        began = path.name.isdecimal() and not (path / mf.FILES).exists()
        if path.name.endswith(_DOOMED) or (began and not (path / af.COMMIT_FILE).exists()):
            path.rmtree()


def require_array(path: mf.Path, leaf: Any) -> None:
    """Refuse a leaf whose bytes could not be restored as they are."""
    plain = isinstance(leaf, (jax.Array, np.ndarray)) and not jnp.issubdtype(
        leaf.dtype, jax.dtypes.extended
    )
    if not plain:
        raise TypeError(f"{mf.name(path)}: cannot save {type(leaf).__name__}, only plain arrays")


def match(folder: Any, manifest: Manifest, wanted: Mapping[mf.Path, Any]) -> None:
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


def place(array: np.ndarray, like: Any) -> Any:
    """Put a host array where its target lies."""
    if isinstance(like, np.ndarray):
        return array
    sharding = getattr(like, "sharding", None)
    if sharding is None or not getattr(like, "committed", True):
        return jax.device_put(array)
    return spread(array, sharding)


def first_line(error: BaseException) -> str:
    """Kind and first line of an error, without the libraries' dumps; its end tells the cause."""
    text = str(error).split("[tensorstore_spec=")[0].strip().splitlines()
    line = text[0] if text else ""
    short = line if len(line) <= _LINE else f"{line[: _LINE // 3]} ... {line[-_LINE * 2 // 3 :]}"
    return f"{type(error).__name__}: {short}"


def free_space(folder: epath.Path) -> str:
    """Words on the free space below a folder, for a message."""
    if not af.is_local(folder):
        return ""
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    return f", {shutil.disk_usage(existing).free:,} are free"
