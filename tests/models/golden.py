"""What Meta's code puts out for a SAM 2.1 of a few thousand parameters, and what ours does.

`golden.npz` holds Meta's numbers for the inputs and weights made here. `test_golden.py` of
`tests/parity` made it, and compares it again where Meta's code is installed; so the network is held
to Meta's code wherever the tests run.
"""

import dataclasses
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from sss_jax.conversion.keymap import to_ours
from sss_jax.models import memory_bank
from sss_jax.models.presets import preset
from sss_jax.models.sam2 import Sam2
from tests.parity.weights import official_weights

FILE = Path(__file__).with_name("golden.npz")
SIDE, GRID = 64, 4
CONFIG = dataclasses.replace(
    preset("tiny", SIDE),
    embed_dim=8,
    depths=(1, 1, 2, 1),
    global_blocks=(3,),
    width=32,
    upscale_channels=(8, 4),
    memory_width=8,
    memory_layers=2,
    memory_mlp=64,
)
MODEL = Sam2(CONFIG)
PROMPTED, TRACKED, INDEX, COUNT = (0,), (1, 2, 3, 4, 5), 6, 8
BOX, LABELS = np.array([[[[9.0, 15.0], [52.0, 41.0]]]], np.float32), np.array([[[2, 3]]])


def weights():
    """Arrays by official name; some layers are faint, so that the next norm's epsilon counts."""
    return official_weights(CONFIG, seed=5, faint=True)


def normal(seed, *shape):
    """A stream that no version of NumPy changes."""
    return np.random.RandomState(seed).standard_normal(shape).astype(np.float32)


def image():
    """Uneven along x and y."""
    return normal(1, 1, SIDE, SIDE, 3)


def features():
    """Pyramid maps that do not come from the encoder."""
    sides = [SIDE // stride for stride in CONFIG.strides]
    return tuple(normal(2 + i, 1, s, s, CONFIG.width) for i, s in enumerate(sides))


def faint_map():
    """A coarse map so small that the epsilon of memory attention counts."""
    return 0.01 * normal(6, 1, GRID, GRID, CONFIG.width)


def mask_logits():
    """A mask at four times the coarse grid."""
    return 3 * normal(7, 1, 1, 4 * GRID, 4 * GRID)


def remembered():
    """(memory, pointer) by slice."""
    shape = (1, 1, GRID**2, CONFIG.memory_width)
    return {
        t: (normal(10 + t, *shape), normal(30 + t, 1, 1, CONFIG.width))
        for t in (*PROMPTED, *TRACKED)
    }


def encoder(params):
    """Pyramid maps of the image."""
    maps = MODEL.apply({"params": params}, image(), method="encode_image")
    return {f"features {i}": level for i, level in enumerate(maps)}


def decoder(params):
    """A box on the given features, and a mask prompt."""

    def run(module):
        encoder = module.sam_prompt_encoder
        tokens, _ = encoder.points(BOX, LABELS, (SIDE, SIDE))
        return (
            tokens[0, 0],
            encoder.masks(mask_logits())[0, 0],
            encoder.dense_position(GRID, GRID),
            module.decode(features(), BOX, LABELS),
            module.predict(features(), BOX, LABELS, multimask=True).pointer_BKD[0, 0],
        )

    tokens, dense, place, out, pointer = MODEL.apply({"params": params}, method=run)
    return {
        "prompt tokens": tokens,
        "mask prompt": dense,
        "positions of the grid": place,
        "mask logits": out.logits_BKMHW[0, 0],
        "estimated IoU": out.iou_BKM[0, 0],
        "object score": out.object_score_BK[0],
        "pointer": pointer,
    }


def memory(params):
    """The memory of a mask."""
    score = jnp.ones((1, 1))
    found = MODEL.apply(
        {"params": params},
        features()[2],
        mask_logits(),
        score,
        binary=False,
        method="encode_memory",
    )
    return {"memory features": found[0, 0]}


def attention(params):
    """The faint map after a look at one prompted slice, five tracked ones, and six pointers."""
    bank = memory_bank.empty_bank(CONFIG, 1, 1, GRID**2, len(PROMPTED))
    yes = jnp.ones((1, 1), bool)
    for t, (encoded, pointer) in remembered().items():
        new = memory_bank.Memory(jnp.asarray(encoded), jnp.asarray(pointer))
        if t in PROMPTED:
            bank = memory_bank.remember_prompted(bank, CONFIG, new, jnp.int32(t), yes)
        else:
            bank = memory_bank.remember_tracked(bank, CONFIG, new, jnp.int32(t), yes, yes)
    maps = (*features()[:2], faint_map())
    numbers = jnp.int32(INDEX), jnp.int32(COUNT), jnp.asarray(False)
    seen = MODEL.apply({"params": params}, maps, bank, *numbers, method="attend_memory")
    return {"memory attention": seen[2][0, 0]}


def our_params():
    """The weights as our parameters."""
    return to_ours(weights())


def error(ours, theirs):
    """Largest error as a share of the root mean square."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape
    return np.abs(ours - theirs).max() / np.sqrt(np.mean(np.square(theirs)))
