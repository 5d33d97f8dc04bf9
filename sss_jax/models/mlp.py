"""LayerNorm and two linear layers with an activation between them, plainly or as TPU kernels."""

from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from sss_jax.axes import Array, Float
from sss_jax.models import layers, mlp_kernel
from sss_jax.models.initial import initialiser
from sss_jax.models.mlp_kernel import Weights


class Activation(NamedTuple):
    """An activation.

    Attributes:
        apply: with a derivative of its own.
        with_slope: returns it and its derivative.
    """

    apply: Callable[[Array], Array]
    with_slope: Callable[[Array], tuple[Array, Array]]


def _relu_and_slope(x: Array) -> tuple[Array, Array]:
    return jnp.maximum(x, 0), (x > 0).astype(x.dtype)


GELU = Activation(layers.gelu, layers.gelu_and_slope)
RELU = Activation(jax.nn.relu, _relu_and_slope)


class Norm(nn.Module):
    """Parameters of a LayerNorm that is applied elsewhere."""

    @nn.compact
    def __call__(self, channels: int) -> tuple[Float[Array, " C"], Float[Array, " C"]]:
        """Return scale and shift."""
        scale = self.param("scale", initialiser("scale"), (channels,))
        return scale, self.param("bias", initialiser("bias"), (channels,))


class Projection(nn.Module):
    """Parameters of a linear layer that is applied elsewhere.

    Attributes:
        features: output channels.
    """

    features: int

    @nn.compact
    def __call__(self, channels: int) -> tuple[Float[Array, "C E"], Float[Array, " E"]]:
        """Return kernel and bias for this many input channels."""
        kernel = self.param("kernel", initialiser("kernel"), (channels, self.features))
        return kernel, self.param("bias", initialiser("bias"), (self.features,))


def transform(
    x: Float[Array, "... C"],
    weights: Weights,
    activation: Activation,
    epsilon: float = 1e-6,
    *,
    shortcut: bool,
    kernels: bool,
) -> Float[Array, "... C"]:
    """Normalise every token and transform it.

    Args:
        x: tokens, of the type that products are computed in.
        weights: parameters, float32.
        activation: between the linear layers.
        epsilon: added to LayerNorm's variance.
        shortcut: add the tokens to the result.
        kernels: by the kernels that only TPUs run, where they suit.
    """
    size = x.size // x.shape[-1], x.shape[-1], weights.first_bias_H.size, x.dtype
    if kernels and mlp_kernel.suits(*size):
        form = mlp_kernel.Form(activation.with_slope, epsilon, shortcut)
        rows = layers.in_rows(x.reshape(-1, x.shape[-1]))
        return mlp_kernel.transform(rows, weights, form).reshape(x.shape)
    y = layers.layer_norm(x, weights.scale_C, weights.shift_C, epsilon)
    matrices = [a.astype(x.dtype) for a in weights[2:]]
    y = activation.apply(
        layers.add_bias(layers.linear(y.astype(x.dtype), matrices[0]), matrices[1])
    )
    y = layers.add_bias(layers.linear(y, matrices[2]), matrices[3])
    return x + y if shortcut else y
