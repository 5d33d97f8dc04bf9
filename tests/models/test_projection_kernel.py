"""The TPU kernels of linear layers against the plain layers, run without a TPU."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sss_jax.models import (
    hiera,
    kernel_parts,
    layers,
    memory_attention,
    position,
    projection_kernel,
)
from sss_jax.models.projection_kernel import Form, Weights, suits
from tests.small_networks import TRACKING_CONFIG


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def by_definition(x, weights, onto, table, form):
    heads, m, n, c = x.shape
    y = jnp.moveaxis(x, 0, 2).reshape(m, n, heads * c)
    if weights.scale_C is not None:
        y = layers.layer_norm(y, weights.scale_C, weights.shift_C, form.epsilon)
    y = y @ weights.kernel_CE + weights.bias_E.reshape(1, 1, -1)
    y = y if onto is None else y + onto
    results = jnp.split(y, form.results, axis=-1)
    results = [position.rotate(y, table) if i < form.turned else y for i, y in enumerate(results)]
    results = [jnp.moveaxis(layers.split_heads(y, form.heads), 2, 0) for y in results]
    return (*results, x) if form.through else tuple(results)


# Heads, maps, tokens and channels that come in; channels that go out; normalised; added to
# something; and the form.
CASES = [
    ((1, 3, 64, 16), 24, False, False, Form()),
    ((1, 3, 64, 16), 48, True, False, Form(results=3, turned=2, through=True)),
    ((1, 2, 96, 8), 24, True, False, Form(results=3, heads=2, epsilon=1e-3)),
    ((4, 2, 64, 8), 16, False, True, Form()),
    ((1, 2, 64, 8), 16, False, False, Form(turned=1)),
]


@pytest.mark.parametrize("block", [1, 2**22])
@pytest.mark.parametrize("case", CASES, ids=["plain", "self", "global", "behind", "keys"])
def test_values_and_gradients_follow_the_plain_layers(monkeypatch, case, block):
    monkeypatch.setattr(projection_kernel, "BLOCK", block)
    monkeypatch.setattr(kernel_parts, "ROWS", 32)
    shape, out, normed, added, form = case
    heads, m, n, c = shape
    x = normal(0, *shape)
    scale = (normal(1, c), normal(2, c)) if normed else ()
    weights = Weights(normal(3, heads * c, out), normal(4, out), *scale)
    onto = normal(5, m, n, out) if added else None
    angle = normal(6, n, out // form.results // 2)
    table = (jnp.cos(angle), jnp.sin(angle))
    ours = lambda x, w, onto: projection_kernel.project(x, w, table, onto, form, True)  # noqa: E731
    plain = functools.partial(by_definition, table=table, form=form)
    found, ours_back = jax.vjp(jax.jit(ours), x, weights, onto)
    expected, plain_back = jax.vjp(jax.jit(plain), x, weights, onto)
    bars = tuple(normal(7 + i, *y.shape) for i, y in enumerate(expected))
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)
    jax.tree.map(close, found, expected)
    jax.tree.map(close, ours_back(bars), plain_back(bars))


def test_which_shapes_suit():
    assert suits(4096, 256, 768, jnp.bfloat16)
    assert not suits(4096 + 16, 256, 768, jnp.bfloat16)  # cores cannot share the tiles
    assert not suits(4096, 1152, 3456, jnp.bfloat16)  # parameters and gradients fill the core


def test_a_global_block_is_the_same_on_tpus_as_elsewhere(interpreted):
    plain = hiera.Block(16, 2, 0, False, 2, jnp.float32)
    x = normal(0, 2, 8, 12, 16)
    compare(plain, plain.clone(kernels="tpu"), x)
    assert "projection_backward" in interpreted


def test_memory_attention_is_the_same_on_tpus_as_elsewhere(interpreted):
    """Keys on the grid turn, pointers and the keys that fill the last block do not."""
    config = dataclasses.replace(TRACKING_CONFIG, memory_layers=2)
    plain = memory_attention.MemoryAttention(config)
    on_tpus = plain.clone(config=dataclasses.replace(config, kernels="tpu"))
    coarse, keys, pointers = normal(0, 1, 8, 8, 16), 2 * 64, 3
    shape = (1, 2, keys + pointers)
    memory = memory_attention.MemoryKeys(
        normal(1, *shape, 8), normal(2, *shape, 8), normal(3, *shape) > -1, keys
    )
    compare(plain, on_tpus, coarse, memory)
    assert "projection_backward" in interpreted


def compare(plain, on_tpus, *inputs):
    """Values and gradients with regard to parameters and inputs."""
    params = jax.eval_shape(lambda key: plain.init(key, *inputs), jax.random.key(0))
    params = jax.tree.map(lambda x: normal(4, *x.shape) * 0.4, params)
    leaves, structure = jax.tree.flatten(inputs)
    real = [jnp.issubdtype(jnp.result_type(x), jnp.floating) for x in leaves]

    def through(model):
        def apply(params, *given):
            rest = iter(given)
            inputs = [next(rest) if yes else x for yes, x in zip(real, leaves, strict=True)]
            return model.apply(params, *jax.tree.unflatten(structure, inputs))

        return jax.vjp(
            jax.jit(apply), params, *(x for yes, x in zip(real, leaves, strict=True) if yes)
        )

    (expected, by_plain), (found, by_kernels) = through(plain), through(on_tpus)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)
    bar = normal(5, *expected.shape)
    close = functools.partial(np.testing.assert_allclose, rtol=5e-3, atol=2e-3)
    jax.tree.map(close, by_kernels(bar), by_plain(bar))
