"""The network as pure functions of its parameters, `net`."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sss_jax.axes import Array, Float, PyTree
from sss_jax.models.mask_decoder import Skips
from sss_jax.models.memory_bank import Memory, MemoryBank
from sss_jax.models.prompt_encoder import MaskPrompts, Prompts
from sss_jax.models.sss import SegmentOutput, SliceOutput, SSSModel

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

    def segment(
        self, features: Features | Skips, prompts: Prompts, masks: MaskPrompts | None = None
    ) -> SegmentOutput:
        """Decode all classes of every image."""
        return self._apply("segment", features, prompts, masks)

    def skips(self, features: Features) -> Skips:
        """Return of the FPN maps what carrying classes through a volume needs."""
        return self._apply("skips", features)

    def without_memory(self, coarse_NHWD: Array) -> Array:
        """Return the coarse maps [N, 1, H, W, D] of slices that begin their volume."""
        return self._apply("without_memory", coarse_NHWD)

    def with_memory(self, coarse_NHWD: Array, bank: MemoryBank, *place: Array) -> Array:
        """Return the coarse maps [N, 1, H, W, D] of N objects, conditioned on their memory."""
        return self._apply("with_memory", coarse_NHWD, bank, *place)

    def with_images(self, coarse_NHWD: Array, memory_NKLPM: Array, valid_NKL: Array) -> Array:
        """Return the coarse maps [N, K, H, W, D] of N images, conditioned on other images."""
        return self._apply("with_images", coarse_NHWD, memory_NKLPM, valid_NKL)

    def segment_and_remember(
        self,
        skips: Skips,
        seen_NKHWD: Array,
        prompts: Prompts,
        masks: MaskPrompts | None,
        class_NK: Array,
    ) -> tuple[SliceOutput, Memory]:
        """Decode K objects on each of N slices, and encode what to remember of them."""
        return self._apply("segment_and_remember", skips, seen_NKHWD, prompts, masks, class_NK)

    def _apply(self, method: str, *args: Any) -> Any:
        return self.model.apply({"params": self.net}, *args, method=method)
