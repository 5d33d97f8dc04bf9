"""The SSS network: SAM-2, one token per class, and the coarse head.

Source: SSS (Zhu et al. 2026).
"""

import functools
from typing import NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from sss_jax.axes import Array, Bool, Float, Int, Key, PyTree
from sss_jax.errors import ConfigError
from sss_jax.models.coarse_head import CoarseHead
from sss_jax.models.image_encoder import Features, normalise_image
from sss_jax.models.initial import draw_all, initialiser
from sss_jax.models.mask_decoder import Skips, with_coarse
from sss_jax.models.memory_bank import Memory, MemoryBank
from sss_jax.models.presets import Kernels, Sam2Config, kernels_here, preset
from sss_jax.models.prompt_encoder import MaskPrompts, Prompts, no_prompts
from sss_jax.models.sam2 import NO_OBJECT, Sam2
from sss_jax.options import Options


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


class SliceOutput(NamedTuple):
    """Segmentation of K objects on each of N slices.

    Attributes:
        logits_NKHW: mask logits at four times the coarse grid.
        iou_NK: estimated intersection over union.
        object_score_NK: logit that the class is present.
    """

    logits_NKHW: Float[Array, "N K H W"]
    iou_NK: Float[Array, "N K"]
    object_score_NK: Float[Array, "N K"]


def as_classes(
    logits_BKHW: Float[Array, "B K H W"],
    iou_BK: Float[Array, "B K"],
    score_BK: Float[Array, "B K"],
) -> SegmentOutput:
    """Lay the masks of K objects out as class logits, with 0 for the background."""
    classes = jnp.moveaxis(logits_BKHW, 1, -1)
    background = jnp.zeros_like(classes[..., :1])
    return SegmentOutput(jnp.concatenate([background, classes], axis=-1), iou_BK, score_BK)


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

    def segment(
        self, features: Features | Skips, prompts: Prompts, masks: MaskPrompts | None = None
    ) -> SegmentOutput:
        """Decode all classes, each with its prompt and its class token, without memory.

        Differs from the paper: SAM-2 knows no classes, so each class is an object with a learned
        token, and the background logit is 0.
        """
        b = features[0].shape[0]
        tokens = jnp.broadcast_to(self.class_tokens[None], (b, *self.class_tokens.shape))
        output = self.sam2.decode(
            features, prompts.points_BKQ2, prompts.labels_BKQ, tokens, masks, single=True
        )
        return as_classes(
            output.logits_BKMHW[:, :, 0], output.iou_BKM[..., 0], output.object_score_BK
        )

    def skips(self, features: Features) -> Skips:
        """Reduce the features of slices to what carrying classes through a volume needs."""
        return self.sam2.skips(features)

    def without_memory(self, coarse_NHWD: Float[Array, "N H W D"]) -> Float[Array, "N 1 H W D"]:
        """Make the coarse maps of slices that begin their volume."""
        return self.sam2.without_memory(coarse_NHWD)[:, None]

    def with_memory(
        self,
        coarse_NHWD: Float[Array, "N H W D"],
        bank: MemoryBank,
        index_N1: Int[Array, "N 1"],
        num_slices_N1: Int[Array, "N 1"],
        backwards_N1: Bool[Array, "N 1"],
    ) -> Float[Array, "N 1 H W D"]:
        """Condition the coarse maps of N objects, each on a slice of its own, on their memory."""
        return self.sam2.condition(coarse_NHWD, bank, index_N1, num_slices_N1, backwards_N1)

    def with_images(
        self,
        coarse_NHWD: Float[Array, "N H W D"],
        memory_NKLPM: Float[Array, "N K L P M"],
        valid_NKL: Bool[Array, "N K L"],
    ) -> Float[Array, "N K H W D"]:
        """Condition the coarse maps of N images on memories of other images, class by class."""
        return self.sam2.recall(coarse_NHWD, memory_NKLPM, valid_NKL)

    def segment_and_remember(
        self,
        skips: Skips,
        seen_NKHWD: Float[Array, "N K H W D"],
        prompts: Prompts,
        masks: MaskPrompts | None,
        class_NK: Int[Array, "N K"],
    ) -> tuple[SliceOutput, Memory]:
        """Decode K objects on each of N slices, and encode what to remember of them.

        Args:
            skips: features of the slices.
            seen_NKHWD: their coarse maps as `without_memory`, `with_memory` or `with_images` make
                them.
            prompts: prompts of the objects.
            masks: mask prompts of the objects.
            class_NK: class of each object, from 0.
        """
        output = self.sam2.decode(
            with_coarse(skips, seen_NKHWD),
            prompts.points_BKQ2,
            prompts.labels_BKQ,
            self.class_tokens[class_NK],
            masks,
            single=True,
            memory_conditioned=True,
        )
        logits, score = output.logits_BKMHW[:, :, 0], output.object_score_BK
        present = score > 0
        kept = jnp.where(present[..., None, None], logits, NO_OBJECT)
        memory = self.sam2.encode_memory(skips.coarse_BHWD, kept, score, binary=False)
        pointer = self.sam2.pointer(output.tokens_BKMD[:, :, 0], present)
        return SliceOutput(logits, output.iou_BKM[..., 0], score), Memory(memory, pointer)

    def __call__(
        self, image_BHW1: Float[Array, "B H W 1"], prompts: Prompts
    ) -> tuple[Float[Array, "B H W K1"], SegmentOutput]:
        """Coarse logits and segmentation; `init` on this creates every parameter."""
        if self.is_initializing():
            self.sam2(normalise_image(image_BHW1), prompts.points_BKQ2, prompts.labels_BKQ)
        features = self.encode(image_BHW1)
        return self.coarse(features), self.segment(features, prompts)


def build_model(options: Options) -> SSSModel:
    """Make the network that `options` describe; without memory, without the parts for it."""
    model = options.model
    memory = options.memory.kind != "none"
    config = preset(
        model.preset,
        model.image_size,
        model.dtype,
        model.remat,
        remat_keeps=model.remat_keeps,
        loop_blocks=model.loop_blocks,
        kernels=kernels_for(options, kernels_here()),
        memory=memory,
    )
    return SSSModel(config, model.num_classes, model.class_token_std)


def kernels_for(options: Options, platform: Kernels) -> Kernels:
    """Choose the kernels for a platform that has some, or for one that has none, `off`.

    Raises:
        ConfigError: they are asked for where images are cut over devices.
    """
    cut, asked = options.mesh.context > 1, options.model.kernels
    if asked in ("tpu", "gpu") and cut:
        raise ConfigError(
            f"model.kernels={asked}: a kernel takes whole images, and "
            f"mesh.context={options.mesh.context} cuts their rows; set one of them back"
        )
    chosen = platform if asked == "auto" else cast(Kernels, asked)
    return "off" if cut else chosen


@functools.partial(jax.jit, static_argnums=0)
def init_params(model: SSSModel, key: Key[Array, ""]) -> PyTree:
    """Draw float32 parameters as a plain nested dict.

    Their shapes do not depend on the image size, so the smallest image is traced, and once: shapes
    and values of the same model share the trace.
    """
    side = model.config.size_multiple
    image = jnp.zeros((1, side, side, 1))
    prompts = no_prompts(1, model.num_classes)
    shapes = jax.eval_shape(model.init, key, image, prompts)["params"]
    std = {"class_tokens": model.class_token_std}
    return draw_all(key, shapes, std)
