"""Weak augmentation: one geometric change of a whole clip, image and label alike."""

import math

import jax
import jax.numpy as jnp

from sss_jax.axes import Array, Bool, Float, Int, Key
from sss_jax.errors import ConfigError
from sss_jax.options import WeakOptions

__all__ = ["draw_transform", "warp", "weak_view"]

# Quarter turns as integers: cos(pi / 2) in floating point is not zero, and a rotation by 90 degrees
# has to move pixels without touching their values.
_QUARTER_TURNS = (
    ((1.0, 0.0), (0.0, 1.0)),
    ((0.0, 1.0), (-1.0, 0.0)),
    ((-1.0, 0.0), (0.0, -1.0)),
    ((0.0, -1.0), (1.0, 0.0)),
)


def draw_transform(
    key: Key[Array, ""], options: WeakOptions
) -> tuple[Float[Array, "2 2"], Float[Array, " 2"]]:
    """Draw the map from output to input positions, both relative to the image centre.

    With probability `rot90_flip` one of the eight symmetries of the square, otherwise with
    probability `rotate` a rotation; then a zoom. A zoomed-in image is cropped at a random place, a
    zoomed-out one lies at a random place of the frame; `shift` moves either further.

    Args:
        key: key of the example.
        options: probabilities and ranges.

    Returns:
        The matrix M and the shift t of `input = M (output - t)`; t is a share of the side, rows
        first.

    Source: the weak view of UniMatch's medical recipe (Yang et al. 2023, 2024).
    Differs from the paper: all eight symmetries are equally likely.
    """
    if options.scale_low > options.scale_high:
        raise ConfigError(
            f"weak.scale_low ({options.scale_low}) is above weak.scale_high "
            f"({options.scale_high}); swap them"
        )
    symmetric, turn, flip, rotates, angle, zoom, *place = jax.random.uniform(key, (8,))
    quarter_22 = jnp.array(_QUARTER_TURNS)[(4 * turn).astype(jnp.int32)]
    # The flip negates the first input row: with the four turns it gives every symmetry once.
    symmetry_22 = quarter_22 * jnp.array([jnp.where(flip < 0.5, -1.0, 1.0), 1.0])[:, None]
    radians = jnp.where(rotates < options.rotate, math.radians(options.degrees), 0.0) * (
        2 * angle - 1
    )
    cos, sin = jnp.cos(radians), jnp.sin(radians)
    rotation_22 = jnp.array([[cos, -sin], [sin, cos]])
    matrix_22 = jnp.where(symmetric < options.rot90_flip, symmetry_22, rotation_22)
    scale = options.scale_low + zoom * (options.scale_high - options.scale_low)
    reach = jnp.abs(scale - 1) / 2 + options.shift
    return matrix_22 / scale, reach * (2 * jnp.array(place) - 1)


def _source(
    matrix_22: Float[Array, "2 2"], shift_2: Float[Array, " 2"], side: int
) -> tuple[Float[Array, "H W"], Float[Array, "H W"]]:
    """Input row and column, in pixels, that each output pixel shows."""
    centre = (side - 1) / 2
    offset = jnp.arange(side, dtype=jnp.float32) - centre
    row_H1 = (offset - side * shift_2[0])[:, None]
    column_1W = (offset - side * shift_2[1])[None, :]
    # Not a matmul: its reduced precision on accelerators would move pixels.
    row_HW = matrix_22[0, 0] * row_H1 + matrix_22[0, 1] * column_1W + centre
    column_HW = matrix_22[1, 0] * row_H1 + matrix_22[1, 1] * column_1W + centre
    return row_HW, column_HW


