"""Batches are a function of (seed, step): threads, hosts, memory and resuming change nothing."""

import dataclasses
import threading
import time

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sss_jax.augment.fit import fit
from sss_jax.data.cases import Case, load_split
from sss_jax.data.examples import Scan, place
from sss_jax.data.geometry import Frame
from sss_jax.data.load import StackCache, load_example, load_scan
from sss_jax.data.pipeline import Loader, draw_slices
from sss_jax.errors import ConfigError, DataError
from sss_jax.options import DataOptions, ModelOptions, Options, TrainOptions
from sss_jax.train.setup import batch_fields
from tests.poison import garbage_labels, nan_image, truncated_labels

MODEL = ModelOptions(image_size=32, num_classes=2)
DATA = DataOptions(clip_slices=4, max_stride=2, threads=2)
TRAIN = TrainOptions(steps=6, labelled_batch=2, unlabelled_batch=4)
NAMES = [f"s{i}_x" for i in range(9)]
SPLIT = {
    "labelled": ["s0", "s1", "s2"],
    "unlabelled": ["s3", "s4", "s5", "s6", "s7"],
    "val": ["s8"],
}


@pytest.fixture
def root(folder):
    return folder(NAMES, slices=[6, 9, 3, 6, 12, 2, 7, 5, 6], split=SPLIT)


@pytest.fixture
def split(root):
    return load_split(root, "split.json")


def assert_equal_batches(got, want):
    got, want = list(got), list(want)
    assert len(got) == len(want) > 0
    for mine, other in zip(got, want, strict=True):
        assert mine.keys() == other.keys()
        for stream in mine:
            assert mine[stream].keys() == other[stream].keys()
            for key in mine[stream]:
                np.testing.assert_array_equal(mine[stream][key], other[stream][key])


def reading_threads():
    return [t for t in threading.enumerate() if t.name.startswith("grain")]


def assert_no_reading_threads():
    deadline = time.monotonic() + 10
    while reading_threads() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not reading_threads()


def test_a_batch_has_the_promised_form(split):
    batch = Loader(split, MODEL, DATA, TRAIN).batch(3)
    assert set(batch) == {"labelled", "unlabelled"}
    assert "label" not in batch["unlabelled"]
    for stream, size in (("labelled", 2), ("unlabelled", 4)):
        part = batch[stream]
        assert part["image"].shape == (size, 4, 32, 32, 1)
        assert part["image"].dtype == np.float32
        assert 0 <= part["image"].min() < part["image"].max() <= 1
        assert part["slice_mask"].shape == (size, 4)
        assert part["slice_mask"].dtype == np.bool_
        assert part["id"].dtype == np.int32
        assert part["id"].tolist() == list(range(3 * size, 4 * size))
    assert batch["labelled"]["label"].shape == (2, 4, 32, 32)
    assert batch["labelled"]["label"].dtype == np.int32
    assert set(np.unique(batch["labelled"]["label"])) == {0, 1, 2}


def test_a_canvas_carries_the_same_clips_to_the_device(split):
    options = Options(model=MODEL, data=DATA, train=TRAIN)
    canvas = dataclasses.replace(options, data=dataclasses.replace(DATA, canvas=12))
    for step in range(6):
        there = Loader(split, MODEL, canvas.data, TRAIN).batch(step)
        here = Loader(split, MODEL, DATA, TRAIN).batch(step)
        assert jax.tree.map(describe, there) == jax.tree.map(describe, batch_fields(canvas))
        fitted = {name: fit(part, canvas) for name, part in there.items()}
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), fitted, here)


def describe(array):
    return array.shape, array.dtype


def test_without_semi_supervision_there_is_one_stream(split):
    loader = Loader(split, MODEL, DATA, TRAIN, semi=False)
    both = Loader(split, MODEL, DATA, TRAIN)
    assert set(loader.batch(0)) == set(loader.names(0)) == {"labelled"}
    labelled = ({"labelled": both.batch(step)["labelled"]} for step in range(6))
    assert_equal_batches(loader.iterate(), labelled)


def test_short_volumes_are_padded_at_the_end(split):
    loader = Loader(split, MODEL, DATA, TRAIN)
    lengths = {"s2_x": 3, "s5_x": 2}
    seen = set()
    for step in range(6):
        batch, names = loader.batch(step), loader.names(step)
        for stream in batch:
            for row, name in enumerate(names[stream]):
                length = lengths.get(name, 4)
                mask = batch[stream]["slice_mask"][row]
                np.testing.assert_array_equal(mask, np.arange(4) < length)
                assert not batch[stream]["image"][row, length:].any()
                assert batch[stream]["image"][row, :length].any(axis=(1, 2, 3)).all()
                if stream == "labelled":
                    assert not batch[stream]["label"][row, length:].any()
                seen.add(name)
    assert seen >= set(lengths)


