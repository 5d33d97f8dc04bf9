"""Clicks, propagation and corrections, against dictionaries that keep everything."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sss_jax import sam2
from sss_jax.errors import ConfigError, DataError
from sss_jax.models import interaction, position
from sss_jax.models.image_encoder import normalise_image
from sss_jax.models.masks import SUPPRESSED
from sss_jax.models.memory_attention import MemoryKeys
from sss_jax.models.sam2 import Sam2
from sss_jax.sam2_network import encode
from tests.models.test_memory import Dictionaries, call
from tests.small_networks import TRACKING_CONFIG, params_that_find

MODEL = Sam2(TRACKING_CONFIG)
SIZE = TRACKING_CONFIG.image_size
GRID = SIZE // TRACKING_CONFIG.strides[2]
SLICES = 8


@pytest.fixture(scope="module")
def network():
    return sam2.Network(MODEL, params_that_find(MODEL, 3))


@pytest.fixture(scope="module")
def volume():
    """Slices of the network's own size, so that nothing is resized on the way in."""
    return np.random.default_rng(1).random((SLICES, SIZE, SIZE)).astype(np.float32)


@jax.jit
def attend(params, coarse, value, key, valid):
    keys = MemoryKeys(value, key, valid, SLICES * GRID**2)
    method = lambda model: model.memory_attention(coarse, keys)  # noqa: E731
    return MODEL.apply({"params": params}, method=method)


def attend_to_lists(params, coarse, memories, pointers):
    """Condition features on lists of (memory, row) and (pointer, distance), in one program."""
    c = TRACKING_CONFIG
    tokens, pieces = GRID**2, c.width // c.memory_width
    place = position.sine_position(GRID, GRID, c.memory_width)
    rows = params["maskmem_tpos_enc"][:, 0, 0]
    value = np.zeros((SLICES * (tokens + pieces), c.memory_width), np.float32)
    key, valid = value.copy(), np.zeros(len(value), bool)
    for i, (memory, row) in enumerate(memories):
        here = slice(i * tokens, (i + 1) * tokens)
        value[here], key[here], valid[here] = memory, memory + place + rows[row][None], True
    project = params["obj_ptr_tpos_proj"]
    for i, (pointer, distance) in enumerate(pointers):
        wave = position.sine_of_distance(np.float32(distance), c.width)
        time = np.asarray(wave @ project["kernel"] + project["bias"])
        here = slice(SLICES * tokens + i * pieces, SLICES * tokens + (i + 1) * pieces)
        value[here] = np.asarray(pointer).reshape(pieces, -1)
        key[here], valid[here] = value[here] + time[None], True
    return attend(params, coarse, *(x[None, None] for x in (value, key, valid)))


class SlowObject:
    """One object, slice by slice, by the network's methods alone."""

    def __init__(self, params, volume):
        rgb = normalise_image(jnp.asarray(np.repeat(volume[..., None], 3, -1)))
        self.params, self.features = params, [call(params, "encode_image", x[None]) for x in rgb]
        self.known, self.memory, self.found = Dictionaries(), {}, {}
        self.points, self.pending, self.visited = {}, {}, {}

    def predict(self, t, points, sign, previous=None):
        """Sign None: without memory."""
        features, conditioned = self.features[t], sign is not None
        if conditioned:
            near = [(self.memory[s], row) for s, row in self.known.memories(t, sign)]
            far = [
                (self.found[s].pointer_BKD[0, 0], share)
                for s, share in self.known.pointers(t, sign, SLICES)
            ]
            coarse = attend_to_lists(self.params, features[2], near, far)
            features = (*features[:2], coarse)
        xy = np.array([p[:2] for p in points] or [(0, 0)], np.float32)
        labels = np.array([p[2] for p in points] or [-1], np.int32)
        masks = () if previous is None else (jnp.clip(previous, -32, 32),)
        return call(
            self.params,
            "predict",
            features,
            xy[None, None],
            labels[None, None],
            *masks,
            multimask=len(points) <= 1,
            memory_conditioned=conditioned,
        )

    def latest(self, t):
        return self.pending.get(t) or self.found.get(t)

    def click(self, t, *points):
        """Points (x, y, label)."""
        self.points[t] = self.points.get(t, ()) + points
        before = self.latest(t)
        previous = None if before is None else before.logits_BKHW
        self.pending[t] = self.predict(t, self.points[t], self.visited.get(t), previous)

    def remember(self, t, found, *, binary):
        args = self.features[t][2], found.logits_BKHW, found.object_score_BK
        self.memory[t] = call(self.params, "encode_memory", *args, binary=binary)[0, 0]
        self.found[t] = found

    def go(self, start):
        for t, found in self.pending.items():
            self.remember(t, found, binary=True)
            self.known.prompted[t] = True
            self.known.tracked.pop(t, None)
        self.pending = {}
        there, back = range(start, SLICES), range(start, -1, -1) if start else ()
        for t, sign in [(t, 1) for t in there] + [(t, -1) for t in back]:
            self.visited[t] = sign
            if t not in self.known.prompted:
                self.remember(t, self.predict(t, (), sign), binary=False)
                self.known.tracked[t] = True


