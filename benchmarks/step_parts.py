"""The training step cut into parts that can be compiled alone, each on what the one before makes.

A part is a pure function with its arguments. These are arrays where the functions are run on the
way, or shapes where they are only traced, so that the same cut serves times and counters. Parts
marked `in_step` together do what the step does, but for dropout, joins, and the search for prompts
on labelled clips.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sss_jax.axes import Array, PyTree
from sss_jax.errors import ConfigError
from sss_jax.models.sss import SegmentOutput, SSSModel
from sss_jax.options import Options
from sss_jax.ssl.batches import cut, join
from sss_jax.ssl.network import Features, Network
from sss_jax.ssl.pcsw import clip_prompts
from sss_jax.ssl.prompts import ClipPrompts, clips_to_images, images_to_clips
from sss_jax.ssl.propagation import segment_clips
from sss_jax.ssl.pseudo_labels import PseudoLabels, make_pseudo_labels, mix_target
from sss_jax.ssl.strong_features import enhance_views
from sss_jax.ssl.views import LabelledView, UnlabelledViews, labelled_view, unlabelled_views
from sss_jax.ssl.weak_to_strong import Batch, labelled_terms, unlabelled_terms
from sss_jax.train.setup import Setup
from sss_jax.train.step import Gradients, make_train_step

Run = Callable[..., Any]
Views = tuple[LabelledView, UnlabelledViews | None]
WHOLE = "whole step"


class Part(NamedTuple):
    """A piece of the step.

    Attributes:
        name: what it is called in results.
        function: pure function.
        args: arrays or shapes to call it with.
        in_step: whether it is counted when the parts are added up.
    """

    name: str
    function: Callable[..., Any]
    args: tuple[Any, ...]
    in_step: bool = False


def step_parts(
    options: Options, setup: Setup, state: PyTree, batch: Batch, key: Array, run: Run
) -> list[Part]:
    """Cut the step of a configuration.

    Args:
        options: all settings.
        setup: what the step is made of.
        state: train state, arrays or shapes.
        batch: global batch, the same.
        key: root key, the same.
        run: `run(function, *args)` returns what the function makes of arrays, or of shapes:
            `jax.eval_shape`.

    Raises:
        ConfigError: memory between images without order, whose parts are not cut yet.
    """
    if options.memory.kind == "self_sorting":
        raise ConfigError(
            "the step is not cut into parts with memory.kind=self_sorting; use fifo or none"
        )
    step = _Step(setup.model, options)
    whole = make_train_step(setup.model, options, setup.optimizer)
    views = run(step.views, batch, key)
    return [
        Part(WHOLE, whole, (state, batch, key)),
        Part("augmentation", step.views, (batch, key), True),
        *_encoder_parts(step, state, batch, views),
        *_decoder_parts(step, state, batch, views, run),
        Part("optimizer and EMA", _update(setup, options), (state, state["params"]), True),
    ]


def _encoder_parts(step: "_Step", state: PyTree, batch: Batch, views: Views) -> list[Part]:
    net = state["params"]["net"]
    parts = [
        Part("encoder forward", step.encode, (net, views)),
        Part("encoder forward and backward", _with_backward(step.encode), (net, views), True),
    ]
    if step.options.semi.enabled:
        mask = batch["unlabelled"]["slice_mask"]
        parts.append(
            Part("teacher's pseudo-labels", step.pseudo, (state["ema"], views, mask), True)
        )
    return parts


def _decoder_parts(
    step: "_Step", state: PyTree, batch: Batch, views: Views, run: Run
) -> list[Part]:
    net, parts = state["params"]["net"], []
    encoded, pseudo = run(step.encode, net, views), None
    features = encoded
    if step.options.semi.enabled:
        pseudo = run(step.pseudo, state["ema"], views, batch["unlabelled"]["slice_mask"])
        if step.options.dfe.enabled:
            args = (state["params"]["dfe"], encoded, pseudo, views)
            both = _with_backward(step.enhance, (0, 1))
            parts.append(Part("DFE forward", step.enhance, args))
            parts.append(Part("DFE forward and backward", both, args, True))
            features = run(step.enhance, *args)
    masks = run(step.masks, batch)
    coarse = run(step.coarse, net, encoded)
    prompts = run(step.search, coarse, masks)
    if step.options.pcsw.enabled:
        parts.append(Part("PCSW", step.search, (coarse, masks), True))
    parts += _segment_parts(step, net, features, prompts, masks)
    output = run(step.segment, net, features, prompts, masks)
    terms = _with_backward(step.losses, (0, 1, 2))
    return [*parts, Part("losses", terms, (net, encoded, output, views, pseudo), True)]


def _segment_parts(
    step: "_Step", net: PyTree, features: Features, prompts: ClipPrompts, masks: Array
) -> list[Part]:
    """Decode every slice by itself and, where classes are carried from slice to slice, that too."""
    carried = step.options.memory.kind != "none"
    alone, args = (net, features, prompts), (net, features, prompts, masks)
    parts = [
        Part("decoder forward, no memory", step.decode, alone),
        Part(
            "decoder forward and backward, no memory",
            _with_backward(step.decode, (0, 1)),
            alone,
            not carried,
        ),
    ]
    if carried:
        both = _with_backward(step.segment, (0, 1))
        parts.append(Part("memory scan forward", step.segment, args))
        parts.append(Part("memory scan forward and backward", both, args, True))
    return parts


class _Step(NamedTuple):
    """The pieces of `sss_loss` as functions of arrays alone."""

    model: SSSModel
    options: Options

    def views(self, batch: Batch, key: Array) -> Views:
        key_labelled, key_unlabelled = jax.random.split(key)
        labelled = labelled_view(key_labelled, batch["labelled"], self.options)
        if not self.options.semi.enabled:
            return labelled, None
        unlabelled = unlabelled_views(key_unlabelled, batch["unlabelled"], self.options, None)
        return labelled, unlabelled

    def masks(self, batch: Batch) -> Array:
        """Return the slice masks of labelled clips and of every strong view."""
        masks = [batch["labelled"]["slice_mask"]]
        if self.options.semi.enabled:
            masks += [batch["unlabelled"]["slice_mask"]] * self.options.semi.views
        return join(masks)

    def encode(self, net: PyTree, views: Views) -> Features:
        labelled, unlabelled = views
        clips = [labelled.image_BSHWC]
        clips += [view.image_BSHWC for view in unlabelled.strong] if unlabelled else []
        return Network(self.model, net).encode(join([clips_to_images(clip) for clip in clips]))

    def pseudo(self, teacher: PyTree, views: Views, mask_BS: Array) -> PseudoLabels:
        assert views[1] is not None
        return make_pseudo_labels(Network(self.model, teacher), views[1], mask_BS, self.options)

    def enhance(
        self, params: PyTree, encoded: Features, pseudo: PseudoLabels, views: Views
    ) -> Features:
        """Return the labelled images' features and the strong views' with DFE."""
        assert views[1] is not None
        labelled, *strong = self._by_stream(encoded, views)
        enhanced, _, _ = enhance_views(
            {"dfe": params}, pseudo, strong, views[1], self.options, None
        )
        return join([labelled, *enhanced])

    def coarse(self, net: PyTree, features: Features) -> Array:
        slices = self.options.data.clip_slices
        return images_to_clips(Network(self.model, net).coarse_foreground(features), slices)

    def search(self, coarse_BSHWK: Array, mask_BS: Array) -> ClipPrompts:
        size = self.options.model.image_size
        return clip_prompts(coarse_BSHWK, mask_BS, size, self.options.pcsw)[0]

    def decode(self, net: PyTree, features: Features, prompts: ClipPrompts) -> SegmentOutput:
        own = prompts.images(), prompts.image_masks()
        return Network(self.model, net).segment(features, *own)

    def segment(
        self, net: PyTree, features: Features, prompts: ClipPrompts, mask_BS: Array
    ) -> SegmentOutput:
        return segment_clips(Network(self.model, net), features, prompts, mask_BS, self.options)

    def losses(
        self,
        net: PyTree,
        encoded: Features,
        output: SegmentOutput,
        views: Views,
        pseudo: PseudoLabels | None,
    ) -> Array:
        """Return the loss of outputs and, of the coarse head, features."""
        labelled, unlabelled = views
        student = Network(self.model, net)
        features, *_ = self._by_stream(encoded, views)
        own, *others = self._by_stream(output, views)
        total, _ = labelled_terms(student, features, own, labelled, self.options, None)
        if unlabelled is not None and pseudo is not None:
            targets = [mix_target(v.box_B4, pseudo.target, None) for v in unlabelled.strong]
            more, _ = unlabelled_terms(others, targets, unlabelled, self.options, None)
            total += more
        return total

    def _by_stream(self, tree: PyTree, views: Views) -> list[PyTree]:
        """Cut what was made of all images into labelled ones and those of each strong view."""
        labelled, unlabelled = views
        clips = [labelled.image_BSHWC]
        clips += [view.image_BSHWC for view in unlabelled.strong] if unlabelled else []
        return cut(tree, [clip.shape[0] * clip.shape[1] for clip in clips])


def _with_backward(
    function: Callable[..., PyTree], inputs: tuple[int, ...] = (0,)
) -> Callable[..., tuple[Array, PyTree]]:
    """Return a function that also takes the gradient with respect to some of its arguments.

    What it descends is half the square of the outputs: then what comes back to them are they
    themselves, and no constant from which a compiler could save itself work.
    """

    @functools.wraps(function)
    def both(*args: Any) -> tuple[Array, PyTree]:
        def energy(*chosen: Any) -> Array:
            full = list(args)
            for place, value in zip(inputs, chosen, strict=True):
                full[place] = value
            outputs = jax.tree.leaves(function(*full))
            return sum((jnp.sum(jnp.square(x.astype(jnp.float32))) for x in outputs), jnp.zeros(()))

        chosen = [args[place] for place in inputs]
        return jax.value_and_grad(energy, tuple(range(len(inputs))))(*chosen)

    return both


def _update(setup: Setup, options: Options) -> Callable[[PyTree, PyTree], PyTree]:
    """Return the step without its gradients: optimizer, guard and teacher."""

    def update(state: PyTree, gradients: PyTree) -> PyTree:
        given = Gradients(gradients, jnp.zeros(()), {}, {})
        step = make_train_step(setup.model, options, setup.optimizer, gradients=lambda *_: given)
        return step(state, {}, jax.random.key(0))

    return update
