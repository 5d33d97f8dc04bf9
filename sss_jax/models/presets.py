"""Every network size, in one table."""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp

from sss_jax.errors import ConfigError
from sss_jax.models.attention_gpu_kernel import CAPABILITIES

Kernels = Literal["off", "tpu", "gpu"]
"""The platform whose kernels of ours compute what suits them."""


def kernels_here() -> Kernels:
    """Name the platform of this process if kernels are written for it, and for its kind of GPU."""
    name = jax.default_backend()
    if name == "gpu":
        capability = getattr(jax.devices()[0], "compute_capability", "")
        return "gpu" if capability in CAPABILITIES else "off"
    return "tpu" if name == "tpu" else "off"


@dataclasses.dataclass(frozen=True)
class Sam2Config:
    """Shape of a SAM-2 network; the defaults are those that all published sizes share.

    Attributes:
        name: preset this came from.
        image_size: side of the square input, pixels; no parameter depends on it.
        dtype: computation type; parameters are float32.
        remat: recompute the activations of the trunk's blocks, and of the layers of memory
            attention, in the backward pass.
        remat_keeps: what is kept of a block all the same, a key of `attention.KEEPS`; of a layer of
            memory attention at least the attention.
        loop_blocks: equal layers as a loop, which compiles sooner.
        kernels: of which platform: whole layers for TPUs, large attention for GPUs.
        stem_kernel: side of the patch convolution.
        stem_stride: its stride, which is the stride of the finest level.
        embed_dim: width of stage 1; every later stage doubles it.
        heads: attention heads of stage 1; every later stage doubles them.
        depths: blocks in each of the four stages.
        windows: side of the attention window in each stage, tokens of that stage.
        global_blocks: indices of the blocks that attend over the whole image.
        pos_table: side of the learned position table before it is resized.
        mlp_ratio: hidden width of a trunk block over its width.
        width: D, width of the feature pyramid and of the decoder.
        lateral_kernel: side of the pyramid's lateral convolutions.
        top_down_levels: levels that take part in the top-down path; 3 is the coarsest.
        decoder_depth: layers of the two-way transformer.
        decoder_heads: its attention heads.
        decoder_mlp: its hidden width.
        attention_downsample: D over the inner width of its cross attention.
        upscale_channels: channels after the first and second upscaling of the decoder.
        head_hidden: hidden width of the IoU head.
        mask_prompt_channels: channels inside the embedding of a mask prompt.
        multimasks: mask candidates beside the single mask.
        version: "2.1" adds positions of object pointers and a memory of absence to "2.0".
        memory: whether the network has the parts that remember other slices.
        memory_width: M, channels of a memory.
        memory_layers: layers of memory attention.
        memory_mlp: their hidden width.
        num_maskmem: slices that tracking remembers: this many less one, beside the prompted ones.
        max_pointers: object pointers that tracking remembers, beside the prompted ones.
    """

    name: str = "tiny"
    image_size: int = 1024
    dtype: str = "float32"
    remat: bool = False
    remat_keeps: str = "nothing"
    loop_blocks: bool = False
    kernels: Kernels = "off"

    stem_kernel: int = 7
    stem_stride: int = 4
    embed_dim: int = 96
    heads: int = 1
    depths: tuple[int, ...] = (1, 2, 7, 2)
    windows: tuple[int, ...] = (8, 4, 14, 7)
    global_blocks: tuple[int, ...] = (5, 7, 9)
    pos_table: int = 7
    mlp_ratio: int = 4

    width: int = 256
    lateral_kernel: int = 1
    top_down_levels: tuple[int, ...] = (2, 3)

    decoder_depth: int = 2
    decoder_heads: int = 8
    decoder_mlp: int = 2048
    attention_downsample: int = 2
    upscale_channels: tuple[int, int] = (64, 32)
    head_hidden: int = 256
    mask_prompt_channels: tuple[int, int] = (4, 16)
    multimasks: int = 3

    version: str = "2.1"
    memory: bool = True
    memory_width: int = 64
    memory_layers: int = 4
    memory_mlp: int = 2048
    num_maskmem: int = 7
    max_pointers: int = 16

    @property
    def strides(self) -> tuple[int, int, int]:
        """Strides of the fine, middle and coarse feature maps, input pixels."""
        return self.stem_stride, 2 * self.stem_stride, 4 * self.stem_stride

    @property
    def size_multiple(self) -> int:
        """Image sides must be a multiple of this: four stages, and tiled position windows."""
        return 8 * self.stem_stride

    @property
    def num_masks(self) -> int:
        """Mask tokens: the single mask and the candidates."""
        return self.multimasks + 1

    @property
    def compute_dtype(self) -> Any:
        """The computation type as JAX knows it."""
        return jnp.dtype(self.dtype)