def test_clips_are_the_slices_of_the_named_case(split):
    loader = Loader(split, MODEL, DATA, TRAIN)
    cases = {case.name: case for case in split.cases}
    for step in range(3):
        batch, names = loader.batch(step), loader.names(step)
        for stream in batch:
            for row, name in enumerate(names[stream]):
                whole = load_example(cases[name], MODEL, DATA)
                kept = batch[stream]["slice_mask"][row]
                clip = batch[stream]["image"][row, kept, ..., 0]
                at = [int(np.abs(whole.image_SHW - s).sum((1, 2)).argmin()) for s in clip]
                np.testing.assert_array_equal(clip, whole.image_SHW[at])
                assert len(set(np.diff(at))) <= 1
                if stream == "labelled":
                    label = batch[stream]["label"][row, kept]
                    np.testing.assert_array_equal(label, whole.label_SHW[at])


@pytest.mark.parametrize("threads", [0, 2, 4])
def test_threads_change_nothing(split, threads):
    loader = Loader(split, MODEL, dataclasses.replace(DATA, threads=threads), TRAIN)
    by_step = [Loader(split, MODEL, DATA, TRAIN).batch(step) for step in range(TRAIN.steps)]
    assert_equal_batches(loader.iterate(), by_step)
    assert_no_reading_threads()


@pytest.mark.parametrize("start", [1, 4, 5])
def test_resuming_needs_the_step_alone(split, start):
    whole = list(Loader(split, MODEL, DATA, TRAIN).iterate())
    assert_equal_batches(Loader(split, MODEL, DATA, TRAIN).iterate(start), whole[start:])


def test_a_finished_run_yields_nothing(split):
    assert list(Loader(split, MODEL, DATA, TRAIN).iterate(6)) == []
    assert list(Loader(split, MODEL, DATA, TRAIN).iterate(9)) == []


def test_hosts_read_disjoint_parts_of_one_batch(split):
    whole = Loader(split, MODEL, DATA, TRAIN)
    hosts = [Loader(split, MODEL, DATA, TRAIN, process_index=i, process_count=2) for i in (0, 1)]
    joined = []
    for parts in zip(*(host.iterate() for host in hosts), strict=True):
        first, second = parts
        joined.append(
            {s: {k: np.concatenate([first[s][k], second[s][k]]) for k in first[s]} for s in first}
        )
    assert_equal_batches(joined, whole.iterate())
    names = [host.names(2) for host in hosts]
    assert {s: names[0][s] + names[1][s] for s in names[0]} == whole.names(2)


def test_epochs_hold_every_case_once_and_are_shuffled_anew(split):
    loader = Loader(split, MODEL, DATA, dataclasses.replace(TRAIN, labelled_batch=3))
    epochs = [tuple(loader.names(step)["labelled"]) for step in range(30)]
    assert all(sorted(epoch) == ["s0_x", "s1_x", "s2_x"] for epoch in epochs)
    assert len(set(epochs)) > 3
    unlabelled = [n for step in range(25) for n in loader.names(step)["unlabelled"]]
    rounds = [unlabelled[i : i + 5] for i in range(0, 100, 5)]
    assert all(len(set(group)) == 5 for group in rounds)


def test_the_seed_sets_order_and_clips(split):
    first = Loader(split, MODEL, DATA, TRAIN)
    other = Loader(split, MODEL, DATA, dataclasses.replace(TRAIN, seed=1))
    assert [first.names(s) for s in range(6)] != [other.names(s) for s in range(6)]
    one_case = dataclasses.replace(split, labelled=split.labelled[1:2])
    clips = [
        Loader(one_case, MODEL, DATA, dataclasses.replace(TRAIN, seed=seed)).batch(step)
        for seed in (0, 1)
        for step in range(3)
    ]
    assert len({clip["labelled"]["image"].tobytes() for clip in clips}) > 3


def test_labels_of_unlabelled_cases_are_never_opened(root, split):
    want = list(Loader(split, MODEL, DATA, TRAIN).iterate())
    for case in split.unlabelled:
        (root / f"labels/{case.name}.nii.gz").unlink()
    fresh = load_split(root, "split.json")
    assert fresh.digest == split.digest
    assert_equal_batches(Loader(fresh, MODEL, DATA, TRAIN).iterate(), want)


