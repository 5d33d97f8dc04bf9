"""The SSS network: SAM-2, one token per class, and the coarse head.

Source: SSS (Zhu et al. 2026).
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from sss_jax.axes import Array, Float, Key, PyTree
from sss_jax.models.coarse_head import CoarseHead
from sss_jax.models.image_encoder import Features, normalise_image
from sss_jax.models.initial import draw_all, initialiser
from sss_jax.models.presets import Sam2Config, preset
from sss_jax.models.prompt_encoder import Prompts, no_prompts
from sss_jax.models.sam2 import Sam2
from sss_jax.options import ModelOptions


class SegmentOutput(NamedTuple):
    """Segmentation of all classes.

    Attributes:
        logits_BHWK1: class logits at four times the coarse grid, softmax over the last axis;
            class 0, the background, is constantly 0.
        iou_BK: estimated intersection over union of each class.
        object_score_BK: logit that the class is present.
    """

    logits_BHWK1: Float[Array, "B H W K1"]
    iou_BK: Float[Array, "B K"]
    object_score_BK: Float[Array, "B K"]


class SSSModel(nn.Module):
    """Segments K classes of single-channel images.

    Attributes:
        config: shape of the SAM-2 network.
        num_classes: K, foreground classes.
        class_token_std: initial spread of the class tokens; 0 leaves SAM-2's outputs exact.
    """

    config: Sam2Config
    num_classes: int
    class_token_std: float = 0.0

    def setup(self) -> None:
        """Create the parts."""
        self.sam2 = Sam2(self.config)
        self.coarse_head = CoarseHead(self.config, self.num_classes)
        init = initialiser("class_tokens", self.class_token_std)
        shape = (self.num_classes, self.config.width)
        self.class_tokens = self.param("class_tokens", init, shape)

    def encode(self, image_BHW1: Float[Array, "B H W 1"]) -> Features:
        """Encode intensities in [0, 1]."""
        return self.sam2.encode_image(normalise_image(image_BHW1))

    def coarse(self, features: Features) -> Float[Array, "B H W K1"]:
        """Class logits of the coarse head at the finest level."""
        return self.coarse_head(features[0])

    def segment(self, features: Features, prompts: Prompts) -> SegmentOutput:
        """Decode all classes, each with its prompt and its class token.

        Differs from the paper: SAM-2 knows no classes, so each class is an object with a learned
        token, and the background logit is 0.
        """
        b = features[0].shape[0]
        tokens = jnp.broadcast_to(self.class_tokens[None], (b, *self.class_tokens.shape))
        output = self.sam2.decode(
            features, prompts.points_BKQ2, prompts.labels_BKQ, tokens, single=True
        )
        classes = jnp.moveaxis(output.logits_BKMHW[:, :, 0], 1, -1)
        background = jnp.zeros_like(classes[..., :1])
        return SegmentOutput(
            logits_BHWK1=jnp.concatenate([background, classes], axis=-1),
            iou_BK=output.iou_BKM[..., 0],
            object_score_BK=output.object_score_BK,
        )

    def __call__(
        self, image_BHW1: Float[Array, "B H W 1"], prompts: Prompts
    ) -> tuple[Float[Array, "B H W K1"], SegmentOutput]:
        """Coarse logits and segmentation; `init` on this creates every parameter."""
        if self.is_initializing():
            self.sam2(normalise_image(image_BHW1), prompts.points_BKQ2, prompts.labels_BKQ)
        features = self.encode(image_BHW1)
        return self.coarse(features), self.segment(features, prompts)


def build_model(options: ModelOptions) -> SSSModel:
    """Make the network that `options` describe."""
    config = preset(options.preset, options.image_size, options.dtype, options.remat, memory=False)
    return SSSModel(config, options.num_classes, options.class_token_std)


def init_params(model: SSSModel, key: Key[Array, ""]) -> PyTree:
    """Draw float32 parameters as a plain nested dict.

    Their shapes do not depend on the image size, so the smallest image is traced.
    """
    side = model.config.size_multiple
    image = jnp.zeros((1, side, side, 1))
    prompts = no_prompts(1, model.num_classes)
    shapes = jax.eval_shape(model.init, key, image, prompts)["params"]
    std = {"class_tokens": model.class_token_std}
    return jax.jit(lambda k: draw_all(k, shapes, std))(key)
