"""Names and shapes of the tensors in the official checkpoints, derived from the presets.

Source: the eight checkpoints of SAM 2 and SAM 2.1 (Ravi et al. 2024); torch's layouts: a linear
layer is (out, in), a convolution (out, in, height, width), a transposed one (in, out, ...).
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence

from sss_jax.models.presets import (
    FUSER_KERNEL,
    FUSER_LAYERS,
    POINT_KINDS,
    VERSIONS,
    Sam2Config,
    preset,
)

VARIANTS = ("tiny", "small", "base_plus", "large")

BUFFER = "sam_prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"
"""Fixed frequencies: part of every checkpoint, never trained, in no count of parameters."""

Shapes = dict[str, tuple[int, ...]]


@dataclasses.dataclass(frozen=True, order=True)
class Model:
    """One published network.

    Attributes:
        variant: its size, a preset.
        version: "2.0" or "2.1".
    """

    variant: str
    version: str

    def __str__(self) -> str:
        return f"SAM {self.version} {self.variant}"


def models() -> list[Model]:
    """All published networks."""
    return [Model(variant, version) for version in VERSIONS for variant in VARIANTS]


def shapes(model: Model) -> Shapes:
    """Every tensor of a published network, in the order of its parts."""
    return shapes_of(preset(model.variant, version=model.version))


def shapes_of(config: Sam2Config) -> Shapes:
    """Every tensor of a network with the parts that remember, in the order of its parts."""
    parts = [
        _bare(config),
        _trunk(config),
        _neck(config),
        _memory_attention(config),
        _memory_encoder(config),
        _prompt_encoder(config),
        _mask_decoder(config),
        _pointers(config),
    ]
    return {name: shape for part in parts for name, shape in part.items()}


def _bare(config: Sam2Config) -> Shapes:
    found: Shapes = {
        "maskmem_tpos_enc": (config.num_maskmem, 1, 1, config.memory_width),
        "no_mem_embed": (1, 1, config.width),
        "no_mem_pos_enc": (1, 1, config.width),
        "no_obj_ptr": (1, config.width),
    }
    if config.version == "2.1":
        found["no_obj_embed_spatial"] = (1, config.memory_width)
    return found


def _trunk(config: Sam2Config) -> Shapes:
    here, width = "image_encoder.trunk", config.embed_dim
    table, window = config.pos_table, config.windows[0]
    found: Shapes = {
        f"{here}.pos_embed": (1, width, table, table),
        f"{here}.pos_embed_window": (1, width, window, window),
        **_conv(f"{here}.patch_embed.proj", width, 3, config.stem_kernel),
    }
    index = 0
    for stage, depth in enumerate(config.depths):
        for _ in range(depth):
            entered, width = width, config.embed_dim * 2**stage
            found |= _block(f"{here}.blocks.{index}", entered, width, config.mlp_ratio)
            index += 1
    return found


def _block(here: str, entered: int, width: int, ratio: int) -> Shapes:
    return {
        **_norm(f"{here}.norm1", entered),
        **_linear(f"{here}.attn.qkv", 3 * width, entered),
        **_linear(f"{here}.attn.proj", width, width),
        **_norm(f"{here}.norm2", width),
        **_mlp(f"{here}.mlp", (width, ratio * width, width)),
        **({} if entered == width else _linear(f"{here}.proj", width, entered)),
    }


def _neck(config: Sam2Config) -> Shapes:
    found: Shapes = {}
    for i in range(len(config.depths)):
        entered = config.embed_dim * 2 ** (len(config.depths) - 1 - i)
        name = f"image_encoder.neck.convs.{i}.conv"
        found |= _conv(name, config.width, entered, config.lateral_kernel)
    return found


def _memory_attention(config: Sam2Config) -> Shapes:
    width = config.width
    found: Shapes = {}
    for i in range(config.memory_layers):
        here = f"memory_attention.layers.{i}"
        found |= _attention(f"{here}.self_attn", width, width)
        found |= _attention(f"{here}.cross_attn_image", width, width, config.memory_width)
        found |= _linear(f"{here}.linear1", config.memory_mlp, width)
        found |= _linear(f"{here}.linear2", width, config.memory_mlp)
        for n in (1, 2, 3):
            found |= _norm(f"{here}.norm{n}", width)
    return found | _norm("memory_attention.norm", width)


def _memory_encoder(config: Sam2Config) -> Shapes:
    here, width = "memory_encoder", config.width
    found: Shapes = {}
    channels = [4**i for i in range(int(math.log2(config.strides[2])) + 1)]
    for i, (entered, left) in enumerate(itertools.pairwise(channels)):
        found |= _conv(f"{here}.mask_downsampler.encoder.{3 * i}", left, entered, 3)
        found |= _norm(f"{here}.mask_downsampler.encoder.{3 * i + 1}", left)
    last = len(channels) - 1
    found |= _conv(f"{here}.mask_downsampler.encoder.{3 * last}", width, channels[-1], 1)
    found |= _conv(f"{here}.pix_feat_proj", width, width, 1)
    for i in range(FUSER_LAYERS):
        layer = f"{here}.fuser.layers.{i}"
        found[f"{layer}.gamma"] = (width,)
        found |= _conv(f"{layer}.dwconv", width, 1, FUSER_KERNEL)
        found |= _norm(f"{layer}.norm", width)
        found |= _linear(f"{layer}.pwconv1", 4 * width, width)
        found |= _linear(f"{layer}.pwconv2", width, 4 * width)
    return found | _conv(f"{here}.out_proj", config.memory_width, width, 1)


def _prompt_encoder(config: Sam2Config) -> Shapes:
    here, width = "sam_prompt_encoder", config.width
    first, second = config.mask_prompt_channels
    table = (1, width)
    return {
        BUFFER: (2, width // 2),
        **{f"{here}.point_embeddings.{i}.weight": table for i in range(POINT_KINDS)},
        f"{here}.not_a_point_embed.weight": table,
        **_conv(f"{here}.mask_downscaling.0", first, 1, 2),
        **_norm(f"{here}.mask_downscaling.1", first),
        **_conv(f"{here}.mask_downscaling.3", second, first, 2),
        **_norm(f"{here}.mask_downscaling.4", second),
        **_conv(f"{here}.mask_downscaling.6", width, second, 1),
        f"{here}.no_mask_embed.weight": table,
    }


def _mask_decoder(config: Sam2Config) -> Shapes:
    here, width = "sam_mask_decoder", config.width
    first, second = config.upscale_channels
    found = {
        **_transformer(f"{here}.transformer", config),
        f"{here}.iou_token.weight": (1, width),
        f"{here}.mask_tokens.weight": (config.num_masks, width),
        f"{here}.obj_score_token.weight": (1, width),
        f"{here}.output_upscaling.0.weight": (width, first, 2, 2),
        f"{here}.output_upscaling.0.bias": (first,),
        **_norm(f"{here}.output_upscaling.1", first),
        f"{here}.output_upscaling.3.weight": (first, second, 2, 2),
        f"{here}.output_upscaling.3.bias": (second,),
        **_conv(f"{here}.conv_s0", second, width, 1),
        **_conv(f"{here}.conv_s1", first, width, 1),
    }
    for i in range(config.num_masks):
        found |= _mlp(f"{here}.output_hypernetworks_mlps.{i}", (width, width, width, second))
    hidden = config.head_hidden
    found |= _mlp(f"{here}.iou_prediction_head", (width, hidden, hidden, config.num_masks))
    return found | _mlp(f"{here}.pred_obj_score_head", (width, width, width, 1))


def _transformer(here: str, config: Sam2Config) -> Shapes:
    width, inner = config.width, config.width // config.attention_downsample
    found: Shapes = {}
    for i in range(config.decoder_depth):
        layer = f"{here}.layers.{i}"
        found |= _attention(f"{layer}.self_attn", width, width)
        found |= _attention(f"{layer}.cross_attn_token_to_image", inner, width)
        found |= _mlp(f"{layer}.mlp", (width, config.decoder_mlp, width))
        found |= _attention(f"{layer}.cross_attn_image_to_token", inner, width)
        for n in (1, 2, 3, 4):
            found |= _norm(f"{layer}.norm{n}", width)
    found |= _attention(f"{here}.final_attn_token_to_image", inner, width)
    return found | _norm(f"{here}.norm_final_attn", width)


def _pointers(config: Sam2Config) -> Shapes:
    width = config.width
    found = _mlp("obj_ptr_proj", (width, width, width, width))
    # From pixels to the grid of mask prompts, which is four times the coarse one.
    found |= _conv("mask_downsample", 1, 1, config.strides[2] // 4)
    if config.version == "2.1":
        found |= _linear("obj_ptr_tpos_proj", config.memory_width, width)
    return found


def _linear(name: str, out: int, entered: int) -> Shapes:
    return {f"{name}.weight": (out, entered), f"{name}.bias": (out,)}


def _norm(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def _conv(name: str, out: int, entered: int, side: int) -> Shapes:
    return {f"{name}.weight": (out, entered, side, side), f"{name}.bias": (out,)}


def _mlp(name: str, widths: Sequence[int]) -> Shapes:
    found: Shapes = {}
    for i, (entered, out) in enumerate(itertools.pairwise(widths)):
        found |= _linear(f"{name}.layers.{i}", out, entered)
    return found


def _attention(name: str, inner: int, width: int, looked_at: int | None = None) -> Shapes:
    """Projections of an attention; keys and values may have another width than queries."""
    other = width if looked_at is None else looked_at
    return {
        **_linear(f"{name}.q_proj", inner, width),
        **_linear(f"{name}.k_proj", inner, other),
        **_linear(f"{name}.v_proj", inner, other),
        **_linear(f"{name}.out_proj", width, inner),
    }
