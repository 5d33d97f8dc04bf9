"""Gradients of one number with respect to every parameter, ours and those of Meta's code.

The number hangs on all outputs: masks, IoU and scores of boxes, clicks and mask prompts; adopted
masks with their pointers; memories of an object that is there and of one that is not; a slice that
has looked at seven memories and their pointers; and the memory of that slice.
"""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("sam2", reason="Meta's code is not installed; tests/parity/meta.py says how")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402

from sss_jax.conversion import keymap, official  # noqa: E402
from sss_jax.models import memory_bank  # noqa: E402
from sss_jax.models.prompt_encoder import no_prompts  # noqa: E402
from tests.parity import meta, parts  # noqa: E402
from tests.parity.pair import pair  # noqa: E402

SIZE, GRID, INDEX, COUNT = 64, 4, 7, 20
NUDGES = 5
TRACKED = range(1, INDEX)
TOLERANCE = 1e-4
UNUSED = {"no_mem_pos_enc", "sam_prompt_encoder/pe_layer/positional_encoding_gaussian_matrix"}
"""Part of every checkpoint, used by nobody; and the frequencies, which are never trained."""

BOX = np.array([[[8, 10], [40, 50], [30, 20]]], np.float32), np.array([[2, 3, 1]], np.int32)
CLICK = np.array([[[44, 12]]], np.float32), np.array([[0]], np.int32)


def normal(seed, *shape):
    return np.random.RandomState(seed).standard_normal(shape).astype(np.float32)


