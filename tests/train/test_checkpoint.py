"""Checkpoints under faults: whatever happens to the files, a restored state is the saved one."""

import errno
import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from sss_jax.errors import CheckpointError
from sss_jax.train import array_files, manifest, step_folders
from sss_jax.train.checkpoint import Checkpointer, check_identity

META = {"config": {"model": {"preset": "nano"}}, "seed": 7}
OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))


def make_state(step: int) -> dict:
    """A state whose every leaf depends on the step, with the node types of a real one."""
    rng = np.random.default_rng(step)
    params = {
        "trunk": {"kernel": jnp.asarray(rng.normal(size=(16, 33)).astype(np.float32))},
        "head": {"bias": jnp.asarray(rng.normal(size=5), jnp.bfloat16)},
    }
    opt_state = jax.tree.map(lambda x: x + jnp.full((), step, x.dtype), OPTIMIZER.init(params))
    ema = jax.tree.map(lambda x: x * jnp.full((), 0.5, x.dtype), params)
    return {"params": params, "ema": ema, "opt_state": opt_state, "step": jnp.int32(step)}


def same(a, b) -> bool:
    """Equal structure, dtypes and bits."""
    if jax.tree.structure(a) != jax.tree.structure(b):
        return False
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(
        x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in pairs
    )


def target() -> dict:
    return jax.eval_shape(lambda: make_state_shapes)


make_state_shapes = make_state(0)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """Folder with the steps 10 and 20; tests copy it."""
    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    with Checkpointer(folder) as checkpointer:
        for step in (10, 20):
            checkpointer.save(step, make_state(step), meta=META, metrics={"dice": 1.0 / step})
    return folder


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "checkpoints"))


def files_of(step_folder: Path) -> list[Path]:
    return sorted(path for path in step_folder.rglob("*") if path.is_file())


def flip(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


# What is saved comes back.


def test_restores_newest_with_its_meta(folder):
    with Checkpointer(folder) as checkpointer:
        restored = checkpointer.restore(target())
    assert restored.step == 20
    assert restored.meta == META
    assert restored.metrics == {"dice": 0.05}
    assert same(restored.state, make_state(20))
    assert type(restored.state["opt_state"]) is type(OPTIMIZER.init({}))


def test_restores_one_step_into_concrete_arrays(folder):
    with Checkpointer(folder) as checkpointer:
        assert same(checkpointer.restore_step(10, make_state(0)).state, make_state(10))
        with pytest.raises(CheckpointError, match=r"no checkpoint 15 .* it has \[10, 20\]"):
            checkpointer.restore_step(15, target())


def test_nothing_saved_is_none_not_an_error(tmp_path):
    with Checkpointer(tmp_path / "absent") as checkpointer:
        assert checkpointer.restore(target()) is None
        assert checkpointer.latest_step() is None
        assert checkpointer.best_step() is None
        with pytest.raises(CheckpointError, match="train first"):
            checkpointer.load_params()
    assert not (tmp_path / "absent").exists()


def test_load_params_needs_no_target(folder):
    with Checkpointer(folder) as checkpointer:
        params, meta = checkpointer.load_params("latest", "ema")
        best, best_meta = checkpointer.load_params("best", "params")
        exact, _ = checkpointer.load_params(10, "params")
        with pytest.raises(CheckpointError, match="no 'teacher', but ema, opt_state, params, step"):
            checkpointer.load_params("best", "teacher")
    assert meta["step"] == 20
    assert meta["config"] == META["config"]
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(params))
    assert same(params, jax.tree.map(np.asarray, make_state(20)["ema"]))
    assert best_meta["step"] == 10
    assert same(best, exact)
    assert same(best, jax.tree.map(np.asarray, make_state(10)["params"]))


def test_step_is_an_ordinary_orbax_checkpoint(folder):
    import orbax.checkpoint as ocp

    with (
        ocp.PyTreeCheckpointer() as plain,
        pytest.warns(UserWarning, match="Sharding info not provided"),
    ):
        read = plain.restore(folder / "20")
    np.testing.assert_array_equal(
        read["params"]["trunk"]["kernel"], make_state(20)["params"]["trunk"]["kernel"]
    )


