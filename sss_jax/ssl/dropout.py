"""Complementary channel dropout between the two strong views."""

import jax
import jax.numpy as jnp

from sss_jax.augment.keys import example_keys
from sss_jax.axes import Array, Float, Int, Key
from sss_jax.parallel import Axis, axis_size, rows

__all__ = ["complementary_masks"]


def complementary_masks(
    key: Key[Array, ""], id_B: Int[Array, " B"], width: int, axis: Axis | None, level: int = 0
) -> tuple[Float[Array, "B C"], Float[Array, "B C"]]:
    """Draw the channel factors of both strong views for one feature level.

    Each clip keeps a random half of the channels, doubled, in the first view and the other ones in
    the second view: the factors add up to 2. A random floor(G / 2) of the G clips of the global
    batch keep all channels in both views.

    Args:
        key: key of the step; with one key for all levels the same clips keep their channels
            everywhere.
        id_B: global ids of the clips held here.
        width: channels C of the level.
        axis: device axis, or None where the batch is the global one.
        level: number of the level; levels are drawn independently.

    Returns:
        The factors of the first and of the second view, all in {0, 1, 2}; the slices of a clip
        share them.

    Source: UniMatch V2 (Yang et al. 2024), complementary dropout.
    Differs from the paper: each feature level has its own draw.
    """
    keep_key, mask_key = jax.random.split(key)
    batch = id_B.shape[0]
    total = batch * axis_size(axis)
    place_G = jax.random.permutation(keep_key, total)
    keeps_B1 = (place_G[rows(batch, axis)] < total // 2)[:, None]
    keys_B = example_keys(jax.random.fold_in(mask_key, level), id_B)
    drawn_BC = jax.vmap(lambda k: jax.random.bernoulli(k, 0.5, (width,)))(keys_B)
    first_BC = jnp.where(keeps_B1, 1.0, jnp.where(drawn_BC, 2.0, 0.0))
    return first_BC, 2.0 - first_BC
