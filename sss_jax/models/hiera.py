"""Hiera, the trunk of SAM-2's image encoder.

Source: Hiera (Ryali et al. 2023) and SAM 2 (Ravi et al. 2024).
"""

import functools
from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from sss_jax.axes import Array, Float
from sss_jax.models import (
    layers,
    mlp,
    position,
    projection_kernel,
    repeats,
    window_block_kernel,
    window_kernel,
    windows,
)
from sss_jax.models.attention import ATTENDED, KEEPS, large_attention
from sss_jax.models.initial import initialiser
from sss_jax.models.mlp import Projection
from sss_jax.models.presets import Kernels, Sam2Config
from sss_jax.models.projection_kernel import Form, Weights, project

EPSILON = 1e-6


class BlockShape(NamedTuple):
    """Shape of one block: output width, heads, side of the window (0: all), query pooling."""

    width: int
    heads: int
    window: int
    pool: bool


def block_table(config: Sam2Config) -> list[BlockShape]:
    """Shapes of all blocks, in order.

    The first block of stages 2 to 4 doubles the width and pools its queries. Its window is the
    one of the stage before it, which the pooling then halves.
    """
    table: list[BlockShape] = []
    for stage, depth in enumerate(config.depths):
        for i in range(depth):
            enters = stage > 0 and i == 0
            window = config.windows[stage - 1 if enters else stage]
            if len(table) in config.global_blocks:
                window = 0
            growth = 2**stage
            shape = BlockShape(config.embed_dim * growth, config.heads * growth, window, enters)
            table.append(shape)
    return table


class WindowAttention(nn.Module):
    """Multi-head self-attention inside windows, with optional 2x2 max-pooled queries.

    Windows that overhang the map hold padding tokens, whose q, k and v are the bias of the
    projection (what a zero token gives). They take part in the softmax: SAM-2 was trained so.

    Attributes:
        width: output channels.
        heads: attention heads.
        window: side of a window; 0: the whole map.
        pool: pool the queries.
        dtype: computation type.
        kernels: of the platform that they are for.
    """

    width: int
    heads: int
    window: int
    pool: bool
    dtype: jnp.dtype
    kernels: Kernels = "off"

    @nn.compact
    def __call__(self, x_BHWC: Float[Array, "B H W C"]) -> Float[Array, "B h w E"]:
        """Attend; with `pool`, the sides are halved."""
        x = x_BHWC.astype(self.dtype)
        projection = Projection(3 * self.width, name="qkv")(x.shape[-1])
        kernel, bias = (a.astype(self.dtype) for a in projection)
        shape = (self.window, self.heads, self.pool)
        if not self.window:
            y = _attend_everywhere(x, kernel, bias, self.heads, self.pool, self.kernels)
        elif self.kernels == "tpu":
            y = _attend_in_kernel(x, kernel, bias, *shape)
        else:
            y = windows.attend(layers.linear(x, kernel), bias, *shape)
        return layers.Dense(self.width, self.dtype, name="proj")(y)


