"""Equal layers as a loop: the runs that are found, and that nothing changes but the program."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sss_jax import flops
from sss_jax.models.hiera import Hiera, block_table
from sss_jax.models.memory_attention import MemoryAttention, MemoryKeys
from sss_jax.models.presets import Sam2Config, preset
from sss_jax.models.repeats import find_runs

# Stage 3: an entering block, then windowed and global blocks in turn.
DEEP = Sam2Config(
    embed_dim=4,
    depths=(2, 1, 5, 1),
    windows=(4, 2, 6, 3),
    global_blocks=(5, 7),
    width=32,
    memory_width=8,
    memory_layers=3,
    memory_mlp=32,
)
LOOPED = dataclasses.replace(DEEP, loop_blocks=True)
KEPT = ("attention", "products")


def shortest(layers):
    """Fewest layers to write down, by trying every first run: the definition, without a table."""
    if not layers:
        return 0
    sizes = [1 + shortest(layers[1:])]
    for period in range(1, len(layers) // 2 + 1):
        end = 2 * period
        while end <= len(layers) and layers[:period] == layers[end - period : end]:
            sizes.append(period + shortest(layers[end:]))
            end += period
    return min(sizes)


@given(st.lists(st.integers(0, 2), max_size=9))
def test_runs_spell_the_layers_with_the_fewest_bodies(layers):
    runs = find_runs(layers)
    spelled = [layer for run in runs for layer in _group(layers, run) * run.times]
    assert spelled == layers
    assert [run.first for run in runs[1:]] == [run.end for run in runs[:-1]]
    assert sum(run.period for run in runs) == shortest(layers)


def _group(layers, run):
    return layers[run.first : run.first + run.period]


@pytest.mark.parametrize(
    ("name", "bodies"), [("tiny", 8), ("small", 10), ("base_plus", 11), ("large", 12)]
)
def test_bodies_of_the_published_sizes(name, bodies):
    assert sum(run.period for run in find_runs(block_table(preset(name)))) == bodies


def random_like(shapes):
    generator = np.random.default_rng(0)
    return jax.tree.map(lambda x: 0.3 * generator.standard_normal(x.shape).astype("f4"), shapes)


def value_and_gradient(module, params, *inputs):
    def total(params):
        outputs = module.apply({"params": params}, *inputs)
        return sum((jnp.sin(y) ** 2).mean() for y in jax.tree.leaves(outputs))

    return jax.jit(jax.value_and_grad(total))(params)


def assert_same(one, other):
    (value, grads), (looped, looped_grads) = one, other
    np.testing.assert_allclose(looped, value, rtol=1e-6)
    scale = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(grads))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(b, a, atol=1e-5 * scale), grads, looped_grads
    )


@pytest.fixture(scope="module")
def trunk():
    """Image, parameters, and what the trunk makes of them without loops."""
    image = np.random.default_rng(1).standard_normal((2, 32, 32, 3)).astype(np.float32)
    module = Hiera(DEEP)
    params = random_like(jax.eval_shape(module.init, jax.random.key(0), image)["params"])
    return image, params, value_and_gradient(module, params, image)


@pytest.mark.parametrize(
    "changes", [{}, {"remat": True}, *({"remat": True, "remat_keeps": k} for k in KEPT)]
)
def test_a_looped_trunk_is_the_trunk(trunk, changes):
    image, params, expected = trunk
    looped = Hiera(dataclasses.replace(LOOPED, **changes))
    made = jax.eval_shape(looped.init, jax.random.key(0), image)["params"]
    assert jax.tree.map(jnp.shape, made) == jax.tree.map(jnp.shape, params)
    assert_same(expected, value_and_gradient(looped, params, image))
    text = str(jax.make_jaxpr(looped.apply)({"params": params}, image))
    # Both blocks of stage 1, and two times a windowed and a global block of stage 3.
    assert text.count("length=2\n") == 2


@pytest.mark.parametrize("config", [DEEP, LOOPED], ids=["blocks", "loop"])
def test_kept_products_are_not_computed_again(trunk, config):
    image, params, _ = trunk

    def operations(**changes):
        module = Hiera(dataclasses.replace(config, **changes))
        gradient = jax.grad(lambda p: sum(y.sum() for y in module.apply({"params": p}, image)))
        return flops.count(gradient, params)

    attended, products = (operations(remat=True, remat_keeps=keeps) for keeps in KEPT)
    # The weights of attention inside windows are computed again all the same.
    assert operations() < products < attended < operations(remat=True)


@pytest.mark.parametrize("config", [DEEP, LOOPED], ids=["layers", "loop"])
@pytest.mark.parametrize("remat", [False, True])
def test_recomputed_and_looped_memory_attention_is_memory_attention(config, remat):
    generator = np.random.default_rng(2)
    draw = lambda *shape: generator.standard_normal(shape).astype(np.float32)  # noqa: E731
    keys = MemoryKeys(draw(2, 3, 32, 8), draw(2, 3, 32, 8), generator.random((2, 3, 32)) > 0.2, 32)
    coarse = draw(2, 4, 4, DEEP.width)

    def initial(module):
        return jax.eval_shape(lambda key: module.init(key, coarse, keys), jax.random.key(0))

    plain = MemoryAttention(DEEP)
    looped = MemoryAttention(dataclasses.replace(config, remat=remat))
    assert initial(plain) == initial(looped)
    params = random_like(initial(plain)["params"])
    assert_same(
        value_and_gradient(plain, params, coarse, keys),
        value_and_gradient(looped, params, coarse, keys),
    )


@pytest.mark.parametrize("config", [DEEP, LOOPED], ids=["layers", "loop"])
def test_recomputed_memory_attention_does_not_attend_again(config):
    keys = MemoryKeys(
        jnp.zeros((1, 1, 256, 8)), jnp.zeros((1, 1, 256, 8)), jnp.ones((1, 1, 256), bool), 256
    )
    coarse = jnp.zeros((1, 16, 16, DEEP.width))

    def operations(**changes):
        module = MemoryAttention(dataclasses.replace(config, **changes))
        params = jax.eval_shape(lambda key: module.init(key, coarse, keys), jax.random.key(0))
        loss = lambda p: module.apply(p, coarse, keys).sum()  # noqa: E731
        return flops.count(jax.grad(loss), params)

    kept, lean = operations(), operations(remat=True)
    # One product of all queries with all keys, in both attentions of every layer. The
    # derivative of a softmax takes that of the logits again, but the one with the values is kept.
    product = 2 * 256 * 256 * DEEP.width * 2 * DEEP.memory_layers
    assert kept + product < lean < kept + 2 * product
