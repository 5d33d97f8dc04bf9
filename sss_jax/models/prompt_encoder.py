"""Prompt encoder: points, box corners and masks become tokens and a dense map.

Source: SAM (Kirillov et al. 2023) and SAM 2 (Ravi et al. 2024).
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from sss_jax.axes import Array, Bool, Float, Int
from sss_jax.models import layers, position
from sss_jax.models.initial import initialiser
from sss_jax.models.presets import POINT_KINDS, Sam2Config

PADDING, CLICK, BOX_START, BOX_END = -1, 1, 2, 3


class Prompts(NamedTuple):
    """Prompt points of K classes (or objects) per image, as SAM 2 takes them.

    Attributes:
        points_BKQ2: (x, y) in pixels of the input image.
        labels_BKQ: -1 padding, 0 and 1 negative and positive click, 2 and 3 box corners; all -1
            where there is no prompt.
    """

    points_BKQ2: Float[Array, "B K Q 2"]
    labels_BKQ: Int[Array, "B K Q"]


class MaskPrompts(NamedTuple):
    """Mask prompts of K objects per image.

    Attributes:
        logits_BKHW: mask logits at four times the coarse grid.
        given_BK: objects that have one.
    """

    logits_BKHW: Float[Array, "B K H W"]
    given_BK: Bool[Array, "B K"]


def no_prompts(batch: int, classes: int, slots: int = 3) -> Prompts:
    """Prompts of `batch` images where no class has one; by default as wide as box and centre."""
    shape = (batch, classes, slots)
    return Prompts(jnp.zeros((*shape, 2), jnp.float32), jnp.full(shape, PADDING, jnp.int32))


def prompt_slots(labels_BKQ: Int[Array, "B K Q"]) -> Bool[Array, "B K Q"]:
    """Which slots of a fixed-size prompt become tokens.

    Valid points do. Where an object has none, exactly its first slot does, as the empty point
    that SAM-2 feeds when there is no prompt.
    """
    given = labels_BKQ >= 0
    empty = ~given.any(axis=-1, keepdims=True)
    first = jnp.arange(labels_BKQ.shape[-1])[None, None] == 0
    return given | (empty & first)


class FourierPosition(nn.Module):
    """Owner of the random frequencies, which are part of a checkpoint but never trained.

    Attributes:
        width: D, number of features.
    """

    width: int

    @nn.compact
    def __call__(self, coords: Float[Array, "... 2"]) -> Float[Array, "... D"]:
        """Encode (x, y) in [0, 1], float32."""
        shape = (2, self.width // 2)
        name = "positional_encoding_gaussian_matrix"
        gaussian = self.param(name, initialiser(name), shape)
        return position.fourier_position(coords, jax.lax.stop_gradient(gaussian))


class PromptEncoder(nn.Module):
    """Embeds prompts of K objects per image.

    Attributes:
        config: network shape.
    """

    config: Sam2Config

    def setup(self) -> None:
        """Create the tables."""
        c = self.config
        self.pe_layer = FourierPosition(c.width)

        self.point_embeddings = [layers.Table(1, c.width) for _ in range(POINT_KINDS)]
        self.not_a_point_embed = layers.Table(1, c.width)
        self.no_mask_embed = layers.Table(1, c.width)
        first, second = c.mask_prompt_channels
        self.mask_downscaling_0 = layers.Conv(first, 2, c.compute_dtype, stride=2)
        self.mask_downscaling_1 = layers.LayerNorm(c.compute_dtype)
        self.mask_downscaling_3 = layers.Conv(second, 2, c.compute_dtype, stride=2)
        self.mask_downscaling_4 = layers.LayerNorm(c.compute_dtype)
        self.mask_downscaling_6 = layers.Conv(c.width, 1, c.compute_dtype)

    def points(
        self,
        points_BKQ2: Float[Array, "B K Q 2"],
        labels_BKQ: Int[Array, "B K Q"],
        image_hw: tuple[int, int],
    ) -> tuple[Float[Array, "B K N D"], Bool[Array, "B K N"]]:
        """Embed points and append SAM-2's padding point, which comes last (N = Q + 1).

        Args:
            points_BKQ2: (x, y) in input pixels.
            labels_BKQ: -1 unused, 0 / 1 clicks, 2 / 3 box corners.
            image_hw: size of the input image, pixels.

        Returns:
            Tokens, and which of them are in use.
        """
        if points_BKQ2.shape[2] == 0:
            points_BKQ2 = jnp.pad(points_BKQ2, ((0, 0), (0, 0), (0, 1), (0, 0)))
            labels_BKQ = jnp.pad(labels_BKQ, ((0, 0), (0, 0), (0, 1)), constant_values=-1)
        slots = jnp.pad(prompt_slots(labels_BKQ), ((0, 0), (0, 0), (0, 1)), constant_values=True)
        labels = jnp.pad(labels_BKQ, ((0, 0), (0, 0), (0, 1)), constant_values=-1)
        points = jnp.pad(points_BKQ2, ((0, 0), (0, 0), (0, 1), (0, 0)))

        height, width = image_hw
        size = jnp.array([width, height], jnp.float32)[None, None, None]
        where = self.pe_layer((points.astype(jnp.float32) + 0.5) / size)
        kinds = [e() for e in self.point_embeddings]
        table = jnp.concatenate([*kinds, self.not_a_point_embed()])
        kind = table[jnp.where(labels < 0, POINT_KINDS, labels)]
        tokens = kind + jnp.where((labels < 0)[..., None], 0.0, where)
        return tokens.astype(self.config.compute_dtype), slots

    def masks(self, masks: Float[Array, "B K H W"] | MaskPrompts) -> Float[Array, "B K h w D"]:
        """Embed mask logits, given at four times the coarse grid."""
        if isinstance(masks, MaskPrompts):
            given = masks.given_BK[..., None, None, None]
            return jnp.where(given, self.masks(masks.logits_BKHW), self.no_mask())
        b, k, h, w = masks.shape
        x = masks.reshape(b * k, h, w, 1)
        x = layers.gelu(self.mask_downscaling_1(self.mask_downscaling_0(x)))
        x = layers.gelu(self.mask_downscaling_4(self.mask_downscaling_3(x)))
        x = self.mask_downscaling_6(x)
        return x.reshape(b, k, *x.shape[1:])

    def no_mask(self) -> Float[Array, "1 1 1 1 D"]:
        """Dense embedding of "no mask prompt", the same at every position."""
        embedding = self.no_mask_embed().astype(self.config.compute_dtype)
        return embedding[None, None, None]

    def dense_position(self, height: int, width: int) -> Float[Array, "H W D"]:
        """Positional encoding of the coarse grid."""
        return self.pe_layer(position.pixel_centres(height, width))
