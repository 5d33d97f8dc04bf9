"""One SSS step as a pure function: (params, teacher, batch, key) -> (loss, aux).

    labelled    x, y --weak--> E --> D(prompts) ---------------------> L_l
    unlabelled  x --weak--> E', coarse head, PCSW, D' --> pseudo-label, prompts (no gradient)
                  --strong 1, 2--> E --> dropout --> DFE(weak, strong) --> D(prompts) --> L_u

E is the image encoder, D the mask decoder that carries every class through the slices of a clip by
memory attention, E' and D' the teacher's. Source: SSS (Zhu et al. 2026,
arXiv 2506.08949), figure 2; weak-to-strong frame from UniMatch V2 (Yang et al. 2024).
Differs from the paper: the coarse head is trained with the supervised loss on labelled slices
(the published sketch never trains it); where CutMix pastes a box, pseudo-label, confidence,
coarse masks and weak features are pasted with it, the features after the convolution of DFE.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from sss_jax import losses
from sss_jax.axes import Array, Bool, Float, Int, Key, PyTree
from sss_jax.models.sss import SegmentOutput, SSSModel
from sss_jax.options import Options
from sss_jax.ssl import dfe, dropout, labelled_prompts
from sss_jax.ssl.network import Features, Network
from sss_jax.ssl.pcsw import volume_prompts
from sss_jax.ssl.prompts import ClipPrompts, clips_to_images, images_to_clips, no_clip_prompts
from sss_jax.ssl.propagation import segment_clips
from sss_jax.ssl.views import (
    LabelledView,
    UnlabelledViews,
    labelled_view,
    mix,
    unlabelled_views,
)

Batch = dict[str, dict[str, Array]]
Aux = dict[str, Array]


class PseudoLabels(NamedTuple):
    """What the teacher says of the weak view; everything is under stop-gradient."""

    features: Features
    coarse_BSHWK: Float[Array, "B S h w K"]
    label_BSHW: Int[Array, "B S H W"]
    confidence_BSHW: Float[Array, "B S H W"]
    prompts_valid: Float[Array, ""]


def sss_loss(
    params: PyTree,
    teacher: PyTree,
    batch: Batch,
    key: Key[Array, ""],
    step: Int[Array, ""],
    *,
    model: SSSModel,
    options: Options,
    axis: str | None = None,
) -> tuple[Float[Array, ""], Aux]:
    """Compute the loss of one step and what is worth logging.

    Args:
        params: `{"net": parameters of SSSModel, "dfe": parameters of DFE}` of the student.
        teacher: `net` parameters that make the pseudo-labels.
        batch: `labelled` and, unless `semi.enabled` is false, `unlabelled` clips.
        key: key of this step; randomness of an example depends on it and on the example's id.
        step: steps done so far, for the ramp of the unlabelled loss.
        model: the network.
        options: all settings.
        axis: name of the pmap or shard_map axis; None when the batch is global.

    Returns:
        The scalar loss over the global batch, and scalars by name.
    """
    student = Network(model, params["net"])
    key_labelled, key_unlabelled, key_dropout, key_prompts = jax.random.split(key, 4)
    labelled = labelled_view(key_labelled, batch["labelled"], options)
    images = [labelled.image_BSHWC]
    if options.semi.enabled:
        views = unlabelled_views(key_unlabelled, batch["unlabelled"], options, axis)
        pseudo = make_pseudo_labels(
            Network(model, teacher), views, batch["unlabelled"]["slice_mask"], options
        )
        images += [view.image_BSHWC for view in views.strong]

    # Labelled images and strong views pass the encoder, and later the decoder, in one call.
    sizes = [image.shape[0] * image.shape[1] for image in images]
    encoded = student.encode(_join([clips_to_images(image) for image in images]))
    features, *strong = _cut(encoded, sizes)
    enhanced: list[Features] = []
    similarity: Aux = {}
    volumes: list[Array] = []
    if options.semi.enabled:
        dropped = _drop(key_dropout, strong, batch["unlabelled"]["id"], options, axis)
        enhanced, similarity = _enhance(params, pseudo, dropped, views, options, axis)
        volumes = _view_volumes(student, strong, views, pseudo, options, axis)
    masks = [batch["labelled"]["slice_mask"]]
    if enhanced:
        masks += [batch["unlabelled"]["slice_mask"]] * len(enhanced)
    prompts = _prompts(key_prompts, student, features, labelled, volumes, batch, options)
    segmented = segment_clips(student, _join([features, *enhanced]), prompts, _join(masks), options)
    outputs = _cut(segmented, sizes)

    loss, aux = _labelled_loss(student, features, outputs[0], labelled, options, axis)
    if options.semi.enabled:
        unlabelled, shares = _unlabelled_loss(outputs[1:], pseudo, views, options, axis)
        loss += options.semi.weight * _ramp(step, options.semi.ramp_steps) * unlabelled
        aux |= {"loss_unlabelled": unlabelled} | shares
        aux |= {"prompts_valid": pseudo.prompts_valid} | similarity
    return loss, aux


def make_pseudo_labels(
    teacher: Network,
    views: UnlabelledViews,
    slice_mask_BS: Bool[Array, "B S"],
    options: Options,
) -> PseudoLabels:
    """Segment the weak view with the teacher: coarse masks, PCSW prompts, then the decoder."""
    teacher = Network(teacher.model, jax.lax.stop_gradient(teacher.net))
    _, slices, height, width = views.valid_BSHW.shape
    features = teacher.encode(clips_to_images(views.weak_BSHWC))
    coarse = images_to_clips(teacher.coarse_foreground(features), slices)
    prompts, prompts_valid = _search(coarse, slice_mask_BS, width, options)
    logits = segment_clips(teacher, features, prompts, slice_mask_BS, options).logits_BHWK1
    probability = jax.nn.softmax(losses.upsample_logits(logits, (height, width)))
    pseudo = PseudoLabels(
        features=features,
        coarse_BSHWK=coarse,
        label_BSHW=images_to_clips(jnp.argmax(probability, axis=-1), slices),
        confidence_BSHW=images_to_clips(jnp.max(probability, axis=-1), slices),
        prompts_valid=prompts_valid,
    )
    return jax.lax.stop_gradient(pseudo)


def _search(
    coarse_BSHWK: Array, slice_mask_BS: Array, image_size: int, options: Options
) -> tuple[ClipPrompts, Array]:
    """Run PCSW; also return the share of clips and classes that got a prompt."""
    width, classes = coarse_BSHWK.shape[3:]
    if not options.pcsw.enabled:
        return no_clip_prompts(slice_mask_BS, classes), jnp.zeros(())
    coarse_BSHWK = jax.lax.stop_gradient(coarse_BSHWK)
    prompts, found = volume_prompts(coarse_BSHWK, slice_mask_BS, image_size // width, options.pcsw)
    return prompts, found.valid_BK.astype(jnp.float32).mean()


def _prompts(
    key: Array,
    student: Network,
    features: Features,
    labelled: LabelledView,
    view_volumes: list[Array],
    batch: Batch,
    options: Options,
) -> ClipPrompts:
    """Make the prompts of the labelled clips and of all strong views: one search for all."""
    ids, mask = batch["labelled"]["id"], batch["labelled"]["slice_mask"]
    slices, size = labelled.label_BSHW.shape[1:3]
    coarse = images_to_clips(student.coarse_foreground(features), slices)
    own = labelled_prompts.volumes_to_search(labelled.label_BSHW, coarse, options)
    masks = [mask] * len(own)
    if view_volumes:
        masks += [batch["unlabelled"]["slice_mask"]] * len(view_volumes)
    found: list[ClipPrompts] = []
    if masks:
        together, _ = _search(_join([*own, *view_volumes]), _join(masks), size, options)
        found = _cut(together, [len(m) for m in masks])
    none = no_clip_prompts(mask, coarse.shape[-1])
    first = labelled_prompts.choose(key, found[: len(own)], own, ids, none, options)
    others = found[len(own) :]
    if first.mask_BSKHW is not None:
        height, width = first.mask_BSKHW.shape[-2:]
        others = [other.without_masks((height, width)) for other in others]
    return _join([first, *others])


def _view_volumes(
    student: Network,
    strong: list[Features],
    views: UnlabelledViews,
    pseudo: PseudoLabels,
    options: Options,
    axis: str | None,
) -> list[Array]:
    """Masks that prompt the strong views: the weak pseudo-masks (sketch) or their own (figure).

    With CutMix the weak masks are pasted before the search, so that a prompt never points at
    something the view no longer shows.
    """
    if options.pcsw.source == "per_view":
        slices = views.valid_BSHW.shape[1]
        return [images_to_clips(student.coarse_foreground(f), slices) for f in strong]
    return [mix(view.box_B4, pseudo.coarse_BSHWK, axis) for view in views.strong]


def _drop(
    key: Array, strong: list[Features], ids: Array, options: Options, axis: str | None
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


def _enhance(
    params: PyTree,
    pseudo: PseudoLabels,
    strong: list[Features],
    views: UnlabelledViews,
    options: Options,
    axis: str | None,
) -> tuple[list[Features], Aux]:
    """Run DFE on each strong view; the weak side is projected once and pasted like the image."""
    if not options.dfe.enabled:
        return strong, {}
    own = [dfe.project_levels(params["dfe"], features, options.dfe) for features in strong]
    if options.dfe.pair == "strong_strong":
        others = own[::-1]
    else:
        slices = views.valid_BSHW.shape[1]
        weak = dfe.project_levels(params["dfe"], pseudo.features, options.dfe)
        weak = jax.tree.map(lambda x: images_to_clips(x, slices), weak)
        others = [
            jax.tree.map(lambda x, box=view.box_B4: clips_to_images(mix(box, x, axis)), weak)
            for view in views.strong
        ]
    merged = [
        dfe.merge_levels(*arguments, options.dfe)
        for arguments in zip(strong, own, others, strict=True)
    ]
    similarity = {
        f"similarity_{level}": jnp.stack([found[level] for _, found in merged]).mean()
        for level in dfe.enabled_levels(options.dfe)
    }
    return [features for features, _ in merged], similarity


def _labelled_loss(
    student: Network,
    features: Features,
    output: SegmentOutput,
    view: LabelledView,
    options: Options,
    axis: str | None,
) -> tuple[Array, Aux]:
    label, valid = clips_to_images(view.label_BSHW), clips_to_images(view.valid_BSHW)
    weights, size = options.loss, (label.shape[1], label.shape[2])
    logits = losses.upsample_logits(output.logits_BHWK1, size)
    coarse = losses.upsample_logits(student.coarse(features), size)
    terms = {
        "loss_labelled": losses.supervised_loss(logits, label, valid, weights, axis),
        "loss_coarse": losses.supervised_loss(coarse, label, valid, weights, axis),
        "loss_iou": losses.iou_loss(output.iou_BK, logits, label, valid, axis),
        "loss_presence": losses.presence_loss(output.object_score_BK, label, valid, axis),
    }
    factors = (1.0, weights.coarse, weights.iou, weights.presence)
    total = sum((f * t for f, t in zip(factors, terms.values(), strict=True)), jnp.zeros(()))
    return total, terms


def _unlabelled_loss(
    outputs: list[SegmentOutput],
    pseudo: PseudoLabels,
    views: UnlabelledViews,
    options: Options,
    axis: str | None,
) -> tuple[Array, Aux]:
    """Average the consistency loss over the strong views; also return the trusted shares.

    `coverage` is the share of pixels with a confident pseudo-label, `coverage_foreground` that of
    confident foreground: coverage near 1 with none of it foreground teaches nothing.
    """
    tau, total = options.semi.confidence, jnp.zeros(())
    shares = {"coverage": jnp.zeros(()), "coverage_foreground": jnp.zeros(())}
    for output, view in zip(outputs, views.strong, strict=True):
        label, confidence, valid = (
            clips_to_images(mix(view.box_B4, x, axis))
            for x in (pseudo.label_BSHW, pseudo.confidence_BSHW, views.valid_BSHW)
        )
        logits = losses.upsample_logits(output.logits_BHWK1, (label.shape[1], label.shape[2]))
        total += losses.unlabelled_loss(
            logits,
            label,
            confidence,
            valid,
            tau,
            dice=options.semi.unlabelled_dice,
            smooth=options.loss.smooth,
            axis=axis,
        )
        foreground = jnp.where(label > 0, confidence, -1.0)
        shares["coverage"] += losses.confident_share(confidence, valid, tau, axis)
        shares["coverage_foreground"] += losses.confident_share(foreground, valid, tau, axis)
    count = len(outputs)
    return total / count, {name: share / count for name, share in shares.items()}


def _ramp(step: Array, ramp_steps: int) -> Array:
    if ramp_steps == 0:
        return jnp.ones(())
    return jnp.minimum(1.0, step.astype(jnp.float32) / ramp_steps)


def _join(trees: list[PyTree]) -> PyTree:
    """Join trees of equal structure along every leaf's first axis."""
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *trees)


def _cut(tree: PyTree, sizes: list[int]) -> list[PyTree]:
    """Cut every leaf along its first axis into pieces of these sizes."""
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return [
        jax.tree.map(lambda x, a=end - size, b=end: x[a:b], tree)
        for size, end in zip(sizes, ends, strict=True)
    ]
