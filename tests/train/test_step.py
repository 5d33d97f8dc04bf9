"""The step: one function under jit, over a mesh of eight devices and under pmap."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sss_jax.errors import ConfigError
from sss_jax.options import MeshOptions
from sss_jax.train.checkpoint import Checkpointer
from sss_jax.train.mesh import make_driver
from sss_jax.train.state import count_params, init_all_params, state_of
from sss_jax.train.step import Gradients, _accumulate, make_train_step, root_key
from tests.small_networks import with_memory

NUDGES = 8


def with_train(options, **changes):
    return dataclasses.replace(options, train=dataclasses.replace(options.train, **changes))


@pytest.fixture(scope="module", params=["none", pytest.param("fifo", marks=pytest.mark.slow)])
def start(micro, request):
    """Plain SGD, whose state after a step is the step's gradient (momentum with decay 0)."""
    model, options, batch = with_memory(micro, request.param)
    optimizer = optax.sgd(1e-2, momentum=0.0)
    params = jax.jit(lambda k: init_all_params(model, options, k))(root_key(0))
    state = state_of(params, optimizer)
    return model, options, batch, optimizer, jax.device_get(state)


def run(driver, state, batch, steps):
    state = driver.place_state(jax.tree.map(jnp.asarray, state))
    key = driver.place_key(root_key(3))
    metrics, grads = [], []
    for _ in range(steps):
        state, terms = driver.step(state, driver.place_batch(batch), key)
        metrics.append(jax.device_get(terms))
        grads.append(jax.device_get(driver.fetch(state)["opt_state"][0].trace))
    return jax.device_get(driver.fetch(state)), metrics, grads


@pytest.fixture(scope="module")
def results(start):
    """State and metrics after two steps, by driver."""
    model, options, batch, optimizer, state = start
    one = jax.devices()[:1]
    pmap = with_train(options, parallel="pmap")
    drivers = {
        "one": make_driver(model, options, optimizer, state, one),
        "mesh": make_driver(model, options, optimizer, state),
        "pmap": make_driver(model, pmap, optimizer, state),
    }
    found = {name: run(driver, state, batch, 2) for name, driver in drivers.items()}
    expected = found["one"][2][0]
    nudged = [run(drivers["one"], state, nudge(batch, seed), 1)[2][0] for seed in range(NUDGES)]
    found["rounding"] = max(distance(grads, expected) for grads in nudged)
    return found, drivers


def nudge(batch, seed):
    """Move every pixel to the next float32 number, up or down: the least there is to change."""
    way = np.random.default_rng(seed)

    def move(x):
        ends = np.where(way.random(x.shape) < 0.5, 0.0, 2.0).astype(np.float32)
        return np.where(x > 0, np.nextafter(x, ends), x)

    return {part: clips | {"image": move(clips["image"])} for part, clips in batch.items()}


def distance(one, other):
    """Norm of the difference of two gradients, all arrays together."""
    squares = jax.tree.map(lambda a, b: float(np.square(a - b).sum()), one, other)
    return np.sqrt(sum(jax.tree.leaves(squares)))


@pytest.mark.parametrize("name", ["mesh", "pmap"])
def test_eight_devices_take_the_step_of_one(results, name):
    _, metrics, grads = results[0][name]
    _, expected_metrics, expected = results[0]["one"]
    for step, tolerance in ((0, 1e-5), (1, 1e-4)):
        for term, value in expected_metrics[step].items():
            np.testing.assert_allclose(
                metrics[step][term], value, rtol=tolerance, atol=1e-6, err_msg=f"{term}, {step}"
            )
    # A device convolves and sums its share of the batch in another order, and a value next to the
    # kink of a ReLU may fall on its other side. How much rounding alone moves this gradient is
    # measured beside it, by the least possible changes of the input: a few values do lie so close
    # to a kink, and each change carries some of them over.
    total, rounding = expected_metrics[0]["grad_norm"], results[0]["rounding"]
    assert rounding <= 1e-4 * total
    assert distance(grads[0], expected[0]) <= max(1e-5 * total, 2 * rounding)
    for path, value in jax.tree_util.tree_leaves_with_path(expected[0]):
        error = np.abs(_at(grads[0], path) - value)
        # Below 1e-6 of the whole lies what is zero by mathematics, such as the bias of every key.
        assert error.max() <= max(1e-3 * np.abs(value).max(), 1e-6 * total), path


def _at(tree, path):
    for key in path:
        if isinstance(key, jax.tree_util.GetAttrKey):
            tree = getattr(tree, key.name)
        else:
            tree = tree[key.key if hasattr(key, "key") else key.idx]
    return tree


