"""The trunk: block table, padding of windows, rematerialisation."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sss_jax.models import layers, windows
from sss_jax.models.hiera import Block, Hiera, WindowAttention, block_table
from sss_jax.models.presets import Sam2Config, preset

SMALL = Sam2Config(embed_dim=4, depths=(1, 1, 2, 1), windows=(4, 2, 6, 3), global_blocks=(3,))


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def random_like(shapes, seed=0):
    generator = np.random.default_rng(seed)
    return jax.tree.map(lambda x: 0.3 * generator.standard_normal(x.shape).astype("f4"), shapes)


def init_shapes(module, *args):
    return jax.eval_shape(module.init, jax.random.key(0), *args)["params"]


def test_block_table_of_tiny():
    table = block_table(preset("tiny"))
    assert [b.width for b in table] == [96] + [192] * 2 + [384] * 7 + [768] * 2
    assert [b.heads for b in table] == [1] + [2] * 2 + [4] * 7 + [8] * 2
    # Entering a stage keeps the window of the stage before.
    assert [b.window for b in table] == [8, 8, 4, 4, 14, 0, 14, 0, 14, 0, 14, 7]
    assert [i for i, b in enumerate(table) if b.pool] == [1, 3, 10]


@pytest.mark.parametrize(
    ("name", "globals_"),
    [("small", (7, 10, 13)), ("base_plus", (12, 16, 20)), ("large", (23, 33, 43))],
)
def test_global_blocks(name, globals_):
    table = block_table(preset(name))
    assert tuple(i for i, b in enumerate(table) if b.window == 0) == globals_
    assert all(not table[i].pool for i in globals_)


def plain_window_attention(params, x, window, heads, pool):
    """Pad the input with zeros, then treat every window on its own: the order of SAM-2."""
    b, height, width, _ = x.shape
    rows, cols = -(-height // window), -(-width // window)
    padding = ((0, 0), (0, rows * window - height), (0, cols * window - width), (0, 0))
    x = np.pad(x, padding)
    step, features = window // 2 if pool else window, params["proj"]["kernel"].shape[0]
    y = np.zeros((b, rows * step, cols * step, features), np.float32)
    for image, row, col in np.ndindex(b, rows, cols):
        tokens = x[image, row * window : (row + 1) * window, col * window : (col + 1) * window]
        q, k, v = np.split(tokens @ params["qkv"]["kernel"] + params["qkv"]["bias"], 3, axis=-1)
        if pool:
            q = np.maximum.reduce([q[i::2, j::2] for i in range(2) for j in range(2)])
        q, k, v = (a.reshape(-1, heads, features // heads) for a in (q, k, v))
        logits = np.einsum("nhd,mhd->hnm", q, k) / np.sqrt(features // heads)
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        out = np.einsum("hnm,mhd->nhd", weights, v).reshape(step, step, features)
        y[image, row * step : (row + 1) * step, col * step : (col + 1) * step] = out
    if pool:
        height, width = height // 2, width // 2
    return y[:, :height, :width] @ params["proj"]["kernel"] + params["proj"]["bias"]


@pytest.mark.parametrize(
    ("height", "width", "window", "pool"),
    [(8, 8, 4, False), (6, 10, 4, False), (6, 10, 4, True), (8, 4, 4, True), (2, 2, 6, True)],
)
@pytest.mark.parametrize("waste", [1.0, windows.WASTE, 100.0])
def test_padding_tokens_attend(monkeypatch, waste, height, width, window, pool):
    """Also where the map is always, and never, cut instead of padded."""
    monkeypatch.setattr(windows, "WASTE", waste)
    x = normal(0, 2, height, width, 6)
    module = WindowAttention(8, 2, window, pool, jnp.float32)
    params = random_like(init_shapes(module, x))
    expected = plain_window_attention(params, x, window, 2, pool)
    np.testing.assert_allclose(module.apply({"params": params}, x), expected, atol=1e-5)


def test_first_block_of_a_stage_projects_the_normalised_tokens():
    x = normal(0, 1, 4, 4, 4) + 5
    block = Block(8, 2, 4, True, 4, jnp.float32)
    params = random_like(init_shapes(block, x))
    for dead in ("attn", "mlp"):
        params[dead] = jax.tree.map(np.zeros_like, params[dead])
    mean, std = x.mean(-1, keepdims=True), np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    y = (x - mean) / std * params["norm1"]["scale"] + params["norm1"]["bias"]
    expected = layers.max_pool(y @ params["proj"]["kernel"] + params["proj"]["bias"])
    np.testing.assert_allclose(block.apply({"params": params}, x), expected, atol=1e-5)


def test_remat_changes_neither_names_nor_values():
    image = normal(0, 2, 16, 32, 3)
    config = dataclasses.replace(SMALL, depths=(1, 1))
    plain, lean = Hiera(config), Hiera(dataclasses.replace(config, remat=True))
    shapes = init_shapes(plain, image)
    assert jax.tree.map(lambda x: x.shape, shapes) == jax.tree.map(
        lambda x: x.shape, init_shapes(lean, image)
    )
    params = random_like(shapes)

    def loss(module):
        def total(p):
            return sum((jnp.sin(y) ** 2).mean() for y in module.apply({"params": p}, image))

        return jax.jit(jax.value_and_grad(total))

    (value, grads), (lean_value, lean_grads) = loss(plain)(params), loss(lean)(params)
    np.testing.assert_allclose(lean_value, value, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(b, a, atol=1e-6), grads, lean_grads)
    assert "remat" in str(jax.make_jaxpr(loss(lean))(params))


def test_stages_halve_the_resolution():
    image = np.zeros((1, 32, 96, 3), np.float32)
    module = Hiera(SMALL)
    stages = jax.eval_shape(module.apply, {"params": init_shapes(module, image)}, image)
    assert [x.shape for x in stages] == [(1, 32 // s, 96 // s, s) for s in (4, 8, 16, 32)]
