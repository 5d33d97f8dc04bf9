"""Where scans come from: NIfTI files, prepared shards, or nowhere (synthetic)."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

from sss_jax.data import check
from sss_jax.data.cases import Case, Split, load_split
from sss_jax.data.faults import FileFault
from sss_jax.data.generated import PREFIX, GeneratedSource
from sss_jax.data.load import Stack, load_scan
from sss_jax.data.prepared import is_prepared
from sss_jax.data.prepared_source import PreparedSource
from sss_jax.options import DataOptions, Options, TrainOptions


class Source(Protocol):
    """Cases in parts, and the slices of each."""

    @property
    def name(self) -> str:
        """What a run's record calls it."""

    def split(self, data: DataOptions, train: TrainOptions) -> Split:
        """Return the cases of each part."""

    def read(self, case: Case, num_classes: int | None, options: DataOptions) -> Stack:
        """Return the slices of a case; see `load.Read`."""

    def faults(
        self, cases: Sequence[Case], num_classes: int | None, options: DataOptions
    ) -> Iterator[tuple[Case, list[FileFault]]]:
        """Yield cases, all or those in doubt, each with what is wrong with its files."""


class FolderSource:
    """A folder of NIfTI files with a split file."""

    def __init__(self, root: Path) -> None:
        self._root = root

    @property
    def name(self) -> str:
        """The folder, for the record of a run."""
        return str(self._root.resolve())

    def split(self, data: DataOptions, train: TrainOptions) -> Split:
        """Return the cases of each part."""
        return load_split(
            self._root,
            data.split,
            all_labels=train.all_labels,
            labelled_subjects=train.labelled_subjects,
        )

    def read(self, case: Case, num_classes: int | None, options: DataOptions) -> Stack:
        """Return the whole volume of a case, decoded."""
        return load_scan(case, num_classes, options)

    def faults(
        self, cases: Sequence[Case], num_classes: int | None, options: DataOptions
    ) -> Iterator[tuple[Case, list[FileFault]]]:
        """Read all cases once."""
        return check.unusable(cases, options, num_classes)


def open_source(data: str | Path, options: Options) -> Source:
    """Return the source that `--data` names.

    Args:
        data: folder of NIfTI files, prepared folder, or `synthetic:`.
        options: sizes and seed of synthetic volumes.

    Raises:
        DataError: a damaged manifest.
        ConfigError: a malformed `synthetic:`.
    """
    if str(data).startswith(PREFIX):
        return GeneratedSource(str(data), options)
    root = Path(data)
    return PreparedSource(root) if is_prepared(root) else FolderSource(root)
