"""The assembled image path."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sss_jax.models import memory_bank
from sss_jax.models.presets import preset
from sss_jax.models.prompt_encoder import prompt_slots
from sss_jax.models.sam2 import Sam2
from tests.small_networks import CONFIG, random_params

MODEL = Sam2(CONFIG)
B, K, Q = 2, 3, 3


@pytest.fixture(scope="module")
def params():
    return random_params(MODEL)


@pytest.fixture(scope="module")
def encode():
    return jax.jit(lambda p, x: MODEL.apply({"params": p}, x, method="encode_image"))


@pytest.fixture(scope="module")
def decode():
    def run(p, features, points, labels, bias=None, masks=None, **static):
        args = features, points, labels, bias, masks
        return MODEL.apply({"params": p}, *args, method="decode", **static)

    return jax.jit(run, static_argnames=("single", "memory_conditioned"))


@pytest.fixture(scope="module")
def image():
    return np.random.default_rng(1).standard_normal((B, 64, 64, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def features(encode, params, image):
    return encode(params, image)


@pytest.fixture(scope="module")
def prompts():
    generator = np.random.default_rng(2)
    points = generator.uniform(0, 64, (B, K, Q, 2)).astype(np.float32)
    labels = np.array([[[2, 3, 1], [2, 3, -1], [-1] * 3], [[1, 0, -1], [-1, 1, 2], [0, 1, 1]]])
    return points, labels.astype(np.int32)


def assert_same(a, b, atol=2e-5):
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4 if atol else 0, atol=atol)
    jax.tree.map(close, a, b)


def test_shapes(features, decode, params, prompts):
    assert [x.shape for x in features] == [(B, 64 // s, 64 // s, 16) for s in (4, 8, 16)]
    out = decode(params, features, *prompts)
    assert out.logits_BKMHW.shape == (B, K, 4, 16, 16)
    assert out.iou_BKM.shape == (B, K, 4)
    assert out.object_score_BK.shape == (B, K)
    assert out.tokens_BKMD.shape == (B, K, 4, 16)
    assert np.all((out.iou_BKM > 0) & (out.iou_BKM < 1))


def test_prompts_matter(features, decode, params, prompts):
    points, labels = prompts
    out = decode(params, features, points, labels).logits_BKMHW
    moved = decode(params, features, points + 9, labels).logits_BKMHW
    kinds = decode(params, features, points, np.where(labels == 1, 0, labels)).logits_BKMHW
    used = (labels >= 0).any(-1)
    assert np.all(np.abs(out - moved).max((2, 3, 4))[used] > 1e-3)
    assert np.all(np.abs(out - kinds).max((2, 3, 4))[(labels == 1).any(-1)] > 1e-3)
    assert np.all(np.abs(out - moved).max((2, 3, 4))[~used] == 0)


def test_objects_in_one_batch_equal_one_by_one(features, decode, params, prompts):
    points, labels = prompts
    together = decode(params, features, points, labels)
    for b, k in np.ndindex(B, K):
        alone = decode(
            params,
            tuple(x[b : b + 1] for x in features),
            points[b : b + 1, k : k + 1],
            labels[b : b + 1, k : k + 1],
        )
        assert_same(
            jax.tree.map(lambda x, b=b, k=k: x[b, k], together),
            jax.tree.map(lambda x: x[0, 0], alone),
        )


def test_images_in_a_batch_are_independent(encode, params, image):
    alone = encode(params, np.stack([image[0], 3 * image[1]]))
    both = encode(params, image)
    assert_same([x[0] for x in both], [x[0] for x in alone])


def test_unused_slots_equal_fewer_points(features, decode, params, prompts):
    points, labels = prompts
    padded = decode(params, features, points, labels)
    for b, k in [(0, 1), (1, 0), (1, 1)]:
        used = labels[b, k] >= 0
        fewer = decode(
            params,
            tuple(x[b : b + 1] for x in features),
            points[b, k][used][None, None],
            labels[b, k][used][None, None],
        )
        assert_same(
            jax.tree.map(lambda x, b=b, k=k: x[b, k], padded),
            jax.tree.map(lambda x: x[0, 0], fewer),
        )


def test_no_prompt_is_one_empty_point_and_the_padding(features, decode, params):
    """Any number of unused slots decodes as none at all, for which the empty point is made."""
    empty = [
        decode(params, features, np.full((B, K, n, 2), 5.0, "f4"), np.full((B, K, n), -1, "i4"))
        for n in (0, Q)
    ]
    assert_same(*empty)


def test_prompt_slots():
    labels = np.array([[[2, 3, 1], [-1, 0, -1], [-1, -1, -1]]], np.int32)
    expected = [[[True] * 3, [False, True, False], [True, False, False]]]
    np.testing.assert_array_equal(prompt_slots(labels), expected)


def test_token_bias_rides_on_the_padding_point(features, decode, params, prompts):
    none = decode(params, features, *prompts)
    zero = decode(params, features, *prompts, np.zeros((B, K, 16), np.float32))
    assert_same(none, zero, atol=0)
    bias = np.zeros((B, K, 16), np.float32)
    bias[1, 2] = 1
    moved = decode(params, features, *prompts, bias)
    change = np.abs(moved.logits_BKMHW - none.logits_BKMHW).max((2, 3, 4))
    assert change[1, 2] > 1e-3
    change[1, 2] = 0
    assert np.all(change == 0)


def test_single_is_the_first_of_all_masks(features, decode, params, prompts):
    every = decode(params, features, *prompts)
    single = decode(params, features, *prompts, single=True)
    assert single.logits_BKMHW.shape[2] == 1
    first = every._replace(
        logits_BKMHW=every.logits_BKMHW[:, :, :1],
        iou_BKM=every.iou_BKM[..., :1],
        tokens_BKMD=every.tokens_BKMD[:, :, :1],
    )
    assert_same(first, single, atol=1e-5)


def test_memory_conditioning_replaces_the_no_memory_embedding(features, decode, params, prompts):
    fine, mid, coarse = features
    conditioned = fine, mid, coarse + params["no_mem_embed"][None]
    plain = decode(params, features, *prompts)
    assert_same(decode(params, conditioned, *prompts, memory_conditioned=True), plain, atol=1e-5)


def test_mask_prompts_belong_to_their_object(features, decode, params, prompts):
    masks = np.random.default_rng(4).standard_normal((B, K, 16, 16)).astype(np.float32)
    out = decode(params, features, *prompts, None, masks)
    other = masks.copy()
    other[0, 1] += 3
    moved = decode(params, features, *prompts, None, other)
    change = np.abs(out.logits_BKMHW - moved.logits_BKMHW).max((2, 3, 4))
    assert change[0, 1] > 1e-3
    change[0, 1] = 0
    assert np.all(change == 0)


@pytest.mark.parametrize(
    ("model", "sizes"),
    [(MODEL, [(32, 32), (96, 160)]), (Sam2(preset("nano", 64)), [(16, 16), (48, 80)])],
    ids=["published", "nano"],
)
def test_any_multiple_works_with_the_same_parameters(model, sizes):
    params = random_params(model)
    for height, width in sizes:
        points, labels = np.full((1, 2, 1, 2), 3.0, "f4"), np.ones((1, 2, 1), "i4")
        run = jax.eval_shape(
            model.apply, {"params": params}, np.zeros((1, height, width, 3), "f4"), points, labels
        )
        stride = model.config.strides[0]
        assert run.logits_BKMHW.shape == (1, 2, 4, height // stride, width // stride)


def test_other_sizes_are_refused(params):
    with pytest.raises(ValueError, match="multiples of 32"):
        MODEL.apply({"params": params}, jnp.zeros((1, 48, 32, 3)), method="encode_image")


def remembered(module, features):
    """Two objects, one absent: a prompted slice and a tracked one, then attention to both."""
    config = module.config
    b, h, w, _ = features[2].shape
    side = config.strides[2]
    mask = jnp.zeros((b, 2, h * side, w * side)).at[:, 0, 8:24].set(1.0)
    adopted = module.adopt_mask(features, mask)
    score = adopted.object_score_BK
    encoded = module.encode_memory(features[2], adopted.logits_BKHW, score, binary=False)
    new = memory_bank.Memory(encoded, adopted.pointer_BKD)
    yes = jnp.ones((b, 2), bool)
    bank = memory_bank.empty_bank(config, b, 2, h * w, 1)
    bank = memory_bank.remember_prompted(bank, config, new, jnp.int32(0), yes)
    bank = memory_bank.remember_tracked(bank, config, new, jnp.int32(2), yes, yes)
    return module.attend_memory(features, bank, jnp.int32(3), jnp.int32(9), False)[2]


def test_every_parameter_learns(image, prompts):
    """Gradients of all outputs reach every parameter but the constants."""
    model = Sam2(dataclasses.replace(CONFIG, depths=(1, 1, 1, 1), global_blocks=(2,), multimasks=1))
    params = random_params(model)
    # The pointer of an object that is absent is a constant.
    params["sam_mask_decoder"]["pred_obj_score_head"]["layers_2"]["bias"] += 10.0
    masks = np.random.default_rng(5).standard_normal((1, 1, 16, 16)).astype(np.float32)

    def loss(p):
        def run(module):
            embedded = module.sam_prompt_encoder.masks(masks)
            features = module.encode_image(image)
            return embedded, module.decode(features, *prompts), remembered(module, features)

        outputs = model.apply({"params": p}, method=run)
        return sum(jnp.sin(3 * x).sum() for x in jax.tree.leaves(outputs))

    grads = jax.jit(jax.grad(loss))(params)
    norms = {
        "/".join(k.key for k in path): float(jnp.abs(g).max())
        for path, g in jax.tree.leaves_with_path(grads)
    }
    assert norms.pop("sam_prompt_encoder/pe_layer/positional_encoding_gaussian_matrix") == 0
    assert norms.pop("no_mem_pos_enc") == 0, "part of every checkpoint, used by nobody"
    # A bias shared by all keys of a softmax cancels.
    learning = {name: norm for name, norm in norms.items() if not name.endswith("k_proj/bias")}
    assert [name for name, norm in learning.items() if not norm > 1e-4] == []
    assert len(norms) - len(learning) == 7 + 2


def test_bfloat16_stays_close(params, image, features, decode, prompts):
    half = Sam2(dataclasses.replace(CONFIG, dtype="bfloat16"))
    exact = decode(params, features, *prompts)

    @jax.jit
    def run(p):
        def both(module):
            maps = module.encode_image(image)
            return maps, module.decode(maps, *prompts)

        return half.apply({"params": p}, method=both)

    maps, out = run(params)
    assert all(x.dtype == jnp.bfloat16 for x in maps)
    assert out.logits_BKMHW.dtype == out.iou_BKM.dtype == out.object_score_BK.dtype == jnp.float32
    for level, expected in zip(maps, features, strict=True):
        error = np.abs(np.asarray(level, np.float32) - expected).max()
        assert error < 0.05 * np.abs(expected).max()
    correlation = np.corrcoef(np.ravel(out.logits_BKMHW), np.ravel(exact.logits_BKMHW))[0, 1]
    assert correlation > 0.995
