"""Image encoder: Hiera trunk and feature pyramid.

Source: SAM 2 (Ravi et al. 2024), section 4 and appendix D.
"""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from sss_jax.axes import Array, Float
from sss_jax.models import layers, position
from sss_jax.models.hiera import Hiera
from sss_jax.models.presets import Sam2Config

Features = tuple[Float[Array, "B h1 w1 D"], Float[Array, "B h2 w2 D"], Float[Array, "B h3 w3 D"]]
"""Pyramid maps (fine, middle, coarse)."""

IMAGENET_MEAN = np.array([0.485, 0.456, 0.406], np.float32)
IMAGENET_STD = np.array([0.229, 0.224, 0.225], np.float32)


def normalise_image(image_BHW1: Float[Array, "B H W 1"]) -> Float[Array, "B H W 3"]:
    """Repeat intensities in [0, 1] to three channels and standardise them as ImageNet's."""
    return (image_BHW1 - IMAGENET_MEAN[None, None, None]) / IMAGENET_STD[None, None, None]


class Lateral(nn.Module):
    """One convolution of the pyramid.

    Attributes:
        config: network shape.
    """

    config: Sam2Config

    @nn.compact
    def __call__(self, x_BHWC: Float[Array, "B H W C"]) -> Float[Array, "B H W D"]:
        """Bring a stage to the pyramid's width."""
        c = self.config
        side = c.lateral_kernel
        return layers.Conv(c.width, side, c.compute_dtype, padding=side // 2, name="conv")(x_BHWC)


class FpnNeck(nn.Module):
    """Feature pyramid; `convs_0` belongs to the coarsest stage.

    Attributes:
        config: network shape.
    """

    config: Sam2Config

    @nn.compact
    def __call__(self, stages: list[Float[Array, "B h w C"]]) -> list[Float[Array, "B h w D"]]:
        """Return one map per stage, finest first."""
        last = len(stages) - 1
        maps: list[Array] = [jnp.zeros(())] * len(stages)
        above = None
        for level in range(last, -1, -1):
            x = Lateral(self.config, name=f"convs_{last - level}")(stages[level])
            if above is not None and level in self.config.top_down_levels:
                x = x + position.upsample_2x(above)
            maps[level] = above = x
        return maps


class ImageEncoder(nn.Module):
    """Trunk and neck.

    Attributes:
        config: network shape.
    """

    config: Sam2Config

    @nn.compact
    def __call__(self, image_BHWC: Float[Array, "B H W 3"]) -> Features:
        """Encode standardised images; the coarsest stage only feeds the level above it."""
        stages = Hiera(self.config, name="trunk")(image_BHWC)
        fine, mid, coarse, _ = FpnNeck(self.config, name="neck")(stages)
        return fine, mid, coarse
