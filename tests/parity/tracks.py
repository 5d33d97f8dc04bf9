"""Meta's predictor on a video beside our tracking: three objects, both ways, and corrections.

A click, a box, and a mask start on one slice; the second object has a mask on a later slice too.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from torch.nn import functional

from sss_jax.models import memory_bank, tracking
from sss_jax.models.prompt_encoder import Prompts
from tests.parity import meta, parts
from tests.parity.compare import Output

SLICES, START, LATER = 8, 3, 6
OBJECTS = ("click", "box", "mask")
CLICK, BOX, MASK = range(3)
PROMPTS = (  # object, slice, place among the object's prompted slices, kind
    (CLICK, START, 0, "click"),
    (BOX, START, 0, "box"),
    (MASK, START, 0, "mask"),
    (BOX, LATER, 1, "mask"),
)


def video_of(pair, seed=1):
    """Slices that have something in common."""
    rng = np.random.default_rng(seed)
    shape = (pair.size, pair.size, 3)
    base = rng.standard_normal(shape)
    slices = [base + 0.5 * rng.standard_normal(shape) for _ in range(SLICES)]
    return np.stack(slices).astype(np.float32)


def click_of(size):
    """One point, (x, y)."""
    return np.array([[0.35 * size, 0.47 * size]], np.float32)


def box_of(size):
    """Two corners."""
    return np.array([[0.16 * size, 0.23 * size], [0.78 * size, 0.59 * size]], np.float32)


def mask_of(size, t):
    """A disc that moves with the slice."""
    y, x = np.mgrid[:size, :size] / size
    return (np.square(x - 0.3 - 0.05 * t) + np.square(y - 0.55) < 0.05).astype(np.float32)


def run_theirs(pair, video):
    """State of Meta's predictor after it went both ways."""
    model, size = pair.theirs, pair.size
    state = meta.start(model, video)
    model.add_new_points_or_box(state, START, CLICK, points=click_of(size), labels=[1])
    model.add_new_points_or_box(state, START, BOX, box=box_of(size))
    model.add_new_mask(state, START, MASK, mask_of(size, START) > 0)
    model.add_new_mask(state, LATER, BOX, mask_of(size, LATER) > 0)
    meta.propagate(model, state, start_frame_idx=START)
    meta.propagate(model, state, start_frame_idx=START, reverse=True)
    return state


def prompt_ours(pair, video):
    """Our prompted slices."""
    model, size = pair.ours, pair.size
    prompted = tracking.nothing_prompted(model, (pair.grid, pair.grid), len(OBJECTS), 2)
    points = np.zeros((1, len(OBJECTS), 2, 2), np.float32)
    labels = np.full((1, len(OBJECTS), 2), -1, np.int32)
    points[0, CLICK, :1], labels[0, CLICK, :1] = click_of(size), 1
    points[0, BOX], labels[0, BOX] = box_of(size), (2, 3)
    features = pair.call("encode_image", video[START][None])
    prompt = jax.jit(functools.partial(tracking.prompt_slice, model))
    prompted, _ = prompt(pair.params, prompted, features, jnp.int32(START), Prompts(points, labels))
    give = jax.jit(functools.partial(tracking.prompt_mask, model))
    for t, k in ((START, MASK), (LATER, BOX)):
        features = pair.call("encode_image", video[t][None])
        mask = np.broadcast_to(mask_of(size, t), (1, len(OBJECTS), size, size))
        where = np.arange(len(OBJECTS))[None] == k
        prompted, _ = give(pair.params, prompted, features, jnp.int32(t), mask, where)
    return prompted


def track_ours(pair, video, prompted, state):
    """Our masks and scores of all slices, from Meta's memories of the prompted ones.

    Those are made of thresholded masks: a pixel whose logit is 0 but for rounding may fall on
    either side, which moves the memory around it by several per cent. `prompted_slices` compares
    the memories themselves.
    """
    memory = np.array(prompted.bank.memory_BKLPM)
    for k, t, slot, _ in PROMPTS:
        memory[0, k, slot] = tokens(meta.kept(state, k, t)["maskmem_features"])
    bank = prompted.bank._replace(memory_BKLPM=jnp.asarray(memory))
    propagate = jax.jit(functools.partial(tracking.propagate, pair.ours))
    numbers = jnp.int32(START), jnp.int32(SLICES)
    return propagate(pair.params, prompted._replace(bank=bank), video, *numbers)


def tokens(memory_BMhw):
    """Meta's memory of one object as rows of ours."""
    return memory_BMhw[0].flatten(1).T.detach().numpy()


def prompted_slices(pair, video, prompted, state):
    """What prompts leave in the bank: masks, pointers, and memories of Meta's masks."""
    for k, t, slot, kind in PROMPTS:
        kept = meta.kept(state, k, t)
        mask = kept["pred_masks"]
        yield Output(f"{kind} prompt: mask", prompted.logits_BKCHW[0, k, slot], mask[0, 0])
        pointer = prompted.bank.pointer_BKRD[0, k, slot]
        yield Output(f"{kind} prompt: pointer", pointer, kept["obj_ptr"][0])
        ours, theirs = memories_of(pair, video[t][None], state, t, kept)
        yield Output(f"{kind} prompt: memory", ours, theirs)