IMAGE, PROMPT = normal(1, 1, SIZE, SIZE, 3), 3 * normal(2, 1, SIZE // 4, SIZE // 4)


def nudged(number):
    """The image; from the first on, every pixel moved to the next float above or below.

    Where two pixels of a pooling window tie but for rounding, the gradient has two values, and
    compilers choose: such a change jumps from one to the other. Either is right.
    """
    if number == 0:
        return IMAGE
    up = np.random.RandomState(number).standard_normal(IMAGE.shape) > 0
    return np.nextafter(IMAGE, np.where(up, np.inf, -np.inf).astype(np.float32))


def weighted(outputs, array=jnp.asarray):
    """Sum of all outputs with random weights, each output as loud as the others."""
    return sum(
        (x * array(normal(50 + i, *x.shape))).sum() / np.sqrt(np.prod(x.shape))
        for i, x in enumerate(outputs)
    )


def ours(module, image):
    """Every output, by our network."""
    features = module.encode_image(image)
    box, click = (
        module.decode(features, p[0][None], p[1][None], None, mask)
        for p, mask in ((BOX, None), (CLICK, PROMPT[None]))
    )
    masks = parts.some_masks(SIZE)[None]
    taken = module.adopt_mask(features, masks)
    score = taken.object_score_BK
    memory = module.encode_memory(features[2], taken.logits_BKHW, score, binary=False)
    new = memory_bank.Memory(memory, taken.pointer_BKD)
    bank, yes = memory_bank.empty_bank(module.config, 1, 2, GRID**2, 1), jnp.ones((1, 2), bool)
    bank = memory_bank.remember_prompted(bank, module.config, new, jnp.int32(0), yes)
    for t in TRACKED:
        bank = memory_bank.remember_tracked(bank, module.config, new, jnp.int32(t), yes, yes)
    seen = module.attend_memory(features, bank, jnp.int32(INDEX), jnp.int32(COUNT), False)
    found = module.predict(seen, *no_prompts(1, 2, 1), multimask=True, memory_conditioned=True)
    last = module.encode_memory(features[2], found.logits_BKHW, found.object_score_BK, binary=False)
    return [
        *(x[0] for out in (box, click) for x in out[:3]),
        *(x[0] for x in (taken.pointer_BKD, memory)),
        *(x[0] for x in (found.logits_BKHW, found.object_score_BK, found.pointer_BKD, last)),
    ]


def theirs(model):
    """The same, by Meta's."""
    found = model._prepare_backbone_features(model.forward_image(meta.pixels(IMAGE)))
    _, flat, place, sizes = found
    maps = [x.permute(1, 2, 0).view(1, -1, *s) for x, s in zip(flat, sizes, strict=True)]
    skips, coarse = maps[:2], maps[2]
    first = coarse + model.no_mem_embed.reshape(1, -1, 1, 1)
    decoded = [decoded_by(model, first, skips, *p) for p in ((BOX, None), (CLICK, PROMPT))]
    two, place = [x.expand(-1, 2, -1) for x in flat], [x.expand(-1, 2, -1) for x in place]
    both = [x.expand(2, -1, -1, -1) for x in (*skips, coarse)]
    masks = torch.from_numpy(parts.some_masks(SIZE))[:, None]
    _, _, _, low, _, pointer, score = model._use_mask_as_output(both[2], both[:2], masks)
    memory, where = remembered(model, two, sizes, low, score)
    kept = {"maskmem_features": memory, "maskmem_pos_enc": where, "obj_ptr": pointer}
    outputs = {
        "cond_frame_outputs": {0: kept},
        "non_cond_frame_outputs": dict.fromkeys(TRACKED, kept),
    }
    seen = model._prepare_memory_conditioned_features(
        INDEX, False, two[2:], place[2:], sizes[2:], outputs, COUNT
    )
    _, _, _, mask, _, found_pointer, found_score = model._forward_sam_heads(
        seen, None, None, both[:2], True
    )
    last, _ = remembered(model, two, sizes, mask, found_score)
    return [
        *(x for out in decoded for x in out),
        *(pointer, rows(memory)),
        *(mask[:, 0], found_score[:, 0], found_pointer, rows(last)),
    ]


def decoded_by(model, coarse, skips, prompt, mask):
    mask = None if mask is None else torch.from_numpy(mask)[:, None]
    given = tuple(torch.from_numpy(x) for x in prompt)
    sparse, dense = model.sam_prompt_encoder(points=given, boxes=None, masks=mask)
    place = model.sam_prompt_encoder.get_dense_pe()
    logits, iou, _, score = model.sam_mask_decoder.predict_masks(
        coarse, place, sparse, dense, False, skips
    )
    return logits, iou, score[:, 0]


def remembered(model, flat, sizes, low, score):
    full = torch.nn.functional.interpolate(low, (SIZE, SIZE), mode="bilinear")
    return model._encode_new_memory(flat, sizes, full, score, False)


def rows(memory_BMhw):
    return memory_BMhw.flatten(2).transpose(1, 2)


@pytest.fixture(scope="module", params=["2.1", pytest.param("2.0", marks=pytest.mark.slow)])
def both(request):
    networks = pair("tiny", request.param, SIZE)
    value = weighted(theirs(networks.theirs), torch.from_numpy)
    value.backward()
    grads = {
        name: np.zeros(p.shape, np.float32) if p.grad is None else p.grad.numpy()
        for name, p in networks.theirs.named_parameters()
    }
    buffer = dict(networks.theirs.named_buffers())[official.BUFFER]
    grads[official.BUFFER] = np.zeros(buffer.shape, np.float32)
    reference = keymap.flatten(keymap.to_ours(grads))

    def loss(params, image):
        return weighted(networks.ours.apply({"params": params}, image, method=ours))

    run = jax.jit(jax.value_and_grad(loss))
    mine, found = zip(*(run(networks.params, nudged(k)) for k in range(NUDGES)), strict=True)
    return (float(mine[0]), [keymap.flatten(g) for g in found]), (value.item(), reference)


def test_the_number_agrees(both):
    (mine, _), (reference, _) = both
    assert mine == pytest.approx(reference, rel=1e-4)


def shifted_by_a_constant(name):
    """The bias of keys without rotation moves all logits of a softmax alike: no gradient."""
    return name.startswith("sam_mask_decoder/transformer") and name.endswith("k_proj/bias")


def test_every_gradient_agrees(both):
    (_, mine), (_, reference) = both
    assert all(found.keys() == reference.keys() for found in mine)
    total = np.sqrt(sum(np.sum(np.square(g)) for g in reference.values()))
    errors = {}
    for name, gradient in reference.items():
        norm = np.linalg.norm(gradient)
        error = min(np.linalg.norm(found[name] - gradient) for found in mine)
        if name in UNUSED:
            assert norm == 0
            assert not any(np.any(found[name]) for found in mine)
        elif shifted_by_a_constant(name):
            norms = (norm, *(np.linalg.norm(found[name]) for found in mine))
            assert max(norms) < 1e-5 * total, name
        else:
            assert norm > 1e-6 * total, f"{name} does not learn"
            errors[name] = error / norm
    worst = sorted(errors, key=errors.get)[-5:]
    print({name: f"{errors[name]:.1e}" for name in worst}, np.median(list(errors.values())))
    assert {name: errors[name] for name in worst if not errors[name] <= TOLERANCE} == {}


def test_every_row_of_the_temporal_table_learns(both):
    (_, mine), _ = both
    assert np.all(np.square(mine[0]["maskmem_tpos_enc"]).sum(axis=(1, 2, 3)) > 0)
