"""Initial values of parameters: one rule per kind of leaf, and one draw for all of them."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from sss_jax.axes import Array, Key, PyTree

TABLE_STD = 1.0
SMALL_STD = 0.02

_STD = {
    "embedding": TABLE_STD,
    "positional_encoding_gaussian_matrix": TABLE_STD,
    "pos_embed": SMALL_STD,
    "pos_embed_window": SMALL_STD,
    "no_mem_embed": SMALL_STD,
    "no_mem_pos_enc": SMALL_STD,
    "maskmem_tpos_enc": SMALL_STD,
    "no_obj_ptr": SMALL_STD,
    "no_obj_embed_spatial": SMALL_STD,
}

# Constant leaves. A fuser block starts as (almost) the identity (Liu et al. 2022).
_CONSTANT = {"bias": 0.0, "scale": 1.0, "gamma": 1e-6}


def rule(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """Mean and standard deviation of a leaf, from its name and shape.

    Kernels keep the variance of their input (LeCun et al. 1998); the last axis is the output.
    """
    if name == "kernel":
        return 0.0, 1 / math.sqrt(math.prod(shape[:-1]))
    if name in _CONSTANT:
        return _CONSTANT[name], 0.0
    return 0.0, _STD[name]


def initialiser(name: str, std: float | None = None) -> nn.initializers.Initializer:
    """Linen initialiser that follows `rule`, with another spread where `std` is given."""

    def draw(key: Key[Array, ""], shape: tuple[int, ...], dtype: jnp.dtype = jnp.float32) -> Array:
        mean, spread = rule(name, shape) if std is None else (0.0, std)
        return mean + spread * _standard(key, shape) if spread else jnp.full(shape, mean, dtype)

    return draw


def draw_all(key: Key[Array, ""], shapes: PyTree, std: dict[str, float]) -> PyTree:
    """Draw every leaf of a tree of shapes by `rule` from one stream of random numbers.

    One draw, cut to pieces, compiles in seconds where a draw per leaf takes a minute.

    Args:
        key: random key.
        shapes: nested dict of `jax.ShapeDtypeStruct`.
        std: spread of leaves that have no rule, by name.
    """
    leaves, tree = jax.tree.flatten_with_path(shapes)
    rules = [(*_rule_of(path[-1].key, leaf.shape, std), leaf.shape) for path, leaf in leaves]
    sizes = [math.prod(shape) if drawn else 0 for drawn, _, _, shape in rules]
    stream = _standard(key, (sum(sizes),))
    values, start = [], 0
    for (drawn, mean, spread, shape), size in zip(rules, sizes, strict=True):
        piece = jax.lax.slice(stream, (start,), (start + size,))
        values.append(
            piece.reshape(shape) * spread if drawn else jnp.full(shape, mean, jnp.float32)
        )
        start += size
    return jax.tree.unflatten(tree, values)


def _rule_of(name: str, shape: tuple[int, ...], std: dict[str, float]) -> tuple[bool, float, float]:
    """Whether a leaf takes part in the stream, its mean and its spread.

    A leaf with a spread of its own always does, so that setting it to 0 changes no other leaf.
    """
    if name in std:
        return True, 0.0, std[name]
    mean, spread = rule(name, shape)
    return spread > 0, mean, spread


def _standard(key: Key[Array, ""], shape: tuple[int, ...]) -> Array:
    """Normal numbers cut at two standard deviations, rescaled to unit variance."""
    return jax.random.truncated_normal(key, -2.0, 2.0, shape) / 0.87962566103423978
