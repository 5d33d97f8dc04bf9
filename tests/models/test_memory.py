"""Memory attention, memory bank and tracking, against slow and plain versions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sss_jax.models import memory_bank, position, tracking
from sss_jax.models.memory_attention import (
    MemoryKeys,
    RotaryAttention,
)
from sss_jax.models.memory_bank import MemoryBank, reach
from sss_jax.models.prompt_encoder import Prompts
from sss_jax.models.sam2 import NO_OBJECT, Sam2
from tests.models.test_attention import plain_attention
from tests.small_networks import TRACKING_CONFIG as CONFIG
from tests.small_networks import random_params

MODEL = Sam2(CONFIG)
SIDE, GRID, SLICES, OBJECTS = 32, 2, 9, 2


@pytest.fixture(scope="module")
def params():
    return random_params(MODEL, 3)


@pytest.fixture(scope="module")
def volume():
    return np.random.default_rng(4).standard_normal((SLICES, SIDE, SIDE, 3)).astype(np.float32)


# Positions.


def test_sine_position_is_the_formula():
    height, width, channels = 3, 5, 8
    table = position.sine_position(height, width, channels).reshape(height, width, channels)
    for y in range(height):
        for x in range(width):
            for axis, (place, count) in enumerate(((y, height), (x, width))):
                for i in range(4):
                    angle = (place + 1) / (count + 1e-6) * 2 * np.pi / 10000 ** (2 * (i // 2) / 4)
                    wave = np.cos(angle) if i % 2 else np.sin(angle)
                    assert abs(table[y, x, 4 * axis + i] - wave) < 1e-6


def test_rotation_turns_neighbouring_channels_by_column_then_row():
    """Through `RotaryDense`, products of rotated vectors are those of complex numbers."""
    height, width, dim = 2, 3, 16
    rng = np.random.default_rng(0)
    q, k = rng.standard_normal((2, height * width, dim)).astype(np.float32)
    rotate = functools.partial(position.rotate, table=position.rotation(height, width, dim))

    def halves(x):
        return jnp.concatenate([x[:, ::2], x[:, 1::2]], axis=1)

    found = rotate(halves(q)) @ rotate(halves(k)).T
    angle = np.zeros((height * width, dim // 2))
    for p in range(height * width):
        for pair in range(dim // 2):
            place = p % width if pair < dim // 4 else p // width
            angle[p, pair] = place * 10000 ** (-4 * (pair % (dim // 4)) / dim)
    turn = np.exp(1j * angle)
    a, b = ((x[:, ::2] + 1j * x[:, 1::2]) * turn for x in (q, k))
    np.testing.assert_allclose(found, (a @ b.conj().T).real, rtol=1e-4, atol=1e-4)


# Attention.


def test_values_may_be_projected_after_the_sum(params):
    """The folded value projection against q, k and v projected first, with pointers at the end."""
    layer = params["memory_attention"]["layers_0"]["cross_attn_image"]
    rng = np.random.default_rng(2)
    q = rng.standard_normal((1, 1, 4, 16)).astype(np.float32)
    key, value = rng.standard_normal((2, 1, 2, 11, 8)).astype(np.float32)
    valid = np.ones((1, 2, 11), bool)
    valid[0, 1, 4:8] = False
    table = position.rotation(2, 2, 16)
    found = RotaryAttention(16, jnp.float32).apply(
        {"params": layer}, q, key, value, table, jnp.asarray(valid), 8
    )

    def project(x, name):
        return x @ layer[name]["kernel"] + layer[name]["bias"]

    def turned(x):
        halves = np.concatenate([x[..., ::2], x[..., 1::2]], axis=-1)
        return np.asarray(position.rotate(halves, table))

    queries = turned(project(q, "q_proj")) * 16**-0.5
    keys = project(key, "k_proj")
    tiled = [turned(keys[:, :, i : i + 4]) for i in (0, 4)]
    rest = keys[:, :, 8:]
    keys = np.concatenate(
        [*tiled, np.concatenate([rest[..., ::2], rest[..., 1::2]], axis=-1)], axis=2
    )
    expected = project(plain_attention(queries, keys, project(value, "v_proj"), valid), "out_proj")
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


# The bank, against dictionaries that never forget.


class Dictionaries:
    """What SAM 2 keeps: the outputs of all prompted and of all tracked slices."""

    def __init__(self):
        self.prompted, self.tracked = {}, {}

    def memories(self, t, sign):
        """Pairs (slice, row of the temporal table)."""
        found = [(s, CONFIG.num_maskmem - 1) for s in self.prompted]
        for age in range(1, CONFIG.num_maskmem):
            if t - sign * age in self.tracked:
                found.append((t - sign * age, age - 1))
        return sorted(found)

    def pointers(self, t, sign, num_slices):
        """Pairs (slice, distance as a share)."""
        most = min(num_slices, CONFIG.max_pointers)
        found = [(s, sign * (t - s)) for s in self.prompted if sign * (t - s) >= 0]
        for distance in range(1, most):
            if t - sign * distance in self.tracked:
                found.append((t - sign * distance, distance))
        return sorted((s, d / max(most - 1, 1)) for s, d in found)


jitted_reach = jax.jit(reach, static_argnums=1)
remember_prompted = jax.jit(memory_bank.remember_prompted, static_argnums=1)
remember_tracked = jax.jit(memory_bank.remember_tracked, static_argnums=1)


def reachable(bank, t, num_slices, sign):
    seen = jitted_reach(bank, CONFIG, jnp.int32(t), jnp.int32(num_slices), jnp.asarray(sign < 0))
    bank, seen = jax.device_get((bank, seen))
    columns = (
        (bank.memory_slice_BKL, seen.memory_age_BKL, seen.memory_valid_BKL),
        (bank.pointer_slice_BKR, seen.pointer_distance_BKR, seen.pointer_valid_BKR),
    )
    return [
        sorted((int(s), float(w)) for s, w, on in zip(*(c[0, 0] for c in rows), strict=True) if on)
        for rows in columns
    ]


@settings(max_examples=30, deadline=None)
@given(
    st.sets(st.integers(0, 11), min_size=1, max_size=3),
    st.integers(0, 11),
    st.sampled_from([1, -1]),
    st.integers(2, 12),
)
def test_bank_of_fixed_size_reaches_what_a_dictionary_reaches(prompted, start, sign, length):
    everything = Dictionaries()
    bank = memory_bank.empty_bank(CONFIG, 1, 1, 1, 3)
    new = memory_bank.Memory(jnp.ones((1, 1, 1, 8)), jnp.ones((1, 1, 16)))
    yes = jnp.ones((1, 1), bool)
    for s in sorted(prompted):
        everything.prompted[s] = True
        bank = remember_prompted(bank, CONFIG, new, jnp.int32(s), yes)
    num_slices = 12
    for t in range(start, start + sign * length, sign):
        if not 0 <= t < num_slices:
            break
        memories, pointers = reachable(bank, t, num_slices, sign)
        assert memories == everything.memories(t, sign)
        expected = everything.pointers(t, sign, num_slices)
        assert [s for s, _ in pointers] == [s for s, _ in expected]
        np.testing.assert_allclose([d for _, d in pointers], [d for _, d in expected], rtol=1e-6)
        if t not in prompted:
            everything.tracked[t] = True
            bank = remember_tracked(bank, CONFIG, new, jnp.int32(t), yes, yes)


def test_a_prompted_slice_is_overwritten_and_a_full_bank_drops_the_first():
    bank = memory_bank.empty_bank(CONFIG, 1, 1, 1, 2)
    yes = jnp.ones((1, 1), bool)

    def put(bank, index, value):
        new = memory_bank.Memory(jnp.full((1, 1, 1, 8), value), jnp.full((1, 1, 16), value))
        return remember_prompted(bank, CONFIG, new, jnp.int32(index), yes)

    bank = put(put(put(bank, 7, 1.0), 3, 2.0), 7, 3.0)
    assert bank.memory_slice_BKL[0, 0].tolist() == [7, 3, -1, -1]
    assert bank.memory_BKLPM[0, 0, :2, 0, 0].tolist() == [3.0, 2.0]
    bank = put(bank, 9, 4.0)
    assert bank.memory_slice_BKL[0, 0, :2].tolist() == [7, 9]
    assert bank.pointer_slice_BKR[0, 0, :2].tolist() == [7, 9]
    unchanged = remember_prompted(
        bank,
        CONFIG,
        memory_bank.Memory(jnp.zeros((1, 1, 1, 8)), jnp.zeros((1, 1, 16))),
        jnp.int32(1),
        ~yes,
    )
    jax.tree.map(np.testing.assert_array_equal, unchanged, bank)


# Tracking, against a loop that keeps every slice's output.


@functools.cache
def jitted(method, **static):
    return jax.jit(lambda p, *args: MODEL.apply({"params": p}, *args, method=method, **static))


def call(params, method, *args, **static):
    return jitted(method, **static)(params, *args)


@functools.cache
def attend_jit(spatial):
    def attend(model, x, value, key):
        valid = jnp.ones(value.shape[:3], bool)
        return model.memory_attention(x, MemoryKeys(value, key, valid, spatial))

    return jitted(attend)


def attend_to_lists(params, coarse, memories, pointers):
    """Condition features of one object on lists of (memory, row) and (pointer, distance)."""
    m, d = CONFIG.memory_width, CONFIG.width
    place = position.sine_position(GRID, GRID, m)
    rows = params["maskmem_tpos_enc"][:, 0, 0]
    value = [memory for memory, _ in memories]
    key = [memory + place + rows[row][None] for memory, row in memories]
    for pointer, distance in pointers:
        wave = position.sine_of_distance(jnp.float32(distance), d)
        time = wave @ params["obj_ptr_tpos_proj"]["kernel"] + params["obj_ptr_tpos_proj"]["bias"]
        value.append(pointer.reshape(d // m, m))
        key.append(pointer.reshape(d // m, m) + time[None])
    value, key = (jnp.concatenate(x)[None, None] for x in (value, key))
    return attend_jit(len(memories) * GRID * GRID)(params, coarse, value, key)


def slow_track(params, volume, prompts, start):
    """One object at a time, one slice at a time, with dictionaries."""
    logits = np.full((SLICES, OBJECTS, 4 * GRID, 4 * GRID), NO_OBJECT, np.float32)
    features = [call(params, "encode_image", image[None]) for image in volume]
    for k, by_slice in enumerate(prompts):
        if not by_slice:
            continue
        known, memory, pointer = Dictionaries(), {}, {}

        def keep(t, found, *, binary, k=k, memory=memory, pointer=pointer):
            encoded = call(
                params,
                "encode_memory",
                features[t][2],
                found.logits_BKHW,
                found.object_score_BK,
                binary=binary,
            )
            memory[t], pointer[t] = encoded[0, 0], found.pointer_BKD[0, 0]
            logits[t, k] = found.logits_BKHW[0, 0]

        for t, (points, labels) in by_slice.items():
            found = call(
                params,
                "predict",
                features[t],
                points[None, None],
                labels[None, None],
                multimask=len(labels) <= 1,
            )
            known.prompted[t] = True
            keep(t, found, binary=True)
        for t, sign in [(t, 1) for t in range(start, SLICES)] + [
            (t, -1) for t in range(start, -1, -1) if start
        ]:
            if t in known.prompted:
                continue
            near = [(memory[s], row) for s, row in known.memories(t, sign)]
            far = [(pointer[s], share) for s, share in known.pointers(t, sign, SLICES)]
            coarse = attend_to_lists(params, features[t][2], near, far)
            found = call(
                params,
                "predict",
                (*features[t][:2], coarse),
                jnp.zeros((1, 1, 1, 2)),
                jnp.full((1, 1, 1), -1, jnp.int32),
                multimask=True,
                memory_conditioned=True,
            )
            known.tracked[t] = True
            keep(t, found, binary=False)
    return logits


@pytest.fixture(scope="module")
def propagate():
    return jax.jit(functools.partial(tracking.propagate, MODEL))


def prompted_volume(params, volume, prompts, slots):
    """Prompt all objects of a slice in one call."""
    state = tracking.nothing_prompted(MODEL, (GRID, GRID), len(prompts), slots)
    widest = max(len(labels) for by in prompts for _, labels in by.values())
    for t in sorted({t for by_slice in prompts for t in by_slice}):
        points = np.zeros((1, len(prompts), widest, 2), np.float32)
        labels = np.full((1, len(prompts), widest), -1, np.int32)
        for k, by_slice in enumerate(prompts):
            if t in by_slice:
                xy, kind = by_slice[t]
                points[0, k, : len(kind)], labels[0, k, : len(kind)] = xy, kind
        features = call(params, "encode_image", volume[t][None])
        state, _ = tracking.prompt_slice(
            MODEL, params, state, features, jnp.int32(t), Prompts(points, labels)
        )
    return state


CLICK = (np.array([[9.0, 12.0]], np.float32), np.array([1], np.int32))
BOX = (np.array([[4.0, 6.0], [20.0, 25.0]], np.float32), np.array([2, 3], np.int32))


@pytest.mark.parametrize(
    ("prompts", "start"),
    [
        ([{5: CLICK}, {5: BOX}], 5),
        ([{3: BOX, 8: CLICK}, {6: CLICK}], 3),
        ([{0: BOX}, {4: CLICK, 7: BOX}], 0),
    ],
    ids=["one slice", "three slices", "from the first slice"],
)
def test_tracking_is_the_loop_that_keeps_everything(params, volume, propagate, prompts, start):
    """Forwards, then backwards past the start; one object is prompted later than the other."""
    state = prompted_volume(params, volume, prompts, 2)
    padded = np.concatenate([volume, np.ones_like(volume[:3])])
    track = propagate(params, state, padded, jnp.int32(start), jnp.int32(SLICES))
    expected = slow_track(params, volume, prompts, start)
    scale = np.abs(expected[expected > NO_OBJECT]).max()
    np.testing.assert_allclose(track.logits_SKHW[:SLICES], expected, atol=2e-4 * scale)
    assert not np.asarray(track.logits_SKHW[SLICES:]).any()
    masks = expected[:, 0][expected[:, 0].max((1, 2)) > NO_OBJECT]
    assert len(np.unique(masks, axis=0)) == len(masks) >= SLICES // 2, "the slices differ"


def test_an_object_without_prompt_is_nowhere(params, volume, propagate):
    state = prompted_volume(params, volume, [{2: CLICK}, {}], 2)
    track = propagate(params, state, volume, jnp.int32(2), jnp.int32(SLICES))
    assert np.all(track.logits_SKHW[:, 1] == NO_OBJECT)
    assert np.any(track.logits_SKHW[:, 0] > NO_OBJECT)


def test_one_compilation_serves_every_start(params, volume, propagate):
    before = propagate._cache_size()
    for start in (2, 7):
        state = prompted_volume(params, volume, [{start: CLICK}, {}], 2)
        propagate(params, state, volume, jnp.int32(start), jnp.int32(SLICES - start))
    assert propagate._cache_size() == max(before, 1)


def test_mask_prompts_are_adopted(params, volume):
    features = call(params, "encode_image", volume[:1])
    mask = np.zeros((1, 2, SIDE, SIDE), np.float32)
    mask[0, 0, 8:24, 8:24] = 1
    found = call(params, "adopt_mask", features, mask)
    assert found.object_score_BK.tolist() == [[10.0, -10.0]]
    np.testing.assert_allclose(found.logits_BKHW[0, 0, 4, 4], 10, rtol=1e-5)
    np.testing.assert_allclose(found.logits_BKHW[0, 1], -10, rtol=1e-5)
    np.testing.assert_array_equal(found.pointer_BKD[0, 1], params["no_obj_ptr"][0])
    state = tracking.nothing_prompted(MODEL, (GRID, GRID), 2, 1)
    state, _ = tracking.prompt_mask(
        MODEL, params, state, features, jnp.int32(4), mask, jnp.array([[True, False]])
    )
    assert isinstance(state.bank, MemoryBank)
    assert state.bank.memory_slice_BKL[0, :, 0].tolist() == [4, -1]
