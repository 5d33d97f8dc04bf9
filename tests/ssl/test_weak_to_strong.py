"""The loss of one step: what may influence it, and what may not."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sss_jax import flops
from sss_jax.options import SemiOptions
from sss_jax.ssl.network import Network
from sss_jax.ssl.prompts import clips_to_images
from sss_jax.ssl.pseudo_labels import make_pseudo_labels
from sss_jax.ssl.views import mix, unlabelled_views
from sss_jax.ssl.weak_to_strong import _ramp, sss_loss
from sss_jax.train.state import init_all_params
from sss_jax.train.step import root_key


def without_prompts(options, **semi):
    """No prompts and no memory: what the loss is of the features alone."""
    return dataclasses.replace(
        options,
        pcsw=dataclasses.replace(options.pcsw, enabled=False),
        memory=dataclasses.replace(options.memory, kind="none"),
        semi=dataclasses.replace(options.semi, labelled_prompts="none", **semi),
    )


@pytest.fixture(scope="module")
def setup(micro):
    """Parameters and one compiled loss with its gradient, a function of what tests change."""
    model, options, batch = micro
    # Memory has tests of its own, and takes half the time to compile.
    options = dataclasses.replace(options, memory=dataclasses.replace(options.memory, kind="none"))
    params = jax.jit(lambda k: init_all_params(model, options, k))(root_key(0))

    @jax.jit
    def loss(params, teacher, batch, key):
        def of(params, teacher):
            return sss_loss(params, teacher, batch, key, jnp.int32(0), model=model, options=options)

        return jax.value_and_grad(of, argnums=(0, 1), has_aux=True)(params, teacher)

    return model, options, batch, params, loss


@pytest.fixture(scope="module")
def plain(setup):
    _, _, batch, params, loss = setup
    return loss(params, params["net"], batch, root_key(1))


def test_every_term_is_there_and_finite(plain):
    (loss, aux), _ = plain
    assert np.isfinite(loss)
    assert all(np.isfinite(value) for value in aux.values())
    assert {"loss_labelled", "loss_unlabelled", "loss_coarse", "coverage"} <= set(aux)
    assert {"similarity_level_8", "similarity_level_16"} <= set(aux)
    assert 0 < aux["coverage"] <= 1, "the fixture must have confident pixels to test anything"
    assert aux["loss_unlabelled"] > 0


def test_the_total_is_the_weighted_sum(setup, plain):
    options, (loss, aux) = setup[1], plain[0]
    weights = options.loss
    total = (
        aux["loss_labelled"]
        + weights.coarse * aux["loss_coarse"]
        + weights.iou * aux["loss_iou"]
        + weights.presence * aux["loss_presence"]
        + options.semi.weight * aux["loss_unlabelled"]
    )
    np.testing.assert_allclose(loss, total, rtol=1e-6)


def test_the_teacher_gets_no_gradient(plain):
    teacher = plain[1][1]
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(teacher))


def test_dfe_and_encoder_get_gradients(plain):
    student = plain[1][0]
    for name in ("level_8", "level_16"):
        assert all(np.any(leaf) for leaf in jax.tree.leaves(student["dfe"][name])), name
    encoder = student["net"]["sam2"]["image_encoder"]
    assert all(np.any(leaf) for leaf in jax.tree.leaves(encoder))
    assert np.any(student["net"]["class_tokens"])


def test_unlabelled_images_matter_and_padding_does_not(setup, plain):
    _, _, batch, params, loss = setup
    changed = {name: dict(part) for name, part in batch.items()}
    changed["unlabelled"]["image"] = batch["unlabelled"]["image"][:, :, ::-1]
    other = loss(params, params["net"], changed, root_key(1))[0][1]
    assert other["loss_unlabelled"] != plain[0][1]["loss_unlabelled"]
    assert other["loss_labelled"] == plain[0][1]["loss_labelled"]

    mask = batch["labelled"]["slice_mask"]
    garbage = {name: dict(part) for name, part in batch.items()}
    garbage["labelled"]["label"] = np.where(
        mask[..., None, None], batch["labelled"]["label"], 1
    ).astype(np.int32)
    terms = loss(params, params["net"], garbage, root_key(1))[0][1]
    np.testing.assert_allclose(terms["loss_labelled"], plain[0][1]["loss_labelled"], rtol=1e-6)


def test_another_key_is_another_step(setup, plain):
    _, _, batch, params, loss = setup
    assert loss(params, params["net"], batch, root_key(2))[0][0] != plain[0][0]


def test_no_confident_pixel_no_loss(micro):
    """Coverage 0: the unlabelled term and its gradient are exactly 0."""
    model, options, batch = micro
    options = without_prompts(options, confidence=1.0)
    params = jax.jit(lambda k: init_all_params(model, options, k))(root_key(0))

    def unlabelled(params):
        _, aux = sss_loss(
            params, params["net"], batch, root_key(1), jnp.int32(0), model=model, options=options
        )
        return aux["loss_unlabelled"]

    value, grads = jax.jit(jax.value_and_grad(unlabelled))(params)
    assert value == 0
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(grads))


def test_the_unlabelled_loss_may_stop_before_the_encoder(micro):
    """Then its gradient there is exactly 0, and the backward pass through it is not computed."""
    model, options, batch = micro
    options = without_prompts(options)
    params = jax.jit(lambda k: init_all_params(model, options, k))(root_key(0))

    def gradient(trained):
        semi = dataclasses.replace(options.semi, encoder_gradient=trained)
        own = dataclasses.replace(options, semi=semi)

        def unlabelled(params):
            key, step = root_key(1), jnp.int32(0)
            found = sss_loss(params, params["net"], batch, key, step, model=model, options=own)
            return found[1]["loss_unlabelled"]

        return jax.grad(unlabelled)

    frozen = jax.jit(gradient(False))(params)
    encoder = frozen["net"]["sam2"].pop("image_encoder")
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(encoder))
    assert np.any(frozen["net"]["class_tokens"])
    assert all(map(np.any, jax.tree.leaves(frozen["dfe"]["level_16"])))
    strong = jnp.concatenate([clips_to_images(batch["unlabelled"]["image"])] * 2)
    forward = flops.count(lambda p: Network(model, p).encode(strong), params["net"])
    every, few = (flops.count(gradient(trained), params) for trained in (True, False))
    assert every - few == pytest.approx(2 * forward, rel=0.1)


@pytest.mark.slow
def test_lifted_weak_features_change_the_pseudo_labels_alone(micro):
    """`enhance_weak`: the labelled side stays; a DFE that adds nothing changes nothing."""
    model, options, batch = micro
    plain = dataclasses.replace(
        without_prompts(options, views=1, dropout=False),
        strong=dataclasses.replace(options.strong, cutmix=0.0),
        dfe=dataclasses.replace(options.dfe, pair="weak_strong"),
    )
    lift = dataclasses.replace(plain, dfe=dataclasses.replace(plain.dfe, enhance_weak=True))
    params = jax.jit(lambda k: init_all_params(model, options, k))(root_key(0))
    silent = params | {"dfe": jax.tree.map(jnp.zeros_like, params["dfe"])}

    def loss(options):
        return jax.jit(
            lambda p: sss_loss(
                p, p["net"], batch, root_key(1), jnp.int32(0), model=model, options=options
            )[1]
        )

    without, lifted = loss(plain), loss(lift)
    one, other = without(params), lifted(params)
    np.testing.assert_allclose(one["loss_labelled"], other["loss_labelled"], rtol=1e-5)
    assert abs(one["loss_unlabelled"] - other["loss_unlabelled"]) > 1e-5
    one, other = without(silent), lifted(silent)
    np.testing.assert_allclose(one["loss_unlabelled"], other["loss_unlabelled"], rtol=1e-5)
    np.testing.assert_allclose(one["coverage"], other["coverage"], atol=1e-6)


def test_views_are_aligned_and_mixed(micro):
    """A strong view is a function of the weak one, pixel by pixel, with the partner's box."""
    _, options, batch = micro
    still = dataclasses.replace(options.strong, jitter=0.0, blur=0.0, cutmix=1.0)
    options = dataclasses.replace(options, strong=still)
    views = unlabelled_views(root_key(4), batch["unlabelled"], options, None)
    weak = np.asarray(views.weak_BSHWC)
    for view in views.strong:
        y0, x0, y1, x1 = np.asarray(view.box_B4).T
        centre = (np.arange(32) + 0.5) / 32
        rows = (centre >= y0[:, None]) & (centre < y1[:, None])
        columns = (centre >= x0[:, None]) & (centre < x1[:, None])
        box = rows[:, :, None] & columns[:, None, :]
        assert box.any()
        expected = np.where(box[:, None, :, :, None], weak[np.arange(8) ^ 1], weak)
        np.testing.assert_array_equal(view.image_BSHWC, expected)
    first, second = (np.asarray(view.box_B4) for view in views.strong)
    assert not np.array_equal(first, second)


