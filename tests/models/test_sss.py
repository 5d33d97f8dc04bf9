"""The SSS network: SAM-2, class tokens, coarse head."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sss_jax import config
from sss_jax.errors import ConfigError
from sss_jax.models.image_encoder import normalise_image
from sss_jax.models.initial import rule
from sss_jax.models.prompt_encoder import MaskPrompts, no_prompts
from sss_jax.models.sss import SSSModel, build_model, init_params, kernels_for
from sss_jax.options import MemoryOptions, ModelOptions, Options

OPTIONS = Options(
    model=ModelOptions(preset="nano", image_size=16, num_classes=2, class_token_std=0.5),
    memory=MemoryOptions(kind="none"),
)
NANO = build_model(OPTIONS).config
CONFIG = dataclasses.replace(
    NANO, embed_dim=8, depths=(1, 1, 1, 1), global_blocks=(2, 3), width=32, decoder_mlp=32
)
MODEL = SSSModel(CONFIG, OPTIONS.model.num_classes, OPTIONS.model.class_token_std)


@pytest.fixture(scope="module")
def init():
    return jax.jit(lambda key: init_params(MODEL, key))


@pytest.fixture(scope="module")
def params(init):
    return init(jax.random.key(0))


@pytest.fixture(scope="module")
def image():
    return np.random.default_rng(0).uniform(size=(3, 16, 16, 1)).astype(np.float32)


@pytest.fixture(scope="module")
def run():
    return jax.jit(lambda p, x, prompts: MODEL.apply({"params": p}, x, prompts))


def test_normalised_image_is_standard_and_grey():
    image = np.random.default_rng(0).uniform(size=(1, 4, 4, 1)).astype(np.float32)
    x = normalise_image(image)
    assert x.shape == (1, 4, 4, 3)
    np.testing.assert_allclose(x[..., 0], (image[..., 0] - 0.485) / 0.229, rtol=1e-5)
    np.testing.assert_allclose(x[..., 2], (image[..., 0] - 0.406) / 0.225, rtol=1e-5)


def test_outputs(run, params, image):
    coarse, out = run(params, image, no_prompts(3, 2, slots=3))
    assert coarse.shape == out.logits_BHWK1.shape == (3, 8, 8, 3)
    assert out.iou_BK.shape == out.object_score_BK.shape == (3, 2)
    assert np.all(out.logits_BHWK1[..., 0] == 0)
    assert np.std(out.logits_BHWK1[..., 1:]) > 1e-3
    assert np.std(coarse) > 1e-3
    assert np.all((out.iou_BK > 0) & (out.iou_BK < 1))


def test_class_tokens_tell_the_classes_apart(run, params, image):
    prompts = no_prompts(3, 2, slots=3)
    _, out = run(params, image, prompts)
    assert np.abs(out.logits_BHWK1[..., 1] - out.logits_BHWK1[..., 2]).max() > 1e-3
    swapped = params | {"class_tokens": params["class_tokens"][::-1]}
    _, other = run(swapped, image, prompts)
    np.testing.assert_allclose(
        other.logits_BHWK1[..., 1:], out.logits_BHWK1[..., :0:-1], rtol=1e-4, atol=1e-5
    )


def test_zero_class_tokens_are_plain_sam2(run, params, image):
    prompts = no_prompts(3, 2, slots=3)._replace(labels_BKQ=jnp.ones((3, 2, 3), jnp.int32))
    zero = params | {"class_tokens": jnp.zeros_like(params["class_tokens"])}
    _, out = run(zero, image, prompts)

    def plain(module):
        features = module.sam2.encode_image(normalise_image(image))
        return module.sam2.decode(features, prompts.points_BKQ2, prompts.labels_BKQ)

    expected = jax.jit(lambda p: MODEL.apply({"params": p}, method=plain))(zero)
    np.testing.assert_allclose(
        out.logits_BHWK1[..., 1:],
        jnp.moveaxis(expected.logits_BKMHW[:, :, 0], 1, -1),
        rtol=1e-4,
        atol=1e-5,
    )
    np.testing.assert_allclose(out.iou_BK, expected.iou_BKM[..., 0], atol=1e-6)


def named(tree):
    return {"/".join(k.key for k in path): x for path, x in jax.tree.leaves_with_path(tree)}


def test_init_params_has_the_structure_that_linen_gives(params):
    image, prompts = jnp.zeros((1, 16, 16, 1)), no_prompts(1, 2)
    linen = jax.eval_shape(MODEL.init, jax.random.key(0), image, prompts)["params"]
    assert type(params) is dict
    assert {k: (v.shape, v.dtype) for k, v in named(params).items()} == {
        k: (v.shape, v.dtype) for k, v in named(linen).items()
    }
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(params))
    assert set(params) == {"sam2", "coarse_head", "class_tokens"}


def test_initial_values_follow_the_rule(params):
    for name, value in named(jax.device_get(params)).items():
        leaf = name.rpartition("/")[2]
        mean, std = (0.0, 0.5) if leaf == "class_tokens" else rule(leaf, value.shape)
        spread = float(np.std(value))
        if std == 0:
            assert np.all(value == mean), name
        elif value.size > 1000:
            assert 0.9 < spread / std < 1.1, name
        assert np.abs(value - mean).max() <= 2.3 * std + 1e-6, name


def test_parts_of_the_stream_differ(params):
    found = named(jax.device_get(params)).items()
    kernels = [np.ravel(v)[:64] for k, v in found if k.endswith("qkv/kernel")]
    scaled = np.array([k / k.std() for k in kernels])
    correlation = np.corrcoef(scaled) - np.eye(len(scaled))
    assert np.abs(correlation).max() < 0.6


def test_init_depends_on_the_key(init, params):
    other = init(jax.random.key(1))
    assert np.abs(other["class_tokens"] - params["class_tokens"]).max() > 1e-3


def test_init_depends_on_neither_image_size_nor_class_token_spread(params):
    """The default spread of 0 leaves SAM-2 exact, and all other leaves as they were."""
    again = init_params(SSSModel(dataclasses.replace(CONFIG, image_size=64), 2), jax.random.key(0))
    assert np.all(again.pop("class_tokens") == 0)
    rest = {name: value for name, value in params.items() if name != "class_tokens"}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), rest, again)


def test_mask_prompts_of_some_objects(params):
    """Where no mask is given the output is that without mask prompts; where one is, another."""
    rng = np.random.default_rng(0)
    image = jnp.asarray(rng.random((2, 16, 16, 1)), jnp.float32)
    mask = jnp.asarray(rng.normal(size=(2, 2, 8, 8)) * 10, jnp.float32)
    given = jnp.array([[True, False], [False, False]])

    @jax.jit
    def logits(params, masks):
        net = {"params": params}
        features = MODEL.apply(net, image, method="encode")
        found = MODEL.apply(net, features, no_prompts(2, 2), masks, method="segment")
        return found.logits_BHWK1[..., 1:]

    plain, some = logits(params, None), logits(params, MaskPrompts(mask, given))
    change = np.abs(plain - some).max(axis=(1, 2))
    given_change = change[0, 0]
    assert given_change > 1e-3
    change[0, 0] = 0
    assert change.max() < 1e-5, "the rest differs by rounding alone"


def test_build_model_follows_the_options():
    options = ModelOptions(
        preset="small", image_size=96, num_classes=4, dtype="bfloat16", remat=True
    )
    options = Options(model=options)
    model = build_model(options)
    assert model.num_classes == 4
    assert (model.config.name, model.config.image_size) == ("small", 96)
    assert (model.config.dtype, model.config.remat) == ("bfloat16", True)
    assert hash(model.config) == hash(build_model(options).config)
    assert model.config.memory
    without = dataclasses.replace(options, memory=MemoryOptions(kind="none"))
    assert not build_model(without).config.memory


def test_build_model_refuses_an_unfit_size():
    with pytest.raises(ConfigError, match="multiple of 32"):
        build_model(Options(model=ModelOptions(preset="tiny", image_size=100)))


def test_kernels_are_for_their_platform_and_whole_images():
    def found(*changes, platform="off"):
        return kernels_for(config.load("acdc:sss", list(changes)), platform)

    assert found() == "off"
    for platform in ("tpu", "gpu"):
        assert found(platform=platform) == platform
        assert found("mesh.context=2", platform=platform) == "off"
        assert found("model.kernels=off", platform=platform) == "off"
        assert found(f"model.kernels={platform}") == platform
        with pytest.raises(ConfigError, match=r"mesh\.context=2 cuts their rows"):
            found(f"model.kernels={platform}", "mesh.context=2")


@pytest.mark.parametrize(
    ("platform", "capability", "kernels"),
    [("gpu", "9.0", "gpu"), ("gpu", "8.0", "gpu"), ("gpu", "8.6", "off"), ("cpu", "", "off")],
)
def test_only_gpus_with_large_cores_get_kernels(monkeypatch, platform, capability, kernels):
    device = types.SimpleNamespace(compute_capability=capability)
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    monkeypatch.setattr(jax, "devices", lambda: [device])
    assert build_model(config.load("acdc:sss")).config.kernels == kernels
