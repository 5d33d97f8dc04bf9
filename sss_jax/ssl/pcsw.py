"""Prompt generator with physical constraints and a sliding window (PCSW).

One prompt per class and volume: the first window of slices whose foreground is mostly one
connected component gives the slice, the box and the point (SSS, Zhu et al. 2025, section 3.3).
Everything runs inside jit with fixed shapes and follows each volume's true number of slices.
"""

from fractions import Fraction
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from sss_jax.axes import Array, Bool, Float, Int
from sss_jax.models.components import component_sizes, join_planes, plane_components
from sss_jax.options import PCSWOptions
from sss_jax.ssl.prompts import (
    ClipPrompts,
    box_centre,
    clips_to_images,
    full_box,
    middle_slice,
    no_clip_prompts,
    of_clips,
    tight_box,
    to_prompts,
)

_RESOLUTION = 10_000  # of tau; its square must fit int32
_EXACT = 2  # components of the volume whose area in a window the bound knows exactly


class SlicePrompts(NamedTuple):
    """Prompts of one binary volume, in pixels of its own grid.

    Attributes:
        box_S4: inclusive corners (x0, y0, x1, y1); the whole image where not valid.
        point_S2: (x, y).
        valid_S: slices that carry a prompt.
        slice: the prompt slice; 0 without foreground.
        accepted: whether a window was accepted.
        window_start: first slice of the accepted window; 0 if none.
        window_length: slices of the accepted window; 0 if none.
        share: share of the largest component in the accepted window; 0 if none.
    """

    box_S4: Float[Array, "S 4"]
    point_S2: Float[Array, "S 2"]
    valid_S: Bool[Array, " S"]
    slice: Int[Array, ""]
    accepted: Bool[Array, ""]
    window_start: Int[Array, ""]
    window_length: Int[Array, ""]
    share: Float[Array, ""]

    @property
    def valid_BK(self) -> Bool[Array, "*BK"]:
        """Whether a volume (with leading axes: of each image and class) has any prompt."""
        return jnp.any(self.valid_S, axis=-1)


class _Window(NamedTuple):
    """A window that was searched: its place, the verdict and its largest component."""

    position: Array  # index into the flattened table of windows, which is the search order
    accepted: Array
    share: Array
    component_LHW: Array


