"""Head for the coarse masks that the prompt generator starts from."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from sss_jax.axes import Array, Float
from sss_jax.models import layers
from sss_jax.models.presets import Sam2Config


class CoarseHead(nn.Module):
    """3x3 convolution to D/4, normalisation, ReLU, 1x1 convolution to the K + 1 classes.

    Source: SSS (Zhu et al. 2026), prompt generator.

    Attributes:
        config: network shape.
        num_classes: K, foreground classes.
    """

    config: Sam2Config
    num_classes: int

    @nn.compact
    def __call__(self, fine_BHWD: Float[Array, "B H W D"]) -> Float[Array, "B H W K1"]:
        """Class logits at the finest level, float32; class 0 is the background."""
        dtype = self.config.compute_dtype
        x = layers.Conv(self.config.width // 4, 3, dtype, padding=1, name="conv")(fine_BHWD)
        x = jax.nn.relu(layers.LayerNorm(dtype, name="norm")(x))
        x = layers.Conv(self.num_classes + 1, 1, dtype, name="classify")(x)
        return x.astype(jnp.float32)
