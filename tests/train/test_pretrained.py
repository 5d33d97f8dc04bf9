"""Starting from converted weights; the weights themselves are tested with the conversion."""

import dataclasses
import types

import jax
import numpy as np
import pytest

from sss_jax import config
from sss_jax.errors import ConfigError
from sss_jax.models.presets import preset
from sss_jax.models.sam2 import Sam2
from sss_jax.models.sss import build_model
from sss_jax.ssl import dfe
from sss_jax.train import pretrained
from sss_jax.train.state import init_all_params
from sss_jax.train.step import root_key
from tests.small_networks import random_params


@pytest.fixture(scope="module")
def converted():
    """Weights of a whole network, memory included, as the conversion returns them."""
    return random_params(Sam2(preset("nano", 64)), 5)


@pytest.fixture
def options(converted, monkeypatch):
    info = types.SimpleNamespace(variant="nano")
    monkeypatch.setattr(pretrained.conversion, "load", lambda folder: (info, converted))
    settings = ["model.init=weights", "model.class_token_std=0"]
    return config.load("demo:sss", settings)


def test_every_sam2_array_is_the_converted_one(options, converted):
    model = build_model(options)
    drawn = jax.jit(lambda k: init_all_params(model, options, k))(root_key(0))
    params = pretrained.with_converted(drawn, options)
    assert jax.tree.structure(params) == jax.tree.structure(drawn)
    for path, value in jax.tree_util.tree_leaves_with_path(params["net"]["sam2"]):
        expected = converted
        for key in path:
            expected = expected[key.key]
        np.testing.assert_array_equal(value, expected)
    jax.tree.map(np.testing.assert_array_equal, params["dfe"], drawn["dfe"])
    assert not np.asarray(params["net"]["class_tokens"]).any()


def test_dfe_starts_silent_and_can_learn(options):
    model = build_model(options)
    params = jax.jit(lambda k: init_all_params(model, options, k)["dfe"])(root_key(0))
    rng = np.random.default_rng(0)
    weak, strong = (
        tuple(rng.standard_normal((2, s, s, 64)).astype(np.float32) for s in (8, 4, 2))
        for _ in range(2)
    )
    enhanced = dfe.enhance(params, weak, strong, options.dfe)
    for one, other in zip(enhanced.strong, strong, strict=True):
        np.testing.assert_array_equal(one, other)

    def loss(params):
        found = dfe.enhance(params, weak, strong, options.dfe).strong
        return sum((x * w).sum() for x, w in zip(found, weak, strict=True))

    grads = jax.jit(jax.grad(loss))(params)
    assert all(np.abs(level["conv"]["kernel"]).max() > 0 for level in grads.values())
    # The MLP sees nothing while the convolution is 0; one step later it learns too.
    moved = jax.tree.map(lambda p, g: p - 1e-3 * g, params, grads)
    grads = jax.jit(jax.grad(loss))(moved)
    assert all(np.abs(level["linear_3"]["kernel"]).max() > 0 for level in grads.values())
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


def test_another_size_of_network_is_refused(options):
    other = dataclasses.replace(options, model=dataclasses.replace(options.model, preset="tiny"))
    with pytest.raises(ConfigError, match=r"set model\.preset=nano"):
        pretrained.with_converted({"net": {}}, other)


def test_without_init_nothing_changes():
    params = {"net": {}}
    assert pretrained.with_converted(params, config.load("demo:sss")) is params