DTYPES = ("float32", "bfloat16", "float16", "int32", "int8", "uint8", "uint32", "bool")


@settings(max_examples=15, deadline=None)
@given(
    dtype=st.sampled_from(DTYPES),
    shape=st.lists(st.integers(1, 5), max_size=3),
    content=st.binary(min_size=500, max_size=500),
)
def test_every_bit_pattern_survives(tmp_path_factory, dtype, shape, content):
    kind = jnp.dtype(dtype)
    count = int(np.prod(shape, dtype=int))
    raw = np.frombuffer(content, np.uint8)[: count * kind.itemsize]
    raw = raw % 2 if dtype == "bool" else raw
    leaf = raw.copy().view(kind).reshape(shape)
    tree = {"x": leaf, "y": [jnp.asarray(leaf), {"a/b": jnp.asarray(leaf)}]}
    with Checkpointer(tmp_path_factory.mktemp("bits")) as checkpointer:
        checkpointer.save(0, tree, meta={})
        restored = checkpointer.restore(tree).state
    assert isinstance(restored["x"], np.ndarray)
    assert same(restored, tree)


def test_donating_the_saved_buffers_is_safe(tmp_path):
    """A training step overwrites in place what is still being written."""
    advance = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    values = np.arange(2**18, dtype=np.float32)
    state = {"w": jnp.asarray(values) * 1, "v": jnp.asarray(values) * 2}
    like = jax.eval_shape(lambda: state)
    with Checkpointer(tmp_path, keep_last=4) as checkpointer:
        for step in range(4):
            checkpointer.save(step, state, meta={})
            for _ in range(10):
                state = advance(state)
            jax.block_until_ready(state)
        for step in range(4):
            restored = checkpointer.restore_step(step, like).state
            np.testing.assert_array_equal(restored["w"], values + 10 * step)
            np.testing.assert_array_equal(restored["v"], values * 2 + 10 * step)


def mesh_of(*shape: int) -> jax.sharding.Mesh:
    names = ("data", "model")[: len(shape)]
    return jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * len(shape))


@pytest.mark.parametrize("spec", [P(), P("data"), P(None, "data")])
def test_restores_onto_other_devices(tmp_path, spec):
    values = np.arange(16 * 8, dtype=np.float32).reshape(16, 8)
    eight, four_two, one = mesh_of(8), mesh_of(4, 2), jax.devices()[3]
    state = {"w": jax.device_put(values, NamedSharding(eight, spec))}
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(0, state, meta={})
        for sharding in (
            NamedSharding(four_two, P("model", "data")),
            NamedSharding(eight, P()),
            jax.sharding.SingleDeviceSharding(one),
        ):
            like = {"w": jax.ShapeDtypeStruct((16, 8), jnp.float32, sharding=sharding)}
            restored = checkpointer.restore(like).state["w"]
            assert restored.sharding.is_equivalent_to(sharding, 2)
            np.testing.assert_array_equal(restored, values)


def test_sharded_leaf_is_checked_region_by_region(tmp_path):
    values = np.arange(64, dtype=np.float32).reshape(16, 4)
    state = {"w": jax.device_put(values, NamedSharding(mesh_of(8), P("data")))}
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(0, state, meta={})
        checkpointer.wait()
        record = manifest.read(checkpointer.folder / "0")
    regions = record.leaves[("w",)].regions
    assert sorted(region.start for region in regions) == [(2 * i, 0) for i in range(8)]
    for flat in range(64):
        changed = values.copy()
        changed.reshape(-1)[flat] += 1
        with pytest.raises(manifest.Damage, match="w: its bytes"):
            manifest.verify(record, {("w",): changed})


# Which steps are kept.


