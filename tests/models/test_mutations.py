"""Mistakes that a port of SAM-2 can make: each one must move an output away from Meta's.

The numbers of `golden.npz` are Meta's. The network without mistake agrees with them to 1e-5; every
mistake must show at fifty times that, which is five times the tolerance of the parity tests (the
quietest, GELU by tanh, moves outputs by 9e-4). Nothing is jitted, so a patched function is the one
that runs.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sss_jax.models import (
    layers,
    memory_attention,
    memory_encoder,
    mlp,
    position,
    sam2,
    transformer,
    windows,
)
from sss_jax.models.prompt_encoder import PromptEncoder
from tests.models import golden

TOLERANCE, SEEN = 1e-5, 5e-4


@pytest.fixture(scope="module")
def meta():
    with np.load(golden.FILE) as held:
        return dict(held)


@pytest.fixture(scope="module")
def params():
    return golden.our_params()


def worst(meta, outputs):
    return {name: golden.error(array, meta[name]) for name, array in outputs.items()}


@pytest.mark.parametrize("part", [golden.encoder, golden.decoder, golden.memory, golden.attention])
def test_without_mistake(meta, params, part):
    assert max(worst(meta, part(params)).values()) < TOLERANCE


# Mistakes in the weights: what code that forgets or reorders them would compute with.


def change(params, path, function):
    """Change every array whose path contains all words of `path`."""

    def visit(keys, x):
        return function(x) if all(any(w == k.key for k in keys) for w in path.split()) else x

    return jax.tree.map_with_path(visit, params)


def from_halves(x):
    """Channels in the order that makes the rotation take halves for neighbours."""
    one, other = np.split(x, 2, axis=-1)
    return np.stack([one, other], axis=-1).reshape(x.shape)


WEIGHTS = {
    "qkv bias dropped": ("qkv bias", np.zeros_like, golden.encoder),
    "position table dropped": ("pos_embed", np.zeros_like, golden.encoder),
    "position windows dropped": ("pos_embed_window", np.zeros_like, golden.encoder),
    "position table transposed": ("pos_embed", lambda x: x.swapaxes(1, 2), golden.encoder),
    "windows transposed": ("pos_embed_window", lambda x: x.swapaxes(1, 2), golden.encoder),
    "stem transposed": ("patch_embed kernel", lambda x: x.swapaxes(0, 1), golden.encoder),
    "upscaling transposed": (
        "output_upscaling_0 kernel",
        lambda x: x.swapaxes(0, 1),
        golden.decoder,
    ),
    "upscaling flipped": ("output_upscaling_3 kernel", lambda x: x[::-1, ::-1], golden.decoder),
    "depthwise kernel transposed": ("dwconv kernel", lambda x: x.swapaxes(0, 1), golden.memory),
    "gamma dropped": ("gamma", np.ones_like, golden.memory),
    "no-memory embedding dropped": ("no_mem_embed", np.zeros_like, golden.decoder),
    "temporal positions dropped": ("maskmem_tpos_enc", np.zeros_like, golden.attention),
    "rotation of halves, queries": (
        "cross_attn_image q_proj kernel",
        from_halves,
        golden.attention,
    ),
    "rotation of halves, self-attention": (
        "self_attn k_proj kernel",
        from_halves,
        golden.attention,
    ),
}


@pytest.mark.parametrize("mistake", WEIGHTS)
def test_mistakes_in_weights_show(meta, params, mistake):
    path, function, part = WEIGHTS[mistake]
    changed = change(params, path, function)
    assert max(worst(meta, part(changed)).values()) > SEEN


# Mistakes in the code.


def wrapped(patch, home, name, wrap):
    patch.setattr(home, name, wrap(getattr(home, name)))


def transposed_image_positions(patch):
    wrapped(patch, position, "trunk_position", lambda f: lambda *a: jnp.swapaxes(f(*a), 1, 2))


def axes_of_points_swapped(patch):
    wrapped(patch, position, "fourier_position", lambda f: lambda c, g: f(c[..., ::-1], g))


def half_a_pixel_forgotten(patch):
    wrapped(
        patch,
        position,
        "fourier_position",
        lambda f: lambda c, g: f(c - 0.5 / golden.SIDE if c.ndim == 4 else c, g),
    )


def sine_positions_transposed(patch):
    def swap(f):
        def swapped(height, width, channels):
            table = f(height, width, channels).reshape(height, width, channels)
            return table.swapaxes(0, 1).reshape(height * width, channels)

        return swapped

    wrapped(patch, position, "sine_position", swap)


def tanh_gelu(patch):
    patch.setattr(layers, "gelu", jax.nn.gelu)
    patch.setattr(mlp, "GELU", mlp.GELU._replace(apply=jax.nn.gelu))


def gelu_for_relu(patch):
    patch.setattr(jax.nn, "relu", layers.gelu)


def epsilon_1e_5(patch):
    wrapped(
        patch,
        layers,
        "layer_norm",
        lambda f: lambda x, scale, bias, epsilon: f(x, scale, bias, max(epsilon, 1e-5)),
    )


def epsilon_1e_6(patch):
    patch.setattr(transformer, "EPSILON", 1e-6)
    patch.setattr(memory_attention, "EPSILON", 1e-6)


def rotation_by_row_first(patch):
    def swap(f):
        return lambda *a: tuple(np.roll(x, x.shape[1] // 2, axis=1) for x in f(*a))

    wrapped(patch, position, "rotation", swap)


def rotation_dropped(patch):
    patch.setattr(position, "rotate", lambda x, table: x)


def pointers_rotated(patch):
    wrapped(patch, sam2, "MemoryKeys", lambda f: lambda v, k, valid, _: f(v, k, valid, v.shape[2]))


def padding_masked(patch):
    """Equal keys at the end of a window are its padding."""

    def mask(f):
        def masked(q, k, v, times):
            same = jnp.all(k == k[..., -1:, :, :], axis=(-2, -1))
            padding = same & (same.sum(-1, keepdims=True) > 1)
            return f(q, k, v, ~padding, times)

        return masked

    patch.setattr(windows, "WASTE", 1e9)
    wrapped(patch, windows, "attention", mask)


def padding_counted_once(patch):
    patch.setattr(windows, "WASTE", 1.0)
    wrapped(patch, windows, "attention", lambda f: lambda q, k, v, times: f(q, k, v))


def box_without_padding_point(patch):
    def drop(f):
        def points(self, *args):
            tokens, used = f(self, *args)
            return tokens, used.at[:, :, -1].set(False)

        return points

    wrapped(patch, PromptEncoder, "points", drop)


def bicubic_with_a_half(patch):
    def matrix(n_out, n_in):
        eye = jnp.eye(n_in)
        return jax.image.resize(eye, (n_out, n_in), "cubic", antialias=False)

    patch.setattr(position, "bicubic_matrix", matrix)


def same_padding(patch):
    def same(f):
        return lambda *a, padding, **k: f(*a, padding="SAME", **k)

    wrapped(patch, jax.lax, "conv_general_dilated", same)


def distance_as_if_long(patch):
    """Divide by 15 in a short clip too."""
    far = golden.CONFIG.max_pointers - 1

    def divide(f):
        def seen(*args):
            found = f(*args)
            share = found.pointer_distance_BKR * (golden.COUNT - 1) / far
            return found._replace(pointer_distance_BKR=share)

        return seen

    wrapped(patch, sam2, "reach", divide)


def ages_off_by_one(patch):
    def older(f):
        def seen(*args):
            found = f(*args)
            age = (found.memory_age_BKL + 1) % golden.CONFIG.num_maskmem
            return found._replace(memory_age_BKL=age)

        return seen

    wrapped(patch, sam2, "reach", older)


def ages_reversed(patch):
    def turned(f):
        def seen(*args):
            found = f(*args)
            return found._replace(memory_age_BKL=5 - found.memory_age_BKL % 6)

        return seen

    wrapped(patch, sam2, "reach", turned)


def mask_not_stretched(patch):
    patch.setattr(memory_encoder, "MASK_SCALE", 1.0)


def mask_not_shifted(patch):
    patch.setattr(memory_encoder, "MASK_SHIFT", 0.0)


def position_at_full_weight(patch):
    patch.setattr(memory_attention, "POSITION_SHARE", 1.0)


def pointer_distances_interleaved(patch):
    def mixed(f):
        def wave(distance, channels):
            return jnp.asarray(from_halves(np.asarray(f(distance, channels))))

        return wave

    wrapped(patch, position, "sine_of_distance", mixed)


CODE = {
    transposed_image_positions: (golden.encoder, "features 2"),
    axes_of_points_swapped: (golden.decoder, "prompt tokens"),
    half_a_pixel_forgotten: (golden.decoder, "prompt tokens"),
    sine_positions_transposed: (golden.attention, "memory attention"),
    tanh_gelu: (golden.encoder, "features 0"),
    gelu_for_relu: (golden.decoder, "mask logits"),
    epsilon_1e_5: (golden.encoder, "features 0"),
    epsilon_1e_6: (golden.attention, "memory attention"),
    rotation_by_row_first: (golden.attention, "memory attention"),
    rotation_dropped: (golden.attention, "memory attention"),
    pointers_rotated: (golden.attention, "memory attention"),
    padding_masked: (golden.encoder, "features 2"),
    padding_counted_once: (golden.encoder, "features 2"),
    box_without_padding_point: (golden.decoder, "mask logits"),
    bicubic_with_a_half: (golden.encoder, "features 0"),
    same_padding: (golden.encoder, "features 0"),
    distance_as_if_long: (golden.attention, "memory attention"),
    ages_off_by_one: (golden.attention, "memory attention"),
    ages_reversed: (golden.attention, "memory attention"),
    mask_not_stretched: (golden.memory, "memory features"),
    mask_not_shifted: (golden.memory, "memory features"),
    position_at_full_weight: (golden.attention, "memory attention"),
    pointer_distances_interleaved: (golden.attention, "memory attention"),
}
ELSEWHERE = {
    tanh_gelu: [(golden.decoder, "mask logits"), (golden.memory, "memory features")],
    epsilon_1e_6: [(golden.decoder, "mask logits")],
    same_padding: [(golden.memory, "memory features")],
}
CASES = [
    (mistake, *place)
    for mistake, first in CODE.items()
    for place in (first, *ELSEWHERE.get(mistake, ()))
]


@pytest.mark.parametrize(
    ("mistake", "part", "output"),
    CASES,
    ids=[f"{mistake.__name__}-{output}" for mistake, _, output in CASES],
)
def test_mistakes_in_code_show(monkeypatch, meta, params, mistake, part, output):
    mistake(monkeypatch)
    error = worst(meta, part(params))[output]
    print(f"{error:.1e}")
    assert error > SEEN