def click(predictor, name, t, *points):
    return predictor.add(name, t, points=[p[:2] for p in points], labels=[p[2] for p in points])


def agree(predictor, slow):
    """Every slice that either knows, at the resolution of the decoder."""
    for name, one in slow.items():
        for t in range(SLICES):
            ours, theirs = predictor.threads[name].finding(t), one.latest(t)
            assert (ours is None) == (theirs is None), (name, t)
            if ours is not None:
                for a, b in zip(ours.prediction, theirs, strict=True):
                    scale = max(float(jnp.abs(b).max()), 1e-3)
                    np.testing.assert_allclose(a, b, atol=5e-4 * scale, err_msg=f"{name} {t}")


def test_a_session_is_the_loop_that_keeps_everything(network, volume):
    """Two objects on different slices, refined; then corrections on both sides."""
    predictor = sam2.VolumePredictor(network, volume)
    slow = {name: SlowObject(network.params, volume) for name in (4, 2)}

    def both(name, t, *points):
        shown = click(predictor, name, t, *points)
        slow[name].click(t, *points)
        assert shown.logits.shape == volume.shape[1:]
        np.testing.assert_array_equal(shown.mask, shown.logits > 0)

    def go(start):
        found = predictor.propagate()
        for one in slow.values():
            one.go(start)
        agree(predictor, slow)
        return found

    both(4, 3, (9, 12, 1))
    both(4, 3, (20, 22, 0))
    both(2, 5, (7, 25, 1), (12, 20, 1))
    agree(predictor, slow)
    first = go(3)
    assert first.objects == (4, 2)
    assert first.logits.shape == (SLICES, 2, SIZE, SIZE)
    both(4, 7, (15, 15, 1))  # tracked forwards
    both(4, 7, (25, 5, 0))
    both(2, 1, (10, 10, 1))  # tracked backwards
    both(4, 3, (5, 6, 1))  # prompted before
    agree(predictor, slow)
    second = go(1)
    assert np.abs(first.logits - second.logits).max() > 0.1
    assert sorted(predictor.threads[4].prompted) == [3, 7]


def prompts(mask):
    return {
        1: [sam2.Prompt(slice=3, box=(6, 5, 30, 20)), sam2.Prompt(slice=6, points=[(9, 9)])],
        2: [sam2.Prompt(slice=1, points=[(9, 9), (30, 12)], labels=[1, 0])],
        7: [sam2.Prompt(slice=5, mask=mask), sam2.Prompt(slice=1, points=[(20, 9)])],
    }


@pytest.mark.slow
@pytest.mark.parametrize("rules", [{}, {"clean_area": 3, "overlap": False}], ids=["plain", "rules"])
def test_one_round_is_predict_volume(network, rules):
    """The other implementation: one scan over all objects at once, in another file."""
    volume = np.random.default_rng(1).random((7, 40, 48)).astype(np.float32)
    mask = np.zeros((40, 48), bool)
    mask[10:30, 10:30] = True
    predictor = sam2.VolumePredictor(network, volume, **rules)
    for name, group in prompts(mask).items():
        for p in group:
            predictor.add(name, p.slice, points=p.points, labels=p.labels, box=p.box, mask=p.mask)
    found = predictor.propagate()
    expected = sam2.predict_volume(network, volume, prompts(mask), **rules)
    assert found.objects == expected.objects
    scale = np.abs(np.clip(expected.logits, -40, 40)).max().astype(np.float32)
    np.testing.assert_allclose(
        found.logits.astype(np.float32), expected.logits.astype(np.float32), atol=2e-3 * scale
    )
    np.testing.assert_allclose(found.object_score, expected.object_score, atol=2e-3)
    if rules:
        assert ((found.logits > 0).sum(axis=1) <= 1).all()
        rival = np.sort(found.logits, axis=1)[:, :-1]
        assert (rival <= SUPPRESSED).all()


def compilations():
    functions = (interaction._segment, interaction._adopt, interaction._encode_memory)
    return [f.compiled()._cache_size() for f in functions]