def test_keeps_the_newest_and_the_best(tmp_path):
    with Checkpointer(tmp_path, keep_last=2) as checkpointer:
        for step, dice in enumerate([0.5, 0.9, 0.6, float("nan"), 0.65]):
            checkpointer.save(step, {"x": jnp.float32(step)}, meta={}, metrics={"dice": dice})
        checkpointer.wait()
        assert checkpointer.steps() == [1, 3, 4]
        assert checkpointer.best_step() == 1
        assert checkpointer.latest_step() == 4
    with Checkpointer(tmp_path) as again:
        assert again.best_step() == 1
        assert again.load_params("best", "x")[1]["metrics"] == {"dice": 0.9}


def test_equal_scores_prefer_the_newer(tmp_path):
    with Checkpointer(tmp_path, keep_last=3) as checkpointer:
        for step in (1, 2, 3):
            score = {"dice": 0.5} if step < 3 else None
            checkpointer.save(step, {"x": jnp.float32(step)}, meta={}, metrics=score)
        checkpointer.wait()
        assert checkpointer.best_step() == 2


def test_no_score_makes_best_the_latest_and_says_so(tmp_path, caplog):
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, {"ema": jnp.float32(1)}, meta={})
        checkpointer.save(2, {"ema": jnp.float32(2)}, meta={}, metrics={"dice": float("nan")})
        _, meta = checkpointer.load_params("best")
    assert meta["step"] == 2
    assert "has a score; the latest is used" in caplog.text


def test_known_step_is_not_written_again_but_gets_its_score(folder):
    with Checkpointer(folder) as checkpointer:
        checkpointer.restore(target())
        before = {path: path.stat().st_mtime_ns for path in files_of(folder / "20")}
        assert not checkpointer.save(20, make_state(20), meta=META, metrics={"dice": 0.99})
        checkpointer.wait()
        after = {path: path.stat().st_mtime_ns for path in files_of(folder / "20")}
        changed = {path.name for path in after if after[path] != before[path]}
        assert changed == {"manifest-0.json"}
        assert checkpointer.best_step() == 20
        restored = checkpointer.restore(target())
    assert restored.metrics == {"dice": 0.99}
    assert restored.meta == META


def test_step_left_by_another_object_is_replaced(folder):
    with Checkpointer(folder) as checkpointer:
        assert checkpointer.save(20, make_state(21), meta={})
        assert same(checkpointer.restore(target()).state, make_state(21))


def test_step_that_was_removed_by_hand_is_written_again(folder):
    with Checkpointer(folder) as checkpointer:
        assert checkpointer.restore(target()).step == 20
        shutil.rmtree(folder / "20")
        assert checkpointer.save(20, make_state(20), meta=META)
        checkpointer.wait()
        assert checkpointer.steps() == [10, 20]


