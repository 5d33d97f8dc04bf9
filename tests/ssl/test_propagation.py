"""Classes carried through clips: the way, what each slice sees, and what may influence it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sss_jax import flops
from sss_jax.models.memory_bank import (
    Memory,
    TwoWays,
    empty_bank,
    reach,
    remember_on_the_way,
    remember_prompted,
    remember_tracked,
    turn_back,
)
from sss_jax.models.presets import Sam2Config
from sss_jax.models.prompt_encoder import Prompts
from sss_jax.models.sss import init_params
from sss_jax.options import MemoryOptions
from sss_jax.ssl.network import Network
from sss_jax.ssl.prompts import ClipPrompts, clips_to_images, images_to_clips, to_prompts
from sss_jax.ssl.propagation import is_unrolled, outwards, segment_clips

BATCH, SLICES, CLASSES, SIZE = 3, 7, 2, 16
NUM = np.array([7, 5, 6])
START = np.array([[3, 0], [4, 2], [5, 1]])


@settings(deadline=None)
@given(data=st.data(), slices=st.integers(1, 9))
def test_the_way_goes_out_and_back(data, slices):
    num = data.draw(st.integers(1, slices))
    start = data.draw(st.integers(0, num - 1))
    way = outwards(jnp.array([start]), jnp.array([num]), slices)
    expected = [*range(start, num), *range(start - 1, -1, -1), *range(num, slices)]
    assert list(way.slice_NS[0]) == expected
    assert list(way.backwards_NS[0]) == [num - start <= t < num for t in range(slices)]
    assert [expected[t] for t in way.step_NS[0]] == list(range(slices))


@pytest.fixture(scope="module")
def setup(micro):
    """A network that remembers three slices only, so that clips are longer than its rings."""
    return case(micro, num_maskmem=4, max_pointers=3)


@pytest.fixture(scope="module")
def roomy(micro):
    """A network that has room for all slices, some of which lie too far away to be looked at."""
    return case(micro, num_maskmem=6, max_pointers=6)


def case(micro, **reach):
    """Network, options, parameters, images, prompts, and which slices are true ones."""
    model, options, _ = micro
    model = model.clone(config=dataclasses.replace(model.config, **reach))
    params = init_params(model, jax.random.key(0))
    rng = np.random.default_rng(0)
    # Untrained tables are nearly 0; then what is remembered would hardly matter.
    params = jax.tree.map(
        lambda x: x + 0.1 * jnp.asarray(rng.normal(size=x.shape), jnp.float32), params
    )
    image = rng.random((BATCH * SLICES, SIZE, SIZE, 1), np.float32)
    mask = np.arange(SLICES)[None] < NUM[:, None]
    box = np.sort(rng.uniform(0, SIZE, (BATCH * SLICES, CLASSES, 2, 2)), axis=2).reshape(-1, 2, 4)
    here = START[:, None] == np.arange(SLICES)[None, :, None]
    flat = to_prompts(box, (box[..., :2] + box[..., 2:]) / 2, clips_to_images(here))
    prompts = ClipPrompts(*(images_to_clips(x, SLICES) for x in flat), jnp.asarray(START))
    return model, options, params, jnp.asarray(image, jnp.float32), prompts, jnp.asarray(mask)


@pytest.fixture(scope="module")
def run(setup):
    model, options, *_ = setup

    @jax.jit
    def segment(params, image, prompts, mask):
        network = Network(model, params)
        return segment_clips(network, network.encode(image), prompts, mask, options)

    return segment


@pytest.fixture(scope="module")
def found(setup, run):
    return run(*setup[2:])


def slow(model, params, image, prompts, num):
    """One object at a time, one slice after the other; the bank is laid out anew every time."""
    network, config = Network(model, params), model.config
    seen = network.skips(network.encode(image))
    logits = np.zeros((BATCH, SLICES, CLASSES, SIZE // 2, SIZE // 2))
    scores = np.zeros((2, BATCH, SLICES, CLASSES))

    @jax.jit
    def look(coarse, bank, at, count, back):
        return network.with_memory(coarse, bank, at, count, back)

    @jax.jit
    def decode(skips, coarse, prompt, k):
        return network.segment_and_remember(skips, coarse, prompt, None, k)

    for b, k in np.ndindex(BATCH, CLASSES):
        start = int(START[b, k])
        known: dict[int, Memory] = {}
        for at in [*range(start, num[b]), *range(start - 1, -1, -1)]:
            back = at < start
            skips = jax.tree.map(lambda x, i=b * SLICES + at: x[i : i + 1], seen)
            prompt = Prompts(
                prompts.points_BSKQ2[b, at, k][None, None],
                prompts.labels_BSKQ[b, at, k][None, None],
            )
            if known:
                bank = lay_out(config, known, start, at, back)
                coarse = look(
                    skips.coarse_BHWD,
                    bank,
                    jnp.array([[at]]),
                    jnp.array([[num[b]]]),
                    jnp.array([[back]]),
                )
            else:
                coarse = network.without_memory(skips.coarse_BHWD)
            output, known[at] = decode(skips, coarse, prompt, jnp.array([[k]]))
            logits[b, at, k] = output.logits_NKHW[0, 0]
            scores[:, b, at, k] = output.iou_NK[0, 0], output.object_score_NK[0, 0]
    return logits, scores


def lay_out(config, known, start, at, back):
    """Put the start and the slices behind into an empty bank; slices too far away stay out."""
    positions = known[start].memory_BKPM.shape[2]
    bank = empty_bank(config, 1, 1, positions, 1)
    yes, sign = jnp.ones((1, 1), bool), -1 if back else 1
    bank = remember_prompted(bank, config, known[start], start, yes)
    for slice_, memory in known.items():
        behind = (at - slice_) * sign
        if slice_ != start and behind >= 1:
            near = jnp.full((1, 1), behind < config.num_maskmem)
            nearer = jnp.full((1, 1), behind < config.max_pointers)
            bank = remember_tracked(bank, config, memory, slice_, near, nearer)
    return bank


def test_as_one_object_and_one_slice_at_a_time(setup, found):
    model, _, params, image, prompts, mask = setup
    logits, (iou, score) = slow(model, params, image, prompts, NUM)
    got = images_to_clips(found.logits_BHWK1, SLICES)[..., 1:]
    true = np.asarray(mask)
    want = np.moveaxis(logits, 2, -1)
    np.testing.assert_allclose(got[true], want[true], atol=2e-4)
    np.testing.assert_allclose(images_to_clips(found.iou_BK, SLICES)[true], iou[true], atol=1e-5)
    got = images_to_clips(found.object_score_BK, SLICES)
    np.testing.assert_allclose(got[true], score[true], atol=1e-4)
    assert np.abs(want[true]).std() > 0.1, "outputs that are all alike compare nothing"


def test_memory_matters_on_every_slice_but_the_first(setup, run, found):
    """Another prompt changes the masks of its class in its clip, on all slices, and no other."""
    *_, params, image, prompts, mask = setup
    moved = prompts._replace(points_BSKQ2=prompts.points_BSKQ2.at[1, :, 0].add(3.0))
    change = np.abs(run(params, image, moved, mask).logits_BHWK1 - found.logits_BHWK1)
    change = images_to_clips(change, SLICES).max(axis=(2, 3))
    assert (change[1, : NUM[1], 1] > 1e-4).all()
    change[1, :, 1] = 0
    assert change.max() < 1e-5


def test_clips_do_not_see_each_other_nor_padding(setup, run, found):
    *_, params, image, prompts, mask = setup
    order = np.array([2, 0, 1])
    clips = images_to_clips(image, SLICES)
    garbage = jnp.where(mask[..., None, None, None], clips, 7.0)
    got = run(
        params,
        clips_to_images(garbage[order]),
        jax.tree.map(lambda x: x[order], prompts),
        mask[order],
    )
    want = images_to_clips(found.logits_BHWK1, SLICES)[order]
    true = np.asarray(mask)[order]
    np.testing.assert_allclose(
        images_to_clips(got.logits_BHWK1, SLICES)[true], want[true], atol=1e-5
    )


def gradient(setup, **memory):
    """Gradient of the last slices of every object's way by the parameters."""
    return masks_and_gradient(setup, **memory)[1]


