"""The parts of SAM-2 beside Meta's, on one image: encoder, prompts, decoder, heads, memory."""

import jax.numpy as jnp
import numpy as np
import torch

from sss_jax.models import memory_bank
from tests.parity import meta
from tests.parity.compare import Output

KINDS = ("box", "clicks", "box and click", "mask and click", "none")


def image_of(pair, seed=1):
    """A standardised image."""
    shape = (1, pair.size, pair.size, 3)
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def prompt(kind, size, seed=2):
    """Prompts of two objects: points [2, Q, 2], labels [2, Q], mask logits or None."""
    rng = np.random.default_rng(seed)
    low = rng.uniform(0.05, 0.4, (2, 1, 2))
    box = np.concatenate([low, low + rng.uniform(0.1, 0.5, low.shape)], 1)
    clicks = rng.uniform(0, 1, (2, 2, 2))
    mask = 5 * rng.standard_normal((2, size // 4, size // 4))
    corners, click = [[2, 3]] * 2, [[1, 0]] * 2
    points, labels = {
        "box": (box, corners),
        "clicks": (clicks, click),
        "box and click": (np.concatenate([box, clicks[:, :1]], 1), [[2, 3, 1], [2, 3, 0]]),
        "mask and click": (clicks[:, :1], [[1], [0]]),
        "none": (np.zeros((2, 1, 2)), [[-1]] * 2),
    }[kind]
    mask = mask.astype(np.float32) if kind == "mask and click" else None
    return (points * size).astype(np.float32), np.array(labels, np.int32), mask


SLOTS = 3


def padded(points, labels):
    """Prompts of one image in three slots, as our decoder takes them without compiling again."""
    spare = ((0, 0), (0, SLOTS - labels.shape[1]))
    points = np.pad(points, (*spare, (0, 0)), constant_values=7.0)
    return points[None], np.pad(labels, spare, constant_values=-1)[None]


class Image:
    """What both sides know of an image before any prompt."""

    def __init__(self, pair, image_BHWC):
        self.pair, self.model = pair, pair.theirs
        self.features = pair.call("encode_image", image_BHWC)
        with torch.no_grad():
            self.levels = self.model.image_encoder(meta.pixels(image_BHWC))["backbone_fpn"]
            decoder = self.model.sam_mask_decoder
            fine, mid, self.coarse = self.levels
            self.skips = [decoder.conv_s0(fine), decoder.conv_s1(mid)]
            self.first = self.coarse + self.model.no_mem_embed.reshape(1, -1, 1, 1)

    def flat(self, objects=1):
        """The coarse map as Meta's memory wants it, with its positions and its size."""
        place = self.model.image_encoder.neck.position_encoding(self.coarse)
        found = [
            x.expand(objects, -1, -1, -1).flatten(2).permute(2, 0, 1) for x in (self.coarse, place)
        ]
        return [found[0]], [found[1]], [tuple(self.coarse.shape[-2:])]

    def repeated(self, objects):
        """(coarse map, skips) for a batch of objects."""
        coarse, *skips = (x.expand(objects, -1, -1, -1) for x in (self.first, *self.skips))
        return coarse, skips


def encoder(image):
    """Pyramid levels."""
    for stride, ours, theirs in zip((4, 8, 16), image.features, image.levels, strict=True):
        yield Output(f"image encoder, stride {stride}", ours, meta.channels_last(theirs))


def prompts(image):
    """Sparse and dense prompt embeddings, and the positions of the grid."""
    pair, size = image.pair, image.pair.size
    for kind in KINDS:
        points, labels, masks = prompt(kind, size)
        tokens, _ = pair.call(_points, points[None], labels[None])
        with torch.no_grad():
            sparse, dense = _embed(image.model, points, labels, masks)
        yield Output("prompt tokens", tokens[0], sparse)
        if masks is not None:
            ours = pair.call(_masks, masks[None])
            yield Output("mask prompt embedding", ours[0], meta.channels_last(dense))
    place = image.model.sam_prompt_encoder.get_dense_pe()
    yield Output("positions of the grid", pair.call(_place), meta.channels_last(place)[0])


def _points(module, points, labels):
    size = module.config.image_size
    return module.sam_prompt_encoder.points(points, labels, (size, size))


def _masks(module, masks):
    return module.sam_prompt_encoder.masks(masks)


def _place(module):
    side = module.config.image_size // module.config.strides[2]
    return module.sam_prompt_encoder.dense_position(side, side)


def _embed(model, points, labels, masks):
    masks = None if masks is None else torch.from_numpy(masks)[:, None]
    inputs = torch.from_numpy(points), torch.from_numpy(labels)
    return model.sam_prompt_encoder(points=inputs, boxes=None, masks=masks)


def decoder(image):
    """All four masks of every kind of prompt, with what the decoder says about them."""
    model, pair = image.model, image.pair
    for kind in KINDS:
        points, labels, masks = prompt(kind, pair.size)
        given = None if masks is None else masks[None]
        ours = pair.call("decode", image.features, *padded(points, labels), None, given)
        coarse, skips = image.repeated(2)
        with torch.no_grad():
            sparse, dense = _embed(model, points, labels, masks)
            theirs = model.sam_mask_decoder.predict_masks(
                coarse, model.sam_prompt_encoder.get_dense_pe(), sparse, dense, False, skips
            )
        yield Output("mask logits", ours.logits_BKMHW[0], theirs[0])
        yield Output("estimated IoU", ours.iou_BKM[0], theirs[1])
        yield Output("mask tokens", ours.tokens_BKMD[0], theirs[2])
        yield Output("object score", ours.object_score_BK[0], theirs[3][:, 0])


def heads(image):
    """The mask that is chosen, its IoU, and the object pointer; mask prompts taken as they are."""
    for kind in KINDS:
        yield from _chosen(image, kind)
    yield from _adopted(image)


def _chosen(image, kind):
    model, pair = image.model, image.pair
    points, labels, masks = prompt(kind, pair.size)
    given = None if masks is None else masks[None]
    multimask = bool((labels[0] >= 0).sum() <= 1)
    many = np.bool_(multimask)
    ours = pair.call(_predict, image.features, *padded(points, labels), given, many)
    coarse, skips = image.repeated(2)
    inputs = {"point_coords": torch.from_numpy(points), "point_labels": torch.from_numpy(labels)}
    masks = None if masks is None else torch.from_numpy(masks)[:, None]
    with torch.no_grad():
        _, _, iou, mask, _, pointer, _ = model._forward_sam_heads(
            coarse, inputs, masks, skips, multimask
        )
    yield Output("chosen mask", ours.logits_BKHW[0], mask[:, 0])
    yield Output("chosen IoU", ours.iou_BK[0], iou.max(-1).values)
    yield Output("object pointer", ours.pointer_BKD[0], pointer)


def _predict(module, features, points, labels, masks, multimask):
    return module.predict(features, points, labels, masks, multimask=multimask)


def some_masks(size):
    """A disc and an empty mask, at the images' resolution."""
    y, x = np.mgrid[:size, :size] / size
    disc = np.square(x - 0.4) + np.square(y - 0.55) < 0.05
    return np.stack([disc, np.zeros_like(disc)]).astype(np.float32)


def _adopted(image):
    masks = some_masks(image.pair.size)
    ours = image.pair.call("adopt_mask", image.features, masks[None])
    coarse, skips = image.coarse.expand(2, -1, -1, -1), image.repeated(2)[1]
    with torch.no_grad():
        _, _, _, mask, _, pointer, score = image.model._use_mask_as_output(
            coarse, skips, torch.from_numpy(masks)[:, None]
        )
    yield Output("mask prompt: mask", ours.logits_BKHW[0], mask[:, 0])
    yield Output("mask prompt: pointer", ours.pointer_BKD[0], pointer)
    yield Output("mask prompt: object score", ours.object_score_BK[0], score[:, 0])


def memory_features(image, seed=3):
    """Memories of a thresholded mask, of probabilities, and of an object that is absent."""
    pair = image.pair
    side = 4 * pair.grid
    logits = 5 * np.random.default_rng(seed).standard_normal((3, side, side)).astype(np.float32)
    binary, score = np.array([[True, False, False]]), np.array([[3.0, 2.0, -1.0]], np.float32)
    ours = pair.call(_encode_memory, image.features[2], logits[None], score, binary)
    current, _, sizes = image.flat()
    for k in range(3):
        low = torch.from_numpy(logits)[k : k + 1, None]
        with torch.no_grad():
            full = torch.nn.functional.interpolate(low, (pair.size,) * 2, mode="bilinear")
            theirs, _ = image.model._encode_new_memory(
                current, sizes, full, torch.from_numpy(score[:, k : k + 1]), bool(binary[0, k])
            )
        yield Output("memory features", ours[0, k], theirs[0].flatten(1).T)


def _encode_memory(module, coarse, logits, score, binary):
    return module.encode_memory(coarse, logits, score, binary=binary)


CLIPS = (  # prompted slices, tracked slices, the slice at hand, slices in all, backwards
    ((0, 30), range(5, 20), 20, 40, False),
    ((30, 35), range(29, 20, -1), 20, 40, True),
    ((0,), range(1, 6), 6, 8, False),
)


def memory_attention(image, seed=4):
    """The coarse map after a look at two prompted slices, six tracked ones and their pointers."""
    for clip in CLIPS:
        rng = np.random.default_rng(seed)
        memories = {t: _memory(image.pair, rng) for t in (*clip[0], *clip[1])}
        ours = _our_attention(image, memories, *clip)
        theirs = _their_attention(image, memories, *clip)
        yield Output("memory attention", ours[0, 0], meta.channels_last(theirs)[0])


def _memory(pair, rng):
    config = pair.ours.config
    memory = rng.standard_normal((1, 1, pair.grid**2, config.memory_width))
    pointer = rng.standard_normal((1, 1, config.width))
    return memory_bank.Memory(memory.astype(np.float32), pointer.astype(np.float32))


def _our_attention(image, memories, prompted, tracked, index, count, backwards):
    pair = image.pair
    bank = bank_of(pair.ours.config, memories, prompted, tracked)
    numbers = np.int32(index), np.int32(count), np.bool_(backwards)
    return pair.call("attend_memory", image.features, bank, *numbers)[2]


def bank_of(config, memories, prompted, tracked):
    """Our bank after these slices."""
    size = next(iter(memories.values())).memory_BKPM.shape[2]
    bank = memory_bank.empty_bank(config, 1, 1, size, len(prompted))
    yes = jnp.ones((1, 1), bool)
    for t in prompted:
        bank = memory_bank.remember_prompted(bank, config, memories[t], jnp.int32(t), yes)
    for t in tracked:
        bank = memory_bank.remember_tracked(bank, config, memories[t], jnp.int32(t), yes, yes)
    return bank


def _their_attention(image, memories, prompted, tracked, index, count, backwards):
    model, side = image.model, image.pair.grid
    place = model.memory_encoder.position_encoding(torch.zeros(1, 1, side, side))

    def kept(t):
        memory = np.swapaxes(memories[t].memory_BKPM[0, 0], 0, 1).reshape(1, -1, side, side)
        return {
            "maskmem_features": torch.from_numpy(np.ascontiguousarray(memory)),
            "maskmem_pos_enc": [place],
            "obj_ptr": torch.from_numpy(memories[t].pointer_BKD[0]),
        }

    outputs = {
        "cond_frame_outputs": {t: kept(t) for t in prompted},
        "non_cond_frame_outputs": {t: kept(t) for t in tracked},
    }
    with torch.no_grad():
        return model._prepare_memory_conditioned_features(
            index, False, *image.flat(), outputs, count, backwards
        )


PARTS = (encoder, prompts, decoder, heads, memory_features, memory_attention)


def outputs(pair):
    """All of them."""
    image = Image(pair, image_of(pair))
    for part in PARTS:
        yield from part(image)
