"""Convolutions of NHWC maps, in the forms that every platform runs fast.

XLA's CPU compiler brings convolutions into the layout of its fast kernels only outside of loops.
What stands in a `scan` runs as written, and the gradients that autodiff writes are in other
layouts: they were up to 60 times slower there. On CPUs the gradients are therefore written out.
"""

import functools
import itertools
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from sss_jax.axes import Array, Float

_NHWC = ("NHWC", "HWIO", "NHWC")


def convolve(
    x: Float[Array, "N H W C"], kernel: Float[Array, "side side C E"], stride: int, padding: int
) -> Float[Array, "N h w E"]:
    """Convolve maps with zeros on every side.

    Args:
        x: maps.
        kernel: square kernel; it is not flipped.
        stride: along both axes.
        padding: zeros on every side, fewer than the kernel has rows.
    """
    on_cpu = functools.partial(_own_gradients, stride=stride, padding=padding)
    elsewhere = functools.partial(_convolve, stride=stride, padding=padding)
    return jax.lax.platform_dependent(x, kernel, cpu=on_cpu, default=elsewhere)


def _convolve(x: Array, kernel: Array, stride: int, padding: int, groups: int = 1) -> Array:
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(stride, stride),
        padding=((padding, padding), (padding, padding)),
        dimension_numbers=_NHWC,
        feature_group_count=groups,
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _own_gradients(x: Array, kernel: Array, stride: int, padding: int) -> Array:
    return _convolve(x, kernel, stride, padding)


def _forward(
    x: Array, kernel: Array, stride: int, padding: int
) -> tuple[Array, tuple[Array, Array]]:
    return _convolve(x, kernel, stride, padding), (x, kernel)


def _backward(
    stride: int, padding: int, saved: tuple[Array, Array], dy: Array
) -> tuple[Array, Array]:
    """Write both gradients as convolutions in the layout of the forward pass."""
    x, kernel = saved
    side = len(kernel)
    # Rows and columns at the end that no window reaches.
    rests = [(size + 2 * padding - side) % stride for size in x.shape[1:3]]
    dkernel = jax.lax.conv_general_dilated(
        x.transpose(3, 1, 2, 0),
        dy.transpose(1, 2, 0, 3),
        window_strides=(1, 1),
        padding=[(padding, padding - rest) for rest in rests],
        rhs_dilation=(stride, stride),
        dimension_numbers=_NHWC,
    )
    around = side - 1 - padding
    dx = jax.lax.conv_general_dilated(
        dy,
        kernel[::-1, ::-1].swapaxes(2, 3),
        window_strides=(1, 1),
        padding=[(around, around + rest) for rest in rests],
        lhs_dilation=(stride, stride),
        dimension_numbers=_NHWC,
    )
    return dx, dkernel.transpose(1, 2, 0, 3)


_own_gradients.defvjp(_forward, _backward)


def depthwise(
    x: Float[Array, "N H W C"], kernel: Float[Array, "side side 1 C"]
) -> Float[Array, "N H W C"]:
    """Convolve every channel with its own kernel of odd side, same size."""
    return jax.lax.platform_dependent(x, kernel, cpu=_shift_and_add, default=_grouped)


def _grouped(x: Array, kernel: Array) -> Array:
    return _convolve(x, kernel, 1, len(kernel) // 2, groups=x.shape[-1])


@jax.custom_vjp
def _shift_and_add(x: Array, kernel: Array) -> Array:
    """Add up shifted maps: one loop over the output, where XLA on CPUs runs groups one by one."""
    y = jnp.zeros_like(x)
    taps = kernel.reshape(-1, kernel.shape[-1])
    for shifted, tap in zip(_shifts(x, len(kernel)), taps, strict=True):
        y += shifted * tap.reshape(1, 1, 1, -1)
    return y


def _shifts(x: Array, side: int) -> Iterator[Array]:
    """Yield the map as every tap of a kernel sees it, zeros beyond its edges."""
    around, (h, w) = (side // 2, side // 2), x.shape[1:3]
    padded = jnp.pad(x, ((0, 0), around, around, (0, 0)))
    for i, j in itertools.product(range(side), repeat=2):
        yield padded[:, i : i + h, j : j + w]


def _shift_and_add_forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return _shift_and_add(x, kernel), (x, kernel)


def _shift_and_add_backward(saved: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    x, kernel = saved
    dkernel = jnp.stack([(shifted * dy).sum((0, 1, 2)) for shifted in _shifts(x, len(kernel))])
    return _shift_and_add(dy, kernel[::-1, ::-1]), dkernel.reshape(kernel.shape)


_shift_and_add.defvjp(_shift_and_add_forward, _shift_and_add_backward)