def masks_and_gradient(setup, **memory):
    """Mask logits, and the gradient of a mix of all of them by the parameters."""
    model, options, params, image, prompts, mask = setup
    options = dataclasses.replace(options, memory=MemoryOptions(**memory))
    features = jax.jit(Network(model, params).encode)(image)

    @jax.jit
    def loss(params):
        found = segment_clips(Network(model, params), features, prompts, mask, options)
        logits = found.logits_BHWK1
        weight = jnp.cos(jnp.arange(logits.size, dtype=jnp.float32)).reshape(logits.shape)
        return jnp.sum(jnp.where(true_images(mask), logits * weight, 0.0)), logits

    grads, logits = jax.jit(jax.grad(loss, has_aux=True))(params)
    return logits, grads["sam2"]


def true_images(mask):
    return clips_to_images(mask)[:, None, None, None]


@pytest.fixture(scope="module")
def whole(setup):
    return gradient(setup, remat=False)


def test_gradients_reach_what_remembers_and_what_looks(whole):
    for name in ("memory_attention", "memory_encoder", "maskmem_tpos_enc", "obj_ptr_proj"):
        leaves = jax.tree_util.tree_leaves_with_path(whole[name])
        dead = [jax.tree_util.keystr(path) for path, leaf in leaves if not np.any(leaf)]
        assert not dead, (name, dead)


def test_rematerialisation_changes_nothing(setup, whole):
    assert_same(gradient(setup, remat=True), whole)


def assert_same(found, wanted):
    leaves = jax.tree_util.tree_leaves_with_path(found)
    for (path, a), b in zip(leaves, jax.tree.leaves(wanted), strict=True):
        # A bias of the keys shifts all logits of a softmax alike: its gradient is rounding.
        if "k_proj" not in (name := jax.tree_util.keystr(path)) or "bias" not in name:
            assert np.linalg.norm(a - b) <= 1e-4 * np.linalg.norm(b), name


