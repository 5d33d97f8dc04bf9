"""A SAM-2 network with its weights, and its image encoder."""

import functools
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from numpy.typing import ArrayLike

from sss_jax import compiling
from sss_jax.axes import PyTree
from sss_jax.models.image_encoder import Features, normalise_image
from sss_jax.models.presets import kernels_here, preset
from sss_jax.models.sam2 import Sam2
from sss_jax.sam2_inputs import square


class Network(NamedTuple):
    """A SAM-2 network with its weights."""

    model: Sam2
    params: PyTree

    @property
    def size(self) -> int:
        """Side of the square input, pixels."""
        return self.model.config.image_size


def load(folder: str | Path, *, image_size: int = 1024, dtype: str = "float32") -> Network:
    """Load weights that `sss-jax convert` wrote.

    Args:
        folder: converted weights.
        image_size: side of the square that images are resized to, a multiple of 32 pixels.
        dtype: computation type, "float32" or "bfloat16".

    Raises:
        CheckpointError: the folder is missing or damaged.
        ConfigError: the network cannot run at this size.
    """
    from sss_jax.conversion import sam2 as conversion

    info, params = conversion.load(Path(folder))
    config = preset(info.variant, image_size, dtype, version=info.version, kernels=kernels_here())
    return Network(Sam2(config), jax.device_put(params))


def encode_image(network: Network, image: ArrayLike) -> Features:
    """Encode one image, so that many prompts can be tried on it.

    Args:
        network: the network.
        image: [H, W] or [H, W, 3]; integers 0..255 or floats in [0, 1].
    """
    return encode(network.model, network.params, square(np.asarray(image), network.size)[None])


@functools.partial(compiling.jit, static_argnums=0)
def encode(model: Sam2, params: PyTree, image_BHWC: Any) -> Any:
    """Encode images in [0, 1], [B, S, S, 3], that are stretched to the square."""
    standard = normalise_image(image_BHWC).astype(model.config.compute_dtype)
    return model.apply({"params": params}, standard, method="encode_image")
