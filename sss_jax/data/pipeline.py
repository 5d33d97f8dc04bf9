"""Batches for training: a pure function of (seed, step), whatever the threads and the hosts.

Position p of the global batch of step t is example t * batch + p of an endless stream that is
shuffled anew in every epoch. Everything drawn for it depends on the seed, the stream and that
number. So resuming needs the step alone, and hosts read their own part without talking.
"""

import functools
from collections.abc import Generator, Mapping
from typing import Any

import grain
import numpy as np
from numpy.typing import NDArray

from sss_jax.data.cases import Case, Split
from sss_jax.data.examples import Image, Labels, Scan, lay, place
from sss_jax.data.load import Read, Stack, StackCache, load_example, load_scan
from sss_jax.errors import ConfigError, DataError
from sss_jax.options import DataOptions, ModelOptions, TrainOptions

__all__ = ["Batch", "Loader", "draw_slices", "load_example"]

Batch = dict[str, dict[str, NDArray[Any]]]
STREAMS = ("labelled", "unlabelled")
_ORDER, _CLIP = 0, 1


def draw_slices(
    stack: Stack, options: DataOptions, rng: np.random.Generator, *, labelled: bool
) -> NDArray[np.int64]:
    """Draw the slices of a clip: ascending, evenly spaced, at most `clip_slices` of them.

    The stride is uniform over those with which the clip still fits the volume; a volume of fewer
    slices is taken whole. The start is uniform, or, for `foreground_share` of the labelled clips,
    such that a random labelled slice is as central as the volume's ends allow.
    """
    total, wanted = stack.depth, options.clip_slices
    if total <= wanted:
        return np.arange(total)
    fitting = (total - 1) // max(wanted - 1, 1)
    stride = int(rng.integers(1, min(options.max_stride, fitting) + 1))
    last = total - 1 - (wanted - 1) * stride
    start = int(rng.integers(0, last + 1))
    centred = rng.random() < options.foreground_share
    if labelled and centred:
        with_label = stack.with_label
        if with_label is not None and with_label.size:
            centre = int(rng.choice(with_label))
            start = min(max(centre - (wanted // 2) * stride, 0), last)
    return start + stride * np.arange(wanted)


def fitted(
    scan: Scan, size: int, options: DataOptions
) -> tuple[Image, Labels | None, dict[str, NDArray[np.int32]]]:
    """Bring slices to the square, or onto the canvas with `placement` for the device."""
    if options.canvas:
        image, label, placement = lay(scan, size, options)
        return image, label, {"placement": placement}
    example = place(scan, size, options)
    return example.image_SHW, example.label_SHW, {}


class Loader:
    """The labelled and unlabelled clips of every training step.

    Args:
        split: cases.
        model: side of the input and number of classes.
        data: reading, clips and memory.
        train: batch sizes, seed and steps.
        read: where the scans of cases come from; NIfTI files, unless another source is named.
        semi: False leaves the unlabelled stream out.
        process_index: this host.
        process_count: hosts; each reads an equal part of every batch.

    Raises:
        DataError: a stream has no case.
        ConfigError: a batch does not divide among the hosts.
    """

    def __init__(
        self,
        split: Split,
        model: ModelOptions,
        data: DataOptions,
        train: TrainOptions,
        *,
        read: Read = load_scan,
        semi: bool = True,
        process_index: int = 0,
        process_count: int = 1,
    ) -> None:
        self._model, self._data, self._train = model, data, train
        self._index, self._count = process_index, process_count
        self._batches = {"labelled": train.labelled_batch}
        if semi:
            self._batches["unlabelled"] = train.unlabelled_batch
        self._cases = {name: getattr(split, name) for name in self._batches}
        self._check()
        self._order = functools.lru_cache(maxsize=64)(self._shuffled)
        self._stacks = StackCache(
            lambda case: read(case, model.num_classes, data), data.cache_bytes
        )

    def batch(self, step: int) -> Batch:
        """Return this host's part of a step's batch.

        Returns:
            For each stream `image` f32[B, S, H, W, 1], `slice_mask` bool[B, S], `id` int32[B],
            and `label` int32[B, S, H, W] for the labelled one. `id` counts examples globally.
            With `data.canvas`, H and W are its side, and `placement` int32[B, 6] says how
            `augment.fit` brings them to the network's square.
        """
        size = self._local_size
        return self._collate([self._clip(i) for i in range(step * size, (step + 1) * size)])

    def names(self, step: int) -> dict[str, list[str]]:
        """Return the case names of this host's part of a step's batch."""
        found: dict[str, list[str]] = {name: [] for name in self._batches}
        for position in range(step * self._local_size, (step + 1) * self._local_size):
            stream, number = self._example(position)
            found[stream].append(self._case(stream, number).name)
        return found

    def iterate(self, start_step: int = 0) -> Generator[Batch, None, None]:
        """Yield the batches from a step to the last one of the run, read ahead by threads.

        Close the iterator (or exhaust it) to end the threads.
        """
        size, stop = self._local_size, self._train.steps
        if start_step >= stop:
            return
        clips = grain.MapDataset.range(start_step * size, stop * size).map(self._clip)
        ahead = 2 * size if self._data.threads else 0
        options = grain.ReadOptions(num_threads=self._data.threads, prefetch_buffer_size=ahead)
        reader = iter(clips.to_iter_dataset(options))
        try:
            for _ in range(start_step, stop):
                yield self._collate([next(reader) for _ in range(size)])
        finally:
            reader.close()

    @property
    def _local_size(self) -> int:
        return sum(self._batches.values()) // self._count

    def _check(self) -> None:
        for stream, size in self._batches.items():
            if not self._cases[stream]:
                raise DataError(
                    f"the split has no {stream} case: list some, or set train.all_labels=False and "
                    "a smaller train.labelled_subjects; semi.enabled=False needs no unlabelled ones"
                )
            if size % self._count:
                raise ConfigError(
                    f"train.{stream}_batch={size} does not divide among {self._count} hosts: "
                    f"make it a multiple of {self._count}"
                )

    def _shuffled(self, stream: str, epoch: int) -> NDArray[np.int64]:
        """Draw the order of an epoch.

        grain's own shuffle finds one index at a time by walking a cycle of 2^16, which takes
        milliseconds for the few cases that labelled sets have.
        """
        return self._rng(stream, _ORDER, epoch).permutation(len(self._cases[stream]))

    def _rng(self, stream: str, purpose: int, number: int) -> np.random.Generator:
        return np.random.default_rng((self._train.seed, STREAMS.index(stream), purpose, number))

    def _example(self, position: int) -> tuple[str, int]:
        """Map a position in this host's sequence to a stream and a global example number."""
        step, place = divmod(position, self._local_size)
        for stream, size in self._batches.items():
            local = size // self._count
            if place < local:
                return stream, step * size + self._index * local + place
            place -= local
        raise AssertionError("a position lies in one stream")

    def _case(self, stream: str, number: int) -> Case:
        cases = self._cases[stream]
        epoch, place = divmod(number, len(cases))
        return cases[self._order(stream, epoch)[place]]

    def _clip(self, position: int) -> dict[str, Any]:
        stream, number = self._example(position)
        labelled = stream == "labelled"
        stack = self._stacks(self._case(stream, number))
        rng = self._rng(stream, _CLIP, number)
        slices = draw_slices(stack, self._data, rng, labelled=labelled)
        image, label, placement = fitted(stack.read(slices), self._model.image_size, self._data)
        clip = {
            "stream": stream,
            "image": self._padded(image)[..., None],
            "slice_mask": np.arange(self._data.clip_slices) < len(slices),
            "id": np.int32(number),
            **placement,
        }
        if labelled:
            assert label is not None
            clip["label"] = self._padded(label)
        return clip

    def _padded(self, array_SHW: NDArray[Any]) -> NDArray[Any]:
        """Append empty slices to a clip of a short volume; a whole clip is not copied."""
        missing = self._data.clip_slices - len(array_SHW)
        return np.pad(array_SHW, ((0, missing), (0, 0), (0, 0))) if missing else array_SHW

    def _collate(self, clips: list[Mapping[str, Any]]) -> Batch:
        batch: Batch = {}
        for stream in self._batches:
            own = [clip for clip in clips if clip["stream"] == stream]
            fields = [key for key in own[0] if key != "stream"]
            batch[stream] = {key: _stacked(key, [clip[key] for clip in own]) for key in fields}
        return batch


def _stacked(key: str, parts: list[NDArray[Any]]) -> NDArray[Any]:
    """Stack the clips of a stream; labels are widened on the way, in one copy."""
    return np.stack(parts, dtype=np.int32) if key == "label" else np.stack(parts)
