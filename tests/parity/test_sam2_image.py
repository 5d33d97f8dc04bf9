"""The image path against an independent implementation, transformers' `Sam2Model`.

Needs torch and transformers, which the product itself never installs:
`pip install torch==2.13.0 && pip install transformers==5.23.0`.
"""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from flax import traverse_util  # noqa: E402

from sss_jax.conversion.keymap import from_hugging_face, to_ours  # noqa: E402
from tests.parity.oracle import close, image_reference  # noqa: E402

SIZE = 256
OBJECTS = 2

SLOW = [pytest.param(n, marks=pytest.mark.slow) for n in ("small", "base_plus", "large")]


@pytest.fixture(scope="module", params=["tiny", *SLOW])
def pair(request):
    with torch.no_grad():
        model, ours, params = image_reference(request.param, SIZE)
    image = np.random.default_rng(1).standard_normal((2, SIZE, SIZE, 3)).astype(np.float32)
    encode = jax.jit(lambda p, x: ours.apply({"params": p}, x, method="encode_image"))
    features = encode(params, image)
    decode = jax.jit(lambda p, f, *a: ours.apply({"params": p}, f, *a, method="decode"))
    return model, ours, params, image, features, decode


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
    model, ours, params = image_reference("tiny", size)
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
    theirs = traverse_util.flatten_dict(to_ours(from_hugging_face(arrays)), sep="/")

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
