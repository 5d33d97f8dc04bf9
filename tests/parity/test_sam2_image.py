"""The image path against an independent implementation, transformers' `Sam2Model`.

Needs torch and transformers, which the product itself never installs:
`pip install torch==2.13.0 && pip install transformers==5.23.0`.
"""

import re

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from flax import traverse_util  # noqa: E402

from sss_jax.models.presets import preset  # noqa: E402
from sss_jax.models.sam2 import Sam2  # noqa: E402

TOLERANCE = 1e-4
SIZE = 256
OBJECTS = 2

# transformers' names to ours, in order; the first group of rules that matches is applied once.
RENAMES = [
    (r"^no_memory_embedding$", "no_mem_embed"),
    (
        r"^prompt_encoder\.shared_embedding\.positional_embedding$",
        "sam_prompt_encoder.pe_layer.positional_encoding_gaussian_matrix",
    ),
    (
        r"^vision_encoder\.backbone\.patch_embed\.projection\.",
        "image_encoder.trunk.patch_embed.proj.",
    ),
    (r"^vision_encoder\.backbone\.", "image_encoder.trunk."),
    (r"^vision_encoder\.neck\.convs\.(\d)\.", r"image_encoder.neck.convs_\1.conv."),
    (r"^prompt_encoder\.mask_embed\.conv1\.", "sam_prompt_encoder.mask_downscaling_0."),
    (r"^prompt_encoder\.mask_embed\.layer_norm1\.", "sam_prompt_encoder.mask_downscaling_1."),
    (r"^prompt_encoder\.mask_embed\.conv2\.", "sam_prompt_encoder.mask_downscaling_3."),
    (r"^prompt_encoder\.mask_embed\.layer_norm2\.", "sam_prompt_encoder.mask_downscaling_4."),
    (r"^prompt_encoder\.mask_embed\.conv3\.", "sam_prompt_encoder.mask_downscaling_6."),
    (r"^prompt_encoder\.", "sam_prompt_encoder."),
    (r"^mask_decoder\.upscale_conv1\.", "sam_mask_decoder.output_upscaling_0."),
    (r"^mask_decoder\.upscale_layer_norm\.", "sam_mask_decoder.output_upscaling_1."),
    (r"^mask_decoder\.upscale_conv2\.", "sam_mask_decoder.output_upscaling_3."),
    (r"^mask_decoder\.", "sam_mask_decoder."),
]
INSIDE = [
    (r"^(.*(?:hypernetworks_mlps\.\d|_head))\.layers\.0\.", r"\1.layers_1."),
    (r"^(.*(?:hypernetworks_mlps\.\d|_head))\.proj_out\.", r"\1.layers_2."),
    (r"^(.*)\.proj_in\.", r"\1.layers_0."),
    (r"^(.*)\.mlp\.proj_out\.", r"\1.mlp.layers_1."),
    (r"\.o_proj\.", ".out_proj."),
    (r"\.layer_norm_final_attn\.", ".norm_final_attn."),
    (r"\.layer_norm(\d)\.", r".norm\1."),
    (r"\.(blocks|layers|output_hypernetworks_mlps)\.(\d+)\.", r".\1_\2."),
]


def our_name(name):
    for pattern, replacement in RENAMES:
        if re.search(pattern, name):
            name = re.sub(pattern, replacement, name)
            break
    else:
        raise AssertionError(f"no rule for {name}")
    for pattern, replacement in INSIDE:
        name = re.sub(pattern, replacement, name)
    return name


def our_array(name, array):
    """Our path and layout of one of transformers' arrays."""
    path, _, leaf = our_name(name).rpartition(".")
    if leaf in ("pos_embed", "pos_embed_window"):
        array = array.transpose(0, 2, 3, 1)
    elif leaf == "weight" and array.ndim == 4:
        leaf = "kernel"
        transposed = "upscale_conv" in name
        array = array.transpose((2, 3, 0, 1) if transposed else (2, 3, 1, 0))
    elif leaf == "weight" and array.ndim == 1:
        leaf = "scale"
    elif leaf == "weight" and re.search(r"(_embed|_token|_tokens)$", path):
        leaf = "embedding"
    elif leaf == "weight":
        leaf, array = "kernel", array.T
    return "/".join(filter(None, (path.replace(".", "/"), leaf))), array


