"""Self-sorting memory: images without slice order remember other images.

Each class has a bank of up to `memory.capacity` entries: the memory of an image's mask, the
predicted IoU, and the image's flattened coarse map. The bank is data of fixed shape, in and out of
pure functions; it lives in the train state. In a step every image first looks at what the bank
holds; the labelled images then enter it, one after the other in the order of the global batch,
whatever the number of devices; the strong views look at the new bank, so that gradients reach the
memory encoder. Between steps nothing has a gradient.

Source: Medical SAM 2 (Zhu et al. 2024), self-sorting memory bank and weighted resampling.
Differs from the paper: a bank for each class; at test the most similar entries are taken instead of
drawn, so that a result can be repeated; images that are padding never enter.

Axes: N images, K classes, T entries, L entries looked at, P positions, M channels of a memory, E
numbers of a flattened coarse map.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from sss_jax.augment.keys import example_keys
from sss_jax.axes import Array, Bool, Float, Int, Key, PyTree
from sss_jax.models.mask_decoder import Skips
from sss_jax.models.sss import SegmentOutput, SSSModel, as_classes
from sss_jax.options import MemoryOptions
from sss_jax.parallel import Axis, gather
from sss_jax.ssl.network import Features, Network
from sss_jax.ssl.prompts import ClipPrompts

IOU_MARGIN = 0.1
"""A newcomer may be this much worse than the entry whose place it takes."""

_EPSILON = 1e-16  # of squared norms; an entry of zeros is similar to nothing


class ImageBank(NamedTuple):
    """Entries of K classes; those beyond `count_K` are empty.

    Attributes:
        memory_KTPM: encoded masks.
        iou_KT: predicted IoU of the masks.
        embedding_KTE: flattened coarse maps of the images.
        count_K: entries in use.
    """

    memory_KTPM: Float[Array, "K T P M"]
    iou_KT: Float[Array, "K T"]
    embedding_KTE: Float[Array, "K T E"]
    count_K: Int[Array, " K"]


class Newcomers(NamedTuple):
    """What N images would leave in the bank."""

    memory_NKPM: Float[Array, "N K P M"]
    iou_NK: Float[Array, "N K"]
    embedding_NE: Float[Array, "N E"]


class Recall(NamedTuple):
    """How images look at the bank.

    Attributes:
        bank: what is remembered.
        samples: L, entries that each image and class looks at.
        key_N: one key per image draws them by similarity; None takes the most similar ones.
    """

    bank: ImageBank
    samples: int
    key_N: Key[Array, " N"] | None


def empty_bank(model: SSSModel, options: MemoryOptions) -> PyTree:
    """Return `{"bank": ...}` of nothing, for the train state; {} without such memory."""
    if options.kind != "self_sorting":
        return {}
    config, classes, size = model.config, model.num_classes, options.capacity
    positions = (config.image_size // config.strides[2]) ** 2
    bank = ImageBank(
        jnp.zeros((classes, size, positions, config.memory_width)),
        jnp.zeros((classes, size)),
        jnp.zeros((classes, size, positions * config.width)),
        jnp.zeros(classes, jnp.int32),
    )
    return {"bank": bank._asdict()}


def image_keys(key: Key[Array, ""], id_B: Int[Array, " B"], slices: int) -> Key[Array, " N"]:
    """Derive a key for every slice of every clip from the clips' global ids."""
    return jax.vmap(lambda k: jax.random.split(k, slices))(example_keys(key, id_B)).reshape(-1)


def segment_images(
    network: Network, features: Features | Skips, prompts: ClipPrompts, recall: Recall
) -> tuple[SegmentOutput, Newcomers]:
    """Segment all classes of N images, each by itself, with memories of other images.

    Args:
        network: the network.
        features: FPN maps of the images, or their skips.
        prompts: prompts of the clips that the images are slices of.
        recall: how they look at the bank.

    Returns:
        The segmentation, and what the images would leave in the bank.
    """
    skips = features if isinstance(features, Skips) else network.skips(features)
    coarse = skips.coarse_BHWD
    embedding_NE = jax.lax.stop_gradient(coarse.reshape(len(coarse), -1).astype(jnp.float32))
    seen = network.with_images(coarse, *look_up(recall, embedding_NE))
    class_NK = jnp.broadcast_to(jnp.arange(seen.shape[1])[None], seen.shape[:2])
    output, memory = network.segment_and_remember(
        skips, seen, prompts.images(), prompts.image_masks(), class_NK
    )
    left = Newcomers(
        memory.memory_BKPM.astype(jnp.float32),
        jax.lax.stop_gradient(output.iou_NK),
        embedding_NE,
    )
    return as_classes(*output), left