def batches_with(root, spoil, names):
    """All batches of a run, after the files of some cases were spoiled."""
    for seed, name in enumerate(names):
        spoil(root, name, MODEL.num_classes, seed)
    return list(Loader(load_split(root, "split.json"), MODEL, DATA, TRAIN).iterate())


@pytest.mark.parametrize("spoil", [garbage_labels, truncated_labels])
def test_withheld_labels_and_test_cases_reach_no_batch(folder, spoil):
    split = {part: SPLIT[part] for part in ("labelled", "unlabelled")} | {"test": ["s8"]}
    root = folder(NAMES, split=split)
    want = batches_with(root, spoil, [])
    nan_image(root, "s8_x")
    hidden = [f"{subject}_x" for subject in (*SPLIT["unlabelled"], "s8")]
    assert_equal_batches(batches_with(root, spoil, hidden), want)


def test_garbage_in_a_label_that_is_used_reaches_the_batches(root):
    """The control of the test above."""
    want = batches_with(root, garbage_labels, [])
    got = batches_with(root, garbage_labels, ["s1_x"])
    changed = [
        not np.array_equal(mine["labelled"]["label"], other["labelled"]["label"])
        for mine, other in zip(got, want, strict=True)
    ]
    assert any(changed)
    with pytest.raises(DataError, match="s1_x"):
        batches_with(root, truncated_labels, ["s1_x"])


@pytest.mark.parametrize("threads", [0, 2])
def test_a_bad_file_stops_with_its_name_and_no_threads(root, split, threads):
    (root / "images/s1_x.nii.gz").write_bytes(b"damaged")
    loader = Loader(split, MODEL, dataclasses.replace(DATA, threads=threads), TRAIN)
    with pytest.raises(DataError, match=r"case s1_x: .*s1_x\.nii\.gz: is named \.gz"):
        list(loader.iterate())
    assert_no_reading_threads()


def test_stopping_early_ends_the_threads(split):
    batches = Loader(split, MODEL, DATA, TRAIN).iterate()
    next(batches)
    assert reading_threads()
    batches.close()
    assert_no_reading_threads()


def test_labels_beyond_the_classes_are_refused(split):
    loader = Loader(split, dataclasses.replace(MODEL, num_classes=1), DATA, TRAIN)
    with pytest.raises(DataError, match=r"outside 0\.\.1: 2.*num_classes"):
        list(loader.iterate())


def test_empty_streams_and_uneven_batches_are_refused(split):
    none = dataclasses.replace(split, unlabelled=())
    with pytest.raises(DataError, match="no unlabelled case"):
        Loader(none, MODEL, DATA, TRAIN)
    Loader(none, MODEL, DATA, TRAIN, semi=False)
    with pytest.raises(DataError, match="no labelled case"):
        Loader(dataclasses.replace(split, labelled=()), MODEL, DATA, TRAIN)
    with pytest.raises(ConfigError, match=r"labelled_batch=2 .* 3 hosts: make it a multiple of 3"):
        Loader(split, MODEL, DATA, TRAIN, process_count=3)


