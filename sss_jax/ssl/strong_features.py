"""From the encoder's features of the strong views to what the decoder sees of them.

Complementary dropout (UniMatch V2, Yang et al. 2024), then DFE (SSS, Zhu et al. 2026).
"""

import jax
import jax.numpy as jnp

from sss_jax.axes import Array, Key, PyTree
from sss_jax.options import Options
from sss_jax.parallel import Axis
from sss_jax.ssl import dfe, dropout
from sss_jax.ssl.network import Features, Network
from sss_jax.ssl.prompts import clips_to_images, images_to_clips
from sss_jax.ssl.pseudo_labels import PseudoLabels
from sss_jax.ssl.views import UnlabelledViews, mix

Aux = dict[str, Array]


def view_volumes(
    student: Network,
    strong: list[Features],
    views: UnlabelledViews,
    pseudo: PseudoLabels,
    options: Options,
    axis: Axis | None,
) -> list[Array]:
    """Masks that prompt the strong views: the weak pseudo-masks (sketch) or their own (figure).

    With CutMix the weak masks are pasted before the search, so that a prompt never points at
    something the view no longer shows.
    """
    if options.pcsw.source == "per_view":
        slices = views.valid_BSHW.shape[1]
        return [images_to_clips(student.coarse_foreground(f), slices) for f in strong]
    return [mix(view.box_B4, pseudo.coarse_BSHWK, axis) for view in views.strong]


def drop_channels(
    key: Key[Array, ""], strong: list[Features], ids: Array, options: Options, axis: Axis | None
) -> list[Features]:
    """Drop complementary channels of the two strong views, level by level."""
    if not options.semi.dropout:
        return strong
    slices = strong[0][0].shape[0] // ids.shape[0]
    views: list[list[Array]] = [[], []]
    for level, pair in enumerate(zip(*strong, strict=True)):
        masks = dropout.complementary_masks(key, ids, pair[0].shape[-1], axis, level=level)
        for view, feature, mask_BD in zip(views, pair, masks, strict=True):
            factor = jnp.repeat(mask_BD, slices, axis=0)[:, None, None, :]
            view.append(feature * factor.astype(feature.dtype))
    return [tuple(view) for view in views]


@jax.named_scope("dfe")
def enhance_views(
    params: PyTree,
    pseudo: PseudoLabels,
    strong: list[Features],
    views: UnlabelledViews,
    options: Options,
    axis: Axis | None,
) -> tuple[list[Features], list[Features], Aux]:
    """Run DFE on each strong view; the weak side is projected once and pasted like the image.

    Also returns the lifted weak features beside each strong view, none without `enhance_weak`.
    """
    if not options.dfe.enabled:
        return strong, [], {}
    own = [dfe.project_levels(params["dfe"], features, options.dfe) for features in strong]
    if options.dfe.pair == "strong_strong":
        others = own[::-1]
    else:
        weak = dfe.project_levels(params["dfe"], pseudo.features, options.dfe)
        others = _pasted(weak, views, axis)
    merged = [
        dfe.merge_levels(*arguments, options.dfe)
        for arguments in zip(strong, own, others, strict=True)
    ]
    similarity = {
        f"similarity_{level}": jnp.stack([found[level] for _, found in merged]).mean()
        for level in dfe.enabled_levels(options.dfe)
    }
    lifted: list[Features] = []
    if options.dfe.enhance_weak:
        pasted = _pasted(pseudo.features, views, axis)
        lifted = [
            dfe.lift_weak(*arguments, options.dfe)
            for arguments in zip(pasted, others, own, strict=True)
        ]
    return [features for features, _ in merged], jax.lax.stop_gradient(lifted), similarity


def _pasted(maps: PyTree, views: UnlabelledViews, axis: Axis | None) -> list[PyTree]:
    """Paste maps of the weak view's images along the box of each strong view."""
    slices = views.valid_BSHW.shape[1]

    def paste(x: Array, box_B4: Array) -> Array:
        return clips_to_images(mix(box_B4, images_to_clips(x, slices), axis))

    return [jax.tree.map(lambda x, box=v.box_B4: paste(x, box), maps) for v in views.strong]
