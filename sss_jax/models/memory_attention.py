"""Memory attention: the features of a slice look at themselves and at remembered slices.

Source: SAM 2 (Ravi et al. 2024), section 4. Axes: J is 1 while all K objects still share the
features, and K afterwards; P positions of the coarse grid; L memory slots; R object pointers; M
channels of a memory.
Differs from the paper: without the dropout that SAM 2 was trained with.
"""

import functools
from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp

from sss_jax.axes import Array, Bool, Float
from sss_jax.models import layers, memory_layer, mlp, position, repeats
from sss_jax.models.attention import KEEPS, large_attention
from sss_jax.models.initial import initialiser
from sss_jax.models.presets import Kernels, Sam2Config

EPSILON = 1e-5
POSITION_SHARE = 0.1
"""Weight of the positional encoding that is added to the features."""

Rotation = tuple[Float[Array, "P half"], Float[Array, "P half"]]


class MemoryKeys(NamedTuple):
    """What is remembered, laid out for attention.

    Attributes:
        value_BKNM: memories of all slots, position by position, then the pieces of the pointers.
        key_BKNM: the same with the positions in space and time added.
        valid_BKN: keys that exist; at least one of every object must.
        spatial: how many of the N keys lie on the coarse grid, a multiple of P; static.
    """

    value_BKNM: Float[Array, "B K N M"]
    key_BKNM: Float[Array, "B K N M"]
    valid_BKN: Bool[Array, "B K N"]
    spatial: int


class RotaryDense(nn.Module):
    """Linear layer whose output channels are reordered: even ones first, then odd ones.

    SAM-2 rotates neighbouring channels. Dot products do not depend on the order of the channels,
    and halves are rotated without a shuffle, so the small kernel is reordered in their place.

    Attributes:
        features: output channels.
        dtype: computation type.
    """

    features: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "... C"]) -> Float[Array, "... E"]:
        """Apply to the last axis."""
        kernel = self.param("kernel", initialiser("kernel"), (x.shape[-1], self.features))
        bias = self.param("bias", initialiser("bias"), (self.features,))
        x, halves, shift = (a.astype(self.dtype) for a in (x, *in_halves(kernel, bias)))
        return layers.add_bias(layers.linear(x, halves), shift)


def in_halves(
    kernel: Float[Array, "C E"], bias: Float[Array, " E"]
) -> tuple[Float[Array, "C E"], Float[Array, " E"]]:
    """Put a projection's even channels before its odd ones."""
    halves = jnp.concatenate([kernel[:, ::2], kernel[:, 1::2]], axis=1)
    return halves, jnp.concatenate([bias[::2], bias[1::2]])


class RotaryAttention(nn.Module):
    """Attention with one head and axial rotary positions.

    The value projection follows the weighted sum instead of preceding it: the weights sum to 1, so
    the result is the same, and memories are four times narrower than the features.

    Attributes:
        width: D, channels of the features.
        dtype: computation type.
        kernels: of the platform that they are for.
    """

    width: int
    dtype: jnp.dtype
    kernels: Kernels = "off"

    @nn.compact
    def __call__(
        self,
        q: Float[Array, "B J P D"],
        k: Float[Array, "B K N C"],
        v: Float[Array, "B K N C"],
        table: Rotation,
        valid: Bool[Array, "B K N"] | None = None,
        rotated: int | None = None,
    ) -> Float[Array, "B K P D"]:
        """Attend; the first `rotated` keys (default: all) lie on the grid, tiled if there are more.

        Keys that are not `valid` do not take part.
        """
        q = RotaryDense(self.width, self.dtype, name="q_proj")(q)
        k = RotaryDense(self.width, self.dtype, name="k_proj")(k)
        q = position.rotate(q, table)
        q = jnp.broadcast_to(q, (*k.shape[:2], *q.shape[2:]))
        k = _rotate_keys(k, table, k.shape[2] if rotated is None else rotated)
        q, v = q * self.width**-0.5, v.astype(self.dtype)
        y = large_attention(q, k, v, valid, kernels=self.kernels)
        y = layers.Dense(self.width, self.dtype, name="v_proj")(y)
        return layers.Dense(self.width, self.dtype, name="out_proj")(y)


def _rotate_keys(k_BKND: Array, table: Rotation, rotated: int) -> Array:
    b, j, _, d = k_BKND.shape
    grid = k_BKND[:, :, :rotated].reshape(b, j, -1, table[0].shape[0], d)
    turned = position.rotate(grid, table).reshape(b, j, rotated, d)
    if rotated == k_BKND.shape[2]:
        return turned
    return jnp.concatenate([turned, k_BKND[:, :, rotated:]], axis=2)


def _whole_blocks(memory: MemoryKeys) -> MemoryKeys:
    """Add keys that are switched off, once for all layers."""
    more = memory_layer.missing(memory.key_BKNM.shape[2])
    pad = lambda a: jnp.pad(a, [(0, more if axis == 2 else 0) for axis in range(a.ndim)])  # noqa: E731
    arrays = (memory.value_BKNM, memory.key_BKNM, memory.valid_BKN)
    value, key, valid = (pad(a) for a in arrays)
    return MemoryKeys(value, key, valid, memory.spatial)