def test_nothing_is_compiled_twice(network, volume):
    """Slices, clicks up to a power of four, corrections, objects and lengths share programs."""
    mask = np.ones(volume.shape[1:], bool)

    def session(volume, shift):
        predictor = sam2.VolumePredictor(network, volume)
        click(predictor, 1, 2 + shift, (9, 12, 1))
        click(predictor, 1, 2 + shift, (3, 4, 0), (5, 6, 0))
        predictor.propagate()
        for name, t in ((1, 4), (1, 5 + shift), (2, shift), (3, 5)):
            click(predictor, name, t, *[(3, 3, 1)] * (1 + shift))
        predictor.add(1, 3, mask=mask)
        predictor.propagate()
        click(predictor, 1, 0, (9, 9, 0))
        predictor.propagate()

    session(volume, 0)
    before = compilations()
    events = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, *_, **__: events.append(name) if "backend_compile" in name else None
    )
    try:
        session(volume, 1)
        session(volume[:6], 0)
    finally:
        jax.monitoring.clear_event_listeners()
    assert compilations() == before
    assert events == []
    predictor = sam2.VolumePredictor(network, volume)
    predictor.add(1, 0, points=[(3, 3)] * 5)  # the next power
    assert compilations() == [before[0] + 1, *before[1:]]


def test_the_mask_before_is_bounded(network, volume):
    """Its logits enter at 32 at most, on either side."""
    shown = []
    for bound in (32.0, 500.0):
        predictor = sam2.VolumePredictor(network, volume)
        click(predictor, 1, 4, (9, 12, 1))
        finding = predictor.threads[1].fresh[4]
        logits = bound * jnp.sign(finding.prediction.logits_BKHW)
        finding = finding._replace(prediction=finding.prediction._replace(logits_BKHW=logits))
        predictor.threads = {1: predictor.threads[1]._replace(fresh={4: finding})}
        shown.append(click(predictor, 1, 4, (20, 20, 0)).logits)
    np.testing.assert_array_equal(*shown)


def test_states_are_values(network, volume):
    """Keep one, go on, and go back to it."""
    predictor = sam2.VolumePredictor(network, volume)
    click(predictor, 1, 4, (9, 12, 1))
    before, first = predictor.propagate(), predictor.threads
    click(predictor, 1, 6, (9, 12, 0))
    click(predictor, 2, 1, (20, 12, 1))
    after = predictor.propagate()
    assert after.objects == (1, 2)
    predictor.threads = first
    np.testing.assert_array_equal(predictor.result().logits, before.logits)
    # A correction that is taken back before the objects are followed leaves nothing behind.
    click(predictor, 1, 6, (9, 12, 0))
    predictor.remove(1, 6)
    np.testing.assert_array_equal(predictor.result().logits, before.logits)
    np.testing.assert_array_equal(predictor.propagate().logits.shape, before.logits.shape)


def test_prompts_and_objects_are_removed(network, volume):
    predictor = sam2.VolumePredictor(network, volume)
    click(predictor, 1, 4, (9, 12, 1))
    click(predictor, 2, 2, (9, 12, 1))
    predictor.propagate()
    click(predictor, 1, 6, (5, 5, 0))
    predictor.propagate()
    shown = predictor.result().logits[6, 0]
    predictor.remove(1, 6)
    thread = predictor.threads[1]
    assert sorted(thread.prompted) == [4]
    assert 6 in thread.tracked
    assert 6 not in thread.backwards
    np.testing.assert_array_equal(predictor.result().logits[6, 0], shown)
    predictor.propagate()
    assert np.abs(predictor.result().logits[6, 0] - shown).max() > 0
    predictor.remove(1, 4)
    with pytest.raises(DataError, match="object 1 has no prompt"):
        predictor.propagate()
    predictor.remove(1)
    assert predictor.propagate().objects == (2,)
    predictor.reset()
    assert predictor.objects == ()
    with pytest.raises(DataError, match="no object"):
        predictor.propagate()


def test_boxes_and_masks_replace_clicks(network, volume):
    predictor = sam2.VolumePredictor(network, volume)
    click(predictor, 1, 4, (9, 12, 1))
    predictor.add(1, 4, box=(3, 4, 20, 22), points=[(9, 9)])
    assert predictor.threads[1].points[4][1].tolist() == [2, 3, 1]
    mask = np.zeros(volume.shape[1:], bool)
    mask[8:24, 8:24] = True
    shown = predictor.add(1, 4, mask=mask)
    np.testing.assert_array_equal(shown.mask[10:22, 10:22], True)
    assert 4 not in predictor.threads[1].points
    click(predictor, 1, 4, (9, 9, 0))
    assert predictor.threads[1].points[4][1].tolist() == [0]


