"""Classes carried through clips by SAM-2's memory, from the prompt slice outwards.

Every class of every clip is an object of its own: it begins on its prompt slice, goes on to the
last slice, and then from the prompt slice back to the first one. At each step all N = B x K objects
of all clips are decoded together, each on a slice of its own. The same function serves training,
teacher and student, and whole volumes at test. Gradients reach the memory encoder and memory
attention through every slice that looks at a memory.

Source: SSS (Zhu et al. 2026), figure 2; SAM 2 (Ravi et al. 2024), section 4; slices as frames:
Medical SAM 2 (Zhu et al. 2024).
Differs from SAM 2: masks are remembered as probabilities on every slice, the prompted one
included, because a threshold has no gradient; a slice has the single mask, whatever its prompt.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sss_jax.axes import Array, Bool, Int, PyTree
from sss_jax.models.attention import KEEPS
from sss_jax.models.mask_decoder import Skips
from sss_jax.models.memory_bank import (
    Memory,
    MemoryBank,
    TwoWays,
    bank_of,
    empty_bank,
    remember_on_the_way,
    remember_prompted,
    turn_back,
)
from sss_jax.models.presets import Sam2Config
from sss_jax.models.prompt_encoder import MaskPrompts, Prompts
from sss_jax.models.sss import SegmentOutput, SliceOutput, as_classes
from sss_jax.options import Options
from sss_jax.ssl.network import Features, Network
from sss_jax.ssl.prompts import ClipPrompts, clips_to_images, images_to_clips


class Route(NamedTuple):
    """The way of N objects through S slices.

    Attributes:
        slice_NS: slice that each step visits; padding slices come last.
        backwards_NS: whether the step is on the way back.
        step_NS: step that visits each slice.
    """

    slice_NS: Int[Array, "N S"]
    backwards_NS: Bool[Array, "N S"]
    step_NS: Int[Array, "N S"]


def outwards(start_N: Int[Array, " N"], num_N: Int[Array, " N"], slices: int) -> Route:
    """Plan the way from the start to the last true slice, then back from the start to the first.

    Args:
        start_N: first slice of each object, below `num_N`.
        num_N: true slices; padding slices come last.
        slices: S.
    """
    at_1S, start_N1, num_N1 = jnp.arange(slices)[None], start_N[:, None], num_N[:, None]
    ahead_N1 = num_N1 - start_N1
    forward = jnp.where(at_1S < ahead_N1, start_N1 + at_1S, num_N1 - 1 - at_1S)
    back = jnp.where(at_1S >= start_N1, at_1S - start_N1, num_N1 - 1 - at_1S)
    true = at_1S < num_N1
    return Route(
        jnp.where(true, forward, at_1S), true & (at_1S >= ahead_N1), jnp.where(true, back, at_1S)
    )


def segment_clips(
    network: Network,
    features: Features,
    prompts: ClipPrompts,
    slice_mask_BS: Bool[Array, "B S"],
    options: Options,
) -> SegmentOutput:
    """Segment all classes of B clips; the result is that of B x S images.

    Without memory (`memory.kind=none`) every slice is decoded by itself.

    Args:
        network: the network.
        features: FPN maps of the B x S images.
        prompts: prompts of the classes, and where to begin.
        slice_mask_BS: true slices; padding slices come last.
        options: settings of the memory.
    """
    if options.memory.kind == "none":
        return network.segment(features, prompts.images(), prompts.image_masks())
    slices = slice_mask_BS.shape[1]
    skips = jax.tree.map(lambda x: images_to_clips(x, slices), network.skips(features))
    return carry_classes(network, functools.partial(_pick, skips), prompts, slice_mask_BS, options)


def _pick(skips: Skips, slice_BK: Array) -> Skips:
    """Take the slice of each object from its clip: [B, S, ...] to [B x K, ...]."""
    return jax.tree.map(lambda x: clips_to_images(_take(x, slice_BK)), skips)


def _take(x_NS: Array, at: Array) -> Array:
    """Take, in each row, what stands at these places of its slices."""
    return jax.vmap(lambda x_S, own: x_S[own])(x_NS, at)


def carry_classes(
    network: Network,
    skips_of: Callable[[Array], Skips],
    prompts: ClipPrompts,
    slice_mask_BS: Bool[Array, "B S"],
    options: Options,
) -> SegmentOutput:
    """Carry all classes of B clips outwards from where they begin.

    Args:
        network: the network.
        skips_of: features of slices [B, K], one for each object, as [B x K, ...].
        prompts: prompts of the classes, and where to begin.
        slice_mask_BS: true slices; padding slices come last.
        options: settings of the memory.

    Returns:
        Segmentation of the B x S images.
    """
    (batch, slices), classes = slice_mask_BS.shape, prompts.start_BK.shape[1]
    objects = batch * classes
    num_N = jnp.repeat(jnp.sum(slice_mask_BS, axis=1, dtype=jnp.int32), classes)
    route = outwards(prompts.start_BK.reshape(objects), num_N, slices)
    walk = _Walk(network, skips_of, prompts, num_N, options)
    most = longest_unrolled(network.model.config)
    if slices <= most and is_unrolled(options, jax.default_backend()):
        found = walk.step_by_step(route)
    else:
        steps = (jnp.arange(slices), route.slice_NS.T, route.backwards_NS.T)
        _, found = jax.lax.scan(walk.lean(walk.visit), walk.begin(slice_mask_BS), steps)

    def in_order(x_SN: Array) -> Array:
        x_NS = _take(jnp.moveaxis(x_SN, 0, 1), route.step_NS)
        x_BKS = x_NS[:, :, 0].reshape(batch, classes, slices, *x_NS.shape[3:])
        return clips_to_images(jnp.swapaxes(x_BKS, 1, 2))

    return as_classes(*(in_order(x) for x in found))


def is_unrolled(options: Options, platform: str) -> bool:
    """Whether short clips go step by step on a platform, such as `tpu`."""
    if options.memory.unroll == "auto":
        return platform != "cpu"
    return options.memory.unroll == "on"


def longest_unrolled(config: Sam2Config) -> int:
    """Most slices of a clip in which nothing is ever forgotten for want of room."""
    return min(config.num_maskmem, config.max_pointers) + 1


class _Walk(NamedTuple):
    """What stays the same at every step."""

    network: Network
    skips_of: Callable[[Array], Skips]
    prompts: ClipPrompts
    num_N: Array
    options: Options

    def begin(self, slice_mask_BS: Array) -> TwoWays:
        """Return banks that remember nothing."""
        batch, classes = self.prompts.start_BK.shape
        zero = jnp.zeros((batch, classes), jnp.int32)
        coarse = jax.eval_shape(self.skips_of, zero).coarse_BHWD
        config, slices = self.network.model.config, slice_mask_BS.shape[1]
        positions = coarse.shape[1] * coarse.shape[2]
        bank = empty_bank(config, batch * classes, 1, positions, 1, slices)
        # Written so that it varies over devices as the clips do.
        nothing = jnp.any(slice_mask_BS & ~slice_mask_BS)
        bank = jax.tree.map(lambda x: jnp.where(nothing, 0, x).astype(x.dtype), bank)
        return TwoWays(bank, bank)

    def lean(self, visit: Callable[..., Any]) -> Callable[..., Any]:
        """Return what visits a slice, recomputed in the backward pass if so asked."""
        memory = self.options.memory
        return jax.checkpoint(visit, policy=KEEPS[memory.remat_keeps]) if memory.remat else visit

    def step_by_step(self, route: Route) -> SliceOutput:
        """Visit all slices, with room for no more memories than there are at each step."""
        visit = self.lean(self._visit_after)
        found: list[SliceOutput] = []
        past: list[Memory] = []
        for step in range(route.slice_NS.shape[1]):
            past = self._forget_gradients(past, step)
            way_NT = route.slice_NS[:, : step + 1]
            output, memory = visit(past, way_NT, route.backwards_NS[:, step])
            found.append(output)
            past.append(memory)
        return jax.tree.map(lambda *steps: jnp.stack(steps), *found)

    def _visit_after(
        self, past: list[Memory], way_NT: Array, backwards_N: Array
    ) -> tuple[SliceOutput, Memory]:
        """Segment the last slice of the way so far; `past` is what the others left.

        Padding comes last on every way: no true slice looks at it.
        """
        slice_N = way_NT[:, -1]

        def look(coarse: Array) -> Array:
            if not past:
                return self.network.without_memory(coarse)
            bank = bank_of(self.network.model.config, past, way_NT[:, None, :-1])
            return self._look(coarse, bank, slice_N, backwards_N)

        return self._segment(slice_N, look)

    def _look(self, coarse: Array, bank: MemoryBank, slice_N: Array, backwards_N: Array) -> Array:
        place = (slice_N[:, None], self.num_N[:, None], backwards_N[:, None])
        return self.network.with_memory(coarse, bank, *place)

    def _segment(
        self, slice_N: Array, look: Callable[[Array], Array]
    ) -> tuple[SliceOutput, Memory]:
        """Segment a slice of every object; `look` conditions its coarse map on the memory."""
        batch, classes = self.prompts.start_BK.shape
        skips = self.skips_of(slice_N.reshape(batch, classes))
        class_N1 = jnp.tile(jnp.arange(classes), batch)[:, None]
        seen = look(skips.coarse_BHWD)
        return self.network.segment_and_remember(skips, seen, *self._prompts_on(slice_N), class_N1)

    def visit(self, ways: TwoWays, now: tuple[Array, Array, Array]) -> tuple[TwoWays, SliceOutput]:
        """Segment one slice of every object and remember it."""
        step, slice_N, backwards_N = now
        at, back = slice_N[:, None], backwards_N[:, None]
        config = self.network.model.config
        ways = self._forget_gradients(turn_back(ways, at == self._turning_point()), step)

        def look(coarse: Array) -> Array:
            return jax.lax.cond(
                step == 0,
                lambda: self.network.without_memory(coarse),
                lambda: self._look(coarse, ways.bank, slice_N, backwards_N),
            )

        output, memory = self._segment(slice_N, look)
        first = jnp.broadcast_to(step == 0, at.shape)
        ways = TwoWays(*(remember_prompted(b, config, memory, at, first) for b in ways))
        tracked = ~first & (step < self.num_N)[:, None]
        return remember_on_the_way(ways, config, memory, at, tracked, step, back), output

    def _turning_point(self) -> Array:
        """Slice before the start, the first one of the way back."""
        return self.prompts.start_BK.reshape(-1, 1) - 1

    def _forget_gradients(self, memories: PyTree, step: Array | int) -> PyTree:
        """Cut the gradients of what is remembered, every `truncate` slices."""
        length = self.options.memory.truncate
        if not length:
            return memories
        cut = step % length == 0

        def held(x: Array) -> Array:
            return jnp.where(cut, jax.lax.stop_gradient(x), x)

        return jax.tree.map(held, memories)

    def _prompts_on(self, slice_N: Array) -> tuple[Prompts, MaskPrompts | None]:
        """Prompts of each object on its slice, with K = 1."""

        def pick(x_BSK: Array) -> Array:
            x_NS = clips_to_images(jnp.moveaxis(x_BSK, 2, 1))
            return _take(x_NS, slice_N)[:, None]

        own = self.prompts
        points = Prompts(pick(own.points_BSKQ2), pick(own.labels_BSKQ))
        if own.mask_BSKHW is None or own.mask_given_BSK is None:
            return points, None
        return points, MaskPrompts(pick(own.mask_BSKHW), pick(own.mask_given_BSK))
