"""Every output against Meta's own code; `meta.py` says how to install it."""

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("sam2", reason="Meta's code is not installed; tests/parity/meta.py says how")

from sss_jax.conversion import sam2  # noqa: E402
from sss_jax.models.presets import preset  # noqa: E402
from tests.parity import meta, parts, tracks  # noqa: E402
from tests.parity.compare import worst  # noqa: E402
from tests.parity.pair import pair  # noqa: E402
from tests.parity.weights import official_weights  # noqa: E402

TOLERANCE = 1e-4

SLOW = [
    pytest.param((name, version), marks=pytest.mark.slow, id=f"{name} {version}")
    for name in ("tiny", "small", "base_plus", "large")
    for version in ("2.0", "2.1")
    if (name, version) != ("tiny", "2.1")
]


@pytest.fixture(scope="module", params=[pytest.param(("tiny", "2.1"), id="tiny 2.1"), *SLOW])
def both(request):
    return pair(*request.param)


@pytest.mark.parametrize("outputs", [parts.outputs, tracks.outputs], ids=["image", "video"])
def test_outputs(both, outputs):
    errors = worst(outputs(both))
    for name, (most, mean) in errors.items():
        print(f"{name}: largest error {most:.1e}, root mean square {mean:.1e}")
    assert len(errors) >= 18
    assert [name for name, (most, _) in errors.items() if not most <= TOLERANCE] == []


def image_outputs(model, size):
    """Everything that Meta's network says about an image and a box, as one flat tensor."""
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(1, 3, size, size, generator=generator)
    point_inputs = {
        "point_coords": torch.tensor([[[30.0, 40.0], [90.0, 100.0]]]),
        "point_labels": torch.tensor([[2, 3]], dtype=torch.int32),
    }
    with torch.no_grad():
        found = model._prepare_backbone_features(model.forward_image(image))
        _, features, places, sizes = found
        first = model.track_step(
            0, True, features, places, sizes, point_inputs, None, {}, 2, run_mem_encoder=True
        )
        known = {"cond_frame_outputs": {0: first}, "non_cond_frame_outputs": {}}
        second = model.track_step(1, False, features, places, sizes, None, None, known, 2)
    outputs = [
        out[key]
        for out in (first, second)
        for key in ("pred_masks", "obj_ptr", "object_score_logits", "maskmem_features")
    ]
    return torch.cat([x.flatten() for x in (*features, *outputs)])


@pytest.mark.parametrize("version", ["2.0", "2.1"])
def test_a_checkpoint_that_went_round_trip_computes_the_same_bits(tmp_path, version):
    size = 128
    config = preset("tiny", size, version=version)
    weights = official_weights(config)
    source, back = tmp_path / "official.pt", tmp_path / "back.pt"
    torch.save({"model": {name: torch.from_numpy(a) for name, a in weights.items()}}, source)
    sam2.run(source, tmp_path / "ours")
    sam2.run(tmp_path / "ours", back, to_torch=True)
    outputs = []
    for path in (source, back):
        model = meta.predictor(config)
        state = torch.load(path, weights_only=True)["model"]
        model.load_state_dict(state, strict=True)
        outputs.append(image_outputs(model, size))
    assert torch.isfinite(outputs[0]).all()
    assert torch.equal(*outputs)
