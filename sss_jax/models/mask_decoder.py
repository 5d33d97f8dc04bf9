"""Mask decoder: prompt tokens and image features become masks, IoU estimates and object scores.

Source: SAM (Kirillov et al. 2023) and SAM 2 (Ravi et al. 2024).
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from sss_jax.axes import Array, Bool, Float
from sss_jax.models import layers
from sss_jax.models.image_encoder import Features
from sss_jax.models.presets import Sam2Config
from sss_jax.models.transformer import TwoWayTransformer


class MaskOutput(NamedTuple):
    """What the decoder says about K objects per image; candidate 0 is the single mask.

    Attributes:
        logits_BKMHW: mask logits at four times the coarse grid.
        iou_BKM: estimated intersection over union of each mask, in [0, 1].
        object_score_BK: logit that the object is present.
        tokens_BKMD: mask tokens after the transformer.
    """

    logits_BKMHW: Float[Array, "B K M H W"]
    iou_BKM: Float[Array, "B K M"]
    object_score_BK: Float[Array, "B K"]
    tokens_BKMD: Float[Array, "B K M D"]


class Skips(NamedTuple):
    """Pyramid maps as far as the decoder needs them: an eighth of the size of `Features`.

    Attributes:
        fine_BHWC: the finest map after the decoder's skip convolution, four pixels side by side
            in the channels (`layers.to_cells`), so that there are as many as a tile of TPUs has.
        mid_BHWC: the middle map after its own.
        coarse_BHWD: the coarse map, as it is or conditioned on memory, [B, K, H, W, D].
    """

    fine_BHWC: Float[Array, "B H1 W1 C1"]
    mid_BHWC: Float[Array, "B H2 W2 C2"]
    coarse_BHWD: Float[Array, "*B H W D"]


def with_coarse(features: Features | Skips, coarse: Array) -> Any:
    """Return the same kind of features with another coarse map."""
    if isinstance(features, Skips):
        return features._replace(coarse_BHWD=coarse)
    return features[0], features[1], coarse


class MaskDecoder(nn.Module):
    """Two-way transformer, upscaling and the heads.

    Attributes:
        config: network shape.
    """

    config: Sam2Config

    def setup(self) -> None:
        """Create the skip convolutions, which may run ahead of the rest."""
        first, second = self.config.upscale_channels
        self.conv_s1 = layers.Conv(first, 1, self.config.compute_dtype)
        self.conv_s0 = layers.Conv(second, 1, self.config.compute_dtype)

    def skips(self, features: Features) -> Skips:
        """Reduce the fine and the middle map to the channels that the decoder adds."""
        fine, mid, coarse = features
        return Skips(layers.to_cells(self.conv_s0(fine)), self.conv_s1(mid), coarse)

    @nn.compact
    def __call__(
        self,
        features: Features | Skips,
        dense: Float[Array, "B J h w D"],
        position_hwD: Float[Array, "h w D"],
        prompts_BKND: Float[Array, "B K N D"],
        valid_BKN: Bool[Array, "B K N"],
        single: bool,
    ) -> MaskOutput:
        """Decode K objects per image.

        Args:
            features: pyramid maps, or their skips; the coarse one already conditioned on memory or
                its absence, [B, h, w, D] or, where every object has its own memory,
                [B, K, h, w, D].
            dense: dense prompt embedding; axes B, J, h and w may be 1.
            position_hwD: positional encoding of the coarse grid.
            prompts_BKND: sparse prompt tokens.
            valid_BKN: which of them are in use.
            single: compute the single mask only (M = 1).

        Returns:
            Masks in float32.
        """
        c = self.config
        fine, mid, coarse = features if isinstance(features, Skips) else self.skips(features)
        b, k = prompts_BKND.shape[:2]
        h, w, d = coarse.shape[-3:]
        tokens, valid = self._with_output_tokens(prompts_BKND, valid_BKN)
        keys = (coarse if coarse.ndim == 5 else coarse[:, None]) + dense
        keys = keys.reshape(b, -1, h * w, d)
        key_pe = position_hwD.reshape(1, 1, h * w, d).astype(c.compute_dtype)
        tokens, keys = TwoWayTransformer(c, name="transformer")(tokens, keys, key_pe, valid)

        masks = 1 if single else c.num_masks
        tokens_BKMD = tokens[:, :, 2 : 2 + masks]
        cells = self._upscale(keys.reshape(b, k, h, w, d), fine, mid)
        weights = self._hypernetworks(tokens[:, :, 2 : 2 + c.num_masks], masks)
        logits = _logits_of_cells(weights, cells)
        iou = self._head("iou_prediction_head", c.num_masks, c.head_hidden)(tokens[:, :, 1])
        score = self._head("pred_obj_score_head", 1, d)(tokens[:, :, 0])
        return MaskOutput(
            logits_BKMHW=logits,
            iou_BKM=jax.nn.sigmoid(iou.astype(jnp.float32))[..., :masks],
            object_score_BK=score[..., 0].astype(jnp.float32),
            tokens_BKMD=tokens_BKMD,
        )

    def _with_output_tokens(self, prompts: Array, valid: Array) -> tuple[Array, Array]:
        c = self.config
        b, k, _, d = prompts.shape

        def table(name: str, rows: int) -> Array:
            return layers.Table(rows, d, name=name)()

        output = jnp.concatenate(
            [table("obj_score_token", 1), table("iou_token", 1), table("mask_tokens", c.num_masks)]
        ).astype(prompts.dtype)
        output = jnp.broadcast_to(output[None, None], (b, k, *output.shape))
        on = jnp.ones(output.shape[:3], bool)
        return jnp.concatenate([output, prompts], 2), jnp.concatenate([on, valid], 2)

    def _upscale(self, keys: Array, fine: Array, mid: Array) -> Array:
        """Bring the keys of every object to four times the grid, with skips from the image.

        The last doubling leaves its pixels in cells, [B, K, 2h, 2w, 4 C].
        """
        dtype = self.config.compute_dtype
        first, second = self.config.upscale_channels
        x = layers.ConvTranspose(first, dtype, name="output_upscaling_0")(keys)
        x = layers.LayerNorm(dtype, name="output_upscaling_1")(x + mid[:, None])
        x = layers.ConvTranspose(second, dtype, True, name="output_upscaling_3")(layers.gelu(x))
        return layers.gelu(x + fine[:, None])

    def _hypernetworks(self, tokens: Array, masks: int) -> Array:
        """Weights of each mask over the upscaled channels; the first `masks` only."""
        c = self.config
        # Initialisation must create all of them, whatever the caller will use.
        count = c.num_masks if self.is_initializing() else masks
        widths = (c.width, c.width, c.upscale_channels[1])
        weights = [
            layers.MLP(widths, jax.nn.relu, c.compute_dtype, name=f"output_hypernetworks_mlps_{i}")(
                tokens[:, :, i]
            )
            for i in range(count)
        ]
        return jnp.stack(weights[:masks], axis=2)

    def _head(self, name: str, outputs: int, hidden: int) -> layers.MLP:
        widths = (hidden, hidden, outputs)
        return layers.MLP(widths, jax.nn.relu, self.config.compute_dtype, name=name)


def _logits_of_cells(
    weights_BKMC: Float[Array, "B K M C"], cells_BKhwC: Float[Array, "B K h w 4C"]
) -> Float[Array, "B K M H W"]:
    """Weigh the channels of every pixel; the weights of a cell's pixels as one matrix."""
    b, k, m, c = weights_BKMC.shape
    own = jnp.eye(4, dtype=weights_BKMC.dtype).reshape(1, 1, 1, 4, 4, 1)
    block = (weights_BKMC[:, :, :, None, None] * own).reshape(b, k, 4 * m, 4 * c)
    logits = jnp.einsum("bknc,bkhwc->bknhw", block, cells_BKhwC, preferred_element_type=jnp.float32)
    h, w = logits.shape[-2:]
    logits = logits.reshape(b, k, m, 2, 2, h, w).transpose(0, 1, 2, 5, 3, 6, 4)
    return logits.reshape(b, k, m, 2 * h, 2 * w)