def _attend_everywhere(
    x_BHWC: Array, kernel: Array, bias: Array, heads: int, pool: bool, kernels: Kernels
) -> Array:
    qkv = layers.add_bias(layers.linear(x_BHWC, kernel), bias)
    q, k, v = windows.split_qkv(qkv, pool)
    n, h, w, width = q.shape
    q = q * (width // heads) ** -0.5
    q, k, v = (jnp.swapaxes(windows.tokens(a, heads), 1, 2) for a in (q, k, v))
    y = jnp.swapaxes(large_attention(q, k, v, kernels=kernels), 1, 2)
    return layers.merge_heads(y).reshape(n, h, w, width)


def _attend_in_kernel(
    x_BHWC: Array, kernel: Array, bias: Array, window: int, heads: int, pool: bool
) -> Array:
    """The same for TPUs, which main memory binds: the narrow input is cut into windows."""
    rows, group = _windows_in_rows(x_BHWC, window, pool)
    width = bias.size // 3
    parts = (slice(width), slice(width, None)) if pool else (slice(None),)
    projections = [
        layers.in_rows(layers.linear(rows, kernel[:, part]) + bias[part].reshape(1, 1, -1))
        for part in parts
    ]
    if pool:
        projections[0] = _pool_corners(projections[0])
    y = checkpoint_name(window_kernel.attend(tuple(projections), heads, group), ATTENDED)
    half = 2 if pool else 1
    size = x_BHWC.shape[1] // half, x_BHWC.shape[2] // half
    return windows.ungroup(y, window // half, group, *size)


def _windows_in_rows(x_BHWC: Array, window: int, pool: bool) -> tuple[Array, int]:
    """Groups of windows as the kernels take them, [G, rows, C], and how many make a group."""
    x = windows.pad(x_BHWC, window)
    group = _group_size(x.shape, window, pool)
    return layers.in_rows(windows.group(x, window, group, pool)), group


def _group_size(shape: tuple[int, ...], window: int, pool: bool) -> int:
    """How many windows of a map of this shape make a group."""
    queries = (window // 2) ** 2 if pool else window**2
    return window_kernel.group_of_windows(-(-shape[2] // window), queries, window**2)


def _pool_corners(x_GNC: Array) -> Array:
    """Pool groups of windows whose rows are sorted by corner."""
    return layers.max_over(x_GNC.reshape(len(x_GNC), 2, 2, -1, x_GNC.shape[-1]), (1, 2))


def _pool_in_windows(project: nn.Module, x_BHWC: Array, window: int) -> Array:
    """Project a map and pool it, from the windows that the block attends in."""
    rows, group = _windows_in_rows(x_BHWC, window, True)
    y = _pool_corners(layers.in_rows(project(rows)))
    return windows.ungroup(y, window // 2, group, x_BHWC.shape[1] // 2, x_BHWC.shape[2] // 2)


class Block(nn.Module):
    """Pre-norm transformer block.

    Attributes:
        width: output channels.
        heads: attention heads.
        window: side of a window; 0: the whole map.
        pool: halve the resolution.
        mlp_ratio: hidden width over width.
        dtype: computation type.
        kernels: as for `WindowAttention`.
    """

    width: int
    heads: int
    window: int
    pool: bool
    mlp_ratio: int
    dtype: jnp.dtype
    kernels: Kernels = "off"

    @nn.compact
    def __call__(self, x_BHWC: Float[Array, "B H W C"]) -> Float[Array, "B h w E"]:
        """Attend, then transform every token."""
        if self._is_one_kernel(x_BHWC.shape):
            x = self._attend_in_one_kernel(x_BHWC)
        elif self._is_global(x_BHWC.shape):
            x = self._attend_everywhere(x_BHWC)
        else:
            x = self._attend(x_BHWC)
        norm = mlp.Norm(name="norm2")(self.width)
        hidden = _Hidden(self.mlp_ratio * self.width, name="mlp")(self.width)
        weights = mlp.Weights(*norm, *hidden)
        return mlp.transform(x, weights, mlp.GELU, shortcut=True, kernels=self.kernels == "tpu")

    def _attend(self, x_BHWC: Array) -> Array:
        rows = layers.in_rows if self.kernels == "tpu" else lambda x: x
        shortcut = rows(x_BHWC)
        x = rows(layers.LayerNorm(self.dtype, name="norm1")(shortcut))
        if shortcut.shape[-1] != self.width:
            # A stage's first block projects the *normalised* tokens, unlike a plain residual.
            project = layers.Dense(self.width, self.dtype, name="proj")
            if self.pool and self.window and self.kernels == "tpu":
                shortcut = _pool_in_windows(project, x, self.window)
            else:
                shortcut = layers.max_pool(project(x)) if self.pool else project(x)
        shape = (self.width, self.heads, self.window, self.pool, self.dtype, self.kernels)
        attend = WindowAttention(*shape, name="attn")
        return rows(shortcut + attend(x))

    def _is_global(self, shape: tuple[int, ...]) -> bool:
        """Whether it attends everywhere, with kernels for the projections."""
        if self.kernels != "tpu" or self.pool or self.window or shape[-1] != self.width:
            return False
        return projection_kernel.suits(shape[1] * shape[2], self.width, 3 * self.width, self.dtype)

    def _attend_everywhere(self, x_BHWC: Array) -> Array:
        b, height, width, channels = x_BHWC.shape
        norm = mlp.Norm(name="norm1")(channels)
        kernel, bias, *behind = _Around(channels, name="attn")(channels)
        ones = jnp.ones((2 * channels,))
        scale = jnp.concatenate([ones[:channels] * (channels // self.heads) ** -0.5, ones])
        weights = Weights(layers.scale_by(kernel, scale), bias * scale, *norm)
        form = Form(results=3, heads=self.heads, through=True, epsilon=EPSILON)
        tokens = layers.in_rows(x_BHWC).reshape(1, b, height * width, channels)
        q, k, v, shortcut = project(tokens, weights, None, None, form)
        y = large_attention(q, k, v, kernels="tpu")
        return project(y, Weights(*behind), None, shortcut[0], Form())[0].reshape(x_BHWC.shape)

    def _is_one_kernel(self, shape: tuple[int, ...]) -> bool:
        """Whether norm, projections and attention are one kernel."""
        if self.kernels != "tpu" or not self.window or self.pool == (shape[-1] == self.width):
            return False
        tokens = _group_size(shape, self.window, self.pool) * self.window**2
        return window_block_kernel.suits(tokens, self.width, self.pool, self.dtype)

    def _attend_in_one_kernel(self, x_BHWC: Array) -> Array:
        _, height, width, channels = x_BHWC.shape
        norm = mlp.Norm(name="norm1")(channels)
        around = _Around(self.width, name="attn")(channels)
        # A stage's first block projects the *normalised* tokens, unlike a plain residual.
        short = Projection(self.width, name="proj")(channels) if self.pool else ()
        weights = window_block_kernel.Weights(*norm, *around, *short)
        rows, group = _windows_in_rows(layers.in_rows(x_BHWC), self.window, self.pool)
        down, across = (layers.padded_size(n, self.window) // self.window for n in (height, width))
        form = window_block_kernel.Form(
            self.window, group, down, across // group, height, width, self.heads, EPSILON, self.pool
        )
        y = checkpoint_name(window_block_kernel.attend(rows, weights, form), ATTENDED)
        half = 2 if self.pool else 1
        size = height // half, width // half
        return layers.in_rows(windows.ungroup(y, self.window // half, group, *size))


class _Around(nn.Module):
    """Parameters of the projections before and behind attention, to `features` channels."""

    features: int

    @nn.compact
    def __call__(self, channels: int) -> tuple[Array, ...]:
        before = Projection(3 * self.features, name="qkv")(channels)
        return *before, *Projection(self.features, name="proj")(self.features)


class _Hidden(nn.Module):
    """Parameters of two linear layers, to `features` channels and back."""

    features: int

    @nn.compact
    def __call__(self, channels: int) -> tuple[Array, ...]:
        first = Projection(self.features, name="layers_0")(channels)
        return *first, *Projection(channels, name="layers_1")(self.features)


class PatchEmbed(nn.Module):
    """Overlapping patches: one strided convolution.

    Attributes:
        config: network shape.
    """

    config: Sam2Config

    @nn.compact
    def __call__(self, image_BHWC: Float[Array, "B H W 3"]) -> Float[Array, "B h w C"]:
        """Embed patches."""
        c = self.config
        return layers.Conv(
            c.embed_dim,
            c.stem_kernel,
            c.compute_dtype,
            c.stem_stride,
            c.stem_kernel // 2,
            name="proj",
        )(image_BHWC)


class Hiera(nn.Module):
    """Hierarchical vision transformer with four stages.

    Attributes:
        config: network shape.
    """

    config: Sam2Config

    @nn.compact
    def __call__(self, image_BHWC: Float[Array, "B H W 3"]) -> list[Float[Array, "B h w C"]]:
        """Return the output of every stage, finest first."""
        c = self.config
        x = PatchEmbed(c, name="patch_embed")(image_BHWC)
        x = x + self._position(x.shape[1], x.shape[2]).astype(x.dtype)
        ends = {sum(c.depths[: i + 1]) for i in range(len(c.depths))}
        outputs = []
        for run in self._runs():
            x = self._repeated(run, x) if run.times > 1 else self._plain(run.first, x)
            if run.end in ends:
                outputs.append(x)
        return outputs

    def _runs(self) -> list[repeats.Run]:
        """Blocks of a stage that are the same again; parameters are made one by one."""
        table = block_table(self.config)
        if self.config.loop_blocks and not self.is_initializing():
            return repeats.find_runs(table)
        return [repeats.Run(i, 1, 1) for i in range(len(table))]

    def _plain(self, i: int, x: Array) -> Array:
        c = self.config
        make = functools.partial(Block, *block_table(c)[i], *self._common())
        policy = KEEPS[c.remat_keeps]
        return repeats.single(self, f"blocks_{i}", make, x, remat=c.remat, policy=policy)

    def _repeated(self, run: repeats.Run, x: Array) -> Array:
        c = self.config
        shapes = block_table(c)[run.first : run.first + run.period]
        group = [Block(*shape, *self._common(), parent=None) for shape in shapes]
        params = [self.variables["params"][f"blocks_{i}"] for i in range(run.first, run.end)]
        return repeats.loop(group, params, x, remat=c.remat, policy=KEEPS[c.remat_keeps])

    def _common(self) -> tuple[int, jnp.dtype, Kernels]:
        """What is the same for all blocks."""
        return self.config.mlp_ratio, self.config.compute_dtype, self.config.kernels

    def _position(self, height: int, width: int) -> Array:
        c = self.config
        side, window = c.pos_table, c.windows[0]
        table = self.param("pos_embed", initialiser("pos_embed"), (1, side, side, c.embed_dim))
        tile = self.param(
            "pos_embed_window", initialiser("pos_embed_window"), (1, window, window, c.embed_dim)
        )
        return position.trunk_position(table, tile, height, width)
