"""Strong augmentation: photometric changes of a clip, and boxes pasted between clips.

Brightness, contrast, blur and CutMix serve single-channel intensities. The colour part of the
natural-image recipe (saturation, hue, random grey-scale) has no meaning there.
"""

import math

import jax
import jax.numpy as jnp

from sss_jax.axes import Array, Bool, Float, Key
from sss_jax.errors import ConfigError
from sss_jax.options import StrongOptions

__all__ = ["box_mask", "cutmix_box", "paste", "photometric"]


def _check_range(name: str, low: float, high: float) -> None:
    if low > high:
        raise ConfigError(f"strong.{name}_low ({low}) is above strong.{name}_high ({high})")


def _jitter(
    key: Key[Array, ""],
    image_SHW1: Float[Array, "S H W 1"],
    slice_mask_S: Bool[Array, " S"],
    options: StrongOptions,
) -> Float[Array, "S H W 1"]:
    """Change brightness and contrast, in random order, each clipped to [0, 1]."""
    applied, order, brightness, contrast = jax.random.uniform(key, (4,))
    applied = applied < options.jitter
    brightness = jnp.where(applied, 1 + options.brightness * (2 * brightness - 1), 1.0)
    contrast = jnp.where(applied, 1 + options.contrast * (2 * contrast - 1), 1.0)
    pixels = math.prod(image_SHW1.shape[1:])
    for brightens in (order < 0.5, order >= 0.5):
        # Both stretch intensities about a pivot: black for brightness, the mean for contrast.
        total = jnp.sum(image_SHW1, where=slice_mask_S[:, None, None, None])
        mean = total / jnp.maximum(pixels * jnp.sum(slice_mask_S, dtype=jnp.float32), 1.0)
        pivot = jnp.where(brightens, 0.0, mean)
        factor = jnp.where(brightens, brightness, contrast)
        image_SHW1 = jnp.clip(factor * image_SHW1 + (1 - factor) * pivot, 0.0, 1.0)
    return image_SHW1


def _blur(
    key: Key[Array, ""], image_SHW1: Float[Array, "S H W 1"], options: StrongOptions
) -> Float[Array, "S H W 1"]:
    """Blur each slice with a separable Gaussian; the border repeats the outermost pixels."""
    applied, sigma = jax.random.uniform(key, (2,))
    sigma = options.sigma_low + sigma * (options.sigma_high - options.sigma_low)
    radius = math.ceil(3 * options.sigma_high)
    offset = jnp.arange(-radius, radius + 1, dtype=jnp.float32)
    weight = jnp.exp(-0.5 * jnp.square(offset / sigma))
    # Not applied: the kernel of the identity, which leaves every value as it is.
    weight = jnp.where(
        applied < options.blur, weight / jnp.sum(weight), (offset == 0).astype(jnp.float32)
    )
    for axis, side in ((1, image_SHW1.shape[1]), (2, image_SHW1.shape[2])):
        margin = [(radius, radius) if a == axis else (0, 0) for a in range(4)]
        padded = jnp.pad(image_SHW1, margin, mode="edge")
        # A sum of shifted copies fuses into one pass; a convolution whose kernel differs per
        # example would not.
        shifted = (
            w * jax.lax.slice_in_dim(padded, i, i + side, axis=axis) for i, w in enumerate(weight)
        )
        image_SHW1 = sum(shifted, start=jnp.zeros_like(image_SHW1))
    return image_SHW1


def photometric(
    key: Key[Array, ""],
    image_SHW1: Float[Array, "S H W 1"],
    options: StrongOptions,
    slice_mask_S: Bool[Array, " S"] | None = None,
) -> Float[Array, "S H W 1"]:
    """Draw a strong view of one clip: brightness, contrast and blur, the same for all slices.

    Args:
        key: key of the example and of the view.
        image_SHW1: intensities in [0, 1].
        options: probabilities and ranges.
        slice_mask_S: which slices are real; padding stays 0 and out of the mean that is the pivot
            of the contrast. None: all are.

    Returns:
        Intensities in [0, 1].

    Source: UniMatch V2 (Yang et al. 2024).
    Differs from the paper: no saturation, hue and grey-scale, which need colour.
    """
    if image_SHW1.shape[-1] != 1:
        raise ValueError(
            f"photometric changes are defined for one channel, not {image_SHW1.shape[-1]}; "
            "give intensities as [S, H, W, 1]"
        )
    _check_range("sigma", options.sigma_low, options.sigma_high)
    if slice_mask_S is None:
        slice_mask_S = jnp.ones(image_SHW1.shape[0], bool)
    jitter_key, blur_key = jax.random.split(key)
    image_SHW1 = _jitter(jitter_key, image_SHW1, slice_mask_S, options)
    image_SHW1 = jnp.clip(_blur(blur_key, image_SHW1, options), 0.0, 1.0)
    return jnp.where(slice_mask_S[:, None, None, None], image_SHW1, 0.0)