# Published sizes: SAM 2 (Ravi et al. 2024). `nano` is ours, for training from random weights on
# CPUs at 64 to 128 pixels: strides 2, 4, 8, so that a 64-pixel slice still has an 8x8 grid of
# keys; a complete top-down path and 3x3 laterals, because no pretraining has put context into the
# finest level.
_PRESETS: dict[str, dict[str, Any]] = {
    "nano": {
        "stem_stride": 2,
        "embed_dim": 32,
        "depths": (1, 1, 3, 2),
        "windows": (8, 8, 8, 4),
        "global_blocks": (3, 4, 5, 6),
        "mlp_ratio": 2,
        "width": 64,
        "lateral_kernel": 3,
        "top_down_levels": (0, 1, 2, 3),
        "decoder_heads": 4,
        "decoder_mlp": 256,
        "upscale_channels": (32, 16),
        "head_hidden": 64,
        "memory_width": 16,
        "memory_layers": 2,
        "memory_mlp": 256,
    },
    "tiny": {},
    "small": {"depths": (1, 2, 11, 2), "global_blocks": (7, 10, 13)},
    "base_plus": {
        "embed_dim": 112,
        "heads": 2,
        "depths": (2, 3, 16, 3),
        "global_blocks": (12, 16, 20),
        "pos_table": 14,
    },
    "large": {
        "embed_dim": 144,
        "heads": 2,
        "depths": (2, 6, 36, 4),
        "windows": (8, 4, 16, 8),
        "global_blocks": (23, 33, 43),
    },
}

POINT_KINDS = 4
"""Point labels with an embedding: 0 negative click, 1 positive click, 2 and 3 box corners."""

FUSER_LAYERS, FUSER_KERNEL = 2, 7
"""Blocks of the memory encoder's fuser, and the side of their depthwise kernels."""

PRESETS = tuple(_PRESETS)
VERSIONS = ("2.0", "2.1")


def preset(
    name: str,
    image_size: int = 1024,
    dtype: str = "float32",
    remat: bool = False,
    *,
    remat_keeps: str = "nothing",
    loop_blocks: bool = False,
    kernels: Kernels = "off",
    version: str = "2.1",
    memory: bool = True,
) -> Sam2Config:
    """Look up a network size.

    Raises:
        ConfigError: the name is unknown, or the network cannot run at `image_size`.
    """
    if name not in _PRESETS:
        raise ConfigError(f"model.preset: no network {name!r}; choose one of {', '.join(PRESETS)}")
    if version not in VERSIONS:
        raise ConfigError(f"version {version!r} of SAM-2 is not one of {', '.join(VERSIONS)}")
    config = Sam2Config(
        name=name,
        image_size=image_size,
        dtype=dtype,
        remat=remat,
        remat_keeps=remat_keeps,
        loop_blocks=loop_blocks,
        kernels=kernels,
        version=version,
        memory=memory,
        **_PRESETS[name],
    )
    if image_size <= 0 or image_size % config.size_multiple:
        below = max(image_size // config.size_multiple, 1) * config.size_multiple
        raise ConfigError(
            f"model.image_size: {name} needs a multiple of {config.size_multiple} pixels, "
            f"not {image_size}; the nearest below is {below}"
        )
    return config
