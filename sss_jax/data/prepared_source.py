"""Cases of a prepared folder: a clip of S slices reads S records, however long its volume is."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sss_jax.data.cases import Case, Split, load_split
from sss_jax.data.examples import Scan, refuse_large, rescale
from sss_jax.data.faults import FileFault, collected, shown
from sss_jax.data.folders import PREPARED
from sss_jax.data.geometry import Frame
from sss_jax.data.load import Stack, naming
from sss_jax.data.prepared import (
    CaseFacts,
    ImageFacts,
    LabelFacts,
    Manifest,
    differing,
    images_name,
    labels_name,
    read_manifest,
)
from sss_jax.data.records import AGAIN, Shard, identity, unpack
from sss_jax.errors import ConfigError
from sss_jax.options import DataOptions, TrainOptions

_HANDLE_BYTES = 1024


@dataclasses.dataclass(frozen=True, eq=False)
class PreparedStack:
    """The slices of a prepared case; `labels` is None unless the run may know them."""

    facts: CaseFacts
    images: Shard
    labels: Shard | None

    @property
    def frame(self) -> Frame:
        """The way back to storage order."""
        return self.facts.frame

    @property
    def depth(self) -> int:
        """Number of slices."""
        return self.frame.shape[self.frame.axes[0]]

    @property
    def with_label(self) -> NDArray[np.int64] | None:
        """Slices that show a label, ascending; None where labels are not known."""
        return None if self.labels is None else np.array(self._label.slices, np.int64)

    @property
    def nbytes(self) -> int:
        """Memory it holds, bytes; voxels stay in the file."""
        return _HANDLE_BYTES

    def read(self, slices: NDArray[np.int64] | None = None) -> Scan:
        """Return the listed slices, or all.

        Raises:
            DataError: naming case, file and record that are damaged.
        """
        positions = range(self.depth) if slices is None else [int(s) for s in slices]
        with naming(self.facts.name):
            image = np.stack([self._image(s) for s in positions])
            label = None
            if self.labels is not None:
                label = np.stack([self._labels(self.labels, s) for s in positions])
        return Scan(image, label, self.frame)

    @property
    def _label(self) -> LabelFacts:
        assert self.facts.label is not None
        return self.facts.label

    def _image(self, position: int) -> NDArray[np.float32]:
        facts = self.facts.image
        stored = self._slice(self.images, "image", facts, facts.dtype, position)
        return rescale(stored.astype(np.float32), facts.low, facts.high)

    def _labels(self, shard: Shard, position: int) -> NDArray[np.uint8]:
        return self._slice(shard, "label", self._label, "uint8", position)

    def _slice(
        self, shard: Shard, kind: str, facts: ImageFacts | LabelFacts, dtype: str, position: int
    ) -> NDArray[Any]:
        record = shard.read(facts.first + position)
        what = identity(kind, self.facts.name, facts.origin.sha256, position)
        try:
            return unpack(record, dtype, self.frame.plane, what)
        except ValueError as error:
            raise FileFault(shard.path, f"{kind} slice {position} {error}", AGAIN) from error


class PreparedSource:
    """A folder made by `sss-jax data prepare`.

    Args:
        root: the folder.

    Raises:
        FileFault: its manifest is missing, damaged or of another version.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._manifest: Manifest = read_manifest(root / PREPARED)
        self._images: dict[Path, Shard] = {}
        self._labels: dict[Path, Shard] = {}
        self._facts: dict[str, CaseFacts] = {}
        self._cases: dict[str, Case] = {}
        for index in range(len(self._manifest.shards)):
            self._add(index)

    @property
    def name(self) -> str:
        """The folder, for the record of a run."""
        return str(self._root.resolve())

    def split(self, data: DataOptions, train: TrainOptions) -> Split:
        """Return the cases of each part; splits are files in the folder, as beside NIfTI files."""
        try:
            return load_split(
                self._root,
                data.split,
                all_labels=train.all_labels,
                labelled_subjects=train.labelled_subjects,
                find=lambda root: dict(sorted(self._cases.items())),
            )
        except FileFault as fault:
            fix = f"{fault.fix}; cases and labels that were not prepared need another folder, by "
            fix += "`sss-jax data prepare` without --config or with this one"
            raise FileFault(fault.path, fault.problem, fix) from fault

    def read(self, case: Case, num_classes: int | None, options: DataOptions) -> Stack:
        """Return the slices of a case, with labels where the case names them.

        Raises:
            ConfigError: the records were made with other settings.
            DataError: labels exceed the number of classes.
        """
        self._refuse_other_settings(options)
        facts = self._facts[case.name]
        if case.label is None:
            return PreparedStack(facts, self._images[case.image], None)
        with naming(case.name):
            _refuse_labels(facts, case.label, num_classes)
        return PreparedStack(facts, self._images[case.image], self._labels[case.label])

    def faults(
        self, cases: Sequence[Case], num_classes: int | None, options: DataOptions
    ) -> Iterator[tuple[Case, list[FileFault]]]:
        """Compare labels and classes, slices and canvas.

        Records are held against their checksums when they are read.

        Raises:
            ConfigError: the records were made with other settings.
        """
        self._refuse_other_settings(options)
        for case in cases:
            found: list[FileFault] = []
            with collected(found):
                refuse_large(self._facts[case.name].frame, case.image, options)
            if case.label is not None:
                with collected(found):
                    _refuse_labels(self._facts[case.name], case.label, num_classes)
            yield case, found

    def _add(self, index: int) -> None:
        shard, count = self._manifest.shards[index], len(self._manifest.shards)
        if shard is None:
            problem = f"lacks shard {index}"
            raise FileFault(self._root / PREPARED, problem, AGAIN)
        image = self._root / images_name(index, count)
        label = self._root / labels_name(index, count)
        self._images[image] = Shard(image, shard.images.bytes, shard.images.records)
        if shard.labels is not None:
            self._labels[label] = Shard(label, shard.labels.bytes, shard.labels.records)
        for facts in shard.cases:
            known = label if facts.label is not None else None
            self._facts[facts.name] = facts
            self._cases[facts.name] = Case(facts.name, facts.subject, image, known)

    def _refuse_other_settings(self, options: DataOptions) -> None:
        words = differing(self._manifest.settings, options)
        if words:
            raise ConfigError(
                f"{shown(self._root)} was prepared with {words}: change the configuration, or "
                "prepare another folder with it"
            )


def _refuse_labels(facts: CaseFacts, path: Path, num_classes: int | None) -> None:
    assert facts.label is not None
    if num_classes is None or max(facts.label.present, default=0) <= num_classes:
        return
    beyond = ", ".join(str(k) for k in facts.label.present if k > num_classes)
    problem = f"has labels outside 0..{num_classes}: {beyond}"
    raise FileFault(path, problem, "set model.num_classes, or map the labels to 0..K")