@pytest.mark.parametrize("keep_slices", [0, 2, 100])
def test_a_bound_on_memory_costs_time_only(network, volume, monkeypatch, keep_slices):
    encoded = []
    monkeypatch.setattr(
        "sss_jax.sam2_interactive.encode", lambda *args: encoded.append(1) or encode(*args)
    )
    one = sum(level.nbytes for level in sam2.encode_image(network, volume[0]))
    predictor = sam2.VolumePredictor(network, volume, keep_bytes=keep_slices * one)
    click(predictor, 1, 4, (9, 12, 1))
    click(predictor, 1, 4, (12, 12, 1))
    assert len(encoded) == 1, "the slice at hand is always kept"
    predictor.propagate()
    found = predictor.propagate()
    assert len(predictor._kept) == min(keep_slices, SLICES)
    assert (len(encoded) == SLICES) == (keep_slices >= SLICES)
    free = sam2.VolumePredictor(network, volume)
    click(free, 1, 4, (9, 12, 1))
    click(free, 1, 4, (12, 12, 1))
    free.propagate()
    np.testing.assert_array_equal(found.logits, free.propagate().logits)


def test_progress_is_reported(network, volume):
    predictor = sam2.VolumePredictor(network, volume)
    click(predictor, 1, 4, (9, 12, 1))
    steps = []
    predictor.propagate(lambda done, total: steps.append((done, total)))
    assert steps == [(i + 1, SLICES + 1) for i in range(SLICES + 1)]


def test_the_example_of_the_manual_runs(network, monkeypatch):
    text = (Path(__file__).parents[1] / "docs" / "how-to" / "interactive.md").read_text()
    program = "\n".join(line[4:] for line in text.splitlines() if line.startswith("    "))
    monkeypatch.setattr(sam2, "load", lambda *_, **__: network)
    seen = {"volume": np.random.default_rng(2).random((21, 90, 100)).astype(np.float32)}
    exec(program, seen)
    assert seen["found"].mask.shape == (90, 100)
    assert seen["labels"].shape == (21, 90, 100)
    assert sorted(seen["predictor"].threads[1].prompted) == [12, 20]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": 1, "slice": SLICES, "points": [(1, 1)]}, r"outside 0\.\.7"),
        ({"name": 1, "slice": -1, "points": [(1, 1)]}, "outside"),
        ({"name": 0, "slice": 1, "points": [(1, 1)]}, "named by its label"),
        ({"name": "liver", "slice": 1, "points": [(1, 1)]}, "named by its label"),
        ({"name": 1, "slice": 1}, "needs a box"),
        ({"name": 1, "slice": 1, "points": [(1, 1)], "labels": [1, 0]}, "1 points have 2"),
        ({"name": 1, "slice": 1, "points": [(1, 1)], "labels": [2]}, "a label is 1"),
        ({"name": 1, "slice": 1, "points": [(1, float("nan"))]}, "finite"),
        ({"name": 1, "slice": 1, "mask": np.ones((3, 3), bool)}, "the mask has the shape"),
    ],
)
def test_bad_prompts_change_nothing(network, volume, arguments, message):
    predictor = sam2.VolumePredictor(network, volume)
    with pytest.raises(DataError, match=message):
        predictor.add(**arguments)
    assert predictor.threads == {}


def test_bad_removals_and_bad_volumes_are_refused(network, volume):
    predictor = sam2.VolumePredictor(network, volume)
    with pytest.raises(DataError, match="no object 3"):
        predictor.remove(3)
    click(predictor, 1, 4, (9, 12, 1))
    with pytest.raises(DataError, match=r"no prompt on slice 2; it has on \[4\]"):
        predictor.remove(1, 2)
    with pytest.raises(DataError, match="three axes"):
        sam2.VolumePredictor(network, volume[0])
    with pytest.raises(DataError, match="integers 0"):
        sam2.VolumePredictor(network, 3 * volume).add(1, 0, points=[(1, 1)])
    for area in (-1, (SIZE // 4) ** 2):
        with pytest.raises(ConfigError, match="clean_area"):
            sam2.VolumePredictor(network, volume, clean_area=area)
        with pytest.raises(ConfigError, match="clean_area"):
            sam2.predict_volume(network, volume, prompts(np.ones((SIZE, SIZE))), clean_area=area)
    with pytest.raises(ConfigError, match="keep_bytes"):
        sam2.VolumePredictor(network, volume, keep_bytes=-1)
