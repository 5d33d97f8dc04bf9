"""The table of names: complete for all published networks, one to one, and right in layout."""

import hashlib
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from sss_jax.conversion import keymap, official
from sss_jax.conversion.official import Model
from sss_jax.conversion.tensors import Spec, Tensors, lazy
from sss_jax.errors import CheckpointError
from sss_jax.models.presets import preset
from sss_jax.models.sam2 import Sam2

# Tensors, trained parameters, and SHA-256 of the sorted lines "name shape", taken from the eight
# official files.
GOLDEN = {
    ("2.0", "tiny"): (
        468,
        38_945_986,
        "5e523b8dafb774df3a42353563bf71d1fce1c41e2f8b3755a33f266c8a67e9c5",
    ),
    ("2.0", "small"): (
        516,
        46_043_842,
        "2b023d3d2f211cbf3216de77ebe33ad6153c5a73e2c34f8705c2f0f98325e718",
    ),
    ("2.0", "base_plus"): (
        612,
        80_833_666,
        "b5ec9a41f6bb0a5f41e8dacede16a9ad209f66c5993e9683b9bef0b449769e3d",
    ),
    ("2.0", "large"): (
        900,
        224_430_130,
        "eb5893e1dfbfb6662eeaede4c9c9582392673c139ef76eaa0246fbb4fe7efb96",
    ),
    ("2.1", "tiny"): (
        471,
        38_962_498,
        "bac6d522c4ff90fe9980fe55056dc14f71966e17c16d772f18674d978c0471ad",
    ),
    ("2.1", "small"): (
        519,
        46_060_354,
        "c9876e8c1ec0adc34129db2418ca9d7118e5b69cdaae84f5d96b11736c3b3e02",
    ),
    ("2.1", "base_plus"): (
        615,
        80_850_178,
        "e2d94a28cde080da1e50ee1a2514e30d1f9b87c12fd36dff1c71ab181c0708f3",
    ),
    ("2.1", "large"): (
        903,
        224_446_642,
        "e5145693245ec4454c0f612349dadd98dc692ceb26c117646a6069c4abfbedcc",
    ),
}

FLOAT32 = np.dtype(np.float32)


def table(shapes) -> Tensors:
    """Tensors that have shapes but no memory."""
    specs = {name: Spec(tuple(shape), FLOAT32) for name, shape in shapes.items()}
    return Tensors(specs, lambda name: np.broadcast_to(np.float32(0), specs[name].shape))


def shapes_of(tensors):
    return {name: spec.shape for name, spec in tensors.specs.items()}


def digest(shapes) -> str:
    lines = sorted(f"{name} {tuple(shape)}" for name, shape in shapes.items())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


@pytest.mark.parametrize("model", official.models(), ids=str)
def test_names_and_shapes_are_the_official_ones(model) -> None:
    shapes = official.shapes(model)
    trained = sum(math.prod(s) for name, s in shapes.items() if name != official.BUFFER)
    assert (len(shapes), trained, digest(shapes)) == GOLDEN[model.version, model.variant]


def test_golden_values_are_those_of_the_reference_list(real_data: Path) -> None:
    path = real_data.parent / "reference" / "sam2_params.json"
    if not path.is_file():
        pytest.skip("list of the official parameters not present")
    listing = json.loads(path.read_text())
    short = {"t": "tiny", "s": "small", "b+": "base_plus", "l": "large"}
    for name, parts in listing["models"].items():
        version = "2.1" if name.startswith("sam2.1") else "2.0"
        shapes = {k: v for part in parts for k, v in listing["parts"][part].items()}
        assert digest(shapes) == GOLDEN[version, short[name.split("_")[-1]]][2]
    assert len(listing["models"]) == 8


@pytest.mark.parametrize("model", official.models(), ids=str)
def test_map_is_one_to_one(model) -> None:
    theirs = table(official.shapes(model))
    ours = keymap.ours(theirs)
    assert len(ours) == len(theirs)
    assert keymap.meta(ours).specs == theirs.specs
    assert keymap.from_hugging_face(table_of(keymap.to_hugging_face(theirs))).specs == theirs.specs


