"""Memory and tracking against an independent implementation, transformers' `Sam2VideoModel`.

Needs torch and transformers: `pip install torch==2.13.0 && pip install transformers==5.23.0`.
"""

import functools

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402

from sss_jax.models import tracking  # noqa: E402
from sss_jax.models.prompt_encoder import Prompts  # noqa: E402
from tests.parity.oracle import close, relative_error, video_reference  # noqa: E402

SIZE, SLICES = 256, 8
GRID = SIZE // 16
CLICK = (np.array([[90.0, 120.0]], np.float32), np.array([1], np.int32))
BOX = (np.array([[40.0, 60.0], [200.0, 150.0]], np.float32), np.array([2, 3], np.int32))

SLOW = [
    pytest.param((name, version), marks=pytest.mark.slow, id=f"{name} {version}")
    for name in ("tiny", "small", "base_plus", "large")
    for version in ("2.0", "2.1")
    if (name, version) != ("tiny", "2.1")
]


@pytest.fixture(scope="module", params=[pytest.param(("tiny", "2.1"), id="tiny 2.1"), *SLOW])
def pair(request):
    name, version = request.param
    return video_reference(name, SIZE, version)


def random_video(seed):
    rng = np.random.default_rng(seed)
    base = rng.standard_normal((SIZE, SIZE, 3))
    steps = [0.5 * rng.standard_normal((SIZE, SIZE, 3)) for _ in range(SLICES)]
    return np.stack([base + step for step in steps]).astype(np.float32)


@pytest.fixture
def float_memory(monkeypatch):
    """Keep the oracle's memories in float32, as ours are; it stores them in bfloat16."""
    monkeypatch.setattr(torch, "bfloat16", torch.float32)


def session_of(video, objects):
    pixels = torch.tensor(np.ascontiguousarray(video.transpose(0, 3, 1, 2)))
    session = transformers.Sam2VideoInferenceSession(
        video=pixels, video_height=SIZE, video_width=SIZE, dtype=torch.float32
    )
    for k in range(objects):
        session.obj_id_to_idx(k)
    return session


def their_prompts(model, session, prompts, index):
    """Give the points of one slice to the oracle and run it."""
    for k, (points, labels) in prompts.items():
        inputs = {
            "point_coords": torch.tensor(points)[None, None],
            "point_labels": torch.tensor(labels)[None, None],
        }
        session.add_point_inputs(k, index, inputs)
    session.obj_with_new_inputs = list(prompts)
    return model(session, frame_idx=index)


def our_prompts(prompts, objects):
    points = np.zeros((1, objects, 2, 2), np.float32)
    labels = np.full((1, objects, 2), -1, np.int32)
    for k, (xy, kind) in prompts.items():
        points[0, k, : len(kind)], labels[0, k, : len(kind)] = xy, kind
    return Prompts(jnp.asarray(points), jnp.asarray(labels))


def begin(pair, video, given, start):
    """Prompt one slice on both sides."""
    model, ours, params = pair
    session = session_of(video, len(given))
    first = their_prompts(model, session, given, start)
    state = tracking.nothing_prompted(ours, (GRID, GRID), len(given), 1)
    encode = jax.jit(lambda p, x: ours.apply({"params": p}, x, method="encode_image"))
    prompt = jax.jit(functools.partial(tracking.prompt_slice, ours))
    features = encode(params, video[start][None])
    prompts = our_prompts(given, len(given))
    return session, first, *prompt(params, state, features, jnp.int32(start), prompts)


def pixels_that_differ(prediction, session, start):
    """The oracle's logits, over their root mean square, where only one side sees the object.

    A prompted slice is remembered as a mask of zeros and ones.
    """
    found = []
    for k, logits in enumerate(np.moveaxis(np.asarray(prediction.logits_BKHW), 1, 0)):
        theirs = session.output_dict_per_obj[k]["cond_frame_outputs"][start]["pred_masks"]
        ours, theirs = (enlarged(x) for x in (torch.tensor(logits)[:, None], theirs))
        found.extend(theirs[(ours > 0) != (theirs > 0)] / theirs.square().mean().sqrt())
    return np.array(found, np.float32)


def enlarged(masks):
    return torch.nn.functional.interpolate(masks, size=(SIZE, SIZE), mode="bilinear")


@pytest.mark.parametrize(
    ("prompts", "start"),
    [([CLICK], 0), ([CLICK, BOX], 3)],
    ids=["a click, forwards", "two objects, both ways"],
)
@torch.inference_mode()
def test_tracking(pair, float_memory, prompts, start):
    model, ours, params = pair
    given = dict(enumerate(prompts))
    # A pixel whose logit is rounding alone is remembered by one side and not by the other.
    for seed in range(1, 5):
        video = random_video(seed)
        session, first, state, prediction = begin(pair, video, given, start)
        differing = pixels_that_differ(prediction, session, start)
        assert np.all(np.abs(differing) <= 1e-5)
        if differing.size == 0:
            break
    assert differing.size == 0
    theirs = {start: first}
    for output in model.propagate_in_video_iterator(session, start_frame_idx=start):
        theirs[output.frame_idx] = output
    for output in model.propagate_in_video_iterator(session, start_frame_idx=start, reverse=True):
        theirs[output.frame_idx] = output
    for k in given:
        stored = session.output_dict_per_obj[k]["cond_frame_outputs"][start]
        close(prediction.logits_BKHW[:, k], stored["pred_masks"][:, 0])
        close(prediction.pointer_BKD[:, k], stored["object_pointer"].reshape(1, -1))
        close(state.bank.memory_BKLPM[0, k, 0], stored["maskmem_features"][:, 0])
    propagate = jax.jit(functools.partial(tracking.propagate, ours))
    track = propagate(params, state, video, jnp.int32(start), jnp.int32(SLICES))
    scores = np.stack([theirs[t].object_score_logits.numpy().reshape(-1) for t in range(SLICES)])
    error = relative_error(track.score_SK, scores)
    print(f"object scores: relative error {error:.2e}")
    assert error <= 1e-4
    assert (scores > 0).mean() > 0.5, "most masks should be there to be compared"
    for t in range(SLICES):
        masks = theirs[t].pred_masks[:, 0].numpy()
        error = relative_error(track.logits_SKHW[t], masks)
        print(f"slice {t}: relative error {error:.2e}")
        assert error <= 1e-4, f"slice {t}: {error:.2e}"
