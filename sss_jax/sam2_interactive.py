"""Objects in a volume by clicks that are answered at once, followed, and corrected.

    predictor = sam2.VolumePredictor(network, volume)
    found = predictor.add(1, slice=12, points=[[60, 80]])
    found = predictor.add(1, slice=12, points=[[90, 80]], labels=[0])     # not this
    labels = predictor.propagate().label()
    found = predictor.add(1, slice=20, points=[[40, 70]])                 # this too
    labels = predictor.propagate().label()

The class holds the volume, the features of its slices and the current state; what happens to the
state is in `models.interaction`.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sss_jax.errors import ConfigError, DataError
from sss_jax.models import interaction
from sss_jax.models.image_encoder import Features
from sss_jax.models.interaction import Finding, Thread
from sss_jax.models.masks import MaskRules
from sss_jax.models.sam2 import NO_OBJECT
from sss_jax.sam2_inputs import Prompt, scaled, square, square_mask
from sss_jax.sam2_network import Network, encode
from sss_jax.sam2_volume import VolumePrediction, check_area, full_logits

KEEP_BYTES = 2**32


class SlicePrediction(NamedTuple):
    """The mask of one object on one slice, of the slice's own size.

    Attributes:
        mask: True inside, [H, W].
        logits: the same before the threshold 0, [H, W].
        iou: estimated intersection over union.
        object_score: logit that the object is there.
    """

    mask: NDArray[np.bool_]
    logits: NDArray[np.float32]
    iou: float
    object_score: float


class VolumePredictor:
    """Interactive segmentation of one volume.

    Attributes:
        network: the network.
        threads: what is known of every object; immutable, and replaced by every call. Assign a
            value that was kept to go back to it.
    """

    def __init__(
        self,
        network: Network,
        volume: ArrayLike,
        *,
        clean_area: int = 0,
        overlap: bool = True,
        keep_bytes: int = KEEP_BYTES,
    ) -> None:
        """Start without any object.

        A slice is encoded when it is first needed, and its features are kept.

        Args:
            network: the network.
            volume: [S, H, W], integers 0..255 or floats in [0, 1].
            clean_area: fill holes and remove islands of up to so many pixels of the mask's grid,
                each of which is 4 x 4 pixels of the network's input; 0: leave them.
            overlap: whether objects may claim the same pixel; else the higher logit has it.
            keep_bytes: memory that the features of slices may take. Slices that do not fit are
                encoded again whenever they are needed.

        Raises:
            DataError: not such a volume.
            ConfigError: an area that is negative or a whole mask.
        """
        self._volume = np.asarray(volume)
        if self._volume.ndim != 3 or 0 in self._volume.shape:
            shape = list(self._volume.shape)
            raise DataError(f"a volume has three axes [slice, row, column], not the shape {shape}")
        if keep_bytes < 0:
            raise ConfigError(f"keep_bytes: {keep_bytes} is negative; 0 keeps no features")
        self.network = network
        check_area(network, clean_area)
        rules = MaskRules(clean_area, overlap)
        self._scene = interaction.make_scene(
            network.model, network.params, len(self._volume), rules
        )
        self._room = keep_bytes
        self._kept: dict[int, Features] = {}
        self._last: tuple[int, Features] | None = None
        self.threads: interaction.Threads = {}

    @property
    def objects(self) -> tuple[int, ...]:
        """Names of the objects."""
        return tuple(self.threads)

    def add(
        self,
        name: int,
        slice: int,
        *,
        points: Sequence[Sequence[float]] = (),
        labels: Sequence[int] | None = None,
        box: Sequence[float] | None = None,
        mask: ArrayLike | None = None,
    ) -> SlicePrediction:
        """Prompt an object on a slice and return its mask there.

        Clicks add to those that the slice has; a box or a mask replaces them. On a slice that was
        followed before, a prompt corrects the mask that it has, and the next `propagate` takes the
        slice as one that was prompted.

        Args:
            name: label of the object, from 1 on; a new one starts an object.
            slice: number of the slice.
            points: (x, y) of clicks, pixels.
            labels: 1 for a click on the object, 0 beside it; all 1 by default.
            box: (x0, y0, x1, y1), pixels.
            mask: True inside; the only prompt of its slice.

        Raises:
            DataError: no such slice, or prompts that do not fit together; nothing has changed then.
        """
        prompt = Prompt(slice=slice, box=box, points=points, labels=labels, mask=mask)
        self._check(name, slice)
        features, thread = self._features(slice), self.threads.get(name, Thread())
        if mask is not None:
            self._check_mask(np.asarray(mask))
            drawn = square_mask(prompt, self.network.size)
            thread = interaction.add_mask(self._scene, thread, features, slice, drawn)
        else:
            xy, kinds = prompt.tokens()
            xy = scaled(xy, self._volume.shape[1:], self.network.size)
            arguments = self._scene, thread, features, slice, xy, kinds
            thread = interaction.add_points(*arguments, replace=box is not None)
        self.threads = {**self.threads, name: thread}
        return self._shown(name, slice)

    def remove(self, name: int, slice: int | None = None) -> None:
        """Take back the prompts of an object on a slice, or the object altogether.

        Raises:
            DataError: no such object, or it has no prompt on this slice.
        """
        if name not in self.threads:
            raise DataError(f"there is no object {name}; there are {list(self.threads)}")
        if slice is None:
            self.threads = {n: t for n, t in self.threads.items() if n != name}
            return
        thread = self.threads[name]
        if slice not in {*thread.fresh, *thread.prompted}:
            prompted = sorted({*thread.fresh, *thread.prompted})
            raise DataError(f"object {name} has no prompt on slice {slice}; it has on {prompted}")
        self.threads = {**self.threads, name: interaction.remove_prompts(thread, slice)}

    def reset(self) -> None:
        """Forget every object; the features of the slices stay."""
        self.threads = {}

    def propagate(self, report: Callable[[int, int], None] | None = None) -> VolumePrediction:
        """Follow every object from the first prompted slice to the end, and back to the beginning.

        Args:
            report: called with the steps done and the steps in all.

        Raises:
            DataError: no object, or one that has no prompt left; nothing has changed then.
        """
        idle = [name for name, t in self.threads.items() if not {*t.fresh, *t.prompted}]
        if idle or not self.threads:
            which = f"object {idle[0]} has no prompt" if idle else "there is no object"
            raise DataError(f"{which}: add one before the objects are followed")
        threads = interaction.remember_prompts(self._scene, self.threads, self._features)
        steps = interaction.route(threads, len(self._volume))
        for done, (index, backwards) in enumerate(steps, 1):
            threads = interaction.visit(self._scene, threads, self._features, index, backwards)
            if report:
                report(done, len(steps))
        self.threads = threads
        return self.result()

    def result(self) -> VolumePrediction:
        """Return what every object looks like now, on every slice where that is known."""
        found = [
            [thread.finding(index) for thread in self.threads.values()]
            for index in range(len(self._volume))
        ]
        logits = np.stack([self._logits(row).astype(np.float16) for row in found])
        scores = [[NO_OBJECT if f is None else _score(f) for f in row] for row in found]
        return VolumePrediction(logits, np.array(scores, np.float32), self.objects)

    def _check(self, name: int, slice: int) -> None:
        if isinstance(name, bool) or not isinstance(name, int | np.integer) or name < 1:
            raise DataError(f"object {name!r}: an object is named by its label, 1 or more")
        if not 0 <= slice < len(self._volume):
            last = len(self._volume) - 1
            raise DataError(f"object {name}: slice {slice} is outside 0..{last}")

    def _check_mask(self, mask: NDArray[np.bool_]) -> None:
        if mask.shape != self._volume.shape[1:]:
            shapes = f"{list(mask.shape)}, a slice {list(self._volume.shape[1:])}"
            raise DataError(f"the mask has the shape {shapes}")

    def _shown(self, name: int, index: int) -> SlicePrediction:
        row = [thread.finding(index) for thread in self.threads.values()]
        logits = self._logits(row)[self.objects.index(name)]
        found = self.threads[name].fresh[index]
        iou = float(found.prediction.iou_BK[0, 0])
        return SlicePrediction(logits > 0, logits, iou, _score(found))

    def _logits(self, found: list[Finding | None]) -> NDArray[np.float32]:
        """Masks of all objects on a slice at its own size, [K, H, W]."""
        side = 4 * self.network.size // self.network.model.config.strides[2]
        low = np.full((len(found), side, side), NO_OBJECT, np.float32)
        for plane, finding in zip(low, found, strict=True):
            if finding is not None:
                plane[:] = finding.prediction.logits_BKHW[0, 0]
        return full_logits(low, self._volume.shape[1:], self._scene.rules)

    def _features(self, index: int) -> Features:
        """Features of a slice; kept where there is room, and those used last in any case."""
        if index in self._kept:
            return self._kept[index]
        if self._last is None or self._last[0] != index:
            image = square(self._volume[index], self.network.size)[None]
            features = encode(self.network.model, self.network.params, image)
            self._last = index, features
            size = sum(level.nbytes for level in features)
            if size * (len(self._kept) + 1) <= self._room:
                self._kept[index] = features
        return self._last[1]


def _score(found: Finding) -> float:
    return float(found.prediction.object_score_BK[0, 0])