def table_of(arrays) -> Tensors:
    return table({name: array.shape for name, array in arrays.items()})


SLOW = [
    pytest.param(model.variant, model.version, marks=pytest.mark.slow)
    for model in official.models()
    if model != Model("tiny", "2.1")
]


@pytest.mark.parametrize(("variant", "version"), [("tiny", "2.1"), *SLOW])
def test_paths_and_layouts_are_those_of_the_network(variant, version) -> None:
    config = preset(variant, version=version)
    side = config.size_multiple
    image, points = jnp.zeros((1, side, side, 3)), jnp.zeros((1, 1, 1, 2))
    labels = jnp.zeros((1, 1, 1), jnp.int32)
    params = jax.eval_shape(Sam2(config).init, jax.random.key(0), image, points, labels)["params"]
    wanted = {k: v.shape for k, v in traverse_util.flatten_dict(params, sep="/").items()}
    assert shapes_of(keymap.ours(table(official.shapes(Model(variant, version))))) == wanted


def test_every_row_describes_a_tensor() -> None:
    names = official.shapes(Model("tiny", "2.1"))
    used = {match.row[0] for match in keymap._resolve(names, keymap.META).values()}
    assert used == {row[0] for row in keymap.ROWS}
    assert len(used) == len(keymap.ROWS)


def numbered(*shape):
    return np.arange(math.prod(shape), dtype=np.float32).reshape(shape)


@pytest.mark.parametrize(
    ("name", "path", "array", "expected"),
    [
        (
            "memory_attention.layers.3.cross_attn_image.k_proj.weight",
            "memory_attention/layers_3/cross_attn_image/k_proj/kernel",
            numbered(2, 3),
            lambda a, i, o: (a[i, o] == numbered(2, 3)[o, i], (3, 2)),
        ),
        (
            "image_encoder.neck.convs.2.conv.weight",
            "image_encoder/neck/convs_2/conv/kernel",
            numbered(2, 3, 4, 5),
            lambda a, h, w, i, o: (a[h, w, i, o] == numbered(2, 3, 4, 5)[o, i, h, w], (4, 5, 3, 2)),
        ),
        (
            "sam_mask_decoder.output_upscaling.3.weight",
            "sam_mask_decoder/output_upscaling_3/kernel",
            numbered(3, 4, 2, 5),
            lambda a, h, w, i, o: (a[h, w, i, o] == numbered(3, 4, 2, 5)[i, o, h, w], (2, 5, 3, 4)),
        ),
        (
            "memory_encoder.fuser.layers.1.dwconv.weight",
            "memory_encoder/fuser/layers_1/dwconv/kernel",
            numbered(6, 1, 7, 5),
            lambda a, h, w, i, o: (a[h, w, i, o] == numbered(6, 1, 7, 5)[o, i, h, w], (7, 5, 1, 6)),
        ),
        (
            "image_encoder.trunk.pos_embed",
            "image_encoder/trunk/pos_embed",
            numbered(1, 3, 4, 5),
            lambda a, b, h, w, c: (a[b, h, w, c] == numbered(1, 3, 4, 5)[b, c, h, w], (1, 4, 5, 3)),
        ),
    ],
    ids=["linear", "conv", "transposed conv", "depthwise conv", "map"],
)
def test_layouts(name, path, array, expected) -> None:
    (found,) = keymap.flatten(keymap.to_ours({name: array})).items()
    assert found[0] == path
    shape = None
    for index in np.ndindex(found[1].shape):
        equal, shape = expected(found[1], *index)
        assert equal
    assert found[1].shape == shape
    assert found[1].flags.c_contiguous
    back = keymap.to_meta(keymap.to_ours({name: array}))
    assert list(back) == [name]
    np.testing.assert_array_equal(back[name], array)


