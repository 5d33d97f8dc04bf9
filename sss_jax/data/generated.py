"""Volumes out of nothing, for throughput: `--data synthetic:` needs no files and hardly any time.

Slices are windows that wander over one large plane of noise with an ellipse for every class, drawn
once. They are cheap, not realistic; phantoms (`synthetic.py`) are for learning.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sss_jax.data.cases import Case, Split
from sss_jax.data.examples import Scan
from sss_jax.data.faults import FileFault
from sss_jax.data.geometry import Frame
from sss_jax.data.load import Stack
from sss_jax.errors import ConfigError
from sss_jax.options import DataOptions, Options, TrainOptions

PREFIX = "synthetic:"
_FORM = re.compile(r"(?:(\d{1,4})x(\d{1,4})x(\d{1,4})(?:,(\d{1,6}))?)?")
_CASES, _VALIDATION = 32, 2
_WANDER = 32  # pixels
_NAME = "synthetic_{size}_{number:05d}"


@dataclasses.dataclass(frozen=True, eq=False)
class _Canvas:
    """Planes larger than a slice: intensities with and without objects, and the objects."""

    objects: NDArray[np.float32]
    noise: NDArray[np.float32]
    label: NDArray[np.uint8]


@dataclasses.dataclass(frozen=True, eq=False)
class GeneratedStack:
    """The slices of a synthetic case, made when they are read.

    Attributes:
        canvas: what slices are windows of.
        frame: upright already, 1 mm.
        number: of the case; sets where its windows lie.
        labelled: whether the run may know the labels.
    """

    canvas: _Canvas
    frame: Frame
    number: int
    labelled: bool

    @property
    def depth(self) -> int:
        """Number of slices."""
        return self.frame.shape[2]

    @property
    def with_label(self) -> NDArray[np.int64] | None:
        """Slices that show a label, ascending; None where labels are not known."""
        return np.array(self._shown) if self.labelled else None

    @property
    def nbytes(self) -> int:
        """Memory it holds, bytes; the planes are shared."""
        return 0

    def read(self, slices: NDArray[np.int64] | None = None) -> Scan:
        """Return the listed slices, or all."""
        positions = range(self.depth) if slices is None else [int(s) for s in slices]
        image = np.stack([self._image(s) for s in positions])
        label = np.stack([self._label(s) for s in positions]) if self.labelled else None
        return Scan(image, label, self.frame)

    @property
    def _shown(self) -> range:
        """Slices that show objects: all but an eighth at either end."""
        edge = self.depth // 8
        return range(edge, self.depth - edge)

    def _window(self, position: int) -> tuple[slice, slice]:
        columns, rows, _ = self.frame.shape
        top = (7 * self.number + position) % (_WANDER + 1)
        left = (11 * self.number + 2 * position) % (_WANDER + 1)
        return slice(top, top + rows), slice(left, left + columns)

    def _image(self, position: int) -> NDArray[np.float32]:
        plane = self.canvas.objects if position in self._shown else self.canvas.noise
        gain = np.float32(0.6 + 0.4 * (self.number * 5 % 8) / 7)
        return plane[self._window(position)] * gain

    def _label(self, position: int) -> NDArray[np.uint8]:
        window = self.canvas.label[self._window(position)]
        return window if position in self._shown else np.zeros_like(window)


class GeneratedSource:
    """Synthetic cases: `synthetic:` or `synthetic:ROWSxCOLUMNSxSLICES[,CASES]`.

    Without a size, slices have the side of the network's input, and volumes twice the slices of a
    clip. Of 32 cases (or CASES) two are for validation and a quarter is labelled.

    Args:
        text: the form above.
        options: sizes, classes and seed.

    Raises:
        ConfigError: another form, or sizes that make no sense.
    """

    def __init__(self, text: str, options: Options) -> None:
        rows, columns, depth, self._count = _sizes(text, options)
        self._frame = Frame((columns, rows, depth), (2, 1, 0), (False,) * 3, (1.0,) * 3, 2)
        self._size = f"{rows}x{columns}x{depth}"
        self._canvas = _draw(rows, columns, options.model.num_classes, options.train.seed)

    @property
    def name(self) -> str:
        """What a run's record calls it."""
        return f"{PREFIX}{self._size},{self._count}"

    def split(self, data: DataOptions, train: TrainOptions) -> Split:
        """Return the cases of each part; there are always unlabelled ones unless all are."""
        learning = self._count - _VALIDATION
        labelled = train.labelled_subjects or max(1, self._count // 4)
        labelled = learning if train.all_labels else min(labelled, learning - 1)
        numbers = iter(range(self._count))
        return Split(
            tuple(self._case(next(numbers), True) for _ in range(labelled)),
            tuple(self._case(next(numbers), False) for _ in range(learning - labelled)),
            tuple(self._case(number, True) for number in numbers),
            (),
        )

    def read(self, case: Case, num_classes: int | None, options: DataOptions) -> Stack:
        """Return the slices of a case, with labels where it is not an unlabelled one."""
        number = int(case.name.rsplit("_", 1)[1])
        return GeneratedStack(self._canvas, self._frame, number, case.label is not None)

    def faults(
        self, cases: Sequence[Case], num_classes: int | None, options: DataOptions
    ) -> Iterator[tuple[Case, list[FileFault]]]:
        """Yield nothing: no file is read."""
        return iter(())

    def _case(self, number: int, labelled: bool) -> Case:
        name = _NAME.format(size=self._size, number=number)
        return Case(name, name, Path(name), Path(name) if labelled else None)


def _sizes(text: str, options: Options) -> tuple[int, int, int, int]:
    found = _FORM.fullmatch(text.removeprefix(PREFIX))
    side = options.model.image_size
    given = found.groups() if found else ()
    usual = (side, side, 2 * options.data.clip_slices, _CASES)
    sizes = [int(g) if g is not None else u for g, u in zip(given, usual, strict=False)]
    if not sizes or min(sizes) < 1 or sizes[3] < _VALIDATION + 2:
        raise ConfigError(
            f"--data {text}: write synthetic: or synthetic:ROWSxCOLUMNSxSLICES[,CASES], such as "
            f"synthetic:256x256x16,32, with at least {_VALIDATION + 2} cases"
        )
    if 0 < options.data.canvas < max(sizes[:2]):
        raise ConfigError(
            f"--data {text}: slices of {sizes[0]} x {sizes[1]} pixels do not fit on "
            f"data.canvas={options.data.canvas}: raise it, or ask for smaller slices"
        )
    return sizes[0], sizes[1], sizes[2], sizes[3]


def _draw(rows: int, columns: int, classes: int, seed: int) -> _Canvas:
    shape = rows + _WANDER, columns + _WANDER
    noise = np.random.default_rng((seed, 0)).random(shape, np.float32)
    label = _ellipses(shape, classes)
    bright = 0.7 * label.astype(np.float32) / np.float32(classes)
    return _Canvas(0.3 * noise + bright, 0.3 * noise, label)


def _ellipses(shape: tuple[int, int], classes: int) -> NDArray[np.uint8]:
    """Draw one ellipse for every class, in the cells of a grid."""
    cells = math.ceil(math.sqrt(classes))
    y, x = (np.arange(n, dtype=np.float32) * np.float32(cells / n) for n in shape)
    number = 1 + cells * y.astype(np.int32)[:, None] + x.astype(np.int32)[None]
    near = ((y % 1 - 0.5) ** 2)[:, None] + ((x % 1 - 0.5) ** 2)[None] < 0.1
    return np.where(near & (number <= classes), number, 0).astype(np.uint8)