def cutmix_box(key: Key[Array, ""], options: StrongOptions) -> Float[Array, " 4"]:
    """Draw the box that CutMix pastes into one clip.

    Args:
        key: key of the example and of the view.
        options: probability, and ranges of area and aspect ratio (height / width).

    Returns:
        (y0, x0, y1, x1) as shares of the side, inside [0, 1]; all 0 where CutMix is not applied.

    Source: UniMatch V2 (Yang et al. 2024); CutMix (Yun et al. 2019).
    Differs from the paper: the aspect ratio is drawn among those whose box fits the image, where
    the original draws again until it fits, so the number of draws is fixed. Where no allowed ratio
    fits, the area is kept and the ratio is the nearest that fits.
    """
    _check_range("area", options.area_low, options.area_high)
    _check_range("aspect", options.aspect_low, options.aspect_high)
    applied, area, aspect, y, x = jax.random.uniform(key, (5,))
    area = options.area_low + area * (options.area_high - options.area_low)
    # height = sqrt(area * aspect) and width = sqrt(area / aspect) are at most 1.
    low, high = (
        jnp.clip(a, area, 1 / jnp.maximum(area, 1e-6))
        for a in (options.aspect_low, options.aspect_high)
    )
    aspect = low + aspect * (high - low)
    height, width = (jnp.minimum(jnp.sqrt(a), 1.0) for a in (area * aspect, area / aspect))
    y0, x0 = y * (1 - height), x * (1 - width)
    box_4 = jnp.stack([y0, x0, y0 + height, x0 + width])
    return jnp.where(applied < options.cutmix, box_4, 0.0)


def box_mask(box_B4: Float[Array, "B 4"], height: int, width: int) -> Bool[Array, "B H W"]:
    """Rasterise boxes: a pixel belongs to the box that holds its centre.

    The same box serves every resolution: image, logits and the feature levels.

    Args:
        box_B4: (y0, x0, y1, x1) as shares of the side.
        height: rows of the raster.
        width: columns of the raster.

    Returns:
        True inside the box; a box of no area holds no pixel.
    """
    y = (jnp.arange(height, dtype=jnp.float32) + 0.5) / height
    x = (jnp.arange(width, dtype=jnp.float32) + 0.5) / width
    y0, x0, y1, x1 = (box_B4[:, i, None] for i in range(4))
    in_row_BH = (y0 <= y[None]) & (y[None] < y1)
    in_column_BW = (x0 <= x[None]) & (x[None] < x1)
    return in_row_BH[:, :, None] & in_column_BW[:, None, :]


def paste(mask_BHW: Bool[Array, "B H W"], a: Array, b: Array, axes: str | None = None) -> Array:
    """Put `b` into `a` where the mask is True.

    Whatever a loss reads at a pasted pixel has to be pasted with it: image, pseudo-label,
    confidence, validity, and the weak features that are compared with the strong ones.

    Args:
        mask_BHW: one raster per clip.
        a: array of the clip.
        b: the same array of its partner (`parallel.swap_neighbours`).
        axes: letters of both arrays' axes; None: "BHW", "BSHW" or "BSHWC" by their number. An
            image batch with channels has to say "BHWC".

    Returns:
        An array like `a`.
    """
    axes = axes or {3: "BHW", 4: "BSHW", 5: "BSHWC"}.get(a.ndim, "")
    if a.shape != b.shape or len(axes) != a.ndim or not {*"BHW"} <= {*axes}:
        raise ValueError(f"arrays of shapes {a.shape} and {b.shape} do not have axes {axes!r}")
    raster = tuple(a.shape[axes.index(letter)] for letter in "BHW")
    if mask_BHW.shape != raster:
        raise ValueError(f"a mask of shape {mask_BHW.shape} does not cover {raster}")
    inner = [i for i, letter in enumerate(axes) if letter not in "BHW"]
    return jnp.where(jnp.expand_dims(mask_BHW, inner), b, a)