PATHS = {
    "image_encoder.trunk.blocks.10.norm2.weight": "image_encoder/trunk/blocks_10/norm2/scale",
    "memory_encoder.fuser.layers.0.gamma": "memory_encoder/fuser/layers_0/gamma",
    "memory_encoder.mask_downsampler.encoder.10.bias": (
        "memory_encoder/mask_downsampler/encoder_10/bias"
    ),
    "sam_prompt_encoder.point_embeddings.3.weight": (
        "sam_prompt_encoder/point_embeddings_3/embedding"
    ),
    "sam_mask_decoder.mask_tokens.weight": "sam_mask_decoder/mask_tokens/embedding",
    "obj_ptr_proj.layers.2.bias": "obj_ptr_proj/layers_2/bias",
    "no_obj_embed_spatial": "no_obj_embed_spatial",
}


@pytest.mark.parametrize(("name", "path"), PATHS.items())
def test_paths(name, path) -> None:
    shape = official.shapes(Model("small", "2.1"))[name]
    array = numbered(*shape)
    found = keymap.flatten(keymap.to_ours({name: array}))
    assert list(found) == [path]
    np.testing.assert_array_equal(found[path], array)


def test_values_survive_both_ways(micro, draw) -> None:
    for model in micro:
        state = draw(official.shapes(model))
        params = keymap.to_ours(state)
        back = keymap.to_meta(params)
        assert back.keys() == state.keys()
        for name, array in state.items():
            np.testing.assert_array_equal(back[name], array)


@pytest.mark.parametrize(
    "name",
    [
        "image_encoder.trunk.blocks.0.norm1.gamma",
        "image_encoder.trunk.blocks.00.norm1.weight",
        "image_encoder.trunk.blocks.0.norm1.weight.weight",
        "image_encoder_trunk_blocks_0_norm1_weight",
        "no_mem_embed.weight",
        "",
    ],
)
def test_unknown_name_is_an_error(name) -> None:
    with pytest.raises(CheckpointError, match="1 names are not SAM-2's"):
        keymap.to_ours({name: np.zeros(3, np.float32)})


def test_name_in_two_rows_is_an_error(monkeypatch) -> None:
    rows = (*keymap.ROWS, ("no_{n}bj_ptr", "x.{n}", keymap.BARE))
    monkeypatch.setattr(keymap, "_PLACEHOLDERS", {**keymap._PLACEHOLDERS, "n": "o"})
    monkeypatch.setattr(keymap, "ROWS", rows)
    keymap._patterns.cache_clear()
    try:
        with pytest.raises(CheckpointError, match=r"stand twice.*no_obj_ptr"):
            keymap.to_ours({"no_obj_ptr": np.zeros((1, 2), np.float32)})
    finally:
        keymap._patterns.cache_clear()


def test_wrong_number_of_axes_is_an_error() -> None:
    name = "memory_encoder.pix_feat_proj.weight"
    with pytest.raises(CheckpointError, match=f"'{name}' has 2 axes instead of 4"):
        keymap.to_ours({name: np.zeros((2, 2), np.float32)})


@pytest.mark.parametrize(
    "path",
    [
        "image_encoder/trunk/blocks_0/norm1/kernel",
        "image_encoder/trunk/blocks_0/norm1/weight",
        "image_encoder/trunk/blocks/0/norm1/scale",
        "memory_attention/layers_0/linear1/embedding",
        "nothing/kernel",
    ],
)
def test_unknown_path_is_an_error(path) -> None:
    with pytest.raises(CheckpointError, match=r"names are not SAM-2's|is no path of SAM-2's"):
        keymap.to_meta(keymap.nest({path: np.zeros((2, 2), np.float32)}))


# Transformers' names.


