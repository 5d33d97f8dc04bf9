"""Windows of a map: cut, put back, and attention inside them.

SAM-2 pads a map with zero tokens, below and to the right, until windows tile it. Their q, k and v
are the bias of the projection, and they take part in the softmax: it was trained so.
"""

import functools

import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from sss_jax.axes import Array, Float
from sss_jax.models import layers
from sss_jax.models.attention import ATTENDED, attention
from sss_jax.models.layers import padded_size

WASTE = 1.5
"""Padded over true tokens from which a map is cut into parts before its windows attend."""


def pad(x_BHWC: Float[Array, "B H W C"], window: int) -> Float[Array, "B Hp Wp C"]:
    """Append zeros below and to the right until windows tile the map."""
    _, h, w, _ = x_BHWC.shape
    below, right = padded_size(h, window) - h, padded_size(w, window) - w
    if below == right == 0:
        return x_BHWC
    return jnp.pad(x_BHWC, ((0, 0), (0, below), (0, right), (0, 0)))


def partition(
    x_BHWC: Float[Array, "B H W C"], rows: int, columns: int
) -> Float[Array, "Bw rows columns C"]:
    """Cut a map, whose sides are multiples of the window's, into windows folded into the batch."""
    b, h, w, c = x_BHWC.shape
    x = x_BHWC.reshape(b, h // rows, rows, w // columns, columns, c)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(-1, rows, columns, c)


def merge(
    windows: Float[Array, "Bw rows columns C"], height: int, width: int
) -> Float[Array, "B H W C"]:
    """Undo `partition`, and crop to `height` x `width`."""
    _, rows, columns, c = windows.shape
    down, across = -(-height // rows), -(-width // columns)
    x = windows.reshape(-1, down, across, rows, columns, c).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(-1, down * rows, across * columns, c)[:, :height, :width]


def group(
    x_BHWC: Float[Array, "B H W C"], window: int, count: int, corners: bool
) -> Float[Array, "Bg rows C"]:
    """Cut a map into blocks of several windows side by side, each block line by line.

    Args:
        x_BHWC: a map whose sides are multiples of `window`.
        window: side of a window.
        count: windows in a block.
        corners: sort a block by corner of its 2x2 cells first, so that the maximum over its four
            quarters pools it.
    """
    b, h, _, c = x_BHWC.shape
    corner = 2 if corners else 1
    cells = window // corner
    x = x_BHWC.reshape(b, h // window, cells, corner, -1, count * cells, corner, c)
    x = x.transpose(0, 1, 4, 3, 6, 2, 5, 7)
    return x.reshape(-1, count * window**2, c)


def ungroup(
    blocks: Float[Array, "Bg rows C"], side: int, count: int, height: int, width: int
) -> Float[Array, "B H W C"]:
    """Undo `group` of `count` windows, not sorted by corner, and crop to `height` x `width`.

    `side` is that of the windows now: half of what it was where they were pooled.
    """
    return merge(blocks.reshape(-1, side, count * side, blocks.shape[-1]), height, width)


def attend(
    qkv_BHWC: Float[Array, "B H W 3E"],
    bias: Float[Array, " 3E"],
    window: int,
    heads: int,
    pool: bool,
) -> Float[Array, "B h w E"]:
    """Attend inside windows.

    Where padding would make the map much larger, as it does that of a small image, the map is cut
    instead: into what whole windows cover, and what the last ones overhang below, to the right and
    in the corner.

    Args:
        qkv_BHWC: projected tokens, before the bias.
        bias: of the projection.
        window: side of a window.
        heads: attention heads.
        pool: pool the queries 2x2; the sides must be even then.
    """
    _, height, width, _ = qkv_BHWC.shape
    inside = functools.partial(_attend_in_part, bias=bias, window=window, heads=heads, pool=pool)
    if padded_size(height, window) * padded_size(width, window) <= WASTE * height * width:
        # Padding before the bias is added equals padding the input, without projecting zeros.
        y = inside(layers.add_bias(pad(qkv_BHWC, window), bias))
        half = 2 if pool else 1
        return y[:, : height // half, : width // half]
    qkv = layers.add_bias(qkv_BHWC, bias)
    down, across = (_spans(side, window) for side in (height, width))
    rows = [jnp.concatenate([inside(qkv[:, i, j]) for j in across], axis=2) for i in down]
    return jnp.concatenate(rows, axis=1)


def _spans(size: int, window: int) -> list[slice]:
    """Cut a side into what whole windows cover and what the last one overhangs."""
    whole = size - size % window
    parts = slice(0, whole), slice(whole, size)
    return [part for part in parts if part.stop > part.start]


def _attend_in_part(qkv_BHWC: Array, bias: Array, window: int, heads: int, pool: bool) -> Array:
    """Attend inside windows that all hold the same number of tokens, and of padding.

    Padding tokens are equal: one key that counts as often as they are there stands for all.
    """
    _, height, width, _ = qkv_BHWC.shape
    rows, columns = min(window, height), min(window, width)
    q, k, v = split_qkv(partition(qkv_BHWC, rows, columns), pool)
    n, h, w, _ = q.shape
    q, k, v = (tokens(a, heads) for a in (q, k, v))
    times = None
    if padding := window**2 - rows * columns:
        k_pad, v_pad = jnp.split(bias, 3)[1:]
        k, v = _with_padding(k, k_pad), _with_padding(v, v_pad)
        times = np.append(np.ones(rows * columns, np.float32), np.float32(padding))
    y = checkpoint_name(attention(q, k, v, times=times), ATTENDED)
    y, half = layers.merge_heads(y).reshape(n, h, w, -1), 2 if pool else 1
    return merge(y, height // half, width // half)


def _with_padding(x_BNHD: Array, token_E: Array) -> Array:
    """Append a token to all sequences."""
    batch, _, heads, channels = x_BNHD.shape
    end = jnp.broadcast_to(token_E.reshape(1, 1, heads, channels), (batch, 1, heads, channels))
    return jnp.concatenate([x_BNHD, end], axis=1)


def split_qkv(
    qkv_BHWC: Float[Array, "B H W 3E"], pool: bool
) -> tuple[Float[Array, "B h w E"], Float[Array, "B H W E"], Float[Array, "B H W E"]]:
    """Return queries, pooled 2x2 or not, keys and values."""
    q, k, v = jnp.split(qkv_BHWC, 3, axis=-1)
    return layers.max_pool(q) if pool else q, k, v


def tokens(x_BHWC: Float[Array, "B H W E"], heads: int) -> Float[Array, "B N heads d"]:
    """Lay a map out as a sequence, its channels split into heads."""
    return layers.split_heads(x_BHWC.reshape(len(x_BHWC), -1, x_BHWC.shape[-1]), heads)
