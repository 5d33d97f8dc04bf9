"""Meta's network and ours with the same weights."""

import dataclasses
import functools
from typing import Any

import jax

from sss_jax.conversion.keymap import to_ours
from sss_jax.models.presets import preset
from sss_jax.models.sam2 import Sam2
from tests.parity import meta
from tests.parity.weights import official_weights


@dataclasses.dataclass(eq=False)
class Pair:
    """The two networks.

    Attributes:
        theirs: Meta's predictor.
        ours: our network; perhaps in another computation type.
        params: our parameters.
    """

    theirs: Any
    ours: Sam2
    params: Any

    @property
    def size(self):
        """Side of the images."""
        return self.ours.config.image_size

    @property
    def grid(self):
        """Side of the coarse feature map."""
        return self.size // self.ours.config.strides[2]

    def call(self, method, *args, **static):
        """Run one of our network's methods, compiled once."""
        return _compiled(self.ours, method, *sorted(static.items()))(self.params, *args)


@functools.lru_cache(maxsize=64)
def _compiled(ours, method, *static):
    def run(params, *args):
        return ours.apply({"params": params}, *args, method=method, **dict(static))

    return jax.jit(run)


def pair(variant, version="2.1", size=256, dtype="float32", seed=0):
    """Both networks of a published size."""
    config = preset(variant, size, version=version)
    weights = official_weights(config, seed)
    ours = Sam2(dataclasses.replace(config, dtype=dtype))
    return Pair(meta.predictor(config, weights), ours, to_ours(weights))
