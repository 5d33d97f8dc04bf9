"""DFE against a plain NumPy version in float64."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import signal

from sss_jax.options import DFEOptions
from sss_jax.ssl import dfe

DIM, BATCH = 6, 3
SIZES = ((8, 6), (4, 3), (2, 2))
ALL = DFEOptions(level_4=True)
FINEST = dataclasses.replace(ALL, level_8=False, level_16=False)

init = jax.jit(dfe.init_dfe, static_argnums=(1, 2, 3))
enhance = jax.jit(dfe.enhance, static_argnums=3)


@pytest.fixture(scope="module")
def params():
    """Parameters of all levels; no bias is zero and no norm is the identity."""
    tree = init(jax.random.key(0), DIM, ALL)
    leaves, structure = jax.tree.flatten(tree)
    rng = np.random.default_rng(1)
    noisy = [leaf + 0.2 * rng.normal(size=leaf.shape).astype(np.float32) for leaf in leaves]
    tree = jax.tree.unflatten(structure, noisy)
    # Nearly constant channels, so that the epsilon of the norm is seen.
    tree["level_16"]["linear_0"] = jax.tree.map(lambda p: p * 3e-3, tree["level_16"]["linear_0"])
    return tree


def features(seed):
    rng = np.random.default_rng(seed)
    # A common offset keeps the similarity away from 0, where it would not be seen.
    return tuple(
        jnp.asarray(rng.normal(0.4, 1.0, (BATCH, *size, DIM)), jnp.float32) for size in SIZES
    )


def plain_project(params, x):
    params = jax.tree.map(lambda p: np.asarray(p, np.float64), params)
    x = np.asarray(x, np.float64)
    kernel, conv = params["conv"]["kernel"], np.zeros_like(x)
    for b, i, o in np.ndindex(len(x), DIM, DIM):
        conv[b, ..., o] += signal.correlate2d(x[b, ..., i], kernel[:, :, i, o], mode="same")
    conv += params["conv"]["bias"]
    y = conv
    for layer in range(4):
        y = y @ params[f"linear_{layer}"]["kernel"] + params[f"linear_{layer}"]["bias"]
        if layer < 3:
            norm = params[f"norm_{layer}"]
            y = (y - y.mean(-1, keepdims=True)) / np.sqrt(y.var(-1, keepdims=True) + 1e-5)
            y = np.maximum(y * norm["scale"] + norm["bias"], 0)
    return conv, y


def plain_adjusted(params, weak, strong):
    (a, mlp_a), (b, mlp_b) = plain_project(params, weak), plain_project(params, strong)
    mean_a, mean_b = a.mean((1, 2)), b.mean((1, 2))
    norms = np.linalg.norm(mean_a, axis=1) * np.linalg.norm(mean_b, axis=1)
    s = (mean_a * mean_b).sum(1) / norms
    wide = s[:, None, None, None]
    w = 1 / (1 + np.exp(-wide))
    return w * mlp_a + (1 - w) * mlp_b + (1 - wide) * (b - a), s


def close(got, expected):
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize(
    ("merge", "enhance_weak", "off"),
    [
        ("residual", False, ()),
        ("replace", False, ("level_4",)),
        ("residual", True, ("level_8", "level_16")),
        ("replace", True, ()),
    ],
)
def test_enhance_equals_its_definition(params, merge, enhance_weak, off):
    switches = {"merge": merge, "enhance_weak": enhance_weak} | dict.fromkeys(off, False)
    options = dataclasses.replace(ALL, **switches)
    weak, strong = features(2), features(3)
    got = enhance(params, weak, strong, options)
    assert (got.weak is not None) == enhance_weak
    assert set(got.similarity) == set(dfe.LEVELS) - set(off)
    for index, level in enumerate(dfe.LEVELS):
        if level in off:
            np.testing.assert_array_equal(got.strong[index], strong[index])
            if enhance_weak:
                np.testing.assert_array_equal(got.weak[index], weak[index])
            continue
        adjusted, s = plain_adjusted(params[level], weak[index], strong[index])
        close(got.similarity[level], s)
        close(got.strong[index], adjusted + (strong[index] if merge == "residual" else 0))
        if enhance_weak:
            close(got.weak[index], weak[index] + adjusted)


def test_parameters_exist_for_enabled_levels_only():
    options = dataclasses.replace(ALL, level_8=False)
    tree = init(jax.random.key(0), DIM, options)
    assert set(tree) == {"level_4", "level_16"}
    shapes = jax.tree.map(jnp.shape, tree["level_4"])
    assert shapes["conv"] == {"kernel": (3, 3, DIM, DIM), "bias": (DIM,)}
    widths = [DIM, 2 * DIM, 2 * DIM, DIM, DIM]
    for layer, (width_in, width_out) in enumerate(itertools.pairwise(widths)):
        linear = {"kernel": (width_in, width_out), "bias": (width_out,)}
        assert shapes[f"linear_{layer}"] == linear
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(tree))
    # A level's draw does not depend on which other levels exist.
    full = init(jax.random.key(0), DIM, ALL)
    jax.tree.map(np.testing.assert_array_equal, tree["level_16"], full["level_16"])
    assert not np.array_equal(full["level_4"]["conv"]["kernel"], full["level_8"]["conv"]["kernel"])


def test_initial_spread_is_fan_in():
    tree = init(jax.random.key(0), 64, FINEST)["level_4"]
    np.testing.assert_allclose(np.std(tree["conv"]["kernel"]), (9 * 64) ** -0.5, rtol=0.05)
    np.testing.assert_allclose(np.std(tree["linear_1"]["kernel"]), 128**-0.5, rtol=0.05)
    silent = init(jax.random.key(0), 8, FINEST, 0.0)["level_4"]
    assert not silent["linear_3"]["kernel"].any()
    assert silent["linear_2"]["kernel"].any()


def test_shared_weak_projections_equal_the_direct_way(params):
    options = ALL
    weak, views = features(2), [features(3), features(4)]

    @jax.jit
    def shared(params, weak, views):
        seen = dfe.project_levels(params, weak, options)
        return [
            dfe.merge_levels(view, dfe.project_levels(params, view, options), seen, options)
            for view in views
        ]

    for view, (merged, similarity) in zip(views, shared(params, weak, views), strict=True):
        direct = enhance(params, weak, view, options)
        jax.tree.map(close, merged, direct.strong)
        jax.tree.map(close, similarity, direct.similarity)


def test_roles_of_weak_and_strong_differ(params):
    weak, strong = features(2), features(3)
    one = enhance(params, weak, strong, dataclasses.replace(ALL, merge="replace"))
    other = enhance(params, strong, weak, dataclasses.replace(ALL, merge="replace"))
    assert np.abs(one.strong[0] - other.strong[0]).max() > 0.1


def test_each_image_is_a_sample(params):
    weak, strong = features(2), features(3)
    together = enhance(params, weak, strong, ALL)
    first = [tuple(level[:1] for level in maps) for maps in (weak, strong)]
    alone = enhance(params, *first, ALL)
    jax.tree.map(lambda a, b: close(a[:1], b), together.strong, alone.strong)


def test_identical_views_are_not_changed_by_the_difference(params):
    weak = features(2)
    got = enhance(params, weak, weak, dataclasses.replace(ALL, merge="replace"))
    for index, level in enumerate(dfe.LEVELS):
        close(got.similarity[level], np.ones(BATCH))
        close(got.strong[index], plain_project(params[level], weak[index])[1])


def total(params, weak, strong, options=FINEST):
    got = dfe.enhance(params, weak, strong, options)
    return sum(jnp.sum(jnp.sin(level)) for level in got.strong)


gradients = jax.jit(jax.grad(total, argnums=(0, 1, 2)))


@pytest.mark.parametrize("kind", ["different", "identical", "weak zero", "both zero", "opposite"])
def test_gradients_are_finite(kind):
    params = init(jax.random.key(0), DIM, FINEST)  # zero biases: means can be 0
    weak, strong = features(2), features(3)
    zero = jax.tree.map(jnp.zeros_like, weak)
    weak, strong = {
        "different": (weak, strong),
        "identical": (weak, weak),
        "weak zero": (zero, strong),
        "both zero": (zero, zero),
        "opposite": (weak, jax.tree.map(jnp.negative, weak)),
    }[kind]
    grads = gradients(params, weak, strong)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
    if kind == "different":
        grads_params, grads_weak, grads_strong = grads
        for leaf in jax.tree.leaves((grads_params, grads_weak[0], grads_strong[0])):
            assert jnp.any(leaf != 0)


def test_rematerialisation_changes_memory_alone(params):
    weak, strong = features(2), features(3)

    def kept(options):
        """Elements that the backward pass is handed, and the gradients."""

        def loss(params):
            return total(params, weak, strong, options)

        _, backward = jax.vjp(loss, params)
        elements = sum(x.size for x in jax.tree.leaves(backward) if hasattr(x, "size"))
        return elements, jax.jit(jax.grad(loss))(params)

    lean, again = kept(dataclasses.replace(ALL, remat=True))
    full, grads = kept(dataclasses.replace(ALL, remat=False))
    assert lean < 0.6 * full
    jax.tree.map(lambda a, b: np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-5), grads, again)


def test_zero_features_have_similarity_zero():
    params = init(jax.random.key(0), DIM, ALL)
    zero = jax.tree.map(jnp.zeros_like, features(2))
    got = enhance(params, zero, features(3), ALL)
    for s in got.similarity.values():
        np.testing.assert_array_equal(s, np.zeros(BATCH))


def test_parameters_learn_through_both_sides(params):
    """Stopping the gradient of the weak features must not stop that of their projections."""
    weak, strong = features(2), features(3)

    def loss(weak_params, strong_params):
        seen = dfe.project_levels(weak_params, jax.lax.stop_gradient(weak), FINEST)
        own = dfe.project_levels(strong_params, strong, FINEST)
        merged, _ = dfe.merge_levels(strong, own, seen, FINEST)
        return sum(jnp.sum(jnp.sin(level)) for level in merged)

    for grads in jax.jit(jax.grad(loss, argnums=(0, 1)))(params, params):
        assert all(jnp.any(leaf != 0) for leaf in jax.tree.leaves(grads["level_4"]))


def test_bfloat16_features_keep_their_type_and_float32_statistics(params):
    weak, strong = features(2), features(3)
    low = [jax.tree.map(lambda x: x.astype(jnp.bfloat16), maps) for maps in (weak, strong)]
    got = enhance(params, *low, ALL)
    wide = enhance(params, weak, strong, ALL)
    for level, s in got.similarity.items():
        assert s.dtype == jnp.float32
        np.testing.assert_allclose(s, wide.similarity[level], atol=0.02)
    for one, other in zip(got.strong, wide.strong, strict=True):
        assert one.dtype == jnp.bfloat16
        np.testing.assert_allclose(one.astype(jnp.float32), other, atol=0.15)


def test_the_projection_may_have_its_own_type(params):
    seen = dfe.project(params["level_4"], features(2)[0], jnp.bfloat16)
    assert seen.conv_BHWD.dtype == seen.mlp_BHWD.dtype == jnp.bfloat16


def test_pmap_equals_one_device(params):
    options = DFEOptions()
    weak = tuple(jnp.concatenate([x] * 3)[:8] for x in features(2))
    strong = tuple(jnp.concatenate([x] * 3)[:8] for x in features(3))
    whole = enhance(params, weak, strong, options).strong
    split = jax.tree.map(lambda x: x.reshape(8, 1, *x.shape[1:]), (weak, strong))
    apart = jax.pmap(lambda w, s: dfe.enhance(params, w, s, options).strong)(*split)
    jax.tree.map(lambda a, b: close(a.reshape(b.shape), b), apart, whole)
