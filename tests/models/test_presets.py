"""Every size has the published parameters: counts, names and shapes."""

import itertools
import math

import jax
import jax.numpy as jnp
import pytest
from flax import traverse_util

from sss_jax.errors import ConfigError
from sss_jax.models.presets import PRESETS, preset
from sss_jax.models.sam2 import Sam2

# Published: trunk, neck. The other parts are equal for all sizes; the prompt encoder's count
# includes the 256 random frequencies, which the official count of 6,220 leaves out.
ENCODER = {
    "tiny": (26_849_472, 369_664),
    "small": (33_947_328, 369_664),
    "base_plus": (68_675_712, 431_104),
    "large": (212_149_296, 553_984),
}
DECODER, PROMPTS, FREQUENCIES = 4_215_109, 6_220, 256


def linear(name, n_in, n_out):
    return {f"{name}.weight": (n_out, n_in), f"{name}.bias": (n_out,)}


def norm(name, width):
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def conv(name, n_in, n_out, side):
    return {f"{name}.weight": (n_out, n_in, side, side), f"{name}.bias": (n_out,)}


def mlp(name, *widths):
    names = {}
    for i, pair in enumerate(itertools.pairwise(widths)):
        names |= linear(f"{name}.layers.{i}", *pair)
    return names


def attention(name, inner):
    names = {}
    for part in ("q_proj", "k_proj", "v_proj"):
        names |= linear(f"{name}.{part}", 256, inner)
    return names | linear(f"{name}.out_proj", inner, 256)


def official_encoder(dim, depths, table):
    names = {
        "trunk.pos_embed": (1, dim, table, table),
        "trunk.pos_embed_window": (1, dim, 8, 8),
    } | conv("trunk.patch_embed.proj", 3, dim, 7)
    index, width = 0, dim
    for stage, depth in enumerate(depths):
        out = dim * 2**stage
        names |= conv(f"neck.convs.{3 - stage}.conv", out, 256, 1)
        for _ in range(depth):
            block = f"trunk.blocks.{index}"
            names |= norm(f"{block}.norm1", width) | norm(f"{block}.norm2", out)
            names |= linear(f"{block}.attn.qkv", width, 3 * out)
            names |= linear(f"{block}.attn.proj", out, out) | mlp(f"{block}.mlp", out, 4 * out, out)
            if width != out:
                names |= linear(f"{block}.proj", width, out)
            index, width = index + 1, out
    return {f"image_encoder.{name}": shape for name, shape in names.items()}


def official_decoder():
    names = {"obj_score_token.weight": (1, 256), "iou_token.weight": (1, 256)}
    names |= {"mask_tokens.weight": (4, 256)}
    for i in range(2):
        layer = f"transformer.layers.{i}"
        names |= attention(f"{layer}.self_attn", 256) | mlp(f"{layer}.mlp", 256, 2048, 256)
        names |= attention(f"{layer}.cross_attn_token_to_image", 128)
        names |= attention(f"{layer}.cross_attn_image_to_token", 128)
        for j in range(1, 5):
            names |= norm(f"{layer}.norm{j}", 256)
    names |= attention("transformer.final_attn_token_to_image", 128)
    names |= norm("transformer.norm_final_attn", 256)
    names |= {"output_upscaling.0.weight": (256, 64, 2, 2), "output_upscaling.0.bias": (64,)}
    names |= norm("output_upscaling.1", 64)
    names |= {"output_upscaling.3.weight": (64, 32, 2, 2), "output_upscaling.3.bias": (32,)}
    names |= conv("conv_s0", 256, 32, 1) | conv("conv_s1", 256, 64, 1)
    for i in range(4):
        names |= mlp(f"output_hypernetworks_mlps.{i}", 256, 256, 256, 32)
    names |= mlp("iou_prediction_head", 256, 256, 256, 4)
    names |= mlp("pred_obj_score_head", 256, 256, 256, 1)
    return {f"sam_mask_decoder.{name}": shape for name, shape in names.items()}


