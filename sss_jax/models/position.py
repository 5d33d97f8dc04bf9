"""Positional encodings: bicubic tables of the trunk, random Fourier features of the prompts."""

import functools

import jax.numpy as jnp
import numpy as np

from sss_jax.axes import Array, Float


@functools.lru_cache(maxsize=64)
def bicubic_matrix(n_out: int, n_in: int) -> np.ndarray:
    """Matrix (n_out, n_in) of one-dimensional cubic interpolation, half-pixel centres.

    Convolution kernel of Keys with a = -0.75 and taps clamped to the ends, which SAM-2's position
    tables were trained with; `jax.image.resize` uses a = -0.5 and renormalises at the ends.
    """
    a = -0.75
    centre = (np.arange(n_out) + 0.5) * (n_in / n_out) - 0.5
    first = np.floor(centre).astype(int) - 1
    matrix = np.zeros((n_out, n_in))
    for tap in range(4):
        x = np.abs(centre - (first + tap))
        near = ((a + 2) * x - (a + 3)) * x * x + 1
        far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
        index = np.clip(first + tap, 0, n_in - 1)
        np.add.at(matrix, (np.arange(n_out), index), np.where(x <= 1, near, far))
    return matrix.astype(np.float32)


def trunk_position(
    table: Float[Array, "1 h w C"],
    window: Float[Array, "1 m m C"],
    height: int,
    width: int,
) -> Float[Array, "1 H W C"]:
    """Position embedding of the trunk: the table resized, plus the window table tiled.

    Source: Hiera with absolute window embeddings (Bolya et al. 2023), as in SAM 2.
    """
    rows = bicubic_matrix(height, table.shape[1])
    cols = bicubic_matrix(width, table.shape[2])
    smooth = jnp.einsum("yh,xw,bhwc->byxc", rows, cols, table)
    tiles = (1, height // window.shape[1], width // window.shape[2], 1)
    return smooth + jnp.tile(window, tiles)


def fourier_position(
    coords: Float[Array, "... 2"], gaussian: Float[Array, "2 half"]
) -> Float[Array, "... D"]:
    """Random Fourier features of (x, y) in [0, 1], in float32.

    Source: SAM (Kirillov et al. 2023), after Tancik et al. 2020.
    """
    angle = 2 * jnp.pi * ((2 * coords.astype(jnp.float32) - 1) @ gaussian)
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)


def _sine_periods(count: int) -> np.ndarray:
    """Periods of `count` channels; each sine shares its own with a cosine."""
    return 10000.0 ** (2 * (np.arange(count) // 2) / count)


def sine_position(height: int, width: int, channels: int) -> np.ndarray:
    """Sine embedding [H * W, D] of a grid: half the channels for y, then half for x.

    Sines and cosines alternate; positions run from 1 / n to 1, times 2 pi. Source: DETR (Carion et
    al. 2020), as in SAM 2.
    """
    half = channels // 2
    period = _sine_periods(half)

    def axis(count: int) -> np.ndarray:
        place = np.arange(1, count + 1) / (count + 1e-6) * 2 * np.pi
        angle = place[:, None] / period[None]
        return np.where(np.arange(half) % 2 == 0, np.sin(angle), np.cos(angle))

    y = np.broadcast_to(axis(height)[:, None], (height, width, half))
    x = np.broadcast_to(axis(width)[None], (height, width, half))
    both = np.concatenate([y, x], axis=-1)
    return both.reshape(height * width, channels).astype(np.float32)


def sine_of_distance(distance: Float[Array, "..."], channels: int) -> Float[Array, "... D"]:
    """Sine embedding of a number: all sines, then all cosines, float32."""
    period = jnp.asarray(_sine_periods(channels // 2), jnp.float32)
    period = period.reshape((1,) * distance.ndim + period.shape)
    angle = distance[..., None].astype(jnp.float32) / period
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)


def rotation(height: int, width: int, channels: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines [H * W, D / 2] of the axial rotary embedding of a grid.

    The first half of the pairs turns with x, the second with y. Source: RoFormer (Su et al. 2021),
    axial as in SAM 2.
    """
    quarter = channels // 4
    frequency = 10000.0 ** (-4 * np.arange(quarter) / channels)
    y, x = np.divmod(np.arange(height * width), width)
    angle = np.concatenate([x[:, None] * frequency[None], y[:, None] * frequency[None]], axis=1)
    return np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)


def rotate(
    x: Float[Array, "... P D"], table: tuple[Array | np.ndarray, Array | np.ndarray]
) -> Float[Array, "... P D"]:
    """Turn every pair (channel i, channel i + D / 2) by the angle of its position, in float32."""
    # Widened and narrowed half by half: as a whole, TPUs wrote the wide array to memory.
    one, other = (half.astype(jnp.float32) for half in jnp.split(x, 2, axis=-1))
    lead = (1,) * (x.ndim - 2)
    cos, sin = (a.reshape(*lead, *a.shape) for a in table)
    turned = one * cos - other * sin, one * sin + other * cos
    return jnp.concatenate([half.astype(x.dtype) for half in turned], axis=-1)


def pixel_centres(height: int, width: int) -> Float[Array, "H W 2"]:
    """Centres (x, y) of the cells of a grid over the unit square."""
    y = (jnp.arange(height, dtype=jnp.float32) + 0.5) / height
    x = (jnp.arange(width, dtype=jnp.float32) + 0.5) / width
    return jnp.stack(jnp.meshgrid(x, y), axis=-1)


def upsample_2x(x_BHWC: Float[Array, "B H W C"]) -> Float[Array, "B H2 W2 C"]:
    """Nearest-neighbour upsampling by 2."""
    b, h, w, c = x_BHWC.shape
    shape = (b, h, 2, w, 2, c)
    return jnp.broadcast_to(x_BHWC[:, :, None, :, None], shape).reshape(b, 2 * h, 2 * w, c)
