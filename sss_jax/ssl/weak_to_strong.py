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

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sss_jax import losses
from sss_jax.axes import Array, Float, Int, Key, PyTree
from sss_jax.models.sss import SegmentOutput, SSSModel
from sss_jax.options import Options, SemiOptions
from sss_jax.parallel import Axis
from sss_jax.ssl import labelled_prompts
from sss_jax.ssl.batches import cut, join
from sss_jax.ssl.network import Features, Network
from sss_jax.ssl.pcsw import clip_prompts
from sss_jax.ssl.prompts import ClipPrompts, clips_to_images, images_to_clips, no_clip_prompts
from sss_jax.ssl.propagation import segment_clips
from sss_jax.ssl.pseudo_labels import Target, lifted_targets, make_pseudo_labels, mix_target
from sss_jax.ssl.self_sorting import (
    ImageBank,
    Recall,
    image_keys,
    remember_images,
    segment_images,
)
from sss_jax.ssl.strong_features import drop_channels, enhance_views, view_volumes
from sss_jax.ssl.views import LabelledView, UnlabelledViews, labelled_view, mix, unlabelled_views

Batch = dict[str, dict[str, Array]]
Aux = dict[str, Any]


def sss_loss(
    params: PyTree,
    teacher: PyTree,
    batch: Batch,
    key: Key[Array, ""],
    step: Int[Array, ""],
    *,
    model: SSSModel,
    options: Options,
    axis: Axis | None = None,
    bank: ImageBank | None = None,
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
        bank: with `memory.kind=self_sorting`, what is remembered of earlier images.

    Returns:
        The scalar loss over the global batch, and scalars by name; with a bank also `bank`, what
        is remembered after the step.
    """
    student, tutor = Network(model, params["net"]), Network(model, teacher)
    key_labelled, key_unlabelled, key_dropout, key_prompts = jax.random.split(key, 4)
    labelled = labelled_view(key_labelled, batch["labelled"], options)
    images, masks = [labelled.image_BSHWC], [batch["labelled"]["slice_mask"]]
    recalls = _Recalls(bank, jax.random.fold_in(key, 4), batch, options)
    if options.semi.enabled:
        mask = batch["unlabelled"]["slice_mask"]
        views = unlabelled_views(key_unlabelled, batch["unlabelled"], options, axis)
        pseudo = make_pseudo_labels(tutor, views, mask, options, recalls.weak())
        images += [view.image_BSHWC for view in views.strong]
        masks += [mask] * len(views.strong)

    features, *strong = _encode(student, images, options.semi)
    enhanced: list[Features] = []
    volumes: list[Array] = []
    if options.semi.enabled:
        dropped = drop_channels(key_dropout, strong, batch["unlabelled"]["id"], options, axis)
        enhanced, lifted, similarity = enhance_views(params, pseudo, dropped, views, options, axis)
        volumes = view_volumes(student, strong, views, pseudo, options, axis)
    prompts = _prompts(key_prompts, student, features, labelled, volumes, batch, options)
    outputs, new_bank = _segment_student(
        student, [features, *enhanced], prompts, masks, recalls, options, axis
    )

    loss, aux = labelled_terms(student, features, outputs[0], labelled, options, axis)
    if options.semi.enabled:
        targets = [mix_target(view.box_B4, pseudo.target, axis) for view in views.strong]
        if lifted:
            own = cut(prompts, [len(m) for m in masks])[1:]
            seen = recalls.strong(bank, len(own))
            targets = lifted_targets(tutor, lifted, own, mask, views, options, seen)
        unlabelled, shares = unlabelled_terms(outputs[1:], targets, views, options, axis)
        loss += options.semi.weight * _ramp(step, options.semi) * unlabelled
        aux |= {"loss_unlabelled": unlabelled} | shares
        aux |= similarity
        if options.pcsw.enabled:
            aux["prompts_valid"] = pseudo.prompts_valid
    return loss, aux if new_bank is None else aux | {"bank": new_bank}


def _encode(student: Network, images: list[Array], semi: SemiOptions) -> list[Features]:
    """Encode the labelled images and the strong views, in one call, as the decoder will take them.

    Where the unlabelled loss does not train the encoder, the views pass it apart: nothing of them
    is kept for a backward pass, and there is none.
    """
    sizes = [image.shape[0] * image.shape[1] for image in images]
    stacked = [clips_to_images(image) for image in images]
    if semi.encoder_gradient or len(images) == 1:
        return cut(student.encode(join(stacked)), sizes)
    frozen = Network(student.model, jax.lax.stop_gradient(student.net))
    views = frozen.encode(join(stacked[1:]))
    return [student.encode(stacked[0]), *cut(views, sizes[1:])]


class _Recalls(NamedTuple):
    """How the images of each stream look at the self-sorting bank; None without one."""

    bank: ImageBank | None
    key: Array
    batch: Batch
    options: Options

    def labelled(self) -> Recall | None:
        return self._of(self.bank, "labelled", 0)

    def weak(self) -> Recall | None:
        return self._of(self.bank, "unlabelled", 1)

    def strong(self, bank: ImageBank | None, views: int) -> Recall | None:
        return self._of(bank, "unlabelled", *range(2, 2 + views))

    def _of(self, bank: ImageBank | None, stream: str, *uses: int) -> Recall | None:
        if bank is None:
            return None
        clips = self.batch[stream]
        slices = clips["slice_mask"].shape[1]
        keys = [image_keys(jax.random.fold_in(self.key, use), clips["id"], slices) for use in uses]
        return Recall(bank, self.options.memory.samples, jnp.concatenate(keys))


def _segment_student(
    student: Network,
    features: list[Features],
    prompts: ClipPrompts,
    masks: list[Array],
    recalls: _Recalls,
    options: Options,
    axis: Axis | None,
) -> tuple[list[SegmentOutput], ImageBank | None]:
    """Segment labelled clips and strong views; also return the self-sorting bank after the step."""
    sizes = [mask.size for mask in masks]
    seen = recalls.labelled()
    if seen is None:
        together = segment_clips(student, join(features), prompts, join(masks), options)
        return cut(together, sizes), None
    own, *others = cut(prompts, [len(mask) for mask in masks])
    first, new = segment_images(student, features[0], own, seen)
    bank = remember_images(seen.bank, new, masks[0].reshape(-1), axis)
    outputs = [first]
    if others:
        recall = recalls.strong(bank, len(others))
        assert recall is not None
        rest, _ = segment_images(student, join(features[1:]), join(others), recall)
        outputs += cut(rest, sizes[1:])
    return outputs, jax.lax.stop_gradient(bank)


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
        joined = join([*own, *view_volumes])
        together, _ = clip_prompts(joined, join(masks), size, options.pcsw)
        found = cut(together, [len(m) for m in masks])
    none = no_clip_prompts(mask, coarse.shape[-1])
    first = labelled_prompts.choose(key, found[: len(own)], own, ids, none, options)
    others = found[len(own) :]
    if first.mask_BSKHW is not None:
        height, width = first.mask_BSKHW.shape[-2:]
        others = [other.without_masks((height, width)) for other in others]
    return join([first, *others])


def labelled_terms(
    student: Network,
    features: Features,
    output: SegmentOutput,
    view: LabelledView,
    options: Options,
    axis: Axis | None,
) -> tuple[Array, Aux]:
    """Return the weighted loss of labelled clips, and its terms by name."""
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


def unlabelled_terms(
    outputs: list[SegmentOutput],
    targets: list[Target],
    views: UnlabelledViews,
    options: Options,
    axis: Axis | None,
) -> tuple[Array, Aux]:
    """Average the consistency loss over the strong views; also return the trusted shares.

    `coverage` is the share of pixels with a confident pseudo-label, `coverage_foreground` that of
    confident foreground: coverage near 1 with none of it foreground teaches nothing.
    """
    tau, total = options.semi.confidence, jnp.zeros(())
    shares = {"coverage": jnp.zeros(()), "coverage_foreground": jnp.zeros(())}
    for output, target, view in zip(outputs, targets, views.strong, strict=True):
        label, confidence = (clips_to_images(x) for x in target)
        valid = clips_to_images(mix(view.box_B4, views.valid_BSHW, axis))
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


def _ramp(step: Array, options: SemiOptions) -> Array:
    """Share of the unlabelled loss that counts at a step.

    The Gaussian is that of Laine & Aila (2017) and Tarvainen & Valpola (2017).
    """
    if options.ramp_steps == 0:
        return jnp.ones(())
    done = jnp.minimum(1.0, step.astype(jnp.float32) / options.ramp_steps)
    return done if options.ramp == "linear" else jnp.exp(-5.0 * (1.0 - done) ** 2)
