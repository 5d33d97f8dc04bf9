"""AdamW against a plain loop, its parameter groups on the real network, and the teacher."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sss_jax.errors import ConfigError
from sss_jax.models.sss import build_model, init_params
from sss_jax.options import ModelOptions, OptimizerOptions, Options
from sss_jax.train.optimizer import (
    decays,
    ema_update,
    learning_rate,
    make_optimizer,
    parameter_groups,
)

STEPS = 20
OPTIONS = OptimizerOptions(rate=1e-2, encoder_rate=1e-3, weight_decay=0.1, clip_norm=1.0)


def make_params(seed=0):
    rng = np.random.default_rng(seed)

    def array(*shape):
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    return {
        "net": {
            "sam2": {
                "image_encoder": {
                    "block": {"kernel": array(3, 4), "bias": array(4)},
                    "pos_embed": array(1, 2, 2, 3),
                },
                "prompt_encoder": {
                    "positional_encoding_gaussian_matrix": array(2, 3),
                    "point_embeddings": array(4, 3),
                },
                "decoder": {"norm": {"scale": array(3)}, "conv": {"kernel": array(3, 3, 2, 2)}},
            },
            "class_tokens": array(2, 3),
        },
        "dfe": {"level_4": {"mlp": {"kernel": array(3, 3), "bias": array(2, 3)}}},
    }


def flat(tree):
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


FROZEN = "net/sam2/prompt_encoder/positional_encoding_gaussian_matrix"


def reference_adamw(params, gradients, options):
    """Textbook AdamW in double precision, parameter by parameter."""
    params = {k: np.asarray(v, np.float64) for k, v in flat(params).items()}
    m = {k: np.zeros_like(v) for k, v in params.items()}
    v2 = {k: np.zeros_like(v) for k, v in params.items()}
    for t, grads in enumerate(gradients):
        grads = {k: np.asarray(g, np.float64) for k, g in flat(grads).items()}
        norm = np.sqrt(sum((g**2).sum() for k, g in grads.items() if k != FROZEN))
        shrink = options.clip_norm / norm if 0 < options.clip_norm < norm else 1.0
        for k, g in grads.items():
            if k == FROZEN:
                continue
            g = g * shrink
            m[k] = 0.9 * m[k] + 0.1 * g
            v2[k] = options.b2 * v2[k] + (1 - options.b2) * g**2
            step = m[k] / (1 - 0.9 ** (t + 1))
            step = step / (np.sqrt(v2[k] / (1 - options.b2 ** (t + 1))) + 1e-8)
            if k.endswith("kernel"):
                step = step + options.weight_decay * params[k]
            rate = options.encoder_rate if "image_encoder" in k else options.rate
            params[k] = params[k] - rate * (1 - t / STEPS) ** options.power * step
    return params


@pytest.mark.parametrize("clip_norm", [1.0, 0.0])
def test_updates_equal_textbook_adamw(clip_norm):
    options = dataclasses.replace(OPTIONS, clip_norm=clip_norm)
    params = make_params()
    # Huge, small and vanishing gradients: clipped, not clipped, nothing at all.
    gradients = [
        jax.tree.map(lambda x, s=s: s * x, make_params(i + 1))
        for i, s in enumerate([100.0, 0.01, 0.0, 1.0, 3.0])
    ]
    optimizer = make_optimizer(options, STEPS, params)
    state = optimizer.init(params)

    @jax.jit
    def step(params, state, grads):
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    new = params
    for grads in gradients:
        new, state = step(new, state, grads)
    for name, expected in reference_adamw(params, gradients, options).items():
        np.testing.assert_allclose(flat(new)[name], expected, rtol=1e-4, atol=1e-6, err_msg=name)
    np.testing.assert_array_equal(flat(new)[FROZEN], flat(params)[FROZEN])


def test_zero_gradients_only_decay_kernels():
    params = make_params()
    optimizer = make_optimizer(OPTIONS, STEPS, params)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = jax.jit(optimizer.update)(zeros, optimizer.init(params), params)
    moved = {name for name, u in flat(updates).items() if np.asarray(u).any()}
    assert moved == {
        "net/sam2/image_encoder/block/kernel",
        "net/sam2/decoder/conv/kernel",
        "dfe/level_4/mlp/kernel",
    }


def test_groups_of_the_real_network():
    model = build_model(Options(model=ModelOptions(preset="nano", image_size=64, num_classes=2)))
    shapes = {"net": jax.eval_shape(lambda: init_params(model, jax.random.key(0)))}
    groups, shrink = flat(parameter_groups(shapes)), flat(decays(shapes))
    for name, shape in flat(shapes).items():
        assert (groups[name] == "encoder") == ("/image_encoder/" in name), name
        assert (groups[name] == "frozen") == ("gaussian_matrix" in name), name
        last = name.rsplit("/", 1)[-1]
        # What has one axis, or is a table, token or position, is not shrunk; all else is.
        spared = shape.ndim < 2 or any(
            word in last
            for word in (
                "bias",
                "scale",
                "gamma",
                "embed",
                "token",
                "gaussian",
                "tpos",
                "ptr",
                "mem",
            )
        )
        assert shrink[name] != spared, name
    assert set(groups.values()) == {"encoder", "frozen", "other"}
    assert list(groups.values()).count("frozen") == 1
    make_optimizer(OPTIONS, STEPS, shapes)  # shapes alone are enough


@pytest.mark.parametrize("schedule", ["poly", "cosine", "constant"])
@pytest.mark.parametrize("warmup", [0, 5])
def test_schedules(schedule, warmup):
    options = OptimizerOptions(rate=0.5, schedule=schedule, warmup_steps=warmup)
    rate = jax.jit(jax.vmap(learning_rate(options, STEPS)))(jnp.arange(STEPS + 5))
    expected = []
    for t in range(STEPS + 5):
        done = min(max((t - warmup) / (STEPS - warmup), 0), 1)
        decay = {
            "poly": (1 - done) ** 0.9,
            "cosine": 0.5 * (1 + np.cos(np.pi * done)),
            "constant": 1.0,
        }[schedule]
        expected.append(0.5 * decay * (min((t + 1) / warmup, 1) if warmup else 1))
    np.testing.assert_allclose(rate, expected, rtol=1e-5, atol=1e-8)
    assert rate[0] > 0
    assert rate[STEPS - 1] > 0
    assert float(learning_rate(options, STEPS)(warmup)) == pytest.approx(0.5)


def test_warmup_longer_than_the_run_only_warms_up():
    options = OptimizerOptions(rate=1.0, warmup_steps=100)
    rate = [float(learning_rate(options, 10)(t)) for t in range(10)]
    np.testing.assert_allclose(rate, np.arange(1, 11) / 100, rtol=1e-5)


def test_teacher_follows_the_formula():
    student = make_params(1)
    teacher = make_params(0)
    update = jax.jit(ema_update, static_argnums=3)
    for step in [0, 1, 9, 249, 250, 10_000, 2**30]:
        weight = min(1 - 1 / (step + 1), 0.996)
        new = flat(update(teacher, student, jnp.int32(step), 0.996))
        for name, value in new.items():
            old, now = flat(teacher)[name], flat(student)[name]
            expected = weight * np.float64(old) + (1 - weight) * np.float64(now)
            np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-6)
    for name, value in flat(update(teacher, student, 0, 0.996)).items():
        np.testing.assert_array_equal(value, flat(student)[name])
    for name, value in flat(update(student, student, 700, 0.996)).items():
        np.testing.assert_array_equal(value, flat(student)[name])


def test_factors_scale_and_freeze_what_lies_below_a_path():
    params = make_params()
    grads = jax.tree.map(jnp.ones_like, params)

    def updates(*factors):
        options = dataclasses.replace(OPTIONS, clip_norm=0.0, factors=factors)
        optimizer = make_optimizer(options, STEPS, params)
        return flat(optimizer.update(grads, optimizer.init(params), params)[0])

    plain = updates()
    block = "net/sam2/image_encoder/block"
    scaled = updates("net/sam2/image_encoder=0.5", f"{block}=0.1", "dfe=0")
    for name, value in plain.items():
        factor = 0.5 if "image_encoder" in name else 1.0
        factor *= 0.1 if name.startswith(block) else 0.0 if name.startswith("dfe") else 1.0
        np.testing.assert_allclose(scaled[name], factor * value, rtol=1e-6, err_msg=name)


def test_frozen_parameters_do_not_count_in_the_clipped_norm():
    params = make_params()
    grads = jax.tree.map(jnp.ones_like, params)
    grads["dfe"] = jax.tree.map(lambda g: 1e6 * g, grads["dfe"])
    options = dataclasses.replace(OPTIONS, factors=("dfe=0",))
    optimizer = make_optimizer(options, STEPS, params)
    state = optimizer.init(params)
    _, after = optimizer.update(grads, state, params)
    without = jax.tree.map(jnp.zeros_like, grads["dfe"])
    _, expected = optimizer.update(grads | {"dfe": without}, state, params)
    jax.tree.map(np.testing.assert_array_equal, after, expected)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("net/sam2/encoder=0.1", "no parameter lies below 'net/sam2/encoder'"),
        ("net/sam2=fast", "is not PATH=FACTOR"),
        ("net/sam2=-1", "is not PATH=FACTOR"),
        ("net/sam2", "is not PATH=FACTOR"),
    ],
)
def test_factors_that_name_nothing_are_refused(entry, message):
    options = dataclasses.replace(OPTIONS, factors=(entry,))
    with pytest.raises(ConfigError, match=message):
        make_optimizer(options, STEPS, make_params())
