"""Memory encoder: a slice's features and the mask found on it become a memory.

Source: SAM 2 (Ravi et al. 2024), section 4.
"""

import math

import flax.linen as nn
import jax.numpy as jnp

from sss_jax.axes import Array, Float
from sss_jax.models import convolution, layers, mlp, phases
from sss_jax.models.initial import initialiser
from sss_jax.models.presets import FUSER_KERNEL, FUSER_LAYERS, Sam2Config

MASK_SCALE, MASK_SHIFT = 20.0, -10.0
"""Probabilities of the mask are stretched to [-10, 10]."""


class HalvingConv(nn.Module):
    """Convolution, kernel 3x3, stride 2, a row of zeros around.

    Attributes:
        features: output channels.
        dtype: computation type.
    """

    features: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "N ..."]) -> Float[Array, "N ..."]:
        """Convolve maps, [N, H, W, C], or maps as phases, [N, P, Q, C, h, w]."""
        in_phases = x.ndim == 6
        shape = (3, 3, x.shape[3], self.features)
        kernel = self.param("kernel", initialiser("kernel"), shape).astype(self.dtype)
        bias = self.param("bias", initialiser("bias"), (self.features,)).astype(self.dtype)
        if in_phases:
            y = phases.convolve_halving(x.astype(self.dtype), kernel)
            return y + bias.reshape(1, 1, 1, -1, 1, 1)
        return layers.add_bias(convolution.convolve(x.astype(self.dtype), kernel, 2, 1), bias)


class MaskDownsampler(nn.Module):
    """Strided convolutions from pixels to the coarse grid; each one halves the sides.

    Attributes:
        config: network shape.
    """

    config: Sam2Config

    @nn.compact
    def __call__(self, mask: Float[Array, "N ..."]) -> Float[Array, "N h w D"]:
        """Embed masks at the resolution of the input image, [N, H, W] or as `phases`."""
        c = self.config
        steps = int(math.log2(c.strides[2]))
        x = mask[..., None] if mask.ndim == 3 else mask[:, :, :, None]
        for i in range(steps):
            x = HalvingConv(4 ** (i + 1), c.compute_dtype, name=f"encoder_{3 * i}")(x)
            norm = layers.LayerNorm(c.compute_dtype, name=f"encoder_{3 * i + 1}")
            channels = 3  # of maps the last axis, of phases the one before the pixels
            x = jnp.moveaxis(norm(jnp.moveaxis(x, channels, -1)), -1, channels)
            x = layers.gelu(x)
            if x.ndim == 6 and x.shape[1:3] == (1, 1):
                x = x[:, 0, 0].transpose(0, 2, 3, 1)
        return layers.Conv(c.width, 1, c.compute_dtype, name=f"encoder_{3 * steps}")(x)


class DepthwiseConv(nn.Module):
    """Depthwise convolution, same size.

    Attributes:
        dtype: computation type.
    """

    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x_NHWC: Float[Array, "N H W C"]) -> Float[Array, "N H W C"]:
        """Convolve every channel with its own kernel."""
        channels = x_NHWC.shape[-1]
        kernel = self.param(
            "kernel", initialiser("kernel"), (FUSER_KERNEL, FUSER_KERNEL, 1, channels)
        )
        bias = self.param("bias", initialiser("bias"), (channels,))
        y = convolution.depthwise(x_NHWC.astype(self.dtype), kernel.astype(self.dtype))
        return layers.add_bias(y, bias.astype(self.dtype))


class FuserBlock(nn.Module):
    """ConvNeXt block (Liu et al. 2022).

    Attributes:
        dtype: computation type.
        kernels: compute the MLP by the kernels that only TPUs run.
    """

    dtype: jnp.dtype
    kernels: bool = False

    @nn.compact
    def __call__(self, x_NHWC: Float[Array, "N H W C"]) -> Float[Array, "N H W C"]:
        """Add what the block computes."""
        width = x_NHWC.shape[-1]
        gamma = self.param("gamma", initialiser("gamma"), (width,))
        y = DepthwiseConv(self.dtype, name="dwconv")(x_NHWC)
        norm = mlp.Norm(name="norm")(width)
        first = mlp.Projection(4 * width, name="pwconv1")(width)
        second = mlp.Projection(width, name="pwconv2")(4 * width)
        # The layer scale goes into the small matrix instead of over every token.
        weights = mlp.Weights(*norm, *first, *(layers.scale_by(a, gamma) for a in second))
        y = mlp.transform(y, weights, mlp.GELU, shortcut=False, kernels=self.kernels)
        return x_NHWC + y


class Fuser(nn.Module):
    """A stack of blocks.

    Attributes:
        dtype: computation type.
        kernels: as for `FuserBlock`.
    """

    dtype: jnp.dtype
    kernels: bool = False

    @nn.compact
    def __call__(self, x_NHWC: Float[Array, "N H W C"]) -> Float[Array, "N H W C"]:
        """Mix features and mask."""
        for i in range(FUSER_LAYERS):
            x_NHWC = FuserBlock(self.dtype, self.kernels, name=f"layers_{i}")(x_NHWC)
        return x_NHWC


class MemoryEncoder(nn.Module):
    """Makes the memories of K objects on one slice.

    Attributes:
        config: network shape.
    """

    config: Sam2Config

    @nn.compact
    def __call__(
        self, coarse_BHWD: Float[Array, "B h w D"], mask: Float[Array, "B K ..."]
    ) -> Float[Array, "B K h w M"]:
        """Encode.

        Args:
            coarse_BHWD: coarse features as the encoder gives them, shared by the objects.
            mask: probability that a pixel is part of the object, at input resolution, [B, K, H,
                W], or as `phases`, [B, K, P, Q, h, w].
        """
        c = self.config
        b, k = mask.shape[:2]
        mask = (MASK_SCALE * mask + MASK_SHIFT).reshape(b * k, *mask.shape[2:])
        seen = MaskDownsampler(c, name="mask_downsampler")(mask)
        pixels = layers.Conv(c.width, 1, c.compute_dtype, name="pix_feat_proj")(coarse_BHWD)
        x = pixels[:, None] + seen.reshape(b, k, *seen.shape[1:])
        x = Fuser(c.compute_dtype, c.kernels == "tpu", name="fuser")(x.reshape(seen.shape))
        x = layers.Conv(c.memory_width, 1, c.compute_dtype, name="out_proj")(x)
        return x.reshape(b, k, *x.shape[1:])
