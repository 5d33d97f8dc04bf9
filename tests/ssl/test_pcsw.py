"""PCSW inside jit against its definition, written out with loops and a depth-first search."""

import functools
import re
from fractions import Fraction

import jax
import jax.numpy as jnp
import nibabel as nib
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from sss_jax.options import PCSWOptions
from sss_jax.ssl import pcsw
from sss_jax.ssl.pcsw import enough, search_prompts, volume_prompts

SHAPE = (13, 6, 7)
OPTIONS = (
    PCSWOptions(),
    PCSWOptions(connectivity=26, tau=0.5),
    PCSWOptions(tau=1.0),
    PCSWOptions(prompts="every_k", every=2, tau=0.6),
    PCSWOptions(prompts="every_k", every=3, tau=0.0, connectivity=26),
)

search = jax.jit(search_prompts, static_argnums=2)


def windows(slices):
    """(start, length) in search order."""
    if slices < 2:
        return [(0, 1)] if slices else []
    shortest, longest = max(2, slices // 3), max(3, slices // 2)
    lengths = range((shortest + longest) // 2, longest + 1)
    return [(start, length) for length in lengths for start in range(slices - length + 1)]


def tight(plane):
    y, x = np.nonzero(plane)
    return [x.min(), y.min(), x.max(), y.max()]


def reference(mask, num_slices, options, depth_first):
    """All fields of SlicePrompts; masks are searched window by window, as the method says."""
    slices, height, width = mask.shape
    mask = mask & (np.arange(slices) < num_slices)[:, None, None]
    full = [0, 0, width - 1, height - 1]
    found = {
        "box_S4": np.array([full] * slices, float),
        "point_S2": np.array([[(width - 1) / 2, (height - 1) / 2]] * slices),
        "valid_S": np.zeros(slices, bool),
        "slice": 0,
        "accepted": False,
        "window_start": 0,
        "window_length": 0,
        "share": 0.0,
    }
    for start, length in windows(num_slices):
        label = depth_first(mask[start : start + length], options.connectivity)
        values, counts = np.unique(label[label >= 0], return_counts=True)
        if not len(values):
            continue
        largest = np.argmax(counts)  # the lowest label, thus the first voxel, on ties
        share = Fraction(int(counts[largest]), int(counts.sum()))
        if share >= Fraction(options.tau).limit_denominator(10_000):
            target = np.zeros_like(mask)
            target[start : start + length] = label == values[largest]
            found |= {
                "accepted": True,
                "window_start": start,
                "window_length": length,
                "share": float(share),
            }
            break
    else:
        target = mask
    area = target.sum(axis=(1, 2))
    if not area.any():
        return found
    prompt = found["slice"] = int(np.argmax(area))
    for index in range(slices):
        spaced = found["accepted"] and options.prompts == "every_k"
        wanted = (index - prompt) % options.every == 0 if spaced else index == prompt
        if wanted and area[index]:
            box = tight(target[index])
            y, x = np.nonzero(target[index])
            centre = [(box[0] + box[2]) / 2, (box[1] + box[3]) / 2]
            found["box_S4"][index] = box
            found["point_S2"][index] = centre if found["accepted"] else [x.mean(), y.mean()]
            found["valid_S"][index] = True
    return found


def assert_same(got, expected):
    for name, value in expected.items():
        np.testing.assert_allclose(getattr(got, name), value, rtol=1e-6, atol=1e-5, err_msg=name)


def volume(*planes):
    """Binary volume of 4 slices, 3 rows, 9 columns from rows of characters; # is foreground."""
    mask = np.zeros((4, 3, 9), bool)
    for plane, rows in zip(mask, planes, strict=False):
        for line, row in zip(plane, rows, strict=False):
            line[: len(row)] = [c == "#" for c in row]
    return mask


@pytest.mark.parametrize("options", OPTIONS, ids=range(len(OPTIONS)))
@settings(deadline=None, max_examples=40)
@given(data=st.data(), seed=st.integers(0, 2**32 - 1), num_slices=st.integers(0, SHAPE[0]))
def test_search_equals_its_definition(
    options, mask_kinds, make_mask, depth_first, data, seed, num_slices
):
    mask = make_mask(data.draw(st.sampled_from(mask_kinds)), seed, SHAPE)
    assert_same(
        search(mask, num_slices, options), reference(mask, num_slices, options, depth_first)
    )


@pytest.mark.parametrize("slices", [1, 2, 3, 4])
def test_few_slices(slices, make_mask, depth_first):
    for seed in range(6):
        for kind in ("noise", "sparse noise", "blobs", "empty"):
            mask = make_mask(kind, seed, (slices, 6, 7))
            for num_slices in {0, 1, slices - 1, slices}:
                expected = reference(mask, num_slices, PCSWOptions(), depth_first)
                assert_same(search(mask, num_slices, PCSWOptions()), expected)


@pytest.mark.parametrize("slices", range(70))
def test_window_lengths_follow_the_true_number_of_slices(slices):
    first, last = pcsw.window_lengths(jnp.int32(slices))
    if slices < 2:
        assert (first, last) == (1, 1)
    else:
        shortest, longest = max(2, slices // 3), max(3, slices // 2)
        assert (first, last) == ((shortest + longest) // 2, longest)
        assert pcsw.longest_window(slices) == min(slices, longest)


def test_share_of_exactly_tau_is_accepted():
    four_of_five = volume(["##...#.", "##....."])
    got = search(four_of_five, 1, PCSWOptions(tau=0.8))
    assert got.accepted
    assert got.share == np.float32(0.8)
    assert not search(four_of_five, 1, PCSWOptions(tau=0.81)).accepted
    np.testing.assert_array_equal(got.box_S4[0], [0, 0, 1, 1])
    np.testing.assert_array_equal(got.point_S2[0], [0.5, 0.5])


def test_the_very_last_window_is_tried(depth_first):
    """Three bars hang together only over slices 1 to 3; slice 0 holds specks."""
    mask = volume(
        ["#.#.#.#.#", ".........", "#.#.#.#.#"],
        ["##.......", ".........", "........."],
        ["##.##.##.", "##.##.##.", "##.##.##."],
        [".........", "...####..", "........."],
    )
    mask[1, 0, :5] = True
    options = PCSWOptions()
    got = search(mask, 4, options)
    assert (got.window_start, got.window_length) == windows(4)[-1] == (1, 3)
    assert got.slice == 2
    assert_same(got, reference(mask, 4, options, depth_first))
    assert not search(mask, 3, options).accepted


def test_of_equal_components_the_first_in_raster_order_wins():
    mask = volume([".....", "...##"], [".....", "##..."], [".....", "....."])
    got = search(mask, 3, PCSWOptions(tau=0.5))
    assert got.slice == 0
    np.testing.assert_array_equal(got.box_S4[0], [3, 1, 4, 1])


def test_of_equal_slices_the_first_wins():
    mask = volume(["....."], [".##.."], [".##.."], ["....."])
    got = search(mask, 4, PCSWOptions())
    assert (got.slice, got.window_start, got.window_length) == (1, 0, 2)
    last = volume(["....."], [".#..."], [".##.."], [".##.."])
    # The window (1, 2) is accepted before slice 3 is seen.
    assert search(last, 4, PCSWOptions()).slice == 1


def test_nothing_accepted_takes_all_foreground_of_the_fullest_slice():
    mask = volume(["#......", ".......", "......#"], ["#.#....", ".......", "#.....#"])
    got = search(mask, 2, PCSWOptions(prompts="every_k", every=1))
    assert not got.accepted
    assert (got.slice, got.window_start, got.window_length, got.share) == (1, 0, 0, 0)
    np.testing.assert_array_equal(got.valid_S, [False, True, False, False])
    np.testing.assert_array_equal(got.box_S4[1], [0, 0, 6, 2])
    np.testing.assert_allclose(got.point_S2[1], [2.0, 1.0])


def test_no_foreground_is_the_whole_image_and_not_valid():
    got = search(volume(), 3, PCSWOptions())
    assert not got.valid_S.any()
    assert not got.accepted
    np.testing.assert_array_equal(got.box_S4, [[0, 0, 8, 2]] * 4)
    np.testing.assert_array_equal(got.point_S2, [[4.0, 1.0]] * 4)


def test_every_k_counts_from_the_prompt_slice_in_both_directions():
    mask = np.zeros((20, 5, 6), bool)
    mask[:, 2, 2] = True
    mask[5, 1:4, 1:4] = True
    got = search(mask, 18, PCSWOptions(prompts="every_k", every=2))
    assert (got.window_start, got.window_length, got.slice) == (0, 7, 5)
    np.testing.assert_array_equal(np.flatnonzero(got.valid_S), [1, 3, 5])
    np.testing.assert_array_equal(got.box_S4[3], [2, 2, 2, 2])
    np.testing.assert_array_equal(got.box_S4[5], [1, 1, 3, 3])


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**32 - 1), kind=st.sampled_from(["blobs", "dense noise", "maze"]))
def test_flips_move_box_and_point_along(make_mask, seed, kind):
    options = OPTIONS[1]  # tau of 0.5: a larger share has no rival
    mask = make_mask(kind, seed, SHAPE)
    got = search(mask, SHAPE[0], options)
    assume(bool(got.accepted) and got.share > 0.5)
    height, width = SHAPE[1:]
    x0, y0, x1, y1 = got.box_S4[got.slice]
    x, y = got.point_S2[got.slice]
    for axis, box, point in (
        (2, [width - 1 - x1, y0, width - 1 - x0, y1], [width - 1 - x, y]),
        (1, [x0, height - 1 - y1, x1, height - 1 - y0], [x, height - 1 - y]),
    ):
        flipped = search(np.flip(mask, axis), SHAPE[0], options)
        assert (flipped.slice, flipped.window_start) == (got.slice, got.window_start)
        np.testing.assert_allclose(flipped.box_S4[got.slice], box)
        np.testing.assert_allclose(flipped.point_S2[got.slice], point)


@settings(deadline=None, max_examples=300)
@given(
    whole=st.integers(0, 2**31 - 1),
    tau=st.sampled_from([0.0, 0.1, 0.3, 0.5, 0.7, 0.8, 0.95, 0.9999, 1.0, 1 / 3]),
    offset=st.integers(-2, 2),
)
def test_shares_are_compared_in_whole_numbers(whole, tau, offset):
    share = Fraction(tau).limit_denominator(10_000)
    part = min(max(int(share * whole) + offset, 0), whole)
    expected = whole > 0 and Fraction(part, max(whole, 1)) >= share
    assert bool(enough(jnp.int32(part), jnp.int32(whole), tau)) == expected


def stack(make_mask, mask_kinds):
    masks = np.stack([make_mask(mask_kinds[i], i, SHAPE) for i in range(8)])
    return masks, np.array([13, 12, 9, 13, 1, 7, 13, 13], np.int32)


def test_loop_vmap_pmap_and_shard_map_agree(make_mask, mask_kinds):
    masks, nums = stack(make_mask, mask_kinds)
    one = functools.partial(search_prompts, options=PCSWOptions())
    results = [search(mask, num, PCSWOptions()) for mask, num in zip(masks, nums, strict=True)]
    loop = jax.tree.map(lambda *leaves: np.stack(leaves), *results)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    sharded = jax.shard_map(
        jax.vmap(one), mesh=mesh, in_specs=(P("data"), P("data")), out_specs=P("data")
    )
    for many in (jax.pmap(one), jax.jit(sharded)):  # one and two volumes a device
        jax.tree.map(np.testing.assert_array_equal, many(masks, nums), loop)


@pytest.mark.slow
def test_jit_changes_nothing():
    mask = volume(["#.#.#"], ["##.#."], ["##"])
    with jax.disable_jit():
        alone = search_prompts(jnp.asarray(mask), jnp.int32(3), PCSWOptions())
    jax.tree.map(np.testing.assert_allclose, alone, search(mask, 3, PCSWOptions()))


def test_volumes_sharded_over_devices_stay_on_their_device():
    """Only the loops' one-bit flags may cross devices; a gathered mask would not scale."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    data = NamedSharding(mesh, P("data"))
    shapes = (
        jax.ShapeDtypeStruct((8, 4, 8, 8, 2), jnp.float32),
        jax.ShapeDtypeStruct((8, 4), bool),
    )
    many = jax.jit(
        lambda prob, mask: volume_prompts(prob, mask, 4, PCSWOptions()),
        in_shardings=(data, data),
        out_shardings=data,
    )
    text = many.lower(*shapes).compile().as_text()
    names = "all-gather|all-to-all|collective-permute|reduce-scatter|all-reduce"
    moved = re.findall(rf"= (\S+) (?:{names})(?:-start)?\(", text)
    assert set(moved) == {"pred[]"}


def test_padding_slices_change_nothing(make_mask):
    mask = make_mask("blobs", 4, SHAPE)
    short = search(mask[:9], 9, PCSWOptions())
    padded = search(mask, 9, PCSWOptions())
    for name in short._fields:
        got = getattr(padded, name)
        np.testing.assert_allclose(got[:9] if got.ndim else got, getattr(short, name))
    assert not padded.valid_S[9:].any()


def test_volumes_become_prompts_in_input_pixels(make_mask, depth_first):
    batch, slices, height, width, classes, stride = 2, 8, 6, 7, 3, 4
    options = PCSWOptions(prompts="every_k", threshold=0.3)
    kinds = ["blobs", "maze", "empty", "sparse noise", "full", "dense noise"]
    masks = [make_mask(kind, 2, (slices, height, width)) for kind in kinds]
    mask_BKSHW = np.stack(masks).reshape(batch, classes, slices, height, width)
    prob = np.where(np.moveaxis(mask_BKSHW, 1, -1), 0.31, 0.3).astype(np.float32)
    slice_mask = np.arange(slices)[None] < np.array([[8], [5]])
    got, info = jax.jit(volume_prompts, static_argnums=(2, 3))(prob, slice_mask, stride, options)
    assert got.points_BSKQ2.shape == (batch, slices, classes, 3, 2)
    assert got.labels_BSKQ.shape == (batch, slices, classes, 3)
    seen = 0
    for b, k in np.ndindex(batch, classes):
        expected = reference(mask_BKSHW[b, k], slice_mask[b].sum(), options, depth_first)
        assert info.slice[b, k] == expected["slice"]
        assert info.valid_BK[b, k] == expected["valid_S"].any()
        middle = slice_mask[b].sum() // 2
        assert got.start_BK[b, k] == (expected["slice"] if info.valid_BK[b, k] else middle)
        for s in range(slices):
            points, labels = got.points_BSKQ2[b, s, k], got.labels_BSKQ[b, s, k]
            if not expected["valid_S"][s]:
                np.testing.assert_array_equal(labels, [-1, -1, -1])
                np.testing.assert_array_equal(points, np.zeros((3, 2)))
                continue
            seen += 1
            (x0, y0, x1, y1), (x, y) = expected["box_S4"][s], expected["point_S2"][s]
            corners = [[x0 * 4, y0 * 4], [x1 * 4 + 3, y1 * 4 + 3], [x * 4 + 1.5, y * 4 + 1.5]]
            np.testing.assert_allclose(points, corners, rtol=1e-6)
            np.testing.assert_array_equal(labels, [2, 3, 1])
    assert seen >= 5


def test_windows_that_cannot_be_accepted_are_not_searched(make_mask):
    """The bound is what keeps noise cheap: without it every window would be searched."""
    candidates = jax.jit(
        lambda mask: pcsw._candidates(
            pcsw.plane_components(mask), mask, jnp.int32(SHAPE[0]), PCSWOptions()
        )
    )
    assert not candidates(make_mask("sparse noise", 0, SHAPE)).any()
    assert not candidates(make_mask("checkerboard", 0, SHAPE)).any()
    assert candidates(make_mask("maze", 0, SHAPE)).any()


def test_real_labels(real_data, depth_first):
    """Expert labels are what good pseudo-masks look like; specks are what bad ones add."""
    paths = sorted((real_data / "hippocampus" / "labels").glob("*.nii.gz"))[:3]
    assert paths
    rng = np.random.default_rng(0)
    shape = (40, 64, 48)
    for path in paths:
        label = np.asarray(nib.load(path).dataobj).transpose(2, 1, 0)[: shape[0]]
        num_slices = len(label)
        padding = [(0, full - size) for full, size in zip(shape, label.shape, strict=True)]
        for value in (1, 2):
            mask = np.pad(label == value, padding)
            for noise in (0, 0.002):
                noisy = mask | (rng.random(shape) < noise)
                expected = reference(noisy, num_slices, PCSWOptions(), depth_first)
                assert noise or expected["accepted"]
                assert_same(search(noisy, num_slices, PCSWOptions()), expected)
