"""Layer maths as plain functions, and the small modules that all parts share."""

import functools
import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from sss_jax.axes import Array, Float
from sss_jax.models import convolution
from sss_jax.models.initial import initialiser


@jax.custom_jvp
def gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Exact GELU; the tanh approximation moves SAM-2's outputs by 1e-3.

    The derivative is written out so that the forward pass keeps one array for it instead of the
    four that differentiating the formula keeps (half the time of an MLP's training on CPUs).
    """
    return x * _normal_cdf(x)


def _normal_cdf(x: Array) -> Array:
    return 0.5 + 0.5 * jax.lax.erf(x * math.sqrt(0.5))


@gelu.defjvp
def _gelu_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (x,), (dx,) = primals, tangents
    y, slope = gelu_and_slope(x)
    return y, dx * slope


def gelu_and_slope(x: Float[Array, "..."]) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """Return GELU and its derivative."""
    cdf = _normal_cdf(x)
    density = jnp.exp(-0.5 * x * x) * (1 / math.sqrt(2 * math.pi))
    return x * cdf, cdf + x * density


def split_heads(x: Float[Array, "... C"], heads: int) -> Float[Array, "... heads d"]:
    """Split the last axis into attention heads."""
    return x.reshape(*x.shape[:-1], heads, x.shape[-1] // heads)


def merge_heads(x: Float[Array, "... heads d"]) -> Float[Array, "... C"]:
    """Undo `split_heads`."""
    return x.reshape(*x.shape[:-2], x.shape[-2] * x.shape[-1])


def padded_size(size: int, window: int) -> int:
    """Smallest multiple of `window` that holds `size`."""
    return -(-size // window) * window


def max_pool(x_BHWC: Float[Array, "B H W C"]) -> Float[Array, "B h w C"]:
    """Maximum over 2x2 cells, stride 2; the sides must be even."""
    b, h, w, c = x_BHWC.shape
    return max_over(x_BHWC.reshape(b, h // 2, 2, w // 2, 2, c), (2, 4))


def in_rows(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Keep an array in memory in the order of its axes, on TPUs.

    Left to itself XLA chooses orders for products and copies the results, which are wider.
    """
    return with_layout_constraint(x, Layout(tuple(range(x.ndim))))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def max_over(x: Float[Array, "..."], axes: tuple[int, ...]) -> Float[Array, "..."]:
    """Maximum over axes of length 2; of equals the first takes the gradient, as in PyTorch.

    The derivative is written out so that the forward pass keeps a byte for each result, where
    differentiating a maximum keeps everything, compares it again and counts the equals.
    """
    return _max_over_forward(x, axes)[0]


def _max_over_forward(x: Array, axes: tuple[int, ...]) -> tuple[Array, Array]:
    best = x.max(axes)
    number = _number(x.shape, axes)
    first = jnp.where(x == jnp.expand_dims(best, axes), number, jnp.int8(127)).min(axes)
    return best, first


def _number(shape: tuple[int, ...], axes: tuple[int, ...]) -> Array:
    """Places along some axes, counted through, in the shape that goes with `shape`."""
    sides = [side if axis in axes else 1 for axis, side in enumerate(shape)]
    return jnp.arange(math.prod(sides), dtype=jnp.int8).reshape(sides)


def _max_over_backward(axes: tuple[int, ...], place: Array, bar: Array) -> tuple[Array]:
    place, bar = (jnp.expand_dims(a, axes) for a in (place, bar))
    shape = [2 if axis in axes else 1 for axis in range(bar.ndim)]
    number = _number(tuple(shape), axes)
    return (jnp.where(place == number, bar, jnp.zeros((), bar.dtype)),)


max_over.defvjp(_max_over_forward, _max_over_backward)


def to_cells(x: Float[Array, "... H W C"]) -> Float[Array, "... h w 4C"]:
    """Put the four pixels of every 2x2 cell side by side in the channels; the sides are even."""
    *batch, height, width, c = x.shape
    x = x.reshape(*batch, height // 2, 2, width // 2, 2, c)
    return jnp.swapaxes(x, -4, -3).reshape(*batch, height // 2, width // 2, 4 * c)


def from_cells(x: Float[Array, "... h w 4C"]) -> Float[Array, "... H W C"]:
    """Undo `to_cells`."""
    *batch, h, w, c = x.shape
    x = x.reshape(*batch, h, w, 2, 2, c // 4)
    return jnp.swapaxes(x, -4, -3).reshape(*batch, 2 * h, 2 * w, c // 4)


def linear(x: Float[Array, "... C"], kernel: Float[Array, "C E"]) -> Float[Array, "... E"]:
    """Multiply the last axis by a matrix.

    The other axes are flattened first: XLA on CPUs transposes and copies both operands of the
    kernel's gradient when it contracts more than one axis, which takes longer than the products.
    """
    return (x.reshape(-1, x.shape[-1]) @ kernel).reshape(*x.shape[:-1], kernel.shape[-1])


@jax.custom_vjp
def add_bias(x: Float[Array, "... C"], bias: Float[Array, " C"]) -> Float[Array, "... C"]:
    """Add a vector of the same type to the last axis; its gradient is summed in float32."""
    return x + bias.reshape((1,) * (x.ndim - 1) + bias.shape)


def _add_bias_forward(x: Array, bias: Array) -> tuple[Array, None]:
    return add_bias(x, bias), None


def _add_bias_backward(_: None, bar: Array) -> tuple[Array, Array]:
    return bar, _sum_rows(bar)


add_bias.defvjp(_add_bias_forward, _add_bias_backward)


def _sum_rows(x: Float[Array, "... C"]) -> Float[Array, " C"]:
    """Sum over all axes but the last.

    By a product with ones: what a plain sum adds up, XLA on CPUs computes a second time.
    """
    rows = x.reshape(-1, x.shape[-1])
    ones = jnp.ones((1, rows.shape[0]), x.dtype)
    return jnp.matmul(ones, rows, precision=jax.lax.Precision.HIGHEST)[0]


def scale_by(x: Float[Array, "... C"], scale: Float[Array, " C"]) -> Float[Array, "... C"]:
    """Multiply the last axis by a vector."""
    return x * scale.reshape((1,) * (x.ndim - 1) + scale.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def layer_norm(
    x: Float[Array, "... C"], scale: Float[Array, " C"], bias: Float[Array, " C"], epsilon: float
) -> Float[Array, "... C"]:
    """Normalise the last axis, scale and shift it; in float32 whatever comes in.

    The variance of float32 numbers is computed in two passes, because the difference of moments
    cancels; of shorter numbers in one, where that loses less than their own rounding did. The
    derivative is written out so that the forward pass keeps what came in, in its own type, where
    differentiating the formula keeps three arrays in float32.
    """
    return _layer_norm_forward(x, scale, bias, epsilon)[0]


def _layer_norm_forward(
    x: Array, scale: Array, bias: Array, epsilon: float
) -> tuple[Array, tuple[Array, ...]]:
    wide = x.astype(jnp.float32)
    mean = wide.mean(axis=-1, keepdims=True)
    if x.dtype == jnp.float32:
        variance = jnp.square(wide - mean).mean(axis=-1, keepdims=True)
    else:
        variance = jnp.square(wide).mean(axis=-1, keepdims=True) - jnp.square(mean)
        variance = jnp.maximum(variance, 0)
    inverse = jax.lax.rsqrt(variance + epsilon)
    out = add_bias(scale_by((wide - mean) * inverse, scale), bias)
    return out, (x, mean, inverse, scale)


def _layer_norm_backward(
    epsilon: float, kept: tuple[Array, ...], bar: Array
) -> tuple[Array, Array, Array]:
    x, mean, inverse, scale = kept
    normal = (x.astype(jnp.float32) - mean) * inverse
    scaled = scale_by(bar, scale)
    along = (scaled * normal).mean(axis=-1, keepdims=True)
    x_bar = (scaled - scaled.mean(axis=-1, keepdims=True) - normal * along) * inverse
    return x_bar.astype(x.dtype), _sum_rows(bar * normal), _sum_rows(bar)


layer_norm.defvjp(_layer_norm_forward, _layer_norm_backward)


class LayerNorm(nn.Module):
    """Normalisation over channels, with float32 statistics.

    Linen's own layer does not run in bfloat16 where types must be promoted explicitly.

    Attributes:
        dtype: computation type.
        epsilon: added to the variance.
    """

    dtype: jnp.dtype
    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x: Float[Array, "... C"]) -> Float[Array, "... C"]:
        """Normalise the last axis, scale and shift it."""
        width = x.shape[-1:]
        scale = self.param("scale", initialiser("scale"), width)
        bias = self.param("bias", initialiser("bias"), width)
        return layer_norm(x, scale, bias, self.epsilon).astype(self.dtype)


class Dense(nn.Module):
    """Linear layer, `x @ kernel + bias`.

    Attributes:
        features: output channels.
        dtype: computation type.
    """

    features: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "... C"]) -> Float[Array, "... E"]:
        """Apply to the last axis."""
        shape = (x.shape[-1], self.features)
        kernel = self.param("kernel", initialiser("kernel"), shape)
        bias = self.param("bias", initialiser("bias"), shape[1:])
        x, kernel, bias = (a.astype(self.dtype) for a in (x, kernel, bias))
        return add_bias(linear(x, kernel), bias)


class Table(nn.Module):
    """Learned vectors.

    Attributes:
        rows: number of vectors.
        features: their length.
    """

    rows: int
    features: int

    @nn.compact
    def __call__(self) -> Float[Array, "rows D"]:
        """Return them all, float32."""
        shape = (self.rows, self.features)
        return self.param("embedding", initialiser("embedding"), shape)


class MLP(nn.Module):
    """Linear layers with an activation between them.

    Attributes:
        widths: output width of each layer.
        activation: applied after every layer but the last.
        dtype: computation type.
    """

    widths: tuple[int, ...]
    activation: Callable[[Array], Array]
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "... C"]) -> Float[Array, "... E"]:
        """Apply the layers to the last axis."""
        for i, width in enumerate(self.widths):
            x = Dense(width, self.dtype, name=f"layers_{i}")(x)
            if i + 1 < len(self.widths):
                x = self.activation(x)
        return x


class Conv(nn.Module):
    """Convolution with explicit symmetric padding ("SAME" would shift strided ones).

    Attributes:
        features: output channels.
        kernel_size: side of the kernel.
        stride: stride along both axes.
        padding: zeros on every side.
        dtype: computation type.
    """

    features: int
    kernel_size: int
    dtype: jnp.dtype
    stride: int = 1
    padding: int = 0

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w E"]:
        """Convolve."""
        side = self.kernel_size
        shape = (side, side, x.shape[-1], self.features)
        kernel = self.param("kernel", initialiser("kernel"), shape)
        bias = self.param("bias", initialiser("bias"), (self.features,))
        x, kernel, bias = (a.astype(self.dtype) for a in (x, kernel, bias))
        if side == self.stride == 1:
            return add_bias(linear(x, kernel[0, 0]), bias)
        return add_bias(convolution.convolve(x, kernel, self.stride, self.padding), bias)


class ConvTranspose(nn.Module):
    """Transposed convolution, kernel 2x2, stride 2, as one matrix product.

    Tap (i, j) of the kernel writes output pixel (2 row + i, 2 column + j); the kernel is not
    flipped.

    Attributes:
        features: output channels.
        dtype: computation type.
        cells: leave the four pixels of a cell side by side in the channels, as `to_cells` does.
    """

    features: int
    dtype: jnp.dtype
    cells: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "... H W C"]) -> Float[Array, "... H2 W2 E"]:
        """Double the resolution."""
        channels = x.shape[-1]
        shape = (2, 2, channels, self.features)
        kernel = self.param("kernel", initialiser("kernel"), shape).astype(self.dtype)
        bias = self.param("bias", initialiser("bias"), (self.features,)).astype(self.dtype)
        taps = kernel.transpose(2, 0, 1, 3).reshape(channels, -1)
        y = add_bias(linear(x.astype(self.dtype), taps), jnp.tile(bias, 4))
        return y if self.cells else from_cells(y)