def test_old_step_that_cannot_be_removed_does_not_stop_the_run(tmp_path, monkeypatch, caplog):
    def refuse(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(step_folders, "remove", refuse)
    with Checkpointer(tmp_path, keep_last=1) as checkpointer:
        for step in (1, 2):
            checkpointer.save(step, {"x": jnp.float32(step)}, meta={})
        checkpointer.wait()
        assert checkpointer.steps() == [1, 2]
    assert "stay: [Errno 13] Permission denied" in caplog.text


# Damage.


def assert_falls_back(folder: Path, caplog, expected: int = 10) -> str:
    """Restore, expect step 10 with exactly one warning line, and return it."""
    caplog.clear()
    with Checkpointer(folder) as checkpointer:
        restored = checkpointer.restore(target())
    assert restored.step == expected
    assert same(restored.state, make_state(expected))
    warned = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert len(warned) == 1
    assert "\n" not in warned[0]
    assert "tensorstore_spec" not in warned[0]
    return warned[0]


def trial(folder: Path, scratch: Path, path: Path, bit: int, caplog) -> bool:
    """Flip one bit; return whether it was detected. Undetected is right only if harmless."""
    shutil.rmtree(scratch, ignore_errors=True)
    shutil.copytree(folder, scratch)
    damaged = scratch / path.relative_to(folder)
    flip(damaged, bit)
    caplog.clear()
    with Checkpointer(scratch) as checkpointer:
        restored = checkpointer.restore(target())
    assert same(restored.state, make_state(restored.step))
    assert restored.meta == META
    if restored.step == 20:
        return False
    assert path.name in caplog.text
    return True


UNREAD = {"commit_success.txt", "_CHECKPOINT_METADATA"}


def random_trials(folder: Path, scratch: Path, count: int, seed: int, caplog) -> None:
    chooser = random.Random(seed)
    files = [path for path in files_of(folder / "20") if path.stat().st_size]
    for index in range(count):
        path = files[index % len(files)] if index < 2 * len(files) else chooser.choice(files)
        bit = chooser.randrange(8 * path.stat().st_size)
        detected = trial(folder, scratch, path, bit, caplog)
        assert detected == (path.name not in UNREAD), (path, bit)


def test_one_flipped_bit_in_any_file(folder, tmp_path, caplog):
    random_trials(folder, tmp_path / "scratch", 36, 0, caplog)


@pytest.mark.slow
def test_200_flipped_bits(folder, tmp_path, caplog):
    random_trials(folder, tmp_path / "scratch", 200, 1, caplog)


def test_every_byte_of_a_manifest_is_guarded(folder):
    path = folder / "20" / "manifest-0.json"
    text = path.read_bytes()
    assert manifest.unseal(text)["step"] == 20
    for index in range(len(text)):
        for bit in (0, 5):  # 5 turns a letter's case and a space into nothing visible
            changed = bytearray(text)
            changed[index] ^= 1 << bit
            with pytest.raises(manifest.Damage):
                manifest.unseal(bytes(changed))
    for cut in (0, 1, len(text) // 2, len(text) - 1):
        with pytest.raises(manifest.Damage):
            manifest.unseal(text[:cut])


def test_wrong_values_in_whole_files_are_caught_by_the_leaf_checksum(folder, caplog, monkeypatch):
    """Files that are as written can still hold other values than the state had."""
    read = array_files.Handler.restore

    def corrupt(self, directory, args):
        arrays = read(self, directory, args)
        if directory.name == "20":
            kernel = arrays["ema", "trunk", "kernel"] = arrays["ema", "trunk", "kernel"].copy()
            kernel.view(np.uint8).reshape(-1)[1000] ^= 4
        return arrays

    monkeypatch.setattr(array_files.Handler, "restore", corrupt)
    message = assert_falls_back(folder, caplog)
    assert "ema/trunk/kernel: its bytes do not match their checksum" in message


def test_cast_on_the_way_is_caught(folder, caplog, monkeypatch):
    read = array_files.Handler.restore

    def cast(self, directory, args):
        arrays = read(self, directory, args)
        if directory.name == "20":
            arrays["step",] = arrays["step",].astype(np.int64)
        return arrays

    monkeypatch.setattr(array_files.Handler, "restore", cast)
    assert "step: int64[], saved as int32[]" in assert_falls_back(folder, caplog)


def largest(step_folder: Path) -> Path:
    return max(files_of(step_folder), key=lambda path: path.stat().st_size)


def truncate(step_folder):
    path = next(iter((step_folder / "ocdbt.process_0" / "d").iterdir()))
    os.truncate(path, path.stat().st_size - 1)
    return path.name


def delete_data(step_folder):
    path = next(iter((step_folder / "d").iterdir()))
    path.unlink()
    return f"{path.name}: is missing"


def delete_leaf_manifest(step_folder):
    (step_folder / "manifest-0.json").unlink()
    return "manifest-0.json: cannot be read"


def delete_file_list(step_folder):
    (step_folder / "files.json").unlink()
    return "files.json: cannot be read"


def empty_but_committed(step_folder):
    for path in files_of(step_folder):
        if path.name != "commit_success.txt":
            path.unlink()
    return "manifest-0.json"


def uncommitted(step_folder):
    (step_folder / "commit_success.txt").unlink()
    return "without commit_success.txt"


def empty_folder(step_folder):
    shutil.rmtree(step_folder)
    step_folder.mkdir()
    return "without commit_success.txt"


def another_step_copied_over(step_folder):
    shutil.rmtree(step_folder)
    shutil.copytree(step_folder.with_name("10"), step_folder)
    return "its manifest belongs to step 10"


def manifest_of_another_step(step_folder):
    shutil.copy(step_folder.with_name("10") / "manifest-0.json", step_folder)
    return "its manifest belongs to step 10"


def arrays_of_another_step(step_folder):
    """Every file list agrees with its files; only the leaf checksums can tell."""
    manifest_file = (step_folder / "manifest-0.json").read_bytes()
    another_step_copied_over(step_folder)
    (step_folder / "manifest-0.json").write_bytes(manifest_file)
    return "its bytes do not match their checksum"


def zeros(step_folder):
    path = largest(step_folder)
    path.write_bytes(bytes(path.stat().st_size))
    return path.name


def text_instead(step_folder):
    path = step_folder / "manifest.ocdbt"
    path.write_text("<html>404</html>")
    return "manifest.ocdbt: 16 bytes"


def folder_instead_of_file(step_folder):
    path = step_folder / "_METADATA"
    path.unlink()
    path.mkdir()
    return "_METADATA"


DAMAGES = [
    truncate,
    delete_data,
    delete_leaf_manifest,
    delete_file_list,
    empty_but_committed,
    uncommitted,
    empty_folder,
    another_step_copied_over,
    manifest_of_another_step,
    arrays_of_another_step,
    zeros,
    text_instead,
    folder_instead_of_file,
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_newest_step_falls_back(folder, caplog, capfd, damage):
    expected = damage(folder / "20")
    assert expected in assert_falls_back(folder, caplog)
    shown = capfd.readouterr()
    assert "Traceback" not in shown.err
    assert "tensorstore" not in shown.err.lower()


def test_stray_names_are_not_steps(folder):
    for name in ("030", "-5", "30.tmp", "notes", "٣"):
        shutil.copytree(folder / "10", folder / name)
    (folder / "40").write_text("a file")
    with Checkpointer(folder) as checkpointer:
        assert checkpointer.steps() == [10, 20]
        assert checkpointer.restore(target()).step == 20


def test_all_damaged_is_refused_with_the_list(folder):
    truncate(folder / "20")
    delete_leaf_manifest(folder / "10")
    with Checkpointer(folder) as checkpointer:
        with pytest.raises(CheckpointError) as caught:
            checkpointer.restore(target())
        with pytest.raises(CheckpointError, match="every checkpoint is damaged"):
            checkpointer.load_params("latest")
    message = str(caught.value)
    assert message.index(str(folder / "20")) < message.index(str(folder / "10"))
    assert "manifest-0.json" in message
    assert "--fresh" in message
    assert caught.value.exit_code == 1
    assert sorted(path.name for path in folder.iterdir()) == ["10", "20"]


def test_damaged_best_is_refused_but_damaged_latest_falls_back(folder, caplog):
    truncate(folder / "10")
    with (
        Checkpointer(folder) as checkpointer,
        pytest.raises(CheckpointError, match=r"10 is damaged.*\n.*another step \[20\]"),
    ):
        checkpointer.load_params("best")
    truncate(folder / "20")
    shutil.copytree(folder / "20", folder / "30")
    with Checkpointer(folder) as checkpointer, pytest.raises(CheckpointError, match="damaged"):
        checkpointer.restore_step(20, target())


def test_damaged_step_is_written_again_and_does_not_push_out_good_ones(folder):
    truncate(folder / "20")
    with Checkpointer(folder, keep_last=2) as checkpointer:
        assert checkpointer.restore(target()).step == 10
        checkpointer.save(15, make_state(15), meta=META)
        checkpointer.wait()
        assert checkpointer.steps() == [10, 15, 20]
        assert checkpointer.save(20, make_state(20), meta=META)
        checkpointer.wait()
        assert checkpointer.steps() == [10, 15, 20][0 if checkpointer.best_step() == 10 else 1 :]
        assert same(checkpointer.restore(target()).state, make_state(20))


# Another state is not damage.


def wrong_shape(state):
    state["params"]["trunk"]["kernel"] = jnp.zeros((16, 34))
    return r"params/trunk/kernel: saved float32\[16, 33\], now float32\[16, 34\]"


def wrong_dtype(state):
    state["step"] = jnp.zeros((), jnp.uint32)
    return r"step: saved int32\[\], now uint32\[\]"


def missing_leaf(state):
    del state["ema"]["head"]["bias"]
    return r"ema/head/bias: saved bfloat16\[5\], now nothing"


def extra_leaf(state):
    state["ema"]["new"] = jnp.zeros(3)
    return r"ema/new: saved nothing, now float32\[3\]"


def other_optimizer(state):
    state["opt_state"] = optax.sgd(0.1, momentum=0.9).init(state["params"])
    return r"opt_state/0/trace/head/bias: saved nothing.*opt_state/1/0/count: saved int32\[\]"


@pytest.mark.parametrize(
    "change", [wrong_shape, wrong_dtype, missing_leaf, extra_leaf, other_optimizer]
)
def test_other_state_is_refused_by_name(folder, change):
    state = make_state(0)
    pattern = change(state)
    with (
        Checkpointer(folder) as checkpointer,
        pytest.raises(CheckpointError, match=f"(?s)holds another state.*{pattern}.*--fresh"),
    ):
        checkpointer.restore(state)


@pytest.mark.parametrize("leaf", [3, 0.5, "text", jax.random.key(0), None])
def test_only_plain_arrays_are_saved(tmp_path, leaf):
    with Checkpointer(tmp_path) as checkpointer:
        if leaf is None:  # an empty subtree
            assert checkpointer.save(0, {"x": jnp.ones(2), "bad": leaf}, meta={})
            return
        with pytest.raises(TypeError, match=r"a/bad: cannot save"):
            checkpointer.save(0, {"x": jnp.ones(2), "a": {"bad": leaf}}, meta={})
        with pytest.raises((TypeError, ValueError)):
            checkpointer.save(0, {"x": jnp.ones(2)}, meta={"bad": {1, 2}})
        assert checkpointer.steps() == []


# Failing saves.


def fail_at(monkeypatch, step: int, error: Exception) -> None:
    write = array_files._write_manifest

    def broken(directory, body, shapes, copies):
        if body["step"] == step:
            raise error
        write(directory, body, shapes, copies)

    monkeypatch.setattr(array_files, "_write_manifest", broken)


def wait_for_error(checkpointer: Checkpointer) -> CheckpointError:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            checkpointer.check()
        except CheckpointError as error:
            return error
        time.sleep(0.01)
    raise AssertionError("no error was reported")


def test_failed_background_save_is_reported_and_later_ones_go_on(tmp_path, monkeypatch, capfd):
    fail_at(monkeypatch, 2, RuntimeError("the pipe burst\nand more"))
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, make_state(1), meta=META)
        checkpointer.save(2, make_state(2), meta=META)
        error = wait_for_error(checkpointer)
        assert f"checkpoint {tmp_path / '2'} could not be saved: RuntimeError: the pipe" in str(
            error
        )
        assert "and more" not in str(error)
        checkpointer.check()
        assert checkpointer.steps() == [1]
        assert not (tmp_path / "2").exists()
        assert checkpointer.save(3, make_state(3), meta=META)
        checkpointer.wait()
        assert checkpointer.steps() == [1, 3]
        assert same(checkpointer.restore(target()).state, make_state(3))
    assert "Traceback" not in capfd.readouterr().err


def test_failure_found_by_the_next_save_does_not_skip_it(tmp_path, monkeypatch):
    fail_at(monkeypatch, 1, RuntimeError("the pipe burst"))
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(1, make_state(1), meta=META)
    with pytest.raises(CheckpointError, match=r"/1 could not be saved"):
        checkpointer.save(2, make_state(2), meta=META)
    checkpointer.close()
    assert checkpointer.steps() == [2]


def test_failed_last_save_is_raised_by_close(tmp_path, monkeypatch):
    fail_at(monkeypatch, 1, OSError(errno.EIO, "Input/output error"))
    with pytest.raises(CheckpointError, match="Input/output error"), Checkpointer(tmp_path) as c:
        c.save(1, make_state(1), meta=META)


def test_failed_save_does_not_hide_the_error_of_the_run(tmp_path, monkeypatch, caplog):
    fail_at(monkeypatch, 1, RuntimeError("the pipe burst"))

    def run():
        with Checkpointer(tmp_path) as checkpointer:
            checkpointer.save(1, make_state(1), meta=META)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run()
    assert "the pipe burst" in caplog.text


def test_folder_that_cannot_be_made_is_an_error_at_once(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with Checkpointer(tmp_path / "file" / "checkpoints") as checkpointer:
        with pytest.raises(CheckpointError, match="could not be saved"):
            checkpointer.save(1, make_state(1), meta=META)
        assert checkpointer.latest_step() is None


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 3 MiB, where this process may mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(disk)]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("cannot mount a small file system here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def as_bytes(step: int) -> dict:
    """A state of 2 MB that does not compress."""
    raw = np.random.default_rng(step).integers(0, 256, 2_000_000, np.uint8)
    return {"w": jnp.asarray(raw)}


# Orbax closes its event loop at the first write that fails; others may answer to it afterwards.
@pytest.mark.filterwarnings("ignore:Exception ignored in:pytest.PytestUnraisableExceptionWarning")
def test_full_disk_leaves_the_earlier_step_whole(small_disk, capfd):
    with Checkpointer(small_disk) as checkpointer:
        checkpointer.save(1, as_bytes(1), meta=META)
        checkpointer.wait()
        checkpointer.save(2, as_bytes(2), meta=META)
        with pytest.raises(CheckpointError) as caught:
            checkpointer.wait()
        assert "No space left" in str(caught.value)
        assert "It needs 2,000,000 bytes, " in str(caught.value)
        assert checkpointer.steps() == [1]
        assert same(checkpointer.restore(as_bytes(0)).state, as_bytes(1))
        # The space of the failed save is free again, and a save that fits succeeds.
        checkpointer.save(3, {"w": jnp.ones(9)}, meta=META)
        checkpointer.wait()
        assert checkpointer.latest_step() == 3
    assert "Traceback" not in capfd.readouterr().err


def test_full_disk_as_the_manifest_is_written(tmp_path, monkeypatch):
    fail_at(monkeypatch, 2, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, make_state(1), meta=META)
        checkpointer.save(2, make_state(2), meta=META)
        error = wait_for_error(checkpointer)
        assert "No space left" in str(error)
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(make_state(2)))
        assert f"It needs {size:,} bytes" in str(error)
        assert same(checkpointer.restore(target()).state, make_state(1))


# Kills.

SAVER = """
import sys, itertools
import numpy as np, jax.numpy as jnp
from sss_jax.train.checkpoint import Checkpointer
with Checkpointer(sys.argv[1]) as checkpointer:
    restored = checkpointer.restore({"w": jnp.zeros((64, 1024)), "step": jnp.int32(0)})
    start = 0 if restored is None else restored.step
    print("ready", start, flush=True)
    for step in itertools.count(start + 1):
        state = {"w": jnp.full((64, 1024), float(step)), "step": jnp.int32(step)}
        checkpointer.save(step, state, meta={"step": step}, metrics={"dice": (step * 7 % 10) / 10})
"""


def kill_while_saving(folder: Path, times: int, seed: int) -> None:
    chooser = random.Random(seed)
    seen = 0
    for _ in range(times):
        environment = {**os.environ, "XLA_FLAGS": ""}
        child = subprocess.Popen(
            [sys.executable, "-c", SAVER, str(folder)], stdout=subprocess.PIPE, env=environment
        )
        try:
            word, start = child.stdout.readline().split()
            assert word == b"ready"
            assert int(start) >= seen
            time.sleep(chooser.uniform(0.0, 0.5))
        finally:
            os.kill(child.pid, signal.SIGKILL)
            child.communicate()
        with Checkpointer(folder) as checkpointer:
            steps = checkpointer.steps()
            for step in steps:
                like = {"w": np.zeros((64, 1024), np.float32), "step": np.array(0, np.int32)}
                state = checkpointer.restore_step(step, like).state
                assert (state["w"] == step).all()
                assert state["step"] == step
        seen = max(steps, default=0)
    # The next run clears what the kills left: no folder but whole steps.
    with Checkpointer(folder) as checkpointer:
        checkpointer.save(seen + 1, {"w": jnp.ones(3)}, meta={})
        checkpointer.wait()
        names = sorted(int(path.name) for path in folder.iterdir())
        assert names == checkpointer.steps()


def test_sigkill_while_saving(tmp_path):
    kill_while_saving(tmp_path / "checkpoints", 3, 0)


@pytest.mark.slow
def test_20_sigkills_while_saving(tmp_path):
    kill_while_saving(tmp_path / "checkpoints", 20, 1)


def test_leftovers_are_cleared_by_the_first_save_only(folder):
    """A reader, such as `predict` on a running training, must not touch anything."""
    (folder / "30").mkdir()
    (folder / "30" / "_METADATA").write_text("{")
    shutil.copytree(folder / "10", folder / "5.deleted")
    copied = shutil.copytree(folder / "10", folder / "7")
    (copied / "commit_success.txt").unlink()
    before = {path.name for path in folder.iterdir()}
    with Checkpointer(folder) as checkpointer:
        checkpointer.restore(target())
        checkpointer.load_params("latest")
        assert {path.name for path in folder.iterdir()} == before
        checkpointer.save(40, make_state(40), meta=META)
        checkpointer.wait()
        left = {path.name for path in folder.iterdir()}
    # A whole step without its commit file may be somebody's copy: it stays, unused.
    assert left == {"7", "10", "20", "40"}


# Identity.

IDENTITY = {
    "method": "sss",
    "seed": 0,
    "split_digest": "ab",
    "model.preset": "tiny",
    "model.num_classes": 1,
    "train.labelled_batch": 4,
    "train.unlabelled_batch": 4,
    "semi.teacher": "ema",
    "data.normalise": "percentile",
}
OTHER = {"sss": "supervised", 0: 1, "ab": "cd", "tiny": "small", 1: 2, 4: 8, "ema": "student"}


@pytest.mark.parametrize("field", IDENTITY)
def test_identity_names_the_differing_field(field):
    now = {**IDENTITY, field: OTHER.get(IDENTITY[field], "other")}
    with pytest.raises(CheckpointError) as caught:
        check_identity(IDENTITY, now)
    saved, current = json.dumps(IDENTITY[field]), json.dumps(now[field])
    assert f"\n  {field}: saved {saved}, now {current}\n" in str(caught.value)
    assert str(caught.value).count(": saved") == 1
    assert "--fresh" in str(caught.value)


def test_identity_of_groups_and_absent_fields():
    saved = {"model": {"preset": "tiny", "size": 64}, "train": {"seed": 0, "log_every": 1}}
    now = {"model": {"preset": "tiny", "size": (64)}, "train": {"seed": 0, "log_every": 9}}
    check_identity(saved, now, ["model", "train.seed"])
    with pytest.raises(CheckpointError, match=r"train\.log_every: saved 1, now 9"):
        check_identity(saved, now)
    with pytest.raises(CheckpointError, match=r"model\.new: saved nothing, now true"):
        check_identity(saved, {**now, "model": {**now["model"], "new": True}}, ["model"])
    check_identity({"levels": (4, 8)}, {"levels": [4, 8]})
    check_identity({"modelling": 1}, {"modelling": 2}, ["model"])