class MemoryAttentionLayer(nn.Module):
    """Self-attention, attention to the memory, MLP; each pre-norm and residual.

    Attributes:
        config: network shape.
    """

    config: Sam2Config

    @nn.compact
    def __call__(
        self, x: Float[Array, "B J P D"], memory: MemoryKeys, table: Rotation
    ) -> Float[Array, "B K P D"]:
        """Return the features of each object."""
        c = self.config
        size = (x.shape[2], c.width, memory.key_BKNM.shape[2], c.compute_dtype)
        if c.kernels == "tpu" and memory_layer.suits(*size):
            x = self._attend_in_kernels(x, memory, table)
        else:
            x = self._attend(x, memory, table)
        weights = mlp.Weights(
            *mlp.Norm(name="norm3")(c.width),
            *mlp.Projection(c.memory_mlp, name="linear1")(c.width),
            *mlp.Projection(c.width, name="linear2")(c.memory_mlp),
        )
        return mlp.transform(
            x, weights, mlp.RELU, EPSILON, shortcut=True, kernels=c.kernels == "tpu"
        )

    def _attend(self, x: Array, memory: MemoryKeys, table: Rotation) -> Array:
        c = self.config
        dtype = c.compute_dtype

        def norm(name: str) -> layers.LayerNorm:
            return layers.LayerNorm(dtype, EPSILON, name=name)

        def attend(name: str) -> RotaryAttention:
            return RotaryAttention(c.width, dtype, c.kernels, name=name)

        y = norm("norm1")(x)
        x = x + attend("self_attn")(y, y, y, table)
        look = attend("cross_attn_image")(
            norm("norm2")(x),
            memory.key_BKNM,
            memory.value_BKNM,
            table,
            memory.valid_BKN,
            memory.spatial,
        )
        return x + look

    def _attend_in_kernels(self, x: Array, memory: MemoryKeys, table: Rotation) -> Array:
        """The same for TPUs: projections with norm, rotation and shortcut in one kernel each."""
        c = self.config
        own = _Around(c.width, name="self_attn")(c.width)
        x = memory_layer.look_at_itself(x, own, mlp.Norm(name="norm1")(c.width), table, EPSILON)
        look = _Around(c.width, name="cross_attn_image")(c.memory_width)
        norm, tables = mlp.Norm(name="norm2")(c.width), (table, _turn_keys(memory, table))
        kept = (memory.key_BKNM, memory.value_BKNM, memory.valid_BKN)
        return memory_layer.look_at_memory(x, *kept, look, norm, tables, EPSILON)


def _turn_keys(memory: MemoryKeys, table: Rotation) -> Rotation:
    """Angles of keys: those on the grid as the grid's, no turn for the others."""
    others = memory.key_BKNM.shape[2] - memory.spatial
    tiles = memory.spatial // len(table[0])
    cos, sin = (jnp.tile(a, (tiles, 1)) for a in table)
    rest = (others, cos.shape[1])
    return jnp.concatenate([cos, jnp.ones(rest)]), jnp.concatenate([sin, jnp.zeros(rest)])


class _Around(nn.Module):
    """Parameters of the projections around attention to keys of so many channels."""

    width: int

    @nn.compact
    def __call__(self, channels: int) -> memory_layer.Around:
        width = self.width
        q = in_halves(*mlp.Projection(width, name="q_proj")(width))
        k = in_halves(*mlp.Projection(width, name="k_proj")(channels))
        v = mlp.Projection(width, name="v_proj")(channels)
        scaled = (q[0] * width**-0.5, q[1] * width**-0.5)
        out = mlp.Projection(width, name="out_proj")(width)
        return memory_layer.Around(scaled, k, v, out)


class MemoryAttention(nn.Module):
    """Conditions the coarse features of a slice on the memory of each object.

    Attributes:
        config: network shape.
    """

    config: Sam2Config

    @nn.compact
    def __call__(
        self, coarse_BHWD: Float[Array, "B h w D"], memory: MemoryKeys
    ) -> Float[Array, "B K h w D"]:
        """Attend to the memory.

        Args:
            coarse_BHWD: coarse features as the encoder gives them.
            memory: what is remembered of K objects.
        """
        c = self.config
        b, h, w, d = coarse_BHWD.shape
        place = jnp.asarray(position.sine_position(h, w, d), coarse_BHWD.dtype)
        x = coarse_BHWD.reshape(b, 1, h * w, d) + POSITION_SHARE * place[None, None]
        cos, sin = position.rotation(h, w, d)
        table = jnp.asarray(cos), jnp.asarray(sin)
        memory = _whole_blocks(memory) if c.kernels == "tpu" else memory
        keeps = KEEPS["attention" if c.remat_keeps == "nothing" else c.remat_keeps]
        make = functools.partial(MemoryAttentionLayer, c)
        # The first layer gives every object features of its own; the others are alike.
        looped = c.loop_blocks and not self.is_initializing() and c.memory_layers > 2
        for i in range(1 if looped else c.memory_layers):
            inputs = (x, memory, table)
            x = repeats.single(self, f"layers_{i}", make, *inputs, remat=c.remat, policy=keeps)
        if looped:
            params = [self.variables["params"][f"layers_{i}"] for i in range(1, c.memory_layers)]
            layer = make(parent=None)
            x = repeats.loop([layer], params, x, memory, table, remat=c.remat, policy=keeps)
        x = layers.LayerNorm(c.compute_dtype, EPSILON, name="norm")(x)
        return x.reshape(b, -1, h, w, d)
