"""Losses against double-precision references, on degenerate inputs, and on eight devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sss_jax import losses
from sss_jax.options import LossOptions

CLASSES = 2
SHAPE = (8, 5, 4)
OPTIONS = LossOptions(cross_entropy=0.7, dice=1.3)
TAU = 0.8


# References: plain NumPy in double precision, one pixel or class at a time.


def reference_pixels(logits, label):
    x = logits.astype(np.float64)
    top = x.max(-1, keepdims=True)
    log_share = x - top - np.log(np.exp(x - top).sum(-1, keepdims=True))
    return -np.take_along_axis(log_share, label[..., None], -1)[..., 0], np.exp(log_share)


def reference_cross_entropy(logits, label, valid):
    pixels = reference_pixels(logits, label)[0][valid]
    return pixels.mean() if pixels.size else 0.0


def reference_dice(logits, label, valid, smooth):
    share = reference_pixels(logits, label)[1][valid]
    truth, guess = label[valid], logits.argmax(-1)[valid]
    scores = []
    for k in range(1, CLASSES + 1):
        if not ((truth == k).any() or (guess == k).any()):
            continue
        p, y = share[:, k], (truth == k).astype(float)
        scores.append(1 - (2 * (p * y).sum() + smooth) / ((p * p).sum() + y.sum() + smooth))
    return np.mean(scores) if scores else 0.0


def reference_supervised(logits, label, valid):
    return 0.7 * reference_cross_entropy(logits, label, valid) + 1.3 * reference_dice(
        logits, label, valid, OPTIONS.smooth
    )


def reference_unlabelled(logits, label, valid, confidence, dice):
    trusted = valid & (confidence >= np.float32(TAU))
    total = reference_pixels(logits, label)[0][trusted].sum() / max(valid.sum(), 1)
    return total + (reference_dice(logits, label, trusted, 1e-5) if dice else 0.0)


def reference_iou(predicted, logits, label, valid):
    gaps = []
    for n in range(len(logits)):
        if not valid[n].any():
            continue
        truth, guess = label[n][valid[n]], logits[n].argmax(-1)[valid[n]]
        for k in range(1, CLASSES + 1):
            union = ((truth == k) | (guess == k)).sum()
            both = ((truth == k) & (guess == k)).sum()
            gaps.append(abs(predicted[n, k - 1] - (both / union if union else 1.0)))
    return np.mean(gaps) if gaps else 0.0


def reference_presence(score, label, valid):
    terms = []
    for n in range(len(label)):
        if not valid[n].any():
            continue
        for k in range(1, CLASSES + 1):
            sign = 1 if (label[n][valid[n]] == k).any() else -1
            terms.append(np.logaddexp(0, -sign * float(score[n, k - 1])))
    return np.mean(terms) if terms else 0.0


# Every loss as a function of (logits [N, H, W, K + 1], a case of other inputs, axis).


def cross_entropy(logits, case, axis=None):
    return losses.cross_entropy(logits, case["label"], case["valid"], axis)


def dice(logits, case, axis=None):
    return losses.dice_loss(logits, case["label"], case["valid"], 1e-5, axis)


def supervised(logits, case, axis=None):
    return losses.supervised_loss(logits, case["label"], case["valid"], OPTIONS, axis)


def unlabelled(logits, case, axis=None, *, with_dice=False):
    return losses.unlabelled_loss(
        logits,
        case["label"],
        case["confidence"],
        case["valid"],
        TAU,
        dice=with_dice,
        smooth=1e-5,
        axis=axis,
    )


def iou(logits, case, axis=None):
    return losses.iou_loss(logits[:, 0, 0, 1:], logits, case["label"], case["valid"], axis)


def presence(logits, case, axis=None):
    return losses.presence_loss(logits[:, 0, 0, 1:], case["label"], case["valid"], axis)


LOSSES = {
    "cross_entropy": (
        cross_entropy,
        lambda x, c: reference_cross_entropy(x, c["label"], c["valid"]),
    ),
    "dice": (dice, lambda x, c: reference_dice(x, c["label"], c["valid"], 1e-5)),
    "supervised": (supervised, lambda x, c: reference_supervised(x, c["label"], c["valid"])),
    "unlabelled": (
        unlabelled,
        lambda x, c: reference_unlabelled(x, c["label"], c["valid"], c["confidence"], False),
    ),
    "unlabelled_dice": (
        functools.partial(unlabelled, with_dice=True),
        lambda x, c: reference_unlabelled(x, c["label"], c["valid"], c["confidence"], True),
    ),
    "iou": (
        iou,
        lambda x, c: reference_iou(x[:, 0, 0, 1:], x, c["label"], c["valid"]),
    ),
    "presence": (
        presence,
        lambda x, c: reference_presence(x[:, 0, 0, 1:], c["label"], c["valid"]),
    ),
}


@jax.jit
def evaluate(logits, case):
    """Value and gradient of every loss, in one compilation."""
    return {
        name: jax.value_and_grad(lambda x, f=f: f(x, case))(logits)
        for name, (f, _) in LOSSES.items()
    }


def make_case(seed, label="any", valid="some", confidence="some"):
    rng = np.random.default_rng(seed)
    labels = {
        "any": rng.integers(0, CLASSES + 1, SHAPE),
        "background": np.zeros(SHAPE, int),
        "one": np.full(SHAPE, CLASSES),
    }
    slices = rng.random((SHAPE[0], 1, 1)) < 0.6
    masks = {
        "all": np.ones(SHAPE, bool),
        "none": np.zeros(SHAPE, bool),
        "some": rng.random(SHAPE) < 0.5,
        "slices": np.broadcast_to(slices, SHAPE),
        "pixel": np.arange(np.prod(SHAPE)).reshape(SHAPE) == 7,
    }
    levels = {
        "some": rng.uniform(0.5, 1, SHAPE),
        "none": np.full(SHAPE, 0.5),
        "edge": np.full(SHAPE, TAU),
    }
    return {
        "label": labels[label].astype(np.int32),
        "valid": np.array(masks[valid]),
        "confidence": levels[confidence].astype(np.float32),
    }


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    spread=st.sampled_from([0.0, 1.0, 30.0, 1e4]),
    offset=st.sampled_from([0.0, -1e3, 1e4]),
    label=st.sampled_from(["any", "background", "one"]),
    valid=st.sampled_from(["all", "none", "some", "slices", "pixel"]),
    confidence=st.sampled_from(["some", "none", "edge"]),
)
def test_losses_equal_references(seed, spread, offset, label, valid, confidence):
    case = make_case(seed, label, valid, confidence)
    noise = np.random.default_rng(seed + 1).standard_normal((*SHAPE, CLASSES + 1))
    logits = (spread * noise + offset).astype(np.float32)
    for name, (value, gradient) in evaluate(logits, case).items():
        expected = LOSSES[name][1](logits, case)
        np.testing.assert_allclose(value, expected, rtol=2e-5, atol=2e-6, err_msg=name)
        assert np.isfinite(gradient).all(), name
        assert not np.asarray(gradient)[~case["valid"]].any() or name in ("iou", "presence"), name


@settings(max_examples=25, deadline=None)
@given(
    values=st.lists(
        st.floats(-(2.0**100), 2.0**100, width=32), min_size=CLASSES + 1, max_size=CLASSES + 1
    ),
    seed=st.integers(0, 10),
)
def test_any_finite_logits_give_finite_losses(values, seed):
    logits = np.broadcast_to(np.float32(values), (*SHAPE, CLASSES + 1))
    for name, (value, gradient) in evaluate(logits, make_case(seed)).items():
        assert np.isfinite(value), name
        assert np.isfinite(gradient).all(), name


def test_gradients_equal_finite_differences():
    case = make_case(5)
    rng = np.random.default_rng(6)
    logits = rng.standard_normal((*SHAPE, CLASSES + 1)).astype(np.float32)
    direction = rng.standard_normal(logits.shape)
    for name, (_, gradient) in evaluate(logits, case).items():
        step = 1e-6
        up, down = (
            LOSSES[name][1](logits.astype(np.float64) + s * step * direction, case) for s in (1, -1)
        )
        expected = (up - down) / (2 * step)
        np.testing.assert_allclose(np.sum(gradient * direction), expected, rtol=2e-4, err_msg=name)


def test_non_finite_logits_outside_the_valid_pixels_do_no_harm():
    case = make_case(1, valid="slices")
    logits = np.random.default_rng(1).standard_normal((*SHAPE, CLASSES + 1)).astype(np.float32)
    clean = evaluate(logits, case)
    dirty = evaluate(np.where(case["valid"][..., None], logits, np.nan).astype(np.float32), case)
    for name in LOSSES:
        for a, b in zip(clean[name], dirty[name], strict=True):
            np.testing.assert_array_equal(a, b, err_msg=name)


@pytest.mark.parametrize("nothing", [{"valid": "none"}, {"confidence": "none"}])
def test_nothing_to_learn_is_exactly_zero(nothing):
    case = make_case(2, **nothing)
    logits = np.random.default_rng(2).standard_normal((*SHAPE, CLASSES + 1)).astype(np.float32)
    names = LOSSES if "valid" in nothing else ["unlabelled", "unlabelled_dice"]
    results = evaluate(logits, case)
    for name in names:
        value, gradient = results[name]
        assert value == 0, name
        assert not np.asarray(gradient).any(), name


def test_dice_of_nothing_present_and_nothing_predicted_is_exactly_zero():
    case = make_case(3, label="background", valid="all")
    logits = np.zeros((*SHAPE, CLASSES + 1), np.float32)
    logits[..., 0] = 3.0
    value, gradient = evaluate(logits, case)["dice"]
    assert value == 0
    assert not np.asarray(gradient).any()


def test_perfect_masks_cost_nothing():
    case = make_case(4, valid="all")
    logits = 50.0 * np.float32(np.eye(CLASSES + 1)[case["label"]])
    results = evaluate(logits, case)
    for name in ("cross_entropy", "dice", "supervised", "unlabelled", "unlabelled_dice"):
        assert abs(float(results[name][0])) < 1e-6, name


def test_absent_class_has_iou_one_only_if_nothing_is_predicted():
    label = jnp.zeros((2, 3, 3), jnp.int32)
    logits = jnp.zeros((2, 3, 3, 2)).at[..., 0].set(1.0).at[1, 0, 0, 1].set(5.0)
    valid = jnp.ones((2, 3, 3), bool)
    assert losses.iou_loss(jnp.array([[1.0], [0.0]]), logits, label, valid) == 0
    assert losses.iou_loss(jnp.array([[0.0], [1.0]]), logits, label, valid) == 1


def test_unlabelled_loss_divides_by_all_valid_pixels():
    case = make_case(7, valid="all", confidence="edge")
    logits = np.random.default_rng(7).standard_normal((*SHAPE, CLASSES + 1)).astype(np.float32)
    whole = unlabelled(logits, case)
    case["confidence"][::2] = 0.1
    half = unlabelled(logits, case)
    expected = reference_pixels(logits, case["label"])[0][1::2].sum() / case["valid"].sum()
    np.testing.assert_allclose(half, expected, rtol=1e-5)
    assert half < whole
    share = losses.confident_share(case["confidence"], case["valid"], TAU)
    np.testing.assert_allclose(share, 0.5)
    assert losses.confident_share(case["confidence"], np.zeros(SHAPE, bool), TAU) == 0


@pytest.fixture(scope="module")
def pmapped():
    def local(weight, image, case):
        def total(w, f):
            return f(image @ w, case, axis="data")

        results = {name: jax.value_and_grad(total)(weight, f) for name, (f, _) in LOSSES.items()}
        share = losses.confident_share(case["confidence"], case["valid"], TAU, "data")
        return {
            name: (value, jax.lax.pmean(gradient, "data"))
            for name, (value, gradient) in results.items()
        }, share

    return jax.pmap(local, axis_name="data", in_axes=(None, 0, 0))


@pytest.mark.parametrize(
    "kind",
    [
        {"valid": "some"},
        {"valid": "slices"},
        {"valid": "pixel"},
        {"valid": "none"},
        {"label": "background"},
        {"confidence": "none"},
    ],
    ids=str,
)
def test_eight_devices_equal_one(pmapped, kind):
    """One image per device, so that devices differ in valid pixels and in classes."""
    case = make_case(8, **kind)
    case["label"][: SHAPE[0] // 2] = 0  # class k is on some devices alone
    rng = np.random.default_rng(9)
    image = rng.standard_normal((*SHAPE, 6)).astype(np.float32)
    weight = rng.standard_normal((6, CLASSES + 1)).astype(np.float32)
    split = jax.tree.map(lambda x: x[:, None], case)
    results, share = pmapped(weight, image[:, None], split)
    alone = one_device(weight, image, case)
    for name, (value, gradient) in results.items():
        expected, expected_gradient = alone[name]
        np.testing.assert_allclose(value, np.full(8, expected), rtol=1e-5, err_msg=name)
        for each in np.asarray(gradient):
            np.testing.assert_allclose(each, expected_gradient, rtol=1e-5, atol=1e-6, err_msg=name)
    expected_share = losses.confident_share(case["confidence"], case["valid"], TAU)
    np.testing.assert_allclose(share, np.full(8, expected_share), rtol=1e-6)


@jax.jit
def one_device(weight, image, case):
    return {
        name: jax.value_and_grad(lambda w, f=f: f(image @ w, case))(weight)
        for name, (f, _) in LOSSES.items()
    }


def test_bfloat16_logits_are_summed_in_float32():
    case = make_case(10, valid="all")
    logits = np.random.default_rng(10).standard_normal((*SHAPE, CLASSES + 1))
    rounded = jnp.asarray(logits, jnp.bfloat16)
    value = cross_entropy(rounded, case)
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, cross_entropy(rounded.astype(jnp.float32), case), rtol=1e-6)


@pytest.mark.parametrize(
    ("size", "target"), [((3, 5), (12, 20)), ((4, 4), (7, 9)), ((1, 2), (4, 2))]
)
def test_upsampling_equals_a_pixel_by_pixel_reference(size, target):
    x = np.random.default_rng(0).standard_normal((2, *size, 3)).astype(np.float32)
    out = np.zeros((2, *target, 3))
    for r in range(target[0]):
        for c in range(target[1]):
            y = np.clip((r + 0.5) * size[0] / target[0] - 0.5, 0, size[0] - 1)
            z = np.clip((c + 0.5) * size[1] / target[1] - 0.5, 0, size[1] - 1)
            for i in range(size[0]):
                for j in range(size[1]):
                    weight = max(0, 1 - abs(y - i)) * max(0, 1 - abs(z - j))
                    out[:, r, c] += weight * x[:, i, j]
    np.testing.assert_allclose(losses.upsample_logits(x, target), out, atol=1e-5)
    assert losses.upsample_logits(jnp.asarray(x, jnp.bfloat16), target).dtype == jnp.float32


def test_downsampling_is_refused():
    with pytest.raises(ValueError, match="cannot be upsampled"):
        losses.upsample_logits(jnp.zeros((1, 4, 4, 2)), (8, 3))