def our_params(arrays):
    flat = {}
    for name, array in arrays.items():
        if name == "shared_image_embedding.positional_embedding":
            continue  # stored twice there
        if name == "prompt_encoder.point_embed.weight":
            for i, row in enumerate(array):
                flat[f"sam_prompt_encoder/point_embeddings_{i}/embedding"] = row[None]
            continue
        path, value = our_array(name, array)
        assert path not in flat, path
        flat[path] = value
    return traverse_util.unflatten_dict(flat, sep="/")


def reference(name, size):
    """transformers' model with random weights that look trained: no zeros, no ones."""
    config = preset(name, size, memory=False)
    widths = [config.embed_dim * 2**i for i in range(4)]
    backbone = transformers.Sam2HieraDetConfig(
        hidden_size=config.embed_dim,
        num_attention_heads=config.heads,
        image_size=[size, size],
        window_positional_embedding_background_size=[config.pos_table] * 2,
        blocks_per_stage=list(config.depths),
        embed_dim_per_stage=widths,
        num_attention_heads_per_stage=[config.heads * 2**i for i in range(4)],
        window_size_per_stage=list(config.windows),
        global_attention_blocks=list(config.global_blocks),
    )
    vision = transformers.Sam2VisionConfig(
        backbone_config=backbone,
        backbone_channel_list=widths[::-1],
        backbone_feature_sizes=[[size // s] * 2 for s in config.strides],
    )
    model = transformers.Sam2Model(
        transformers.Sam2Config(
            vision_config=vision,
            prompt_encoder_config={"image_size": size},
            mask_decoder_config={"dynamic_multimask_via_stability": False},
        )
    ).eval()
    generator = np.random.default_rng(0)
    state = {}
    for key, value in model.state_dict().items():
        noise = generator.standard_normal(value.shape)
        if value.ndim == 1:
            noise = 0.2 * noise + (1.0 if key.endswith("weight") else 0.0)
        elif key.endswith("weight") and not re.search(r"(_embed|_token|_tokens)\.weight$", key):
            noise = noise / np.sqrt(value[0].numel())
        elif "pos_embed" in key:
            noise = 0.5 * noise
        state[key] = torch.tensor(noise, dtype=torch.float32)
    frequencies = "prompt_encoder.shared_embedding.positional_embedding"
    state["shared_image_embedding.positional_embedding"] = state[frequencies]
    model.load_state_dict(state, strict=True)
    params = our_params({key: value.numpy() for key, value in state.items()})
    return model, Sam2(config), params


SLOW = [pytest.param(n, marks=pytest.mark.slow) for n in ("small", "base_plus", "large")]


@pytest.fixture(scope="module", params=["tiny", *SLOW])
def pair(request):
    with torch.no_grad():
        model, ours, params = reference(request.param, SIZE)
    image = np.random.default_rng(1).standard_normal((2, SIZE, SIZE, 3)).astype(np.float32)
    encode = jax.jit(lambda p, x: ours.apply({"params": p}, x, method="encode_image"))
    features = encode(params, image)
    decode = jax.jit(lambda p, f, *a: ours.apply({"params": p}, f, *a, method="decode"))
    return model, ours, params, image, features, decode


def close(ours, theirs, tolerance=TOLERANCE):
    ours, theirs = np.asarray(ours), theirs.detach().numpy()
    assert ours.shape == theirs.shape
    scale = np.sqrt(np.mean(np.square(theirs)))
    assert scale > 1e-3, "the reference is degenerate"
    error = np.abs(ours - theirs).max() / scale
    print(f"relative error {error:.2e}")
    assert error <= tolerance, f"relative error {error:.2e}"


def pixels(image):
    return torch.tensor(np.ascontiguousarray(image.transpose(0, 3, 1, 2)))


def test_parameters_match_one_to_one(pair):
    _, ours, params, *_ = pair
    side = ours.config.size_multiple
    points, labels = jnp.zeros((1, 1, 1, 2)), jnp.zeros((1, 1, 1), jnp.int32)
    shapes = jax.eval_shape(
        ours.init, jax.random.key(0), jnp.zeros((1, side, side, 3)), points, labels
    )["params"]
    mine = {k: v.shape for k, v in traverse_util.flatten_dict(shapes, sep="/").items()}
    theirs = {k: v.shape for k, v in traverse_util.flatten_dict(params, sep="/").items()}
    assert mine == theirs


def test_feature_maps(pair):
    model, _, _, image, features, _ = pair
    with torch.no_grad():
        theirs = model.vision_encoder(pixels(image)).fpn_hidden_states
    for mine, level in zip(features, theirs, strict=True):
        close(mine, level.permute(0, 2, 3, 1))


def boxes(generator):
    low = generator.uniform(10, 100, (2, OBJECTS, 2))
    return np.concatenate([low, low + generator.uniform(20, 120, low.shape)], -1).astype(np.float32)


def prompt(kind):
    """The same prompt for transformers (keywords) and for us (points, labels, masks)."""
    generator = np.random.default_rng(2)
    box = boxes(generator)
    corners = box.reshape(2, OBJECTS, 2, 2)
    corner_labels = np.broadcast_to(np.array([2, 3], np.int32), (2, OBJECTS, 2))
    clicks = generator.uniform(0, SIZE, (2, OBJECTS, 2, 2)).astype(np.float32)
    click_labels = np.broadcast_to(np.array([1, 0], np.int32), (2, OBJECTS, 2))
    spare, unused = np.full((2, OBJECTS, 1, 2), 7.0, np.float32), np.full((2, OBJECTS, 1), -1)
    unused = unused.astype(np.int32)
    tensor = torch.tensor
    if kind == "box":
        points = np.concatenate([corners, spare], 2), np.concatenate([corner_labels, unused], 2)
        return {"input_boxes": tensor(box)}, (*points, None)
    if kind == "clicks":
        theirs = {"input_points": tensor(clicks), "input_labels": tensor(click_labels)}
        points = np.concatenate([spare, clicks], 2), np.concatenate([unused, click_labels], 2)
        return theirs, (*points, None)
    if kind == "box and click":
        centre, label = clicks[:, :, :1], click_labels[:, :, :1]
        theirs = {"input_points": tensor(centre), "input_labels": tensor(label)}
        points = np.concatenate([corners, centre], 2), np.concatenate([corner_labels, label], 2)
        return theirs | {"input_boxes": tensor(box)}, (*points, None)
    if kind == "mask and box":
        mask = 5 * generator.standard_normal((2, SIZE // 4, SIZE // 4)).astype(np.float32)
        theirs = {"input_boxes": tensor(box), "input_masks": tensor(mask[:, None])}
        masks = np.broadcast_to(mask[:, None], (2, OBJECTS, *mask.shape[1:]))
        return theirs, (corners, corner_labels, masks)
    none = np.full((2, 1, 3, 2), 9.0, np.float32), np.full((2, 1, 3), -1, np.int32)
    return {}, (*none, None)


@pytest.mark.parametrize("kind", ["box", "clicks", "box and click", "mask and box", "none"])
def test_decoder(pair, kind):
    model, _, params, image, features, decode = pair
    theirs, (points, labels, masks) = prompt(kind)
    tokens = []
    hook = model.mask_decoder.register_forward_hook(lambda *a: tokens.append(a[2][2]))
    with torch.no_grad():
        single = model(pixels(image), **theirs, multimask_output=False)
        multi = model(pixels(image), **theirs, multimask_output=True)
    hook.remove()
    mine = decode(params, features, points, labels, None, masks)
    close(mine.logits_BKMHW, torch.cat([single.pred_masks, multi.pred_masks], 2))
    close(mine.iou_BKM, torch.cat([single.iou_scores, multi.iou_scores], 2))
    close(mine.object_score_BK, multi.object_score_logits[..., 0])
    close(mine.tokens_BKMD, torch.cat(tokens, 2))


def test_prompt_embeddings(pair):
    model, ours, params, *_ = pair

    def embed(module, points, labels, masks):
        encoder = module.sam_prompt_encoder
        tokens, used = encoder.points(points, labels, (SIZE, SIZE))
        return tokens, used, encoder.masks(masks), encoder.dense_position(16, 16)

    theirs, (points, labels, masks) = prompt("mask and box")
    tokens, used, dense, place = ours.apply({"params": params}, points, labels, masks, method=embed)
    with torch.no_grad():
        their_tokens, their_dense = model.get_prompt_embeddings(**theirs)
        their_place = model.get_image_wide_positional_embeddings()
    assert used.all()
    close(tokens, their_tokens)
    close(dense[:, 0], their_dense.permute(0, 2, 3, 1))
    close(place, their_place[0].permute(1, 2, 0))


@pytest.fixture(scope="module")
def gradients():
    """Gradients of one scalar of every output with respect to all parameters, both sides."""
    size = 64
    model, ours, params = reference("tiny", size)
    generator = np.random.default_rng(3)
    image = generator.standard_normal((2, size, size, 3)).astype(np.float32)
    box = np.array([[[8, 10, 40, 50]], [[20, 4, 60, 33]]], np.float32)
    weights = generator.standard_normal((2, 1, 4, size // 4, size // 4)).astype(np.float32)

    def scalar(masks, iou, score, weights):
        return (masks * weights).sum() / 100 + iou.sum() + score.sum()

    single = model(pixels(image), input_boxes=torch.tensor(box), multimask_output=False)
    multi = model(pixels(image), input_boxes=torch.tensor(box), multimask_output=True)
    scalar(
        torch.cat([single.pred_masks, multi.pred_masks], 2),
        torch.cat([single.iou_scores, multi.iou_scores], 2),
        (single.object_score_logits + multi.object_score_logits) / 2,
        torch.tensor(weights),
    ).backward()
    arrays = {
        name: np.zeros(value.shape, np.float32) if value.grad is None else value.grad.numpy()
        for name, value in model.named_parameters()
    }
    theirs = traverse_util.flatten_dict(our_params(arrays), sep="/")

    def loss(params):
        points, labels = box.reshape(2, 1, 2, 2), jnp.tile(jnp.array([2, 3]), (2, 1, 1))

        def run(module):
            features = module.encode_image(image)
            return module.decode(features, points, labels)

        out = ours.apply({"params": params}, method=run)
        return scalar(out.logits_BKMHW, out.iou_BKM, out.object_score_BK, weights)

    mine = jax.jit(jax.grad(loss))(params)
    return traverse_util.flatten_dict(mine, sep="/"), theirs


def test_gradients(gradients):
    mine, theirs = gradients
    frequencies = "sam_prompt_encoder/pe_layer/positional_encoding_gaussian_matrix"
    assert not np.any(mine.pop(frequencies))
    assert mine.keys() == theirs.keys()
    total = np.sqrt(sum(np.sum(np.square(g)) for g in theirs.values()))
    for name, reference_gradient in theirs.items():
        norm = np.linalg.norm(reference_gradient)
        error = np.linalg.norm(np.asarray(mine[name]) - reference_gradient)
        # Biases of key projections shift a softmax and have no gradient but rounding.
        assert error <= 1e-3 * norm + 1e-6 * total, f"{name}: {error / max(norm, 1e-30):.1e}"
