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
MEMORY_ATTENTION, MEMORY_ENCODER = 5_922_304, 1_384_608
TOTAL = {
    "tiny": 38_962_498,
    "small": 46_060_354,
    "base_plus": 80_850_178,
    "large": 224_446_642,
}
ONLY_2_1 = 16_512


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


def official_memory(version):
    names = norm("memory_attention.norm", 256)
    for i in range(4):
        layer = f"memory_attention.layers.{i}"
        for part, keys in (("self_attn", 256), ("cross_attn_image", 64)):
            names |= linear(f"{layer}.{part}.q_proj", 256, 256)
            names |= linear(f"{layer}.{part}.k_proj", keys, 256)
            names |= linear(f"{layer}.{part}.v_proj", keys, 256)
            names |= linear(f"{layer}.{part}.out_proj", 256, 256)
        names |= linear(f"{layer}.linear1", 256, 2048) | linear(f"{layer}.linear2", 2048, 256)
        for j in range(1, 4):
            names |= norm(f"{layer}.norm{j}", 256)
    down = "memory_encoder.mask_downsampler.encoder"
    for i, (n_in, n_out) in enumerate(itertools.pairwise((1, 4, 16, 64, 256))):
        names |= conv(f"{down}.{3 * i}", n_in, n_out, 3) | norm(f"{down}.{3 * i + 1}", n_out)
    names |= conv(f"{down}.12", 256, 256, 1) | conv("memory_encoder.pix_feat_proj", 256, 256, 1)
    for i in range(2):
        block = f"memory_encoder.fuser.layers.{i}"
        names |= {f"{block}.dwconv.weight": (256, 1, 7, 7), f"{block}.dwconv.bias": (256,)}
        names |= norm(f"{block}.norm", 256) | linear(f"{block}.pwconv1", 256, 1024)
        names |= linear(f"{block}.pwconv2", 1024, 256) | {f"{block}.gamma": (256,)}
    names |= conv("memory_encoder.out_proj", 256, 64, 1) | mlp("obj_ptr_proj", *[256] * 4)
    names |= conv("mask_downsample", 1, 1, 4)
    names |= {"maskmem_tpos_enc": (7, 1, 1, 64), "no_obj_ptr": (1, 256)}
    names |= {"no_mem_embed": (1, 1, 256), "no_mem_pos_enc": (1, 1, 256)}
    if version == "2.1":
        names |= linear("obj_ptr_tpos_proj", 256, 64) | {"no_obj_embed_spatial": (1, 64)}
    return names


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
        elif len(shape) == 4 and parts[-1] == "kernel":
            transposed = parts[-2].startswith("output_upscaling")
            lead = shape[:2] if transposed else shape[1::-1]
            shape = (*shape[2:], *lead)
        elif parts[-1] == "kernel":
            shape = shape[::-1]
        ours["/".join(parts)] = shape
    return ours


def shapes(name, **options):
    model = Sam2(preset(name, **options))
    side = model.config.size_multiple
    image = jnp.zeros((1, side, side, 3))
    points, labels = jnp.zeros((1, 1, 1, 2)), jnp.zeros((1, 1, 1), jnp.int32)
    tree = jax.eval_shape(model.init, jax.random.key(0), image, points, labels)["params"]
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(tree))
    return {path: x.shape for path, x in traverse_util.flatten_dict(tree, sep="/").items()}


def count(found, prefix):
    return sum(math.prod(shape) for name, shape in found.items() if name.startswith(prefix))


@pytest.mark.parametrize("version", ["2.0", "2.1"])
@pytest.mark.parametrize("name", ENCODER)
def test_published_counts_names_and_shapes(name, version):
    found = shapes(name, version=version)
    trunk, neck = ENCODER[name]
    assert count(found, "image_encoder/trunk/") == trunk
    assert count(found, "image_encoder/neck/") == neck
    assert count(found, "sam_mask_decoder/") == DECODER
    assert count(found, "sam_prompt_encoder/") == PROMPTS + FREQUENCIES
    assert count(found, "memory_attention/") == MEMORY_ATTENTION
    assert count(found, "memory_encoder/") == MEMORY_ENCODER
    total = TOTAL[name] - (ONLY_2_1 if version == "2.0" else 0)
    assert count(found, "") == total + FREQUENCIES
    config = preset(name)
    official = official_encoder(config.embed_dim, config.depths, config.pos_table)
    official |= official_decoder() | official_prompt_encoder()
    assert found == converted(official | official_memory(version))


def test_without_memory_the_rest_is_the_same():
    every = shapes("tiny")
    image = shapes("tiny", memory=False)
    assert image.items() < every.items()
    assert not any("memory" in name or "ptr" in name for name in image)


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
