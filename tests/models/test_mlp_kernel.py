"""The TPU kernels of the normalised MLP against the plain layers, run without a TPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sss_jax.models import hiera, kernel_parts, memory_encoder, mlp, mlp_kernel
from sss_jax.models.mlp_kernel import Form, Weights, suits

here = functools.partial(mlp_kernel.transform, interpret=True)


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def example(tokens, width, hidden):
    shapes = [(width,), (width,), (width, hidden), (hidden,), (hidden, width), (width,)]
    weights = Weights(*(normal(1 + i, *shape) for i, shape in enumerate(shapes)))
    return normal(0, tokens, width) * 3 + 1, weights._replace(
        first_CH=weights.first_CH * width**-0.5, second_HC=weights.second_HC * hidden**-0.5
    )


def both(x, weights, activation, shortcut):
    """Value and vector-Jacobian product, by the kernels and by the plain layers."""
    form = Form(activation.with_slope, 1e-5, shortcut)
    plain = functools.partial(
        mlp.transform, activation=activation, epsilon=1e-5, shortcut=shortcut, kernels=False
    )
    bar = normal(99, *x.shape).astype(x.dtype)
    for function in (lambda x, w: here(x, w, form), plain):
        y, pull = jax.vjp(jax.jit(function), x, weights)
        yield y, *jax.tree.leaves(pull(bar))


# One block a core and several; a hidden layer in one piece and in several; channels that fill
# lanes or not.
SHAPES = [(32, 8, 16), (96, 128, 256), (96, 24, 40), (64, 16, 384)]


@pytest.mark.parametrize("shortcut", [True, False])
@pytest.mark.parametrize("activation", [mlp.GELU, mlp.RELU], ids=["gelu", "relu"])
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients_follow_the_plain_layers(monkeypatch, shape, activation, shortcut):
    monkeypatch.setattr(mlp_kernel, "BLOCK", 32)
    monkeypatch.setattr(kernel_parts, "ROWS", 16)
    monkeypatch.setattr(mlp_kernel, "HIDDEN", 128)
    found, expected = both(*example(*shape), activation, shortcut)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-4, atol=2e-4)


def test_short_numbers_lose_no_more_than_the_plain_layers():
    """Against float32 everywhere; gradients of the weights are summed in float32."""
    x, weights = example(512, 64, 256)
    _, exact = both(x, weights, mlp.GELU, True)
    short = both(x.astype(jnp.bfloat16), weights, mlp.GELU, True)
    for ours, plain, right in zip(*short, exact, strict=True):
        away = [float(jnp.linalg.norm(a.astype(jnp.float32) - right)) for a in (ours, plain)]
        assert away[0] <= 1.1 * away[1]


def test_which_shapes_suit():
    assert suits(49152, 384, 1536, jnp.bfloat16)
    assert not suits(49152 + 16, 384, 1536, jnp.bfloat16)  # cores cannot share the tiles
    assert not suits(49152, 1152, 4608, jnp.bfloat16)  # parameters and gradients fill the core


def test_a_block_of_the_fuser_is_the_same_on_tpus_as_elsewhere(interpreted):
    plain = memory_encoder.FuserBlock(jnp.float32)
    x = normal(0, 2, 8, 8, 32)
    params = jax.eval_shape(plain.init, jax.random.key(0), x)
    params = jax.tree.map(lambda x: normal(1, *x.shape) * 0.3, params)
    expected, by_plain = jax.vjp(jax.jit(plain.apply), params, x)
    found, by_kernels = jax.vjp(jax.jit(plain.clone(kernels=True).apply), params, x)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)
    bar = normal(3, *expected.shape)
    close = functools.partial(np.testing.assert_allclose, rtol=2e-3, atol=2e-3)
    jax.tree.map(close, by_kernels(bar), by_plain(bar))
    assert {"mlp_forward", "mlp_backward"} <= set(interpreted)


def test_parameters_keep_their_names():
    names = lambda tree: sorted(jax.tree_util.keystr(k) for k, _ in jax.tree.leaves_with_path(tree))  # noqa: E731
    block = hiera.Block(8, 2, 0, False, 2, jnp.float32)
    found = names(block.init(jax.random.key(0), normal(0, 1, 4, 4, 8))["params"]["mlp"])
    assert found == [f"['layers_{i}']['{n}']" for i in (0, 1) for n in ("bias", "kernel")]