def official_prompt_encoder():
    names = {"pe_layer.positional_encoding_gaussian_matrix": (2, 128)}
    for table in (*(f"point_embeddings.{i}" for i in range(4)), "not_a_point_embed"):
        names[f"{table}.weight"] = (1, 256)
    names["no_mask_embed.weight"] = (1, 256)
    names |= conv("mask_downscaling.0", 1, 4, 2) | norm("mask_downscaling.1", 4)
    names |= conv("mask_downscaling.3", 4, 16, 2) | norm("mask_downscaling.4", 16)
    names |= conv("mask_downscaling.6", 16, 256, 1)
    return {f"sam_prompt_encoder.{name}": shape for name, shape in names.items()}


def converted(official):
    """The naming rule: numbers join the name before them, weights are named after their use."""
    ours = {}
    for name, shape in official.items():
        parts = []
        for part in name.split("."):
            if part.isdigit():
                parts[-1] += f"_{part}"
            else:
                parts.append(part)
        if parts[-1] == "weight":
            table = (
                parts[-2].endswith(("_embed", "_token", "_tokens")) or "point_embed" in parts[-2]
            )
            parts[-1] = "embedding" if table else "scale" if len(shape) == 1 else "kernel"
        if parts[-1].startswith("pos_embed"):
            shape = (shape[0], *shape[2:], shape[1])
        elif len(shape) == 4 and parts[-2].startswith("output_upscaling"):
            shape = (*shape[2:], shape[0], shape[1])
        elif len(shape) == 4:
            shape = (*shape[2:], shape[1], shape[0])
        elif parts[-1] == "kernel":
            shape = shape[::-1]
        ours["/".join(parts)] = shape
    return ours


def shapes(name):
    model = Sam2(preset(name))
    side = model.config.size_multiple
    image = jnp.zeros((1, side, side, 3))
    points, labels = jnp.zeros((1, 1, 1, 2)), jnp.zeros((1, 1, 1), jnp.int32)
    tree = jax.eval_shape(model.init, jax.random.key(0), image, points, labels)["params"]
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(tree))
    return {path: x.shape for path, x in traverse_util.flatten_dict(tree, sep="/").items()}


def count(found, prefix):
    return sum(math.prod(shape) for name, shape in found.items() if name.startswith(prefix))


@pytest.mark.parametrize("name", ENCODER)
def test_published_counts_names_and_shapes(name):
    found = shapes(name)
    trunk, neck = ENCODER[name]
    assert count(found, "image_encoder/trunk/") == trunk
    assert count(found, "image_encoder/neck/") == neck
    assert count(found, "sam_mask_decoder/") == DECODER
    assert count(found, "sam_prompt_encoder/") == PROMPTS + FREQUENCIES
    config = preset(name)
    official = official_encoder(config.embed_dim, config.depths, config.pos_table)
    official |= official_decoder() | official_prompt_encoder()
    assert found == converted(official) | {"no_mem_embed": (1, 1, 256)}


def test_nano_is_small():
    assert 1e6 < count(shapes("nano"), "") < 3e6


def test_presets_are_hashable_and_distinct():
    assert len({preset(name, 256) for name in PRESETS}) == len(PRESETS) == 5


def test_strides():
    assert preset("tiny").strides == (4, 8, 16)
    assert preset("nano", 64).strides == (2, 4, 8)


def test_unknown_preset_names_the_choices():
    with pytest.raises(ConfigError, match="nano, tiny, small, base_plus, large"):
        preset("huge")


@pytest.mark.parametrize(
    ("name", "size"), [("tiny", 48), ("tiny", 0), ("nano", 24), ("large", -32)]
)
def test_unfit_image_size_names_the_multiple(name, size):
    with pytest.raises(ConfigError, match="multiple of"):
        preset(name, size)