@pytest.mark.parametrize(
    "memory",
    [{"remat": False}, pytest.param({"remat": True, "truncate": 2}, marks=pytest.mark.slow)],
    ids=["plain", "recomputed and cut"],
)
def test_step_by_step_is_the_loop(roomy, memory):
    (loop, wanted), (logits, found) = (
        masks_and_gradient(roomy, unroll=unroll, **memory) for unroll in ("off", "on")
    )
    true = np.broadcast_to(true_images(roomy[-1]), logits.shape)
    np.testing.assert_allclose(logits[true], loop[true], atol=2e-4)
    assert np.std(loop[true]) > 0.1, "outputs that are all alike compare nothing"
    assert_same(found, wanted)


@pytest.mark.parametrize(
    ("unroll", "unrolled"),
    [("auto", {"tpu", "gpu"}), ("on", {"cpu", "tpu", "gpu"}), ("off", set())],
)
def test_step_by_step_by_itself_except_on_cpus(setup, unroll, unrolled):
    options = dataclasses.replace(setup[1], memory=MemoryOptions(unroll=unroll))
    assert {p for p in ("cpu", "tpu", "gpu") if is_unrolled(options, p)} == unrolled


def test_step_by_step_there_is_less_to_look_at(roomy):
    def operations(**memory):
        return flops.count(lambda: gradient(roomy, **memory))

    assert operations(unroll="on") < operations(unroll="off")


def test_a_clip_with_more_slices_than_memories_goes_in_a_loop(setup):
    def text(**memory):
        return str(jax.make_jaxpr(lambda: gradient(setup, **memory))())

    assert text(unroll="on") == text(unroll="off")


def test_what_a_recomputed_slice_keeps_is_not_computed_again(setup):
    def operations(**memory):
        return flops.count(lambda: gradient(setup, **memory))

    counts = [operations(remat_keeps=keeps) for keeps in ("products", "attention", "nothing")]
    assert operations(remat=False) < counts[0] < counts[1] < counts[2]


def test_cut_at_every_slice_nothing_reaches_the_memory_encoder(setup):
    cut = gradient(setup, truncate=1, remat=False)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(cut["memory_encoder"]))
    assert any(np.any(leaf) for leaf in jax.tree.leaves(cut["memory_attention"]))


@pytest.mark.slow
def test_cut_at_every_second_slice_some_reaches_it(setup, whole):
    some = gradient(setup, truncate=2, remat=False)["memory_encoder"]["out_proj"]["kernel"]
    every = whole["memory_encoder"]["out_proj"]["kernel"]
    assert np.any(some)
    assert np.abs(some - every).max() > 1e-3 * np.abs(every).max()


def test_without_memory_slices_are_decoded_by_themselves(setup):
    model, options, params, image, prompts, mask = setup
    options = dataclasses.replace(options, memory=MemoryOptions(kind="none"))
    network = Network(model, params)
    features = jax.jit(network.encode)(image)
    got = segment_clips(network, features, prompts, mask, options)
    want = network.segment(features, prompts.images())
    jax.tree.map(np.testing.assert_array_equal, got, want)


def sights(config, start, num, slices, known):
    """What every slice on the way sees: its memories as pairs of slice and age."""
    bank = empty_bank(config, 1, 1, 1, 1, known)
    ways, seen = TwoWays(bank, bank), []
    place = lambda value: jnp.full((1, 1), value)  # noqa: E731
    for step, at in enumerate([*range(start, num), *range(start - 1, -1, -1)]):
        back = place(at < start)
        ways = turn_back(ways, place(at == start - 1))
        view = reach(ways.bank, config, place(at), place(num), back)
        held = zip(
            np.ravel(ways.bank.memory_BKLPM[..., 0, 0]),
            np.ravel(view.memory_age_BKL),
            np.ravel(view.memory_valid_BKL),
            strict=True,
        )
        seen.append(sorted((float(memory), int(age)) for memory, age, valid in held if valid))
        new = Memory(
            jnp.full((1, 1, 1, config.memory_width), float(at)), jnp.zeros((1, 1, config.width))
        )
        first = place(step == 0)
        ways = TwoWays(*(remember_prompted(b, config, new, place(at), first) for b in ways))
        ways = remember_on_the_way(ways, config, new, place(at), ~first, jnp.int32(step), back)
    return seen


@pytest.mark.parametrize("slices", [1, 2, 3, 4, 6])
def test_a_short_clip_needs_a_short_ring_only(slices):
    config = Sam2Config(memory_width=1, width=1)
    short = empty_bank(config, 1, 1, 1, 1, slices).memory_BKLPM.shape[2]
    assert short == 1 + max(slices - 1, 1) < config.num_maskmem
    for num in {slices, max(slices - 1, 1)}:
        for start in range(num):
            whole = sights(config, start, num, slices, None)
            assert sights(config, start, num, slices, slices) == whole


def test_a_long_clip_has_the_whole_ring():
    config = Sam2Config()
    assert empty_bank(config, 1, 1, 1, 1, 40).memory_BKLPM.shape[2] == config.num_maskmem
