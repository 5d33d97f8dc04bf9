"""SAM-2: the image path.

Source: SAM 2 (Ravi et al. 2024). Submodules carry the names of the official checkpoints, with
`name.0` written `name_0`, so that weights map by rule: linear and convolution weights are
`kernel`, normalisation weights `scale`, tables `embedding`.
"""

import flax.linen as nn
import jax.numpy as jnp

from sss_jax.axes import Array, Float, Int
from sss_jax.models.image_encoder import Features, ImageEncoder
from sss_jax.models.initial import initialiser
from sss_jax.models.mask_decoder import MaskDecoder, MaskOutput
from sss_jax.models.presets import Sam2Config
from sss_jax.models.prompt_encoder import PromptEncoder


class Sam2(nn.Module):
    """Promptable segmentation of images.

    Attributes:
        config: network shape.
    """

    config: Sam2Config

    def setup(self) -> None:
        """Create the parts."""
        c = self.config
        self.image_encoder = ImageEncoder(c)
        self.sam_prompt_encoder = PromptEncoder(c)
        self.sam_mask_decoder = MaskDecoder(c)
        self.no_mem_embed = self.param("no_mem_embed", initialiser("no_mem_embed"), (1, 1, c.width))

    def encode_image(self, image_BHWC: Float[Array, "B H W 3"]) -> Features:
        """Encode standardised images, whose sides are multiples of `config.size_multiple`.

        Returns:
            Pyramid maps at the three `config.strides`, as they are before the decoder's skip
            convolutions and before any memory.
        """
        _, height, width, _ = image_BHWC.shape
        multiple = self.config.size_multiple
        if height % multiple or width % multiple:
            raise ValueError(f"image {height}x{width}: sides must be multiples of {multiple}")
        return self.image_encoder(image_BHWC)

    def decode(
        self,
        features: Features,
        points_BKQ2: Float[Array, "B K Q 2"],
        labels_BKQ: Int[Array, "B K Q"],
        token_bias_BKD: Float[Array, "B K D"] | None = None,
        masks_BKHW: Float[Array, "B K H W"] | None = None,
        *,
        single: bool = False,
        memory_conditioned: bool = False,
    ) -> MaskOutput:
        """Segment K objects per image in one batch that shares the image's features.

        Args:
            features: pyramid maps of `encode_image`.
            points_BKQ2: (x, y) in input pixels.
            labels_BKQ: -1 unused, 0 / 1 clicks, 2 / 3 box corners. Unused slots do not change the
                result; an object without any used slot is decoded as SAM-2 does without prompt.
            token_bias_BKD: added to the padding point that ends every prompt; None: zero.
            masks_BKHW: mask prompts (logits) at four times the coarse grid; None: no mask prompt.
            single: compute the single mask only (M = 1).
            memory_conditioned: the coarse map has seen the memory bank; otherwise the embedding
                of "no memory" is added to it.
        """
        fine, mid, coarse = features
        height, width = (side * self.config.strides[2] for side in coarse.shape[1:3])
        encoder = self.sam_prompt_encoder
        tokens, valid = encoder.points(points_BKQ2, labels_BKQ, (height, width))
        if token_bias_BKD is not None:
            tokens = tokens.at[:, :, -1].add(token_bias_BKD.astype(tokens.dtype))
        if not memory_conditioned:
            coarse = coarse + self.no_mem_embed[None].astype(coarse.dtype)
        dense = encoder.no_mask() if masks_BKHW is None else encoder.masks(masks_BKHW)
        position = encoder.dense_position(*coarse.shape[1:3])
        return self.sam_mask_decoder((fine, mid, coarse), dense, position, tokens, valid, single)

    def __call__(
        self,
        image_BHWC: Float[Array, "B H W 3"],
        points_BKQ2: Float[Array, "B K Q 2"],
        labels_BKQ: Int[Array, "B K Q"],
    ) -> MaskOutput:
        """Encode and decode; `init` on this creates every parameter."""
        features = self.encode_image(image_BHWC)
        if self.is_initializing():
            b, h, w, _ = features[2].shape
            empty = jnp.zeros((b, labels_BKQ.shape[1], 4 * h, 4 * w))
            self.decode(features, points_BKQ2, labels_BKQ, masks_BKHW=empty)
        return self.decode(features, points_BKQ2, labels_BKQ)
