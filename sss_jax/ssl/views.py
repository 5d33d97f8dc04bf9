"""The views of one batch: a weak one of every clip, strong ones of the unlabelled clips."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from sss_jax.augment.fit import fit
from sss_jax.augment.keys import example_keys
from sss_jax.augment.strong import box_mask, cutmix_box, paste, photometric
from sss_jax.augment.weak import weak_view
from sss_jax.axes import Array, Bool, Float, Int, Key
from sss_jax.options import Options
from sss_jax.parallel import Axis, swap_neighbours


class LabelledView(NamedTuple):
    """A view of labelled clips; `valid` is False outside the image and on padding slices."""

    image_BSHWC: Float[Array, "B S H W 1"]
    label_BSHW: Int[Array, "B S H W"]
    valid_BSHW: Bool[Array, "B S H W"]


class StrongView(NamedTuple):
    """A strong view: the weak one with photometric changes and a box from the clip beside it."""

    image_BSHWC: Float[Array, "B S H W 1"]
    box_B4: Float[Array, "B 4"]


class UnlabelledViews(NamedTuple):
    """Pixel-aligned views of unlabelled clips."""

    weak_BSHWC: Float[Array, "B S H W 1"]
    valid_BSHW: Bool[Array, "B S H W"]
    strong: tuple[StrongView, ...]


@jax.named_scope("augment")
def labelled_view(key: Key[Array, ""], clips: dict[str, Array], options: Options) -> LabelledView:
    """Make the weak (geometric) view of labelled clips, some of them with other intensities too.

    Differs from the paper: with `strong.labelled` above 0 a labelled clip may be changed
    photometrically, like a strong view; a network without pretraining knows few scanners.
    """
    clips = fit(clips, options)
    keys = example_keys(key, clips["id"])
    image, label, inside = jax.vmap(lambda k, x, y: weak_view(k, x, y, options.weak))(
        keys, clips["image"], clips["label"]
    )
    assert label is not None
    if options.strong.labelled > 0:
        image = _recoloured(jax.random.fold_in(key, 1), image, clips, options)
    return LabelledView(image, label, _valid(inside, clips["slice_mask"]))


@jax.named_scope("augment")
def unlabelled_views(
    key: Key[Array, ""], clips: dict[str, Array], options: Options, axis: Axis | None
) -> UnlabelledViews:
    """Make the weak view of unlabelled clips and, from it, the strong ones.

    SSS, figure 2, after UniMatch V2 (Yang et al. 2024): geometric changes are shared by all
    views, so they stay aligned pixel by pixel.
    """
    clips = fit(clips, options)
    key_weak, *key_strong = jax.random.split(key, 1 + options.semi.views)
    image, _, inside = jax.vmap(lambda k, x: weak_view(k, x, None, options.weak))(
        example_keys(key_weak, clips["id"]), clips["image"]
    )
    strong = tuple(_strong_view(k, image, clips, options, axis) for k in key_strong)
    return UnlabelledViews(image, _valid(inside, clips["slice_mask"]), strong)


def mix(box_B4: Float[Array, "B 4"], x: Array, axis: Axis | None) -> Array:
    """Paste each clip's box from its CutMix partner, the clip beside it in the batch.

    Works on arrays [B, S, H, W] or [B, S, H, W, C] of any resolution: images, pseudo-labels,
    confidences and feature maps are all cut along the same box.
    """
    mask = box_mask(box_B4, x.shape[2], x.shape[3])
    return paste(mask, x, swap_neighbours(x, axis))


def _recoloured(
    key: Key[Array, ""], image: Array, clips: dict[str, Array], options: Options
) -> Array:
    """Change the intensities of some clips, each with probability `strong.labelled`."""

    def one(key: Array, image: Array, mask: Array) -> Array:
        key_choice, key_change = jax.random.split(key)
        changed = photometric(key_change, image, options.strong, mask)
        return jnp.where(jax.random.uniform(key_choice) < options.strong.labelled, changed, image)

    return jax.vmap(one)(example_keys(key, clips["id"]), image, clips["slice_mask"])


def _strong_view(
    key: Key[Array, ""], weak: Array, clips: dict[str, Array], options: Options, axis: Axis | None
) -> StrongView:
    key_photometric, key_box = jax.random.split(key)
    image = jax.vmap(lambda k, x, mask: photometric(k, x, options.strong, mask))(
        example_keys(key_photometric, clips["id"]), weak, clips["slice_mask"]
    )
    box = jax.vmap(lambda k: cutmix_box(k, options.strong))(example_keys(key_box, clips["id"]))
    return StrongView(mix(box, image, axis), box)


def _valid(inside_BHW: Array, slice_mask_BS: Array) -> Bool[Array, "B S H W"]:
    return jnp.logical_and(inside_BHW[:, None], slice_mask_BS[:, :, None, None])
