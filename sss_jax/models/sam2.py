"""SAM-2: images, and volumes by memory.

Source: SAM 2 (Ravi et al. 2024). Submodules carry the names of the official checkpoints, with
`name.0` written `name_0`, so that weights map by rule: linear and convolution weights are
`kernel`, normalisation weights `scale`, tables `embedding`.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from sss_jax.axes import Array, Bool, Float, Int
from sss_jax.models import layers, phases, position
from sss_jax.models.image_encoder import Features, ImageEncoder
from sss_jax.models.initial import initialiser
from sss_jax.models.mask_decoder import MaskDecoder, MaskOutput, Skips, with_coarse
from sss_jax.models.memory_attention import MemoryAttention, MemoryKeys
from sss_jax.models.memory_bank import MemoryBank, Reach, empty_bank, reach
from sss_jax.models.memory_encoder import MemoryEncoder
from sss_jax.models.presets import Sam2Config
from sss_jax.models.prompt_encoder import MaskPrompts, PromptEncoder, no_prompts

NO_OBJECT = -1024.0
"""Mask logit everywhere where the object is absent."""

MASK_PROMPT_LOGIT = 10.0
"""Logit of a pixel inside a mask prompt; outside its negative."""

STABILITY_SHIFT, STABILITY = 0.05, 0.98
"""A mask is stable if moving its threshold by the shift keeps this share of its area."""


class Prediction(NamedTuple):
    """The mask chosen for each of K objects.

    Attributes:
        logits_BKHW: mask logits at four times the coarse grid.
        iou_BK: estimated intersection over union.
        object_score_BK: logit that the object is present.
        pointer_BKD: object pointer, what other slices remember of the object as a whole.
    """

    logits_BKHW: Float[Array, "B K H W"]
    iou_BK: Float[Array, "B K"]
    object_score_BK: Float[Array, "B K"]
    pointer_BKD: Float[Array, "B K D"]


class Sam2(nn.Module):
    """Promptable segmentation of images and volumes.

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
        self.no_mem_embed = self._table("no_mem_embed", (1, 1, c.width))
        if c.memory:
            self._setup_memory()

    def _setup_memory(self) -> None:
        c = self.config
        self.memory_attention = MemoryAttention(c)
        self.memory_encoder = MemoryEncoder(c)
        self.obj_ptr_proj = layers.MLP((c.width,) * 3, jax.nn.relu, c.compute_dtype)
        shrink = c.strides[2] // 4  # from pixels to the grid of mask prompts
        self.mask_downsample = layers.Conv(1, shrink, c.compute_dtype, stride=shrink)
        self.maskmem_tpos_enc = self._table(
            "maskmem_tpos_enc", (c.num_maskmem, 1, 1, c.memory_width)
        )
        # Part of every checkpoint, used by nobody.
        self.no_mem_pos_enc = self._table("no_mem_pos_enc", (1, 1, c.width))
        self.no_obj_ptr = self._table("no_obj_ptr", (1, c.width))
        if c.version == "2.1":
            self.obj_ptr_tpos_proj = layers.Dense(c.memory_width, c.compute_dtype)
            self.no_obj_embed_spatial = self._table("no_obj_embed_spatial", (1, c.memory_width))

    def _table(self, name: str, shape: tuple[int, ...]) -> Array:
        return self.param(name, initialiser(name), shape)

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

    def skips(self, features: Features) -> Skips:
        """Reduce pyramid maps to what `decode` needs of them, to keep many slices at hand."""
        return self.sam_mask_decoder.skips(features)

    def decode(
        self,
        features: Features | Skips,
        points_BKQ2: Float[Array, "B K Q 2"],
        labels_BKQ: Int[Array, "B K Q"],
        token_bias_BKD: Float[Array, "B K D"] | None = None,
        masks: Float[Array, "B K H W"] | MaskPrompts | None = None,
        *,
        single: bool = False,
        memory_conditioned: bool = False,
    ) -> MaskOutput:
        """Segment K objects per image in one batch that shares the image's features.

        Args:
            features: pyramid maps of `encode_image`, of `skips` or of `attend_memory`.
            points_BKQ2: (x, y) in input pixels.
            labels_BKQ: -1 unused, 0 / 1 clicks, 2 / 3 box corners. Unused slots do not change the
                result; an object without any used slot is decoded as SAM-2 does without prompt.
            token_bias_BKD: added to the padding point that ends every prompt; None: zero.
            masks: mask prompts (logits) at four times the coarse grid, of all objects or, as
                `MaskPrompts`, of some; None: no mask prompt.
            single: compute the single mask only (M = 1).
            memory_conditioned: the coarse map has seen the memory bank; otherwise the embedding
                of "no memory" is added to it.
        """
        coarse = features[2]
        height, width = (side * self.config.strides[2] for side in coarse.shape[-3:-1])
        encoder = self.sam_prompt_encoder
        tokens, valid = encoder.points(points_BKQ2, labels_BKQ, (height, width))
        if token_bias_BKD is not None:
            tokens = tokens.at[:, :, -1].add(token_bias_BKD.astype(tokens.dtype))
        if not memory_conditioned:
            coarse = self.without_memory(coarse)
        dense = encoder.no_mask() if masks is None else encoder.masks(masks)
        place = encoder.dense_position(*coarse.shape[-3:-1])
        seen = with_coarse(features, coarse)
        return self.sam_mask_decoder(seen, dense, place, tokens, valid, single)

    def predict(
        self,
        features: Features,
        points_BKQ2: Float[Array, "B K Q 2"],
        labels_BKQ: Int[Array, "B K Q"],
        masks_BKHW: Float[Array, "B K H W"] | None = None,
        *,
        multimask: bool | Bool[Array, "B K"],
        fall_back: bool = True,
        memory_conditioned: bool = False,
    ) -> Prediction:
        """Decode and choose one mask per object.

        Args:
            features: as for `decode`.
            points_BKQ2: as for `decode`.
            labels_BKQ: as for `decode`.
            masks_BKHW: mask prompts of all objects, as for `decode`.
            multimask: take the best of the three candidates; else the single mask. SAM-2 does so
                for up to one point, where the prompt is ambiguous.
            fall_back: give up a single mask that is not stable for the best candidate.
            memory_conditioned: as for `decode`.

        Source: SAM 2 (Ravi et al. 2024), appendix D.
        """
        output = self.decode(
            features,
            points_BKQ2,
            labels_BKQ,
            None,
            masks_BKHW,
            memory_conditioned=memory_conditioned,
        )
        best_BK = 1 + jnp.argmax(output.iou_BKM[..., 1:], axis=-1)
        multimask = jnp.broadcast_to(multimask, best_BK.shape)
        single = output.logits_BKMHW[:, :, 0]
        keep_BK = _stable(single) if fall_back else jnp.ones(best_BK.shape, bool)
        mask_BK = jnp.where(multimask | ~keep_BK, best_BK, 0)
        # The pointer of a single mask is always that of token 0, even where another mask was taken.
        token_BK = jnp.where(multimask, best_BK, 0)
        present_BK = output.object_score_BK > 0
        logits = _choose(output.logits_BKMHW, mask_BK)
        logits = jnp.where(present_BK[..., None, None], logits, NO_OBJECT)
        return Prediction(
            logits,
            _choose(output.iou_BKM, mask_BK),
            output.object_score_BK,
            self.pointer(_choose(output.tokens_BKMD, token_BK), present_BK),
        )

    def adopt_mask(self, features: Features, mask_BKHW: Float[Array, "B K H W"]) -> Prediction:
        """Take masks as they are instead of decoding; only the pointers come from the decoder.

        Args:
            features: pyramid maps of `encode_image`.
            mask_BKHW: 1 inside, 0 outside, at the resolution of the input image.
        """
        b, k, height, width = mask_BKHW.shape
        coarse = features[2]
        grid = (4 * coarse.shape[-3], 4 * coarse.shape[-2])
        logits = (2 * mask_BKHW - 1) * MASK_PROMPT_LOGIT
        low = jax.image.resize(logits, (b, k, *grid), "linear", antialias=True)
        present_BK = jnp.any(mask_BKHW > 0, axis=(2, 3))
        flat = mask_BKHW.reshape(b * k, height, width, 1).astype(self.config.compute_dtype)
        prompt = self.mask_downsample(flat).reshape(b, k, *grid)
        none = no_prompts(b, k, slots=1)
        # The map enters the decoder as it is, without the embedding of "no memory".
        output = self.decode(features, *none, None, prompt, single=True, memory_conditioned=True)
        seen_BK = present_BK & (output.object_score_BK > 0)
        pointer = self.pointer(output.tokens_BKMD[:, :, 0], seen_BK)
        score = jnp.where(present_BK, MASK_PROMPT_LOGIT, -MASK_PROMPT_LOGIT)
        return Prediction(low, jnp.ones((b, k)), score, pointer)

    def pointer(
        self, token_BKD: Float[Array, "B K D"], present_BK: Bool[Array, "B K"]
    ) -> Float[Array, "B K D"]:
        """Make object pointers from mask tokens; absent objects share one."""
        pointer_BKD = self.obj_ptr_proj(token_BKD)
        absent = self.no_obj_ptr[None].astype(pointer_BKD.dtype)
        return jnp.where(present_BK[..., None], pointer_BKD, absent)

    def encode_memory(
        self,
        coarse_BHWD: Float[Array, "B h w D"],
        logits_BKHW: Float[Array, "B K H W"],
        object_score_BK: Float[Array, "B K"],
        *,
        binary: bool | Bool[Array, "B K"],
    ) -> Float[Array, "B K P M"]:
        """Encode the masks of a slice as memories.

        Args:
            coarse_BHWD: coarse features as `encode_image` gives them.
            logits_BKHW: masks at four times the coarse grid.
            object_score_BK: presence of the objects.
            binary: remember the thresholded mask, as SAM-2 does for prompted slices; else the
                probabilities.
        """
        b, k = logits_BKHW.shape[:2]
        size = tuple(side * self.config.strides[2] for side in coarse_BHWD.shape[1:3])
        full = self._enlarged(logits_BKHW.reshape(b * k, *logits_BKHW.shape[2:]), size)
        full = full.reshape(b, k, *full.shape[1:])
        binary = jnp.broadcast_to(binary, (b, k)).reshape(b, k, *(1,) * (full.ndim - 2))
        mask = jnp.where(binary, (full > 0).astype(jnp.float32), jax.nn.sigmoid(full))
        memory = self.memory_encoder(coarse_BHWD, mask)
        memory = memory.reshape(b, k, -1, memory.shape[-1])
        if self.config.version == "2.0":
            return memory
        absent = (object_score_BK <= 0)[..., None, None]
        extra = self.no_obj_embed_spatial[None, None].astype(memory.dtype)
        return jnp.where(absent, memory + extra, memory)

    def _enlarged(self, logits_NHW: Array, size: tuple[int, ...]) -> Array:
        """Interpolate masks to the input's size; as phases where kernels want them."""
        if self.config.kernels != "tpu":
            return jax.image.resize(logits_NHW, (len(logits_NHW), *size), "bilinear")
        return phases.upsample(phases.split(logits_NHW, 2), size[0] // logits_NHW.shape[1])

    def without_memory(self, coarse_BHWD: Float[Array, "B h w D"]) -> Float[Array, "B h w D"]:
        """Mark coarse maps as those of slices that see no memory."""
        return coarse_BHWD + self.no_mem_embed[None].astype(coarse_BHWD.dtype)

    def attend_memory(
        self,
        features: Features,
        bank: MemoryBank,
        index: Int[Array, ""],
        num_slices: Int[Array, ""],
        backwards: bool | Bool[Array, ""],
    ) -> Features:
        """Condition the coarse map of slice `index` on what the bank holds of each object.

        Returns:
            The features with a coarse map per object, [B, K, h, w, D].
        """
        fine, mid, coarse = features
        return fine, mid, self.condition(coarse, bank, index, num_slices, backwards)

    def condition(
        self,
        coarse_BHWD: Float[Array, "B h w D"],
        bank: MemoryBank,
        index: Int[Array, "*BK"],
        num_slices: Int[Array, "*BK"],
        backwards: bool | Bool[Array, "*BK"],
    ) -> Float[Array, "B K h w D"]:
        """Condition coarse maps on memory, as `attend_memory` does.

        Every object of a volume is on the same slice here, that of the coarse map. Where objects
        are on slices of their own, fold them into the volumes (B) and keep one object (K = 1).
        """
        seen = reach(bank, self.config, index, num_slices, jnp.asarray(backwards))
        keys = self._memory_keys(bank, seen, (coarse_BHWD.shape[1], coarse_BHWD.shape[2]))
        return self.memory_attention(coarse_BHWD, keys)

    def recall(
        self,
        coarse_BHWD: Float[Array, "B h w D"],
        memory_BKLPM: Float[Array, "B K L P M"],
        valid_BKL: Bool[Array, "B K L"],
    ) -> Float[Array, "B K h w D"]:
        """Condition coarse maps on memories of other images, which have no order.

        Each counts as a memory of a prompted slice, whatever its distance. An object without any
        valid memory sees none, as on a first slice.
        """
        c = self.config
        b, k, slots, positions, m = memory_BKLPM.shape
        height, width = coarse_BHWD.shape[1:3]
        place = jnp.asarray(position.sine_position(height, width, m))
        where = (place + self.maskmem_tpos_enc[-1, 0]).astype(c.compute_dtype)
        flat = (b, k, slots * positions, m)
        any_BK = valid_BKL.any(axis=-1)
        # Without any memory the weights must still exist; what they give is thrown away.
        used = jnp.repeat(valid_BKL | ~any_BK[..., None], positions, axis=2)
        memory = memory_BKLPM.astype(c.compute_dtype)
        keys = MemoryKeys(
            memory.reshape(flat),
            (memory + where[None, None, None]).reshape(flat),
            used,
            slots * positions,
        )
        none = self.without_memory(coarse_BHWD)[:, None]
        seen = self.memory_attention(coarse_BHWD, keys)
        return jnp.where(any_BK[..., None, None, None], seen, none)

    def _memory_keys(self, bank: MemoryBank, seen: Reach, grid: tuple[int, int]) -> MemoryKeys:
        c = self.config
        memory, dtype = bank.memory_BKLPM, c.compute_dtype
        b, k, slots, positions, m = memory.shape
        place = jnp.asarray(position.sine_position(*grid, m)).astype(dtype)
        time = self.maskmem_tpos_enc[:, 0, 0][seen.memory_age_BKL].astype(dtype)
        key = memory + place[None, None, None] + time[:, :, :, None]
        pieces = c.width // m
        pointers = bank.pointer_BKRD.reshape(b, k, -1, m)
        when = jnp.repeat(self._pointer_time(seen.pointer_distance_BKR), pieces, axis=2)
        valid = jnp.concatenate(
            [
                jnp.repeat(seen.memory_valid_BKL, positions, axis=2),
                jnp.repeat(seen.pointer_valid_BKR, pieces, axis=2),
            ],
            axis=2,
        )
        flat = (b, k, slots * positions, m)
        return MemoryKeys(
            jnp.concatenate([memory.reshape(flat), pointers], axis=2),
            jnp.concatenate([key.reshape(flat), pointers + when], axis=2),
            valid,
            slots * positions,
        )

    def _pointer_time(self, distance_BKR: Array) -> Float[Array, "B K R M"]:
        c = self.config
        if c.version == "2.0":
            return jnp.zeros((*distance_BKR.shape, c.memory_width), c.compute_dtype)
        return self.obj_ptr_tpos_proj(position.sine_of_distance(distance_BKR, c.width))

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
            self.decode(features, points_BKQ2, labels_BKQ, masks=empty)
            if self.config.memory:
                self._touch_memory(features, labels_BKQ.shape[1])
        return self.decode(features, points_BKQ2, labels_BKQ)

    def _touch_memory(self, features: Features, objects: int) -> None:
        """Create the parameters of the memory."""
        b, h, w, _ = features[2].shape
        side = self.config.strides[2]
        mask = jnp.zeros((b, objects, h * side, w * side))
        taken = self.adopt_mask(features, mask)
        self.encode_memory(features[2], taken.logits_BKHW, taken.object_score_BK, binary=True)
        bank = empty_bank(self.config, b, objects, h * w, 1)
        zero = jnp.zeros((), jnp.int32)
        self.attend_memory(features, bank, zero, zero, False)


def _stable(logits_BKHW: Array) -> Bool[Array, "B K"]:
    """Whether a mask hardly depends on its threshold."""
    inner = jnp.sum(logits_BKHW > STABILITY_SHIFT, axis=(2, 3)).astype(jnp.float32)
    outer = jnp.sum(logits_BKHW > -STABILITY_SHIFT, axis=(2, 3)).astype(jnp.float32)
    return (outer == 0) | (inner >= STABILITY * outer)


def _choose(values_BKM: Array, index_BK: Array) -> Array:
    """Take one of M candidates for each object."""
    index = index_BK.reshape(*index_BK.shape, *(1,) * (values_BKM.ndim - 2))
    return jnp.take_along_axis(values_BKM, index, axis=2)[:, :, 0]