def test_one_compilation_per_driver(results):
    assert results[1]["one"].step._cache_size() == 1
    assert results[1]["mesh"].step._cache_size() == 1


def test_the_state_is_donated(start, results):
    driver = results[1]["one"]
    state = driver.place_state(jax.tree.map(jnp.asarray, start[4]))
    driver.step(state, driver.place_batch(start[2]), driver.place_key(root_key(3)))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state["params"]))


def test_the_step_moves_every_trained_parameter(start, results):
    before, after = start[4]["params"], results[0]["one"][0]["params"]
    still = {
        jax.tree_util.keystr(path)
        for path, leaf in jax.tree_util.tree_leaves_with_path(before)
        if np.array_equal(leaf, _at(after, path))
    }
    unused = ("gaussian", "mask_downscaling", "no_mask", "no_mem_", "multimask")
    if start[1].memory.kind == "none":
        # What the decoder says of an object to the memory that is not there.
        unused += ("obj_ptr", "no_obj", "memory", "object_pointer")
    unexpected = {name for name in still if not any(part in name for part in unused)}
    # The three multi-mask hypernetworks and click labels 0 take no part in this loss.
    allowed = ("output_hypernetworks_mlps_1", "output_hypernetworks_mlps_2")
    allowed += ("output_hypernetworks_mlps_3", "point_embeddings_0", "not_a_point")
    # Masks that somebody drew enter volumes by this one; the second block of the fuser stands
    # behind two layer scales of 1e-6, too small to move a norm's scale of 1 in three steps.
    allowed += ("mask_downsample", "fuser']['layers_1']['norm']['scale']")
    assert not {name for name in unexpected if not any(part in name for part in allowed)}


def test_teacher_follows_the_student(start, results):
    before, state = start[4], results[0]["one"][0]
    # After step 0 the teacher is the student (a_0 = 0), after step 1 the mean of both (a_1 = 1/2).
    net, ema = state["params"]["net"], state["ema"]
    token = np.abs(ema["class_tokens"] - net["class_tokens"]).max()
    assert 0 < token < np.abs(before["ema"]["class_tokens"] - net["class_tokens"]).max()
    assert count_params(ema) == count_params(net)


def test_a_nan_leaves_the_parameters_alone(start, results):
    driver = results[1]["one"]
    batch = {name: dict(part) for name, part in start[2].items()}
    batch["labelled"]["image"] = np.full_like(batch["labelled"]["image"], np.nan)
    state, metrics, _ = run(driver, start[4], batch, 1)
    assert not metrics[0]["finite"]
    assert state["step"] == 1
    for name in ("params", "ema", "opt_state"):
        same = jax.tree.map(np.array_equal, state[name], start[4][name])
        assert all(jax.tree.leaves(same)), name


def test_same_key_same_bits(start, results):
    again = run(results[1]["one"], start[4], start[2], 2)[0]
    same = jax.tree.map(np.array_equal, again, results[0]["one"][0])
    assert all(jax.tree.leaves(same))


def test_a_batch_that_devices_cannot_share_is_refused(start):
    model, options, _, optimizer, state = start
    with pytest.raises(ConfigError, match=r"train\.labelled_batch=6"):
        make_driver(model, with_train(options, labelled_batch=6), optimizer, state)


@pytest.mark.parametrize(
    ("before", "after"), [("one", "fsdp"), ("fsdp", "data"), ("data", "pmap"), ("pmap", "one")]
)
def test_a_state_is_restored_to_where_another_driver_wants_it(micro, tmp_path, before, after):
    model, options, _ = micro
    optimizer = optax.sgd(1e-2, momentum=0.0)
    rng = np.random.default_rng(0)
    block = {"kernel": rng.random((64, 192), np.float32), "bias": rng.random(192, np.float32)}
    state = jax.device_get(state_of({"net": {"block": block}}, optimizer))

    def driver(name):
        wanted = dataclasses.replace(options, mesh=MeshOptions(fsdp=4 if name == "fsdp" else 1))
        wanted = with_train(wanted, parallel="pmap" if name == "pmap" else "mesh")
        devices = jax.devices()[: 1 if name == "one" else 8]
        return make_driver(model, wanted, optimizer, state, devices)

    one, other = driver(before), driver(after)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, one.fetch(one.place_state(state)), meta={})
        restored = checkpointer.restore(other.target).state
    placed, expected = other.place_state(restored), other.place_state(state)
    assert jax.tree.map(lambda x: x.sharding, placed) == jax.tree.map(
        lambda x: x.sharding, expected
    )
    same = jax.tree.map(np.array_equal, jax.device_get(other.fetch(placed)), state)
    assert all(jax.tree.leaves(same))
    if after != "pmap":
        stays = jax.tree.map(lambda a, b: a is b, restored, placed)
        assert all(jax.tree.leaves(stays)), "nothing is moved twice"