def test_mix_uses_the_same_box_at_every_resolution():
    box = jnp.array([[0.0, 0.0, 0.5, 0.5], [0.0, 0.0, 0.0, 0.0]])
    for side in (4, 8, 32):
        x = jnp.stack([jnp.zeros((1, side, side)), jnp.ones((1, side, side))])
        mixed = np.asarray(mix(box, x, None))
        assert mixed[0, 0, : side // 2, : side // 2].all()
        assert mixed[0].sum() == (side // 2) ** 2
        assert mixed[1].all()


def test_pseudo_labels_are_the_teachers_decision(micro):
    model, options, batch = micro
    params = jax.jit(lambda k: init_all_params(model, options, k))(root_key(0))
    views = unlabelled_views(root_key(4), batch["unlabelled"], options, None)
    mask = jnp.asarray(batch["unlabelled"]["slice_mask"])
    pseudo = jax.jit(
        lambda net, views: make_pseudo_labels(Network(model, net), views, mask, options)
    )(params["net"], views)
    assert pseudo.target.label_BSHW.shape == views.valid_BSHW.shape
    confidence = np.asarray(pseudo.target.confidence_BSHW)
    assert confidence.min() >= 1 / (options.model.num_classes + 1) - 1e-6
    assert confidence.max() <= 1
    assert set(np.unique(pseudo.target.label_BSHW)) <= set(range(options.model.num_classes + 1))


@pytest.mark.parametrize(
    ("shape", "middle"), [("linear", 0.5), ("gaussian", np.exp(-1.25))], ids=["linear", "gaussian"]
)
def test_the_unlabelled_loss_grows_to_its_weight(shape, middle):
    ramp = SemiOptions(ramp_steps=100, ramp=shape)
    found = [float(_ramp(jnp.int32(step), ramp)) for step in (0, 50, 100, 1000)]
    start = 0.0 if shape == "linear" else np.exp(-5.0)
    np.testing.assert_allclose(found, [start, middle, 1.0, 1.0], rtol=1e-6)
    assert float(_ramp(jnp.int32(0), SemiOptions(ramp_steps=0, ramp=shape))) == 1.0
