"""The network as pure functions of its parameters, `net`."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sss_jax.axes import Array, Float, PyTree
from sss_jax.models.prompt_encoder import Prompts
from sss_jax.models.sss import SegmentOutput, SSSModel

Features = tuple[Array, ...]


class Network(NamedTuple):
    """A model with one set of parameters: the student, or the teacher."""

    model: SSSModel
    net: PyTree

    def encode(self, image_BHWC: Float[Array, "B H W 1"]) -> Features:
        """Return the FPN maps, fine to coarse, of intensities in [0, 1]."""
        return self._apply("encode", image_BHWC)

    def coarse(self, features: Features) -> Float[Array, "B h w K1"]:
        """Return the class logits of the coarse head, float32."""
        return self._apply("coarse", features).astype(jnp.float32)

    def coarse_foreground(self, features: Features) -> Float[Array, "B h w K"]:
        """Return the foreground probabilities of the coarse head, the input of PCSW."""
        return jax.nn.softmax(self.coarse(features))[..., 1:]

    def segment(self, features: Features, prompts: Prompts) -> SegmentOutput:
        """Decode all classes of every image."""
        return self._apply("segment", features, prompts)

    def _apply(self, method: str, *args: Any) -> Any:
        return self.model.apply({"params": self.net}, *args, method=method)