THEIRS = {
    "memory_temporal_positional_encoding": "maskmem_tpos_enc",
    "occlusion_spatial_embedding_parameter": "no_obj_embed_spatial",
    "vision_encoder.backbone.blocks.5.mlp.proj_out.bias": (
        "image_encoder.trunk.blocks.5.mlp.layers.1.bias"
    ),
    "vision_encoder.neck.convs.3.weight": "image_encoder.neck.convs.3.conv.weight",
    "mask_decoder.iou_prediction_head.layers.0.bias": (
        "sam_mask_decoder.iou_prediction_head.layers.1.bias"
    ),
    "mask_decoder.output_hypernetworks_mlps.2.proj_out.bias": (
        "sam_mask_decoder.output_hypernetworks_mlps.2.layers.2.bias"
    ),
    "mask_decoder.transformer.layers.1.cross_attn_image_to_token.o_proj.bias": (
        "sam_mask_decoder.transformer.layers.1.cross_attn_image_to_token.out_proj.bias"
    ),
    "mask_decoder.transformer.layers.0.layer_norm4.bias": (
        "sam_mask_decoder.transformer.layers.0.norm4.bias"
    ),
    "memory_attention.layers.2.cross_attn_image.v_proj.bias": (
        "memory_attention.layers.2.cross_attn_image.v_proj.bias"
    ),
    "memory_encoder.mask_downsampler.layers.2.conv.bias": (
        "memory_encoder.mask_downsampler.encoder.6.bias"
    ),
    "memory_encoder.mask_downsampler.layers.3.layer_norm.bias": (
        "memory_encoder.mask_downsampler.encoder.10.bias"
    ),
    "memory_encoder.memory_fuser.layers.1.scale": "memory_encoder.fuser.layers.1.gamma",
    "object_pointer_proj.proj_in.bias": "obj_ptr_proj.layers.0.bias",
    "temporal_positional_encoding_projection_layer.bias": "obj_ptr_tpos_proj.bias",
}


@pytest.mark.parametrize(("theirs", "official_name"), THEIRS.items())
def test_names_of_transformers(theirs, official_name) -> None:
    array = np.zeros(2, np.float32)
    assert list(keymap.from_hugging_face({theirs: array})) == [official_name]
    assert list(keymap.to_hugging_face({official_name: array})) == [theirs]


def test_transformers_values_survive_both_ways(state) -> None:
    theirs = keymap.to_hugging_face(state)
    assert len(theirs) == len(state) - 2  # four points in one table, the frequencies twice
    points = theirs["prompt_encoder.point_embed.weight"]
    for i in range(4):
        row = state[f"sam_prompt_encoder.point_embeddings.{i}.weight"]
        np.testing.assert_array_equal(points[i : i + 1], row)
    back = keymap.from_hugging_face(theirs)
    assert back.keys() == state.keys()
    for name, array in state.items():
        np.testing.assert_array_equal(back[name], array)
        assert back.specs[name].shape == array.shape


FIRST = "prompt_encoder.shared_embedding.positional_embedding"
AGAIN = "shared_image_embedding.positional_embedding"


@pytest.mark.parametrize("absent", [FIRST, AGAIN])
def test_one_copy_of_the_frequencies_is_enough(state, absent) -> None:
    theirs = keymap.to_hugging_face(state)
    del theirs[absent]
    found = keymap.from_hugging_face(theirs)
    np.testing.assert_array_equal(found[official.BUFFER], state[official.BUFFER])


def test_copies_of_the_frequencies_must_agree(state) -> None:
    theirs = keymap.to_hugging_face(state)
    theirs[AGAIN] = theirs[AGAIN] + np.float32(1e-6)
    with pytest.raises(CheckpointError, match="should be equal, but differ"):
        keymap.from_hugging_face(theirs)


def test_naming_is_recognised(state) -> None:
    assert keymap.naming(state) == "meta"
    assert keymap.naming(keymap.to_hugging_face(state)) == "hugging face"
    with pytest.raises(CheckpointError, match=r"none of its 1 names .*'conv\.w'"):
        keymap.naming(["conv.w"])
    with pytest.raises(CheckpointError, match="far more than any SAM-2"):
        keymap.naming(f"x{i}" for i in range(keymap.MAX_TENSORS + 1))


def test_nothing_is_read_before_it_is_asked_for(state) -> None:
    read = []

    def note(name):
        read.append(name)
        return state[name]

    watched = Tensors(lazy(state).specs, note)
    ours = keymap.ours(lazy(watched))
    assert read == []
    path = "memory_attention/norm/scale"
    np.testing.assert_array_equal(ours[path], state["memory_attention.norm.weight"])
    assert read == ["memory_attention.norm.weight"]
    assert path in ours
    assert "nothing" not in ours
    with pytest.raises(KeyError):
        ours["nothing"]
