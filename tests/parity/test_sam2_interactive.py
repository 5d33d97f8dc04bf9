"""Clicks, corrections and propagation again against Meta's predictor; `meta.py` installs it."""

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("sam2", reason="Meta's code is not installed; tests/parity/meta.py says how")

import numpy as np  # noqa: E402
from sam2.utils import misc  # noqa: E402
from scipy import ndimage  # noqa: E402

from sss_jax import sam2  # noqa: E402
from sss_jax.models.image_encoder import normalise_image  # noqa: E402
from sss_jax.models.masks import clean_masks, separate_objects  # noqa: E402
from tests.parity import meta  # noqa: E402
from tests.parity.compare import errors  # noqa: E402
from tests.parity.pair import pair  # noqa: E402

TOLERANCE = 1e-4
SLICES = 7

# Object, slice, clicks (x, y, label) as shares of the side; "go" follows the objects both ways.
SCRIPT = (
    (1, 2, (0.35, 0.47, 1)),
    (1, 2, (0.60, 0.30, 0)),
    (1, 2, (0.45, 0.70, 1)),
    (2, 4, (0.70, 0.55, 1), (0.20, 0.20, 0)),
    "go",
    (1, 5, (0.25, 0.40, 1)),  # tracked forwards
    (1, 5, (0.80, 0.80, 0)),
    (2, 0, (0.50, 0.50, 1)),  # tracked backwards
    (1, 2, (0.90, 0.10, 0)),  # prompted before
    "go",
    (2, 6, (0.40, 0.30, 1)),
    "go",
)


@pytest.fixture(scope="module", params=["2.1", pytest.param("2.0", marks=pytest.mark.slow)])
def both(request):
    return pair("tiny", request.param)


@pytest.fixture(scope="module")
def volume():
    rng = np.random.default_rng(5)
    base = rng.random((256, 256))
    return np.stack([(base + rng.random((256, 256))) / 2 for _ in range(SLICES)]).astype(np.float32)


class Theirs:
    """Meta's predictor, told to take corrected slices as prompted ones."""

    def __init__(self, model, volume):
        model.add_all_frames_to_correct_as_cond = True
        self.model = model
        rgb = np.repeat(volume[..., None], 3, axis=-1)
        self.state = meta.start(model, np.asarray(normalise_image(rgb)))

    def click(self, name, t, points):
        _, names, masks = self.model.add_new_points_or_box(
            self.state,
            t,
            name,
            points=points[:, :2],
            labels=points[:, 2].astype(np.int32),
            clear_old_points=False,
        )
        return masks[names.index(name), 0].numpy()

    def go(self):
        meta.propagate(self.model, self.state)
        meta.propagate(self.model, self.state, reverse=True)

    def kept(self, name, t):
        return meta.kept(self.state, self.state["obj_id_to_idx"][name], t)


def steps(script, both, volume):
    """Run a script on both sides; yield what to compare after every step."""
    ours = sam2.VolumePredictor(sam2.Network(both.ours, both.params), volume)
    theirs = Theirs(both.theirs, volume)
    scale = np.array([both.size, both.size, 1], np.float32)
    for step in script:
        if step == "go":
            ours.propagate()
            theirs.go()
        else:
            name, t, *points = step
            points = np.array(points, np.float32) * scale
            mask = theirs.click(name, t, points)
            shown = ours.add(name, t, points=points[:, :2], labels=points[:, 2].astype(int))
            yield f"click on {name}, slice {t}", shown.logits, mask
            continue
        for name in ours.objects:
            scores = [float(theirs.kept(name, t)["object_score_logits"]) for t in range(SLICES)]
            assert np.mean(np.array(scores) > 0) > 0.5, "most masks should be there"
            found = [ours.threads[name].finding(t).prediction for t in range(SLICES)]
            yield f"object {name}: score", [float(f.object_score_BK[0, 0]) for f in found], scores
            for t in range(SLICES):
                found, kept = ours.threads[name].finding(t), theirs.kept(name, t)
                where = f"object {name}, slice {t}"
                yield f"{where}: mask", found.prediction.logits_BKHW, kept["pred_masks"]
                yield f"{where}: pointer", found.prediction.pointer_BKD[0], kept["obj_ptr"]
                memory = kept["maskmem_features"][0].flatten(1).T
                yield f"{where}: memory", found.memory_BKPM[0, 0], memory


@torch.inference_mode()
def test_clicks_corrections_and_propagation_again(both, volume):
    worst = {}
    with meta.float32_memory():
        for name, ours, theirs in steps(SCRIPT, both, volume):
            most, _ = errors(ours, theirs)
            kind = name.split(": ")[-1].split(" on ")[0]
            worst[kind] = max(worst.get(kind, (0.0, "")), (most, name))
    for kind, (most, name) in worst.items():
        print(f"{kind}: largest error {most:.1e} ({name})")
    assert {kind: found for kind, found in worst.items() if not found[0] <= TOLERANCE} == {}


def components(mask):
    """Labels and areas as Meta's CUDA kernel gives them."""
    labels, areas = np.zeros(mask.shape, np.int32), np.zeros(mask.shape, np.int32)
    for index in np.ndindex(mask.shape[:2]):
        labels[index], _ = ndimage.label(mask[index], np.ones((3, 3)))
        areas[index] = np.bincount(labels[index].ravel())[labels[index]] * (labels[index] > 0)
    return torch.from_numpy(labels), torch.from_numpy(areas)


@pytest.mark.parametrize("area", [1, 8])
def test_holes_are_metas(monkeypatch, area):
    """Its function, with scipy's components in the place of the CUDA kernel; islands are ours."""
    monkeypatch.setattr(misc, "get_connected_components", lambda mask: components(mask.numpy()))
    noise = np.random.default_rng(2).standard_normal((2, 1, 24, 31)).astype(np.float32)
    noise = noise + np.array([0.8, -0.8], np.float32)[:, None, None, None]
    filled = misc.fill_holes_in_mask_scores(torch.from_numpy(noise), area)
    cleaned = -misc.fill_holes_in_mask_scores(-filled, area).numpy()
    ours = np.asarray(clean_masks(noise, area))
    np.testing.assert_array_equal(ours > 0, cleaned > 0)
    filled = filled.numpy()
    assert ((filled > 0) != (noise > 0)).any()
    untouched = (filled > 0) == (cleaned > 0)
    np.testing.assert_array_equal(ours[untouched], filled[untouched])


def test_objects_are_separated_as_metas(both):
    logits = 20 * np.random.default_rng(3).standard_normal((3, 1, 16, 16)).astype(np.float32)
    theirs = both.theirs._apply_non_overlapping_constraints(torch.from_numpy(logits))
    np.testing.assert_array_equal(separate_objects(logits[None, :, 0])[0], theirs[:, 0])
