"""Discriminative feature enhancement (DFE): what changed between two views of an image.

Per feature level (SSS, Zhu et al. 2025, section 3.2):

    A = conv3x3(P_a), B = conv3x3(P_b)                       one convolution for both views
    s = cos(mean of A, mean of B) over the image; w = sigmoid(s)
    F_adj = w * MLP(A) + (1 - w) * MLP(B) + (1 - s) * (B - A)

P_b is a strong view and P_a the other strong view, or the weak one (`dfe.pair`). Convolution and
MLP of a view do not depend on the other view, so a view that is compared twice is projected once.
Parameters are plain dicts.

Differs from the paper: it compares weak and strong views. What the weak view's features add is what
the pseudo-label was made from, so the student learns to copy it, and at test time nothing adds it.
And it enhances the finest features too (`dfe.level_4`), three quarters of DFE's operations, which
gained nothing where it was measured (docs/reference/results.md).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from sss_jax.axes import Array, Float, Key, PyTree
from sss_jax.models import convolution, layers
from sss_jax.models.repeats import recomputed
from sss_jax.options import DFEOptions

LEVELS = ("level_4", "level_8", "level_16")  # options and parameters, from fine to coarse

_LAYERS = 4
_NORM_EPSILON = 1e-5
_COSINE_EPSILON = 1e-16  # of squared norms; a view without features has similarity 0

Features = tuple[Array, ...]


class Projection(NamedTuple):
    """One view at one level: what does not depend on the other view."""

    conv_BHWD: Float[Array, "B H W D"]
    mlp_BHWD: Float[Array, "B H W D"]


class Enhanced(NamedTuple):
    """Features after DFE; `weak` is None unless `enhance_weak`; similarity per enabled level."""

    strong: Features
    weak: Features | None
    similarity: dict[str, Float[Array, " B"]]


def enabled_levels(options: DFEOptions) -> tuple[str, ...]:
    """Names of the levels that DFE uses, from fine to coarse."""
    return tuple(level for level in LEVELS if getattr(options, level))


def init_dfe(key: Key[Array, ""], dim: int, options: DFEOptions, scale: float = 1.0) -> PyTree:
    """Draw the parameters: LeCun-normal kernels, zero biases, unit norms.

    Args:
        key: random key.
        dim: feature width D; the MLP is D to 2D, 2D to 2D, 2D to D, D to D.
        options: which levels exist.
        scale: factor of the kernels of the convolution and of the last linear layer; 0 starts from
            a DFE that is silent: F_adj = 0.

    Returns:
        `{level: {"conv": ..., "linear_0": ..., "norm_0": ..., ...}}`, in float32.
    """
    keys = jax.random.split(key, len(LEVELS))
    return {
        level: _init_level(level_key, dim, scale)
        for level, level_key in zip(LEVELS, keys, strict=True)
        if getattr(options, level)
    }


def _init_level(key: Key[Array, ""], dim: int, scale: float) -> PyTree:
    draw = jax.nn.initializers.lecun_normal()
    keys = jax.random.split(key, _LAYERS + 1)
    widths = (dim, 2 * dim, 2 * dim, dim, dim)
    conv = draw(keys[0], (3, 3, dim, dim)) * scale
    params = {"conv": {"kernel": conv, "bias": jnp.zeros(dim)}}
    for layer in range(_LAYERS):
        shape, last = (widths[layer], widths[layer + 1]), layer == _LAYERS - 1
        kernel = draw(keys[layer + 1], shape) * (scale if last else 1.0)
        params[f"linear_{layer}"] = {"kernel": kernel, "bias": jnp.zeros(shape[1])}
        if not last:
            params[f"norm_{layer}"] = {"scale": jnp.ones(shape[1]), "bias": jnp.zeros(shape[1])}
    return params


def _norm_relu(params: PyTree, x: Array) -> Array:
    """LayerNorm over channels with float32 statistics, then ReLU."""
    wide = layers.layer_norm(x, params["scale"], params["bias"], _NORM_EPSILON)
    return jax.nn.relu(wide).astype(x.dtype)


def project(
    params: PyTree, features_BHWD: Float[Array, "B H W D"], dtype: jnp.dtype | None = None
) -> Projection:
    """Apply the convolution and the MLP of one level to one view.

    Args:
        params: parameters of the level.
        features_BHWD: FPN map.
        dtype: computation type; that of the features if None.
    """
    dtype = features_BHWD.dtype if dtype is None else dtype
    low = jax.tree.map(lambda p: p.astype(dtype), params)
    kernel = low["conv"]["kernel"]
    conv = convolution.convolve(features_BHWD.astype(dtype), kernel, stride=1, padding=1)
    conv = layers.add_bias(conv, low["conv"]["bias"])
    x = conv
    for layer in range(_LAYERS):
        linear = low[f"linear_{layer}"]
        x = layers.add_bias(layers.linear(x, linear["kernel"]), linear["bias"])
        if layer < _LAYERS - 1:
            x = _norm_relu(params[f"norm_{layer}"], x)
    return Projection(conv, x)


def similarity(
    one_BHWD: Float[Array, "B H W D"], other_BHWD: Float[Array, "B H W D"]
) -> Float[Array, " B"]:
    """Cosine between the spatial means of two maps, in float32; 0 where one of them is 0."""
    a_BD = jnp.mean(one_BHWD.astype(jnp.float32), axis=(1, 2))
    b_BD = jnp.mean(other_BHWD.astype(jnp.float32), axis=(1, 2))

    def unit(x_BD: Array) -> Array:
        square = jnp.sum(x_BD * x_BD, axis=-1, keepdims=True)
        return x_BD * lax.rsqrt(jnp.maximum(square, _COSINE_EPSILON))

    return jnp.sum(unit(a_BD) * unit(b_BD), axis=-1)


def compare(
    weak: Projection, strong: Projection
) -> tuple[Float[Array, "B H W D"], Float[Array, " B"]]:
    """Compare two views at one level.

    Args:
        weak: projections of the weak view (A).
        strong: projections of the strong view (B).

    Returns:
        The adjusted features F_adj and the similarity s of each image.
    """
    s_B = similarity(weak.conv_BHWD, strong.conv_BHWD)
    dtype = strong.conv_BHWD.dtype
    s = s_B[:, None, None, None]
    share, change = jax.nn.sigmoid(s).astype(dtype), (1 - s).astype(dtype)
    fused = share * weak.mlp_BHWD + (1 - share) * strong.mlp_BHWD
    return fused + change * (strong.conv_BHWD - weak.conv_BHWD), s_B


def project_levels(
    params: PyTree, features: Features, options: DFEOptions
) -> dict[str, Projection]:
    """Apply `project` to every enabled level of one view (fine, middle, coarse)."""
    maps = dict(zip(LEVELS, features, strict=True))
    # The MLP's hidden layers are the largest arrays of a step: 512 channels at stride 4.
    apply = recomputed(project) if options.remat else project
    return {level: apply(params[level], maps[level]) for level in enabled_levels(options)}


def merge_levels(
    strong: Features,
    own: dict[str, Projection],
    other: dict[str, Projection],
    options: DFEOptions,
) -> tuple[Features, dict[str, Float[Array, " B"]]]:
    """Enhance one view, given the projections of both.

    Args:
        strong: features of the view (fine, middle, coarse).
        own: its projections.
        other: projections of the view it is compared with, pasted wherever this view is pasted.
        options: `residual` adds the adjusted features, `replace` puts them in place; levels that
            are not enabled pass unchanged.

    Returns:
        The enhanced features and the similarity per enabled level.
    """
    merged, similarities = list(strong), {}
    for index, level in enumerate(LEVELS):
        if not getattr(options, level):
            continue
        adjusted, similarities[level] = compare(other[level], own[level])
        adjusted = adjusted.astype(strong[index].dtype)
        residual = options.merge == "residual"
        merged[index] = strong[index] + adjusted if residual else adjusted
    return tuple(merged), similarities


def enhance(params: PyTree, weak: Features, strong: Features, options: DFEOptions) -> Enhanced:
    """Enhance a strong view by its weak view, projecting both.

    With `pair = strong_strong` pass the other strong view as `weak`. The sources disagree on the
    weak side: the sketch leaves it alone, the figure adds to it (`enhance_weak`).

    Args:
        params: result of `init_dfe`.
        weak: FPN maps of the weak view (fine, middle, coarse), before conv_s0 and conv_s1.
        strong: the same of the strong view; B are images, slices flattened.
        options: settings.
    """
    seen_weak = project_levels(params, weak, options)
    seen_strong = project_levels(params, strong, options)
    enhanced, similarities = merge_levels(strong, seen_strong, seen_weak, options)
    lifted = None
    if options.enhance_weak:
        lifted = lift_weak(weak, seen_weak, seen_strong, options)
    return Enhanced(enhanced, lifted, similarities)


def lift_weak(
    weak: Features,
    weak_projections: dict[str, Projection],
    strong_projections: dict[str, Projection],
    options: DFEOptions,
) -> Features:
    """Add the adjusted features of the pair to the weak view (`enhance_weak`)."""
    lifted = list(weak)
    for index, level in enumerate(LEVELS):
        if getattr(options, level):
            adjusted, _ = compare(weak_projections[level], strong_projections[level])
            lifted[index] = weak[index] + adjusted.astype(weak[index].dtype)
    return tuple(lifted)