def longest_window(slices: int) -> int:
    """Longest window that a volume of up to `slices` slices can need."""
    return min(slices, max(3, slices // 2))


def window_lengths(num_slices: Int[Array, ""]) -> tuple[Int[Array, ""], Int[Array, ""]]:
    """First and last window length of a volume's search; one slice is its own window."""
    shortest = jnp.maximum(2, num_slices // 3)
    longest = jnp.maximum(3, num_slices // 2)
    single = num_slices < 2
    return jnp.where(single, 1, (shortest + longest) // 2), jnp.where(single, 1, longest)


def enough(part: Int[Array, "*B"], whole: Int[Array, "*B"], tau: float) -> Bool[Array, "*B"]:
    """Whether part / whole >= tau, decided in whole numbers; false where `whole` is 0.

    `tau` counts as the nearest fraction with a denominator up to 10,000 (0.8 is 4/5), so a share
    of exactly tau is accepted on every device, whatever its division rounds to.

    Args:
        part: count, below 2**31.
        whole: count, below 2**31.
        tau: share in [0, 1].
    """
    fraction = Fraction(tau).limit_denominator(_RESOLUTION)
    top, bottom = fraction.numerator, fraction.denominator
    # ceil(tau * whole), without an intermediate result above 2**31
    quotient, rest = whole // bottom, whole % bottom
    need = top * quotient + (top * rest + bottom - 1) // bottom
    return (whole > 0) & (part >= need)


def _window_sums(count_S: Int[Array, " S"]) -> Int[Array, "N S"]:
    """Sum over each window: row N holds the windows of N slices, by their first slice.

    Windows that reach beyond the last slice hold the sum of the slices they have.
    """
    slices = count_S.shape[0]
    total = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(count_S)])
    start_S = jnp.arange(slices)[None]
    end_NS = jnp.minimum(start_S + jnp.arange(longest_window(slices) + 1)[:, None], slices)
    return total[end_NS] - total[start_S]


def _candidates(
    node_SHW: Int[Array, "S H W"],
    mask_SHW: Bool[Array, "S H W"],
    num_slices: Int[Array, ""],
    options: PCSWOptions,
) -> Bool[Array, "N S"]:
    """Windows that may be accepted, by length and first slice: all others surely are not.

    A component inside a window is part of a component of the volume. So no window's largest
    component exceeds the largest area that one of the volume's components has in the window;
    this is known for the volume's largest components and bounded for the rest.
    """
    slices = mask_SHW.shape[0]
    label_SHW = join_planes(node_SHW, mask_SHW, options.connectivity)
    size_V = component_sizes(label_SHW, mask_SHW)
    whole_NS = _window_sums(jnp.sum(mask_SHW, axis=(1, 2), dtype=jnp.int32))
    bound_NS, rest_NS = jnp.zeros_like(whole_NS), whole_NS
    for _ in range(_EXACT):
        largest = jnp.argmax(size_V)
        part_SHW = mask_SHW & (label_SHW == largest)
        part_NS = _window_sums(jnp.sum(part_SHW, axis=(1, 2), dtype=jnp.int32))
        bound_NS = jnp.maximum(bound_NS, part_NS)
        rest_NS = rest_NS - part_NS
        size_V = size_V.at[largest].set(0)
    bound_NS = jnp.maximum(bound_NS, jnp.minimum(rest_NS, jnp.max(size_V)))
    first, last = window_lengths(num_slices)
    length_NS = jnp.arange(longest_window(slices) + 1)[:, None] + jnp.zeros((1, slices), jnp.int32)
    start_NS = jnp.arange(slices)[None] + jnp.zeros_like(length_NS)
    inside_NS = (length_NS >= first) & (length_NS <= last) & (length_NS + start_NS <= num_slices)
    return inside_NS & enough(bound_NS, whole_NS, options.tau)


def _try_window(
    node_SHW: Int[Array, "S H W"],
    mask_SHW: Bool[Array, "S H W"],
    position: Int[Array, ""],
    options: PCSWOptions,
) -> _Window:
    """Search the components of one window."""
    slices, height, width = mask_SHW.shape
    longest = longest_window(slices)
    length, start = position // slices, position % slices
    # A window near the end is cut from earlier on and its first slices are masked.
    cut = jnp.minimum(start, slices - longest)
    node_LHW = lax.dynamic_slice_in_dim(node_SHW, cut, longest) - cut * height * width
    mask_LHW = lax.dynamic_slice_in_dim(mask_SHW, cut, longest)
    slice_L = jnp.arange(longest) + cut
    inside_L = (slice_L >= start) & (slice_L < start + length)
    mask_LHW &= inside_L[:, None, None]
    label_LHW = join_planes(node_LHW, mask_LHW, options.connectivity)
    size_V = component_sizes(label_LHW, mask_LHW)
    largest = jnp.argmax(size_V)
    part, whole = size_V[largest], jnp.sum(mask_LHW, dtype=jnp.int32)
    share = part.astype(jnp.float32) / jnp.maximum(whole, 1).astype(jnp.float32)
    component_LHW = mask_LHW & (label_LHW == largest)
    return _Window(position, enough(part, whole, options.tau), share, component_LHW)


def _first_window(
    node_SHW: Int[Array, "S H W"],
    mask_SHW: Bool[Array, "S H W"],
    candidate_NS: Bool[Array, "N S"],
    options: PCSWOptions,
) -> _Window:
    """Search the candidates in order until one is accepted."""
    candidate_P = candidate_NS.reshape(-1)
    index_P = jnp.arange(candidate_P.size, dtype=jnp.int32)

    def following(position: Array) -> Array:
        open_P = candidate_P & (index_P > position)
        return jnp.min(jnp.where(open_P, index_P, candidate_P.size))

    def search(window: _Window) -> _Window:
        window = _try_window(node_SHW, mask_SHW, window.position, options)
        position = jnp.where(window.accepted, window.position, following(window.position))
        return window._replace(position=position)

    def unfinished(window: _Window) -> Array:
        return ~window.accepted & (window.position < candidate_P.size)

    longest = longest_window(mask_SHW.shape[0])
    # Nothing is accepted yet; written so that it varies over devices as the mask does.
    nothing_LHW = mask_SHW[:longest] & ~mask_SHW[:longest]
    nothing = jnp.any(nothing_LHW)
    start = following(jnp.where(nothing, 0, -1))
    return lax.while_loop(
        unfinished, search, _Window(start, nothing, nothing.astype(jnp.float32), nothing_LHW)
    )


def _centroid(mask_SHW: Bool[Array, "S H W"]) -> Float[Array, "S 2"]:
    """Mean (x, y) of each slice's foreground; 0 without any."""
    _, height, width = mask_SHW.shape
    column_SW = jnp.sum(mask_SHW, axis=1, dtype=jnp.int32).astype(jnp.float32)
    row_SH = jnp.sum(mask_SHW, axis=2, dtype=jnp.int32).astype(jnp.float32)
    area_S = jnp.maximum(jnp.sum(row_SH, axis=1), 1.0)
    x_S = jnp.sum(column_SW * jnp.arange(width, dtype=jnp.float32)[None], axis=1) / area_S
    y_S = jnp.sum(row_SH * jnp.arange(height, dtype=jnp.float32)[None], axis=1) / area_S
    return jnp.stack([x_S, y_S], axis=-1)


def _prompt_slices(
    mask_SHW: Bool[Array, "S H W"], window: _Window, options: PCSWOptions
) -> SlicePrompts:
    """Turn the accepted component, or the whole foreground without one, into prompts."""
    slices, height, width = mask_SHW.shape
    longest = longest_window(slices)
    accepted = window.accepted
    start = jnp.where(accepted, window.position % slices, 0)
    length = jnp.where(accepted, window.position // slices, 0)
    cut = jnp.minimum(start, slices - longest)
    component_SHW = lax.dynamic_update_slice_in_dim(
        mask_SHW & ~mask_SHW, window.component_LHW, cut, axis=0
    )
    target_SHW = jnp.where(accepted, component_SHW, mask_SHW)
    area_S = jnp.sum(target_SHW, axis=(1, 2), dtype=jnp.int32)
    prompt = jnp.argmax(area_S).astype(jnp.int32)
    away_S = jnp.abs(jnp.arange(slices, dtype=jnp.int32) - prompt)
    chosen_S = away_S == 0
    if options.prompts == "every_k":
        chosen_S |= accepted & (away_S % options.every == 0)
    valid_S = chosen_S & (area_S > 0)
    box_S4, _ = tight_box(target_SHW)
    point_S2 = jnp.where(accepted, box_centre(box_S4), _centroid(target_SHW))
    full_S4 = full_box(height, width)[None]
    box_S4 = jnp.where(valid_S[:, None], box_S4, full_S4)
    point_S2 = jnp.where(valid_S[:, None], point_S2, box_centre(full_S4))
    share = jnp.where(accepted, window.share, 0.0)
    return SlicePrompts(box_S4, point_S2, valid_S, prompt, accepted, start, length, share)


def search_prompts(
    mask_SHW: Bool[Array, "S H W"], num_slices: Int[Array, ""], options: PCSWOptions
) -> SlicePrompts:
    """Make the prompts of one class in one volume.

    The windows are tried from shorter to longer and from the first slice to the last; the first
    one whose largest component has at least the share `tau` of its foreground is accepted. The
    prompt slice is the one where that component is largest (the first on ties; of equally large
    components, the one whose first voxel in raster order comes first). If none is accepted, the
    slice with the most foreground gets a box around all of it and its centroid. Without any
    foreground the box is the whole image and nothing is valid.

    Differs from the paper: a window without foreground is never accepted; windows that the
    components of the whole volume rule out are not searched, which cannot change the result.

    Args:
        mask_SHW: foreground of the class; padding slices come last.
        num_slices: true number of slices, at most S; may be traced.
        options: `tau`, `connectivity`, `prompts` and `every` are used.
    """
    num_slices = jnp.asarray(num_slices, jnp.int32)
    true_S = jnp.arange(mask_SHW.shape[0], dtype=jnp.int32) < num_slices
    mask_SHW = mask_SHW & true_S[:, None, None]
    node_SHW = plane_components(mask_SHW, options.connectivity)
    candidate_NS = _candidates(node_SHW, mask_SHW, num_slices, options)
    window = _first_window(node_SHW, mask_SHW, candidate_NS, options)
    return _prompt_slices(mask_SHW, window, options)


@jax.named_scope("pcsw")
def clip_prompts(
    prob_BSHWK: Float[Array, "B S H W K"],
    slice_mask_BS: Bool[Array, "B S"],
    image_size: int,
    options: PCSWOptions,
) -> tuple[ClipPrompts, Float[Array, ""]]:
    """Make the prompts of clips, without gradient; none where PCSW is off.

    Returns:
        Prompts in input pixels, and the share of clips and classes that got one.
    """
    width, classes = prob_BSHWK.shape[3:]
    if not options.enabled:
        return no_clip_prompts(slice_mask_BS, classes), jnp.zeros(())
    prob_BSHWK = lax.stop_gradient(prob_BSHWK)
    prompts, found = volume_prompts(prob_BSHWK, slice_mask_BS, image_size // width, options)
    return prompts, found.valid_BK.astype(jnp.float32).mean()


def volume_prompts(
    prob_BSHWK: Float[Array, "B S H W K"],
    slice_mask_BS: Bool[Array, "B S"],
    stride: int,
    options: PCSWOptions,
) -> tuple[ClipPrompts, SlicePrompts]:
    """Make the prompts of every volume and class, scaled to the input image.

    Args:
        prob_BSHWK: probability of each foreground class on the mask grid.
        slice_mask_BS: true slices; padding slices come last.
        stride: input pixels per mask pixel; mask pixel i covers the input pixels
            i * stride to i * stride + stride - 1.
        options: settings of the search.

    Returns:
        Prompts in input pixels, and the search results with leading axes (B, K), in pixels of the
        mask grid. A class without foreground starts from the middle slice.
    """
    mask_BSHWK = prob_BSHWK.astype(jnp.float32) > options.threshold
    mask_BKSHW = jnp.moveaxis(mask_BSHWK, -1, 1)
    num_B = jnp.sum(slice_mask_BS, axis=1, dtype=jnp.int32)

    def classes(mask_KSHW: Array, num_slices: Array) -> SlicePrompts:
        return jax.vmap(lambda mask_SHW: search_prompts(mask_SHW, num_slices, options))(mask_KSHW)

    found = jax.vmap(classes)(mask_BKSHW, num_B)

    def images(array_BKS: Array) -> Array:
        return clips_to_images(jnp.swapaxes(array_BKS, 1, 2))

    last_4 = jnp.array([0, 0, stride - 1, stride - 1], jnp.float32)
    box_BK4 = images(found.box_S4) * stride + last_4[None, None]
    point_BK2 = images(found.point_S2) * stride + (stride - 1) / 2
    flat = to_prompts(box_BK4, point_BK2, images(found.valid_S))
    start_BK = jnp.where(found.valid_BK, found.slice, middle_slice(slice_mask_BS)[:, None])
    return of_clips(flat, slice_mask_BS.shape[1], start_BK), found