@pytest.fixture(scope="module")
def supervised(micro):
    """`run` of the labelled half over any mesh: little to compile, the same exchanges."""
    model, options, batch = with_memory(micro, "none")
    semi = dataclasses.replace(options.semi, enabled=False, labelled_prompts="none")
    pcsw = dataclasses.replace(options.pcsw, enabled=False)
    options = dataclasses.replace(options, semi=semi, pcsw=pcsw)
    batch = {"labelled": batch["labelled"]}
    params = jax.jit(lambda k: init_all_params(model, options, k))(root_key(0))

    def take(optimizer, batch=batch, devices=None, steps=1, **changes):
        state = state_of(params, optimizer)
        wanted = dataclasses.replace(options, mesh=MeshOptions(**changes.pop("mesh", {})))
        wanted = with_train(wanted, **changes)
        driver = make_driver(model, wanted, optimizer, state, devices)
        placed = driver.place_state(state)
        return run(driver, state, batch, steps), placed, driver

    return take


@pytest.mark.parametrize(
    "mesh",
    [
        pytest.param({"fsdp": 4}, id="fsdp", marks=pytest.mark.slow),
        pytest.param({"fsdp": 2, "context": 2}, id="fsdp and context"),
    ],
)
def test_cut_states_and_cut_images_take_the_same_step(supervised, mesh):
    take = supervised
    optimizer = optax.sgd(1e-2, momentum=0.0)
    (_, metrics, grads), _, _ = take(optimizer, devices=jax.devices()[:1])
    (_, found, cut), placed, driver = take(optimizer, mesh=mesh)
    np.testing.assert_allclose(found[0]["loss"], metrics[0]["loss"], rtol=1e-5)
    np.testing.assert_allclose(found[0]["grad_norm"], metrics[0]["grad_norm"], rtol=1e-4)
    assert distance(grads[0], cut[0]) <= 1e-4 * metrics[0]["grad_norm"]
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(placed))
    held = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(placed))
    # A fifth of this tiny network is biases and norms, which stay whole.
    assert held < (0.2 + 1 / mesh["fsdp"]) * total
    assert driver.step._cache_size() == 1


@pytest.mark.slow
def test_micro_batches_are_averaged(supervised):
    """Clips 0, 2, 4, ... and 1, 3, 5, ... are batches of their own; 1 device or 4 alike."""
    take = supervised
    optimizer = optax.sgd(1e-2, momentum=0.0)
    (_, metrics, grads), _, _ = take(optimizer, devices=jax.devices()[:1], accumulate=2)
    (_, found, spread), _, _ = take(optimizer, devices=jax.devices()[:4], accumulate=2)
    np.testing.assert_allclose(found[0]["loss"], metrics[0]["loss"], rtol=1e-5)
    assert distance(grads[0], spread[0]) <= 1e-4 * metrics[0]["grad_norm"]


def test_a_micro_batch_is_every_second_clip_and_the_bank_goes_on():
    batch = {"x": jnp.arange(6.0)}

    def of_part(bank, part, number):
        total = jnp.sum(part["x"]) * (1 + number).astype(jnp.float32) + bank["seen"]
        return Gradients({"w": total}, total, {"n": total}, {"seen": bank["seen"] + 10})

    found = _accumulate(of_part, {"seen": jnp.zeros(())}, batch, 2)
    # (0 + 2 + 4) + 0 and (1 + 3 + 5) * 2 + 10
    assert found.loss == found.of_params["w"] == found.aux["n"] == (6 + 28) / 2
    assert found.bank["seen"] == 20


@pytest.mark.parametrize("method", ["supervised", "fixmatch", "unimatch_v2", "sss"])
def test_the_step_of_every_method_keeps_the_type_of_the_state(micro, method):
    """Weak types count: a first state that has them makes the second step compile again."""
    from sss_jax import config
    from sss_jax.train.optimizer import make_optimizer

    model, micro_options, batch = micro
    options = dataclasses.replace(
        config.load(f"demo:{method}"), model=micro_options.model, train=micro_options.train
    )
    shapes = jax.eval_shape(lambda k: init_all_params(model, options, k), root_key(0))
    optimizer = make_optimizer(options.optimizer, 10, shapes)
    state = jax.eval_shape(lambda params: state_of(params, optimizer), shapes)
    step = make_train_step(model, options, optimizer)
    out, metrics = jax.eval_shape(step, state, batch, root_key(0))
    assert ("loss_unlabelled" in metrics) == (method != "supervised")
    assert jax.tree.map(_type, out) == jax.tree.map(_type, state)


def _type(x):
    return x.shape, x.dtype, x.weak_type