def memories_of(pair, image, state, t, kept):
    """Memories of both sides from the mask that Meta found on a prompted slice."""
    mask, score = kept["pred_masks"], kept["object_score_logits"]
    full, shift = unambiguous(mask, pair.size)
    coarse = pair.call("encode_image", image)[2]
    ours = pair.call("encode_memory", coarse, (mask + shift).numpy(), score.numpy(), binary=True)
    theirs = kept["maskmem_features"]
    if shift:
        theirs, _ = pair.theirs._run_memory_encoder(state, t, 1, full, score, True)
    return ours[0, 0], tokens(theirs)


def unambiguous(mask, size):
    """Meta's mask at full size, and what to add to it so that both sides threshold it alike.

    Nearly always nothing; but of a million pixels one may be 0 up to rounding, and its side moves
    the memory around it by several per cent.
    """
    for shift in np.linspace(0, 0.01, 11) * float(mask.std()):
        full = functional.interpolate(mask + shift, (size, size), mode="bilinear")
        ours = jax.image.resize((mask + shift).numpy(), (1, 1, size, size), "bilinear")
        if np.array_equal(np.asarray(ours) > 0, full.numpy() > 0):
            return full, float(shift)
    raise AssertionError("the sides disagree about more than a pixel")


def tracked_slices(track, state):
    """Masks and scores of every slice, by object and direction."""
    for k, name in enumerate(OBJECTS):
        for t in range(SLICES):
            kept = meta.kept(state, k, t)
            way = "forwards" if t >= START else "backwards"
            mask = kept["pred_masks"][0, 0]
            yield Output(f"track from a {name}, {way}", track.logits_SKHW[t, k], mask)
        scores = [float(meta.kept(state, k, t)["object_score_logits"]) for t in range(SLICES)]
        yield Output("track: object scores", track.score_SK[:, k], scores)


def their_bank(pair, state, k, slices):
    """Our bank, filled with what Meta's predictor holds of one object on these slices."""
    outputs = state["output_dict_per_obj"][k]
    memories = {}
    for t in (*outputs["cond_frame_outputs"], *slices):
        kept = meta.kept(state, k, t)
        memory = tokens(kept["maskmem_features"])[None, None]
        memories[t] = memory_bank.Memory(memory, kept["obj_ptr"].numpy()[None])
    return parts.bank_of(pair.ours.config, memories, list(outputs["cond_frame_outputs"]), slices)


def one_step(pair, video, state):
    """The last slice, tracked from what Meta's predictor holds of the slices before it."""
    last = SLICES - 1
    step = jax.jit(functools.partial(tracking.track_slice, pair.ours))
    features = pair.call("encode_image", video[last][None])
    numbers = jnp.int32(last), jnp.int32(SLICES), jnp.asarray(False)
    for k in (CLICK, BOX):
        prompted = state["output_dict_per_obj"][k]["cond_frame_outputs"]
        before = [t for t in range(START + 1, last) if t not in prompted]
        bank = their_bank(pair, state, k, before)
        memory, found = step(pair.params, bank, features, *numbers)
        kept = meta.kept(state, k, last)
        yield Output("tracked slice: mask", found.logits_BKHW[0, 0], kept["pred_masks"][0, 0])
        yield Output("tracked slice: pointer", memory.pointer_BKD[0, 0], kept["obj_ptr"][0])
        theirs = tokens(kept["maskmem_features"])
        yield Output("tracked slice: memory", memory.memory_BKPM[0, 0], theirs)


def corrections(pair, video, state):
    """A negative click on a slice that was tracked: memory, and the mask before as a prompt."""
    last, size = SLICES - 1, pair.size
    point = np.array([[0.6 * size, 0.3 * size]], np.float32)
    before = meta.kept(state, CLICK, last)["pred_masks"].numpy()
    model = pair.theirs
    model.add_new_points_or_box(state, last, CLICK, points=point, labels=[0])
    theirs = state["temp_output_dict_per_obj"][CLICK]["non_cond_frame_outputs"][last]
    bank = their_bank(pair, state, CLICK, [t for t in range(last) if t != START])
    features = pair.call("encode_image", video[last][None])
    prompts = Prompts(point[None, None], np.zeros((1, 1, 1), np.int32))
    nothing = tracking.nothing_prompted(pair.ours, (pair.grid, pair.grid), 1, 1)
    correct = jax.jit(functools.partial(tracking.prompt_slice, pair.ours))
    _, found = correct(
        pair.params,
        nothing._replace(bank=bank),
        features,
        jnp.int32(last),
        prompts,
        previous_BKHW=before,
        num_slices=jnp.int32(SLICES),
    )
    yield Output("correction: mask", found.logits_BKHW[0, 0], theirs["pred_masks"][0, 0])
    yield Output("correction: pointer", found.pointer_BKD[0, 0], theirs["obj_ptr"][0])


def outputs(pair):
    """All of them."""
    video = video_of(pair)
    with meta.float32_memory():
        state = run_theirs(pair, video)
        prompted = prompt_ours(pair, video)
        yield from prompted_slices(pair, video, prompted, state)
        yield from tracked_slices(track_ours(pair, video, prompted, state), state)
        yield from one_step(pair, video, state)
        yield from corrections(pair, video, state)