def counting(limit, size=100, fail=()):
    reads = []

    def read(case):
        reads.append(case.name)
        time.sleep(0.002)
        if case.name in fail:
            raise DataError("bad")
        frame = Frame((1, 1, 1), (0, 1, 2), (False,) * 3, (1.0,) * 3, 2)
        return Scan(np.zeros((1, 1, size // 4), np.float32), None, frame)

    return StackCache(read, limit), reads


def case(name):
    return Case(str(name), str(name), None, None)


def test_the_least_recently_used_scan_goes_first():
    cache, reads = counting(300)
    for name in "abcadab":
        cache(case(name))
        assert cache.nbytes <= 300
    assert "".join(reads) == "abcdb"


def test_a_scan_larger_than_the_memory_is_not_kept():
    cache, reads = counting(99)
    for name in "aa":
        assert cache(case(name)).nbytes == 100
    assert (len(reads), cache.nbytes) == (2, 0)


def test_threads_share_one_decoding():
    cache, reads = counting(10**6)
    threads = [threading.Thread(target=cache, args=(case(i % 3),)) for i in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(reads) == ["0", "1", "2"]


def test_a_failed_decoding_fails_for_all_and_can_be_tried_again():
    cache, reads = counting(10**6, fail={"a"})
    for _ in range(2):
        with pytest.raises(DataError, match="bad"):
            cache(case("a"))
    assert reads == ["a", "a"]
    assert cache.nbytes == 0


def test_memory_stays_bounded_and_batches_stay_equal(split):
    """With room for one volume the order of eviction depends on threads, the batches do not."""
    largest = max(load_scan(c, 2, DATA).nbytes for c in split.cases)
    tight = Loader(split, MODEL, dataclasses.replace(DATA, cache_bytes=largest, threads=4), TRAIN)
    assert_equal_batches(tight.iterate(), Loader(split, MODEL, DATA, TRAIN).iterate())
    assert 0 < tight._stacks.nbytes <= largest


def volume(slices, labelled=()):
    label = np.zeros((slices, 2, 2), np.uint8)
    label[list(labelled)] = 1
    frame = Frame((2, 2, slices), (2, 1, 0), (False,) * 3, (1.0,) * 3, 2)
    return Scan(np.zeros((slices, 2, 2), np.float32), label, frame)


@given(
    total=st.integers(1, 40),
    wanted=st.integers(1, 12),
    stride=st.integers(1, 6),
    seed=st.integers(0, 999),
    share=st.sampled_from([0.0, 0.5, 1.0]),
    labelled=st.booleans(),
)
@settings(max_examples=50, deadline=None)
def test_clips_fit_the_volume(total, wanted, stride, seed, share, labelled):
    options = DataOptions(clip_slices=wanted, max_stride=stride, foreground_share=share)
    scan = volume(total, {total // 3})
    slices = draw_slices(scan, options, np.random.default_rng(seed), labelled=labelled)
    assert len(slices) == min(total, wanted)
    assert slices[0] >= 0
    assert slices[-1] < total
    steps = set(np.diff(slices).tolist())
    assert len(steps) <= 1
    assert steps <= set(range(1, stride + 1))


def draws(scan, options, *, labelled=True, count=400):
    rng = np.random.default_rng(0)
    return [draw_slices(scan, options, rng, labelled=labelled) for _ in range(count)]


def test_all_strides_and_starts_that_fit_occur():
    options = DataOptions(clip_slices=4, max_stride=5, foreground_share=0.0)
    found = {(int(s[0]), int(s[1] - s[0])) for s in draws(volume(11), options)}
    assert found == {(a, d) for d in (1, 2, 3) for a in range(11 - 3 * d)}


def test_foreground_clips_centre_on_a_labelled_slice():
    options = DataOptions(clip_slices=5, max_stride=2, foreground_share=1.0)
    for slices in draws(volume(40, {17}), options):
        assert slices[2] == 17
    near_the_end = draws(volume(40, {39}), options)
    assert all(slices[-1] == 39 for slices in near_the_end)
    spread = {int(s[2]) for s in draws(volume(40, {10, 20, 25}), options)}
    assert spread == {10, 20, 25}


def test_the_foreground_share_is_kept():
    options = DataOptions(clip_slices=3, foreground_share=0.6)
    centred = np.mean([s[1] == 50 for s in draws(volume(100, {50}), options, count=2000)])
    assert abs(centred - 0.6) < 0.05
    chance = [s[1] == 50 for s in draws(volume(100, {50}), options, labelled=False, count=2000)]
    assert np.mean(chance) < 0.05


def test_volumes_without_labels_still_give_clips():
    options = DataOptions(clip_slices=3, foreground_share=1.0)
    assert len({int(s[0]) for s in draws(volume(20), options)}) == 18


def test_real_cases_load_whole(real_data):
    split = load_split(real_data / "hippocampus", "split_small.json")
    example = load_example(split.val[0], ModelOptions(image_size=64, num_classes=2), DATA)
    assert example.image_SHW.shape == example.label_SHW.shape
    assert set(np.unique(example.label_SHW)) == {0, 1, 2}
    unknown = load_example(split.unlabelled[0], MODEL, DATA)
    assert unknown.label_SHW is None
    scan = load_scan(split.val[0], 2, DATA)
    np.testing.assert_array_equal(place(scan, 64, DATA).image_SHW, example.image_SHW)


def test_real_batches_are_stable(real_data):
    split = load_split(real_data / "hippocampus", "split_small.json")
    model = ModelOptions(image_size=64, num_classes=2)
    data = dataclasses.replace(DATA, foreground_share=1.0)
    train = dataclasses.replace(TRAIN, steps=3)
    whole = list(Loader(split, model, data, train).iterate())
    assert_equal_batches(Loader(split, model, data, train).iterate(1), whole[1:])
    assert all(batch["labelled"]["label"].any(axis=(1, 2, 3)).all() for batch in whole)