def _bilinear(
    table_NS: Float[Array, "N S"],
    row_N: Float[Array, " N"],
    column_N: Float[Array, " N"],
    side: int,
) -> Float[Array, "N S"]:
    """Interpolate between the four neighbours of positions inside the frame."""
    top_N, left_N = (jnp.clip(jnp.floor(x), 0, max(side - 2, 0)) for x in (row_N, column_N))
    down_N1, right_N1 = (row_N - top_N)[:, None], (column_N - left_N)[:, None]
    first_N = top_N.astype(jnp.int32) * side + left_N.astype(jnp.int32)
    below, beside = (side, 1) if side > 1 else (0, 0)

    def line(index_N: Int[Array, " N"]) -> Float[Array, "N S"]:
        return table_NS[index_N] * (1 - right_N1) + table_NS[index_N + beside] * right_N1

    return line(first_N) * (1 - down_N1) + line(first_N + below) * down_N1


def warp(
    image_SHW1: Float[Array, "S H W 1"],
    label_SHW: Int[Array, "S H W"] | None,
    matrix_22: Float[Array, "2 2"],
    shift_2: Float[Array, " 2"],
) -> tuple[Float[Array, "S H W 1"], Int[Array, "S H W"] | None, Bool[Array, "H W"]]:
    """Move every slice of a clip by the same affine map.

    The image is interpolated bilinearly, the label by its nearest pixel. Positions outside the
    input's pixels (their whole area, not only their centres) give 0.

    Args:
        image_SHW1: square slices.
        label_SHW: their labels, or None.
        matrix_22: M of `input = M (output - t)`, positions (row, column) from the image centre.
        shift_2: t, as a share of the side.

    Returns:
        Image, label (None where none came in), and whether a pixel shows part of the input.
    """
    slices, side = image_SHW1.shape[:2]
    if image_SHW1.shape != (slices, side, side, 1):
        raise ValueError(f"a clip is [S, side, side, 1], not {image_SHW1.shape}")
    row_HW, column_HW = _source(matrix_22, shift_2, side)
    inside_HW = jnp.ones((side, side), bool)
    for x in (row_HW, column_HW):
        inside_HW &= (x >= -0.5) & (x < side - 0.5)
    row_N, column_N = (jnp.clip(x, 0, side - 1).reshape(-1) for x in (row_HW, column_HW))

    def rows_last(x_SHW: Array) -> Array:
        # Slices last: one index then fetches S neighbouring values.
        return jnp.moveaxis(x_SHW, 0, -1).reshape(side * side, slices)

    def clip_again(x_NS: Array) -> Array:
        x_SHW = jnp.moveaxis(x_NS.reshape(side, side, slices), -1, 0)
        return jnp.where(inside_HW[None], x_SHW, jnp.zeros((), x_NS.dtype))

    table_NS = rows_last(image_SHW1[..., 0])
    image = clip_again(_bilinear(table_NS, row_N, column_N, side))[..., None]
    if label_SHW is None:
        return image, None, inside_HW
    nearest_row_N, nearest_column_N = (
        jnp.minimum(jnp.floor(x + 0.5), side - 1).astype(jnp.int32) for x in (row_N, column_N)
    )
    label = clip_again(rows_last(label_SHW)[nearest_row_N * side + nearest_column_N])
    return image, label, inside_HW


def weak_view(
    key: Key[Array, ""],
    image_SHW1: Float[Array, "S H W 1"],
    label_SHW: Int[Array, "S H W"] | None,
    options: WeakOptions,
) -> tuple[Float[Array, "S H W 1"], Int[Array, "S H W"] | None, Bool[Array, "H W"]]:
    """Draw the weak view of one clip: the same transform for all its slices.

    Args:
        key: key of the example (see `example_keys`).
        image_SHW1: square slices.
        label_SHW: their labels, or None.
        options: probabilities and ranges.

    Returns:
        Image, label (None where none came in), and whether a pixel shows part of the input: what
        lies outside is black and belongs in no loss.

    Source: UniMatch's medical recipe (Yang et al. 2023, 2024).
    """
    return warp(image_SHW1, label_SHW, *draw_transform(key, options))
