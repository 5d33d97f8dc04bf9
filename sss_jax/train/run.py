"""A run folder: what it is a run of, so that a resumed run is the same run."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import jax

from sss_jax import __version__, config
from sss_jax.atomic import write_json, write_text
from sss_jax.axes import PyTree
from sss_jax.data.cases import Split
from sss_jax.data.sources import Source
from sss_jax.errors import ConfigError, DataError
from sss_jax.options import Options
from sss_jax.train.checkpoint import Checkpointer, check_identity

# These may change between a run and its continuation: they alter no number that is learned.
_FREE = (
    "data.cache_bytes",
    "data.max_voxels",
    "data.threads",
    "dfe.remat",
    "memory.remat",
    "memory.remat_keeps",
    "memory.unroll",
    "model.kernels",
    "model.loop_blocks",
    "model.remat",
    "model.remat_keeps",
    "train.log_every",
    "train.eval_every",
    "train.save_every",
    "train.parallel",
    "train.nonfinite_limit",
)
_FREE_GROUPS = ("eval.", "mesh.")
RUN = "run.json"
"""File of a run folder; where it is, a run was begun."""


def read_split(options: Options, source: Source) -> Split:
    """Read the run's split and refuse one that the method cannot use.

    Raises:
        DataError: no labelled case, or no unlabelled case for a semi-supervised method.
    """
    split = source.split(options.data, options.train)
    refuse_empty(options, split, source.name)
    return split


def refuse_empty(options: Options, split: Split, source: str) -> None:
    """Refuse a split that lacks cases the method learns from.

    Raises:
        DataError: no labelled case, or no unlabelled case for a semi-supervised method.
    """
    if not split.labelled:
        raise DataError(f"{source}: {options.data.split} has no labelled case that can be used")
    if options.semi.enabled and not split.unlabelled:
        raise DataError(
            f"{source}: {options.data.split} has no unlabelled case that can be used, which "
            f"{options.method} needs; add some or train with the method `supervised`"
        )


def identity(options: Options, split: Split) -> dict[str, Any]:
    """Return what must be equal for a run to be continued: the settings and the split."""
    flat = {"split_digest": split.digest}
    for group, values in dataclasses.asdict(options).items():
        if isinstance(values, dict):
            flat |= {f"{group}.{name}": value for name, value in values.items()}
        else:
            flat[group] = values
    return json.loads(json.dumps(_without_free(flat)))


def _without_free(flat: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in flat.items() if k not in _FREE and not k.startswith(_FREE_GROUPS)}


def open_folder(workdir: Path, options: Options, split: Split, data: str, *, fresh: bool) -> None:
    """Create the run folder, or check that it holds the same run.

    Where the data are is noted and may change: the same cases may come from NIfTI files or from
    shards prepared from them.

    Raises:
        CheckpointError: the folder holds another run.
        ConfigError: the folder has checkpoints of an unknown run.
    """
    known = workdir / RUN
    if fresh:
        _discard(workdir)
    now = identity(options, split)
    if known.is_file():
        # Options that are newer than the run had their defaults when it began.
        saved = json.loads(known.read_text())["identity"]
        begun = identity(Options(), split) | _without_free(saved)
        check_identity(begun, now)
    elif (workdir / "checkpoints").exists():
        raise ConfigError(f"{workdir} has checkpoints but no run.json; choose another --workdir")
    write_text(workdir / "config.json", config.to_json(options))
    write_json(
        known,
        {
            "identity": now,
            "data": data,
            "split": options.data.split,
            "split_digest": split.digest,
            "cases": {name: len(getattr(split, name)) for name in _SUBSETS},
            "versions": {"sss_jax": __version__, "jax": jax.__version__},
            "device": jax.devices()[0].device_kind,
            "devices": jax.device_count(),
        },
    )


_SUBSETS = ("labelled", "unlabelled", "val", "test")


def _discard(workdir: Path) -> None:
    """Remove what a run writes, and nothing else that a user may keep in the folder."""
    for name in (RUN, "config.json", "metrics.jsonl", "report.html"):
        (workdir / name).unlink(missing_ok=True)
    for name in ("checkpoints", "test", "tensorboard"):
        shutil.rmtree(workdir / name, ignore_errors=True)


def save(
    checkpointer: Checkpointer, step: int, state: PyTree, dice: dict[str, float] | None = None
) -> None:
    """Start saving the state of `step`; a validation score makes it a candidate for `best`."""
    checkpointer.save(step, state, meta={"step": step}, metrics=dice)