def look_up(
    recall: Recall, embedding_NE: Float[Array, "N E"]
) -> tuple[Float[Array, "N K L P M"], Bool[Array, "N K L"]]:
    """Choose the memories that each image looks at, by the similarity of its coarse map.

    Drawn with replacement, with probabilities that are the softmax of the cosine similarities; or,
    without keys, the most similar ones, each once.

    Returns:
        The memories, and which of them exist.
    """
    bank = recall.bank
    known_KT = jnp.arange(bank.iou_KT.shape[1])[None] < bank.count_K[:, None]
    similar_NKT = jnp.einsum("ne,kte->nkt", unit(embedding_NE), unit(bank.embedding_KTE))
    score_NKT = jnp.where(known_KT[None], similar_NKT, -jnp.inf)
    if recall.key_N is None:
        best, at_NKL = jax.lax.top_k(score_NKT, recall.samples)
        valid_NKL = jnp.isfinite(best)
    else:
        # Of an empty bank anything may be drawn; it does not count.
        score_NKT = jnp.where(known_KT.any(axis=1)[None, :, None], score_NKT, 0.0)
        at_NKL = jax.vmap(lambda key, score: _draw(key, score, recall.samples))(
            recall.key_N, score_NKT
        )
        valid_NKL = jnp.broadcast_to((bank.count_K > 0)[None, :, None], at_NKL.shape)
    memory = jax.vmap(lambda entries, at: entries[at], (0, 1), 1)(bank.memory_KTPM, at_NKL)
    return memory, valid_NKL


def _draw(key: Array, score_KT: Array, samples: int) -> Int[Array, "K L"]:
    classes = score_KT.shape[0]
    drawn_LK = jax.random.categorical(key, score_KT, shape=(samples, classes))
    return drawn_LK.T


def unit(x: Float[Array, "... E"]) -> Float[Array, "... E"]:
    """Scale the last axis to length 1; zeros stay zeros."""
    square = jnp.sum(x * x, axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.maximum(square, _EPSILON))


def remember_images(
    bank: ImageBank, new: Newcomers, valid_N: Bool[Array, " N"], axis: Axis | None = None
) -> ImageBank:
    """Offer images to the bank, one after the other in the order of the global batch.

    Args:
        bank: what is remembered.
        new: what the images held here would leave.
        valid_N: images that are no padding.
        axis: name of the pmap or shard_map axis; None when the batch is global.
    """
    new, valid_N = gather((new, valid_N), axis)

    def offer(bank: ImageBank, one: tuple[Newcomers, Array]) -> tuple[ImageBank, None]:
        (memory_KPM, iou_K, embedding_E), valid = one
        changed = jax.vmap(_offer, (0, 0, 0, None))(bank, memory_KPM, iou_K, embedding_E)
        return jax.tree.map(lambda a, b: jnp.where(valid, a, b), changed, bank), None

    return jax.lax.scan(offer, bank, (new, valid_N))[0]


def _offer(bank: ImageBank, memory_PM: Array, iou: Array, embedding_E: Array) -> ImageBank:
    """Let the entries of one class decide on a newcomer.

    Full, with i the entry least similar to the newcomer and j the one most similar to i: if the
    newcomer is less similar to i than j is, and not much worse than j, it takes the place of j.
    """
    size = bank.iou_KT.shape[0]
    flat_TE, own_E = (unit(x) for x in (bank.memory_KTPM.reshape(size, -1), memory_PM.reshape(-1)))
    flat_TE, own_E = jax.lax.stop_gradient((flat_TE, own_E))
    to_new_T = flat_TE @ own_E
    between_TT = jnp.where(jnp.eye(size, dtype=bool), -jnp.inf, flat_TE @ flat_TE.T)
    least = jnp.argmin(to_new_T)
    most = jnp.argmax(between_TT[least])
    better = to_new_T[least] < between_TT[least, most]
    good = iou > bank.iou_KT[most] - IOU_MARGIN
    free = bank.count_K < size
    at = jnp.where(free, bank.count_K, most)
    here_T = (jnp.arange(size) == at) & (free | (better & good))

    def put(held: Array, new: Array) -> Array:
        return jnp.where(here_T.reshape(-1, *(1,) * new.ndim), new[None], held)

    return ImageBank(
        put(bank.memory_KTPM, memory_PM),
        put(bank.iou_KT, iou),
        put(bank.embedding_KTE, embedding_E),
        bank.count_K + free.astype(jnp.int32),
    )
