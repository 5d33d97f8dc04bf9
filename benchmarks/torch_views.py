"""Augmentation of clips in torch, on the device, after the same recipe as `sss_jax.augment`.

The draws differ from ours, their distributions and the work do not. Needs torch.

Axes: B clips, S slices, H W space.
"""

import math

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from sss_jax.options import StrongOptions, WeakOptions


def uniform(count: int, generator: Generator, low: float = 0.0, high: float = 1.0) -> Tensor:
    """Draw one number per clip."""
    drawn = torch.rand(count, generator=generator, device=generator.device)
    return low + (high - low) * drawn


def weak_view(
    image_BSHW: Tensor, label_BSHW: Tensor | None, options: WeakOptions, generator: Generator
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Move every slice of a clip by one affine map; also say which pixels show the input.

    Labels, like the mask of what is inside, are moved to the nearest pixel.
    """
    theta_B23 = _affine_maps(len(image_BSHW), options, generator)
    grid = F.affine_grid(theta_B23, list(image_BSHW.shape), align_corners=False)
    image = F.grid_sample(image_BSHW, grid, padding_mode="border", align_corners=False)
    inside_BHW = (grid.abs() <= 1).all(-1)
    image = image * inside_BHW[:, None]
    if label_BSHW is not None:
        moved = F.grid_sample(label_BSHW.float(), grid, mode="nearest", align_corners=False)
        label_BSHW = (moved * inside_BHW[:, None]).long()
    return image, label_BSHW, inside_BHW[:, None].expand(image_BSHW.shape)


def _affine_maps(count: int, options: WeakOptions, generator: Generator) -> Tensor:
    """Output to input positions, both from -1 to 1: a symmetry or a rotation, then a zoom."""
    symmetric = uniform(count, generator) < options.rot90_flip
    rotates = uniform(count, generator) < options.rotate
    quarter = (math.pi / 2) * torch.floor(uniform(count, generator, 0, 4))
    limit = math.radians(options.degrees)
    slight = rotates * uniform(count, generator, -limit, limit)
    angle = torch.where(symmetric, quarter, slight)
    flip = torch.where(symmetric & (uniform(count, generator) < 0.5), -1.0, 1.0)
    scale = uniform(count, generator, options.scale_low, options.scale_high)
    reach = 2 * ((scale - 1).abs() / 2 + options.shift)
    cos, sin = torch.cos(angle) / scale, torch.sin(angle) / scale
    x, y = (reach * uniform(count, generator, -1, 1) for _ in range(2))
    rows = torch.stack([torch.stack([flip * cos, -flip * sin, x]), torch.stack([sin, cos, y])])
    return rows.permute(2, 0, 1)


def strong_view(
    image_BSHW: Tensor, options: StrongOptions, generator: Generator
) -> tuple[Tensor, Tensor]:
    """Change brightness, contrast and sharpness, then paste a box from another clip.

    Returns:
        The view, and its box (y0, x0, y1, x1) as shares of the side, one per clip.
    """
    count = len(image_BSHW)
    image = _blur(_jitter(image_BSHW, options, generator), options, generator).clamp(0, 1)
    applied = uniform(count, generator) < options.cutmix
    area = uniform(count, generator, options.area_low, options.area_high)
    aspect = uniform(count, generator, options.aspect_low, options.aspect_high)
    height = (area * aspect).sqrt().clamp(max=1)
    width = (area / height).clamp(max=1)
    y0 = uniform(count, generator) * (1 - height)
    x0 = uniform(count, generator) * (1 - width)
    box_B4 = torch.stack([y0, x0, y0 + height, x0 + width], 1) * applied[:, None]
    return paste(image, box_B4), box_B4


def _jitter(image_BSHW: Tensor, options: StrongOptions, generator: Generator) -> Tensor:
    count = len(image_BSHW)
    applied = uniform(count, generator) < options.jitter
    first = uniform(count, generator) < 0.5
    spreads = (options.brightness, options.contrast)
    bright, contrast = (
        torch.where(applied, uniform(count, generator, 1 - s, 1 + s), 1.0) for s in spreads
    )
    for brightens in (first, ~first):
        mean = image_BSHW.mean((1, 2, 3))
        pivot = torch.where(brightens, 0.0, mean)[:, None, None, None]
        factor = torch.where(brightens, bright, contrast)[:, None, None, None]
        image_BSHW = (factor * image_BSHW + (1 - factor) * pivot).clamp(0, 1)
    return image_BSHW


def _blur(image_BSHW: Tensor, options: StrongOptions, generator: Generator) -> Tensor:
    """Separable Gaussian, one per clip, as grouped convolutions; the border is repeated."""
    count, slices, height, width = image_BSHW.shape
    applied = uniform(count, generator) < options.blur
    sigma = uniform(count, generator, options.sigma_low, options.sigma_high)
    radius = math.ceil(3 * options.sigma_high)
    offset = torch.arange(-radius, radius + 1, device=image_BSHW.device, dtype=torch.float32)
    weight = torch.exp(-0.5 * (offset / sigma[:, None]).square())
    weight = weight / weight.sum(1, keepdim=True)
    weight = torch.where(applied[:, None], weight, (offset == 0).float())
    groups, taps = count * slices, 2 * radius + 1
    kernel = weight.repeat_interleave(slices, 0)
    x = F.pad(image_BSHW.reshape(1, groups, height, width), [radius] * 4, mode="replicate")
    x = F.conv2d(x, kernel.view(groups, 1, taps, 1), groups=groups)
    x = F.conv2d(x, kernel.view(groups, 1, 1, taps), groups=groups)
    return x.view(image_BSHW.shape)


def paste(x_BSHW: Tensor, box_B4: Tensor) -> Tensor:
    """Paste each clip's box from the clip beside it; further axes may follow S."""
    height, width = x_BSHW.shape[-2:]
    y = (torch.arange(height, device=box_B4.device) + 0.5) / height
    x = (torch.arange(width, device=box_B4.device) + 0.5) / width
    y0, x0, y1, x1 = (box_B4[:, i, None] for i in range(4))
    rows, columns = (y0 <= y) & (y < y1), (x0 <= x) & (x < x1)
    mask_BHW = rows[:, :, None] & columns[:, None, :]
    mask = mask_BHW.view(len(mask_BHW), *[1] * (x_BSHW.ndim - 3), height, width)
    beside = (torch.arange(len(x_BSHW), device=x_BSHW.device) ^ 1).clamp(max=len(x_BSHW) - 1)
    return torch.where(mask, x_BSHW[beside], x_BSHW)
