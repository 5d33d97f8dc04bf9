"""Maps as phases: pixel (s i + p, s j + q) of a map is pixel (i, j) of phase (p, q).

TPUs keep channels side by side, and 1, 4 or 16 of them waste most of what is moved. As phases the
mask downsampler's maps keep pixels side by side and channels one after the other, and a stride is
a choice of phases. The same numbers come out as from interpolation and strided convolutions.

Axes: N maps; P and Q phases down and across; C channels; h w pixels of a phase.
"""

import jax
import jax.numpy as jnp

from sss_jax.axes import Array, Float


def split(x_NHW: Float[Array, "N H W"], count: int) -> Float[Array, "N P Q h w"]:
    """Split maps into `count` phases each way; the sides are multiples of it."""
    n, height, width = x_NHW.shape
    x = x_NHW.reshape(n, height // count, count, width // count, count)
    return x.transpose(0, 2, 4, 1, 3)


def join(x_NPQhw: Float[Array, "N P Q h w"]) -> Float[Array, "N H W"]:
    """Undo `split`."""
    n, down, across, h, w = x_NPQhw.shape
    return x_NPQhw.transpose(0, 3, 1, 4, 2).reshape(n, h * down, w * across)


def upsample(x_NPQhw: Float[Array, "N P Q h w"], factor: int) -> Float[Array, "N R S h w"]:
    """Interpolate bilinearly to `factor` times as many phases, as `jax.image.resize` does.

    Half-pixel centres; beyond the edge lies the pixel of the edge.
    """
    for phase_axis in (1, 2):
        x_NPQhw = _upsample_along(x_NPQhw, phase_axis, phase_axis + 2, factor)
    return x_NPQhw


def _upsample_along(x: Array, phase_axis: int, axis: int, factor: int) -> Array:
    count, size = x.shape[phase_axis], x.shape[axis]
    phases = [jax.lax.index_in_dim(x, i, phase_axis, keepdims=False) for i in range(count)]
    axis -= 1
    first, last = (
        jax.lax.slice_in_dim(phase, start, start + 1, axis=axis)
        for phase, start in ((phases[0], 0), (phases[-1], size - 1))
    )
    before = jnp.concatenate(
        [first, jax.lax.slice_in_dim(phases[-1], 0, size - 1, axis=axis)], axis
    )
    after = jnp.concatenate([jax.lax.slice_in_dim(phases[0], 1, size, axis=axis), last], axis)
    around = [before, *phases, after]
    found = []
    for i in range(count):
        for step in range(factor):
            place = (step + 0.5) / factor - 0.5
            near = around[i] if place < 0 else around[i + 2]
            found.append((1 - abs(place)) * around[i + 1] + abs(place) * near)
    return jnp.stack(found, phase_axis)


def convolve_halving(
    x_NPQChw: Float[Array, "N P Q C h w"], kernel: Float[Array, "3 3 C E"]
) -> Float[Array, "N R S E h w"]:
    """Convolve with stride 2 and a row of zeros before the first: half as many phases each way."""
    x = x_NPQChw
    for phase_axis in (1, 2):
        last = jax.lax.slice_in_dim(x, x.shape[phase_axis] - 1, None, axis=phase_axis)
        x = jnp.concatenate([_moved_on(last, phase_axis + 3), x], phase_axis)
    weights = kernel.reshape(-1, kernel.shape[-1])
    rows = [
        [_taps(x, weights, 2 * r, 2 * s) for s in range(x.shape[2] // 2)]
        for r in range(x.shape[1] // 2)
    ]
    return jnp.stack([jnp.stack(row, 1) for row in rows], 1)


def _moved_on(x: Array, axis: int) -> Array:
    """Move by one pixel; a zero comes first."""
    pad = [(1, 0) if i == axis else (0, 0) for i in range(x.ndim)]
    return jax.lax.slice_in_dim(jnp.pad(x, pad), 0, x.shape[axis], axis=axis)


def _taps(x: Array, weights: Array, row: int, column: int) -> Array:
    taps = x[:, row : row + 3, column : column + 3]
    n, *_, h, w = taps.shape
    return jnp.einsum("ke,nkhw->nehw", weights, taps.reshape(n, -1, h, w))
