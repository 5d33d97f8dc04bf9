"""The steps ours are timed against do the same work and, without chance, find the same loss."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

REASON = "the other side needs torch and transformers"
torch = pytest.importorskip("torch", reason=REASON)
pytest.importorskip("transformers", reason=REASON)

from sss_jax.benchmarks import (  # noqa: E402
    peer_step,
    torch_network,
    torch_prompts,
    torch_step,
    torch_views,
)
from sss_jax.benchmarks.batches import synthetic_batch  # noqa: E402
from sss_jax.models.presets import preset  # noqa: E402
from sss_jax.models.sss import SSSModel  # noqa: E402
from sss_jax.options import (  # noqa: E402
    DataOptions,
    MemoryOptions,
    ModelOptions,
    OptimizerOptions,
    Options,
    PCSWOptions,
    SemiOptions,
    StrongOptions,
    TrainOptions,
    WeakOptions,
)
from sss_jax.ssl import dfe  # noqa: E402
from sss_jax.ssl.network import Network  # noqa: E402
from sss_jax.ssl.pcsw import volume_prompts  # noqa: E402
from sss_jax.ssl.weak_to_strong import sss_loss  # noqa: E402
from sss_jax.train.state import init_all_params  # noqa: E402

SIZE, CLIPS, CLASSES = 64, 2, 2
SMALL = {"embed_dim": 16, "depths": (1, 1, 2, 1), "global_blocks": (3,)}
CONFIG = dataclasses.replace(preset("tiny", SIZE, memory=False), **SMALL)
STEPS = pytest.mark.parametrize("semi", [False, True], ids=peer_step.STEPS)


def options_of(semi, slices=1, chance=True):
    """Settings of a small step; without chance, augmentation changes nothing."""
    still = {"rot90_flip": 0.0, "rotate": 0.0, "scale_low": 1.0, "scale_high": 1.0}
    weak = WeakOptions() if chance else WeakOptions(**still)
    strong = StrongOptions() if chance else StrongOptions(jitter=0.0, blur=0.0, cutmix=0.0)
    spread = {} if chance else {"dropout": False, "box_jitter": 0.0}
    rates = {"rate": 1e-3, "encoder_rate": 1e-3}
    return Options(
        model=ModelOptions("tiny", SIZE, CLASSES),
        data=DataOptions(clip_slices=slices),
        weak=weak,
        strong=strong,
        memory=MemoryOptions(kind="none"),
        dfe=peer_step.paper_dfe(semi),
        semi=SemiOptions(
            enabled=semi,
            confidence=0.6,
            labelled_prompts="gt_box",
            unlabelled_dice=True,
            **spread,
        ),
        optimizer=OptimizerOptions(**rates),
        train=TrainOptions(labelled_batch=CLIPS, unlabelled_batch=CLIPS),
    )


def network(options):
    """Our network and parameters of which every kind does something."""
    model = SSSModel(CONFIG, CLASSES, 0.5)
    params = jax.device_get(init_all_params(model, options, jax.random.key(0)))
    last = params["net"]["coarse_head"]["classify"]
    last["kernel"] = last["kernel"] * np.float32(peer_step.DECIDED)
    return model, params


def whole_batch(options):
    """Clips in which every class is on every slice: a class without a prompt is decoded otherwise.

    There transformers has no mask for points that are not there.
    """
    batch = synthetic_batch(options)
    label = batch["labelled"]["label"]
    label[..., 4:20, 8:30], label[..., 30:50, 20:60] = 1, 2
    return batch


def our_loss(model, options):
    def loss(params, batch):
        key, step = jax.random.key(0), jnp.int32(0)
        return sss_loss(params, params["net"], batch, key, step, model=model, options=options)

    return loss


@STEPS
def test_without_chance_both_sides_find_the_same_loss(semi):
    options = options_of(semi, chance=False)
    model, params = network(options)
    batch = whole_batch(options)
    expected, aux = jax.jit(our_loss(model, options))(params, batch)
    if semi:
        assert aux["prompts_valid"] == 1
        assert 0.1 < aux["coverage"] < 1
    trainer = torch_step.TorchStep(CONFIG, options, params)
    found = trainer.loss(torch_step.as_tensors(batch, "cpu"))
    assert found.item() == pytest.approx(float(expected), rel=1e-4)


@STEPS
def test_a_step_is_finite_and_moves_the_parameters(semi):
    options = options_of(semi, slices=2)
    _, params = network(options)
    trainer = torch_step.TorchStep(CONFIG, options, params)
    before = [p.detach().clone() for p in trainer.parameters()]
    loss = trainer.step(torch_step.as_tensors(synthetic_batch(options), "cpu"))
    assert torch.isfinite(loss)
    moved = [not torch.equal(a, b) for a, b in zip(before, trainer.parameters(), strict=True)]
    assert np.mean(moved) > 0.9
    if semi:
        # The first step copies the student.
        pairs = zip(trainer.teacher.parameters(), trainer.student.parameters(), strict=True)
        assert all(torch.equal(old, new) for old, new in pairs)


@STEPS
def test_both_sides_encode_and_decode_the_same_images(semi, monkeypatch):
    options = options_of(semi, slices=2)
    model, params = network(options)
    batch = synthetic_batch(options)
    ours = {"images_encoded": 0, "masks_decoded": 0}
    encode, segment = Network.encode, Network.segment

    def counted_encode(self, image):
        ours["images_encoded"] += len(image)
        return encode(self, image)

    def counted_segment(self, features, *prompts):
        ours["masks_decoded"] += len(features[0]) * CLASSES
        return segment(self, features, *prompts)

    monkeypatch.setattr(Network, "encode", counted_encode)
    monkeypatch.setattr(Network, "segment", counted_segment)
    jax.eval_shape(our_loss(model, options), params, batch)
    trainer = torch_step.TorchStep(CONFIG, options, params)
    work = peer_step.count_theirs(trainer, torch_step.as_tensors(batch, "cpu"))
    assert {name: work[name] for name in ours} == ours
    images = CLIPS * 2 * (4 if semi else 1)
    assert ours == {"images_encoded": images, "masks_decoded": images * CLASSES}


def test_dfe_is_ours():
    options, width = peer_step.paper_dfe(True), 32
    params = jax.device_get(dfe.init_dfe(jax.random.key(0), width, options))
    module = torch_network.DFE(width)
    torch_network.load_dfe(module, params)
    draw = np.random.default_rng(0).standard_normal
    weak, strong = (
        [draw((3, side, side, width)).astype(np.float32) for side in (8, 4, 2)] for _ in range(2)
    )
    enhance = jax.jit(lambda *views: dfe.enhance(params, *views, options).strong)
    expected = enhance(tuple(weak), tuple(strong))
    sides = ([torch.tensor(x).permute(0, 3, 1, 2) for x in view] for view in (weak, strong))
    found = module(*sides)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a.detach().permute(0, 2, 3, 1), b, atol=1e-4)


@pytest.mark.parametrize("slices", [1, 2, 5, 8])
def test_prompts_are_ours(slices):
    rng = np.random.default_rng(slices)
    # From nearly empty to nearly full, so that windows are accepted, refused and empty.
    share = rng.choice([0.0, 0.02, 0.3, 0.6, 0.9], size=(6, 1, 3, 1, 1))
    masks = rng.random((6, slices, 3, 12, 12)) < share
    found = torch_prompts.search(torch.tensor(masks), 4)
    prob = jnp.asarray(np.moveaxis(masks, 2, -1), jnp.float32)
    every = jnp.ones((6, slices), bool)
    expected = jax.jit(lambda p, m: volume_prompts(p, m, 4, PCSWOptions())[0])(prob, every)
    np.testing.assert_array_equal(found.labels_NKQ, expected.images().labels_BKQ)
    np.testing.assert_allclose(found.points_NKQ2, expected.images().points_BKQ2, atol=1e-4)


def test_views_stay_in_range_and_pasting_swaps_the_box():
    generator = torch.Generator().manual_seed(0)
    image = torch.rand((3, 2, 32, 32), generator=generator)
    label = (image > 0.5).long()
    moved, moved_label, inside = torch_views.weak_view(image, label, WeakOptions(), generator)
    assert moved.shape == inside.shape == moved_label.shape == image.shape
    assert not moved[~inside].any()
    view, box = torch_views.strong_view(moved, StrongOptions(cutmix=1.0), generator)
    assert 0 <= view.min() <= view.max() <= 1
    assert ((box >= 0) & (box <= 1)).all()
    half = torch.tensor([[0.0, 0.0, 1.0, 0.5]]).expand(3, 4)
    pasted = torch_views.paste(image, half)
    assert torch.equal(pasted[..., :16], image[[1, 0, 2]][..., :16])
    assert torch.equal(pasted[..., 16:], image[..., 16:])


def row_of(monkeypatch, options, change):
    """A row of `change`d torch steps against a step of ours that does nothing."""
    monkeypatch.setattr(peer_step.race, "PAUSE", 0)
    _, params = network(options)

    def build(attention):
        made = peer_step.their_step(
            CONFIG, options, params, synthetic_batch(options), "cpu", attention
        )
        change(made[0])
        return made

    class Ours:
        temporary_bytes = 1

        def __call__(self):
            pass

    arguments = ["--repeats", "1", "-o", "unused"]
    return peer_step._row(Ours(), build, "sdpa", peer_step._parser().parse_args(arguments))


def test_a_row_holds_both_times(monkeypatch):
    row = row_of(monkeypatch, options_of(False), lambda trainer: None)
    assert row["torch_s"]["median"] > 0
    assert {"ours_s", "speedup", "speedup_cpu", "torch_first_call_s"} <= row.keys()
    assert row["ours_faults"] >= 0 <= row["torch_faults"]


def test_a_variant_that_fails_leaves_its_error(monkeypatch):
    def breaks(trainer):
        trainer.step = lambda batch: 1 / 0

    row = row_of(monkeypatch, options_of(False), breaks)
    assert row == {"failure": "ZeroDivisionError: division by zero"}
