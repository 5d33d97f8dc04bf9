"""Signals, the lock of a run folder, and numbers that are not finite."""

import errno
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sss_jax.errors import DataError, NonFiniteError
from sss_jax.train import guard
from sss_jax.train.guard import (
    NonFiniteGuard,
    StopSignal,
    WorkdirLock,
    apply_if_finite,
)

# Finite numbers.


@jax.jit
def jitted_apply(finite, new, old):
    return apply_if_finite(finite, lambda: new, old)


def test_apply_if_finite_selects_whole_trees_without_leaking_nan():
    new = {"w": jnp.array([1.0, jnp.nan]), "n": jnp.int32(2), "b": jnp.array([True])}
    old = {"w": jnp.array([5.0, 6.0]), "n": jnp.int32(1), "b": jnp.array([False])}
    kept = jitted_apply(jnp.array(False), new, old)
    jax.tree.map(np.testing.assert_array_equal, kept, old)
    taken = jitted_apply(jnp.array(True), new, old)
    jax.tree.map(np.testing.assert_array_equal, taken, new)


def test_a_nonfinite_gradient_leaves_the_parameters_as_they_were():
    @jax.jit
    def step(w, x):
        loss, gradient = jax.value_and_grad(lambda w: jnp.sum(jnp.sqrt(w * x)))(w)
        finite = jnp.isfinite(loss) & jnp.all(jnp.isfinite(gradient))
        return apply_if_finite(finite, lambda: w - gradient, w), finite

    w = jnp.array([1.0, 2.0])
    # The loss is finite and its gradient is not: the derivative of sqrt at 0.
    after, finite = step(w, jnp.array([1.0, 0.0]))
    assert not finite
    np.testing.assert_array_equal(after, w)
    after, finite = step(w, jnp.array([1.0, 1.0]))
    assert finite
    assert not np.array_equal(after, w)


def flags(*bits: int):
    return [(step, jnp.array(bool(bit))) for step, bit in enumerate(bits)]


def test_guard_stops_at_the_first_bad_step_and_names_its_cases():
    watcher = NonFiniteGuard(1, lambda step: [f"case_{step}a", f"case_{step}b"])
    for step, finite in flags(1, 1, 0, 1):
        watcher.watch(step, finite, {"loss": jnp.float32(jnp.nan), "ce": jnp.float32(1)})
    with pytest.raises(NonFiniteError, match=r"^step 2: not finite: loss nan\. Cases: case_2a, "):
        watcher.check()
    watcher.check()


def test_guard_warns_below_the_limit_and_counts_over_checks(caplog):
    watcher = NonFiniteGuard(3, lambda step: [f"case_{step}"])
    for step, finite in flags(0, 1, 0):
        watcher.watch(step, finite)
    watcher.check({"loss": np.float32(np.inf)})
    assert "step 0: not finite: a gradient" in caplog.text
    assert "step 2: not finite: loss inf" in caplog.text
    assert "(2 of 2 allowed)" in caplog.text
    watcher.watch(3, jnp.array(True))
    watcher.check()
    watcher.watch(4, jnp.array(False))
    with pytest.raises(NonFiniteError, match="step 4"):
        watcher.check()


def test_guard_does_not_wait_for_the_device_while_watching():
    """No value may be fetched in the loop, where transfers are forbidden."""

    class Untouchable:
        def __bool__(self):
            raise AssertionError("the flag was read")

        __array__ = __float__ = __bool__

    watcher = NonFiniteGuard(1, lambda step: [])
    watcher.watch(0, Untouchable(), {"loss": Untouchable()})
    with pytest.raises(AssertionError, match="the flag was read"):
        watcher.check()


# Signals.


@pytest.mark.parametrize("name", StopSignal.SIGNALS)
def test_signal_sets_the_flag_and_handlers_are_put_back(name, capfd):
    number = getattr(signal, name)
    before = signal.getsignal(number)
    with StopSignal() as stop:
        assert not stop.requested
        assert not stop.agreed(0)
        os.kill(os.getpid(), number)
        assert stop.requested
        assert stop.agreed(1)
        assert stop.reason == name
    assert signal.getsignal(number) is before
    assert capfd.readouterr().err == f"\n{name}: stopping after this step\n"


def test_second_interrupt_stops_at_once():
    with StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.reason == "SIGINT"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_repeated_termination_stays_a_request():
    with StopSignal() as stop:
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGTERM)
        assert stop.reason == "SIGTERM"


def test_outside_the_main_thread_nothing_is_installed():
    seen = []

    def work():
        with StopSignal() as stop:
            seen.append((stop.requested, signal.getsignal(signal.SIGTERM)))

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(False, before)]


LOOP = """
import sys, time
import jax.numpy as jnp
from sss_jax.errors import Preempted
from sss_jax.train.checkpoint import Checkpointer
from sss_jax.train.guard import StopSignal, WorkdirLock
from pathlib import Path

folder = Path(sys.argv[1])
folder.mkdir(exist_ok=True)
try:
    with WorkdirLock(folder), StopSignal() as stop, Checkpointer(folder / "checkpoints") as c:
        restored = c.restore({"x": jnp.int32(0)})
        step = 0 if restored is None else restored.step
        print("ready", step, flush=True)
        for step in range(step + 1, 10**6):
            time.sleep(0.02)
            if stop.requested:
                c.save(step, {"x": jnp.int32(step)}, meta={})
                c.wait()
                print("saved", step, stop.reason, flush=True)
                raise Preempted("stopped")
except Preempted as error:
    sys.exit(error.exit_code)
"""


def start(folder) -> tuple[subprocess.Popen, int]:
    child = subprocess.Popen(
        [sys.executable, "-c", LOOP, str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "XLA_FLAGS": ""},
    )
    word, step = child.stdout.readline().split()
    assert word == "ready"
    return child, int(step)


def test_signalled_process_saves_and_exits_75_and_the_next_one_goes_on(tmp_path):
    folder, expected = tmp_path / "run", 0
    for name, group in (("SIGTERM", False), ("SIGINT", True)):
        child, step = start(folder)
        try:
            assert step == expected
            send = os.killpg if group else os.kill
            send(child.pid, getattr(signal, name))
            output, errors = child.communicate(timeout=10)
        finally:
            child.kill()
        assert child.returncode == 75, errors
        word, saved, reason = output.split()
        assert (word, reason) == ("saved", name)
        assert f"{name}: stopping after this step" in errors
        assert not (folder / ".lock").exists()
        expected = int(saved)


def test_killed_holder_leaves_a_lock_that_is_taken_over(tmp_path):
    folder = tmp_path / "run"
    child, _ = start(folder)
    try:
        with (
            pytest.raises(DataError, match=rf"in use by process {child.pid} on "),
            WorkdirLock(folder),
        ):
            pass
    finally:
        child.kill()
        child.communicate()
    assert (folder / ".lock").exists()
    with WorkdirLock(folder):
        assert json.loads((folder / ".lock").read_text())["pid"] == os.getpid()
    assert not (folder / ".lock").exists()


# The lock.


def test_second_lock_is_refused_and_the_first_one_stays(tmp_path):
    with WorkdirLock(tmp_path):
        for _ in range(2):
            with pytest.raises(
                DataError, match=rf"process {os.getpid()} on {socket.gethostname()}"
            ):
                WorkdirLock(tmp_path).__enter__()
        assert (tmp_path / ".lock").exists()
    with WorkdirLock(tmp_path):
        pass


def test_lock_is_released_when_the_run_fails(tmp_path):
    with pytest.raises(ZeroDivisionError), WorkdirLock(tmp_path):
        raise ZeroDivisionError
    with WorkdirLock(tmp_path):
        pass


def dead_pid() -> int:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


def holder(**changes) -> str:
    return json.dumps({**guard._myself(), **changes})


@pytest.fixture
def no_flock(monkeypatch):
    """A file system without locks: the lock file alone decides."""

    def refuse(descriptor, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(guard.fcntl, "flock", refuse)


@pytest.mark.usefixtures("no_flock")
@pytest.mark.parametrize(
    ("content", "free"),
    [
        pytest.param("", True, id="empty"),
        pytest.param("{torn", True, id="torn"),
        pytest.param("[1]", True, id="not a holder"),
        pytest.param("7", True, id="number"),
        pytest.param(lambda: holder(pid=dead_pid()), True, id="dead"),
        pytest.param(lambda: holder(started="boot/1"), True, id="number was reused"),
        pytest.param(lambda: holder(), False, id="alive"),
        pytest.param(lambda: holder(host="elsewhere", pid=dead_pid()), False, id="other host"),
    ],
)
def test_without_kernel_locks_the_named_process_decides(tmp_path, content, free):
    text = content() if callable(content) else content
    (tmp_path / ".lock").write_text(text)
    if free:
        with WorkdirLock(tmp_path):
            assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()
        assert not (tmp_path / ".lock").exists()
    else:
        with pytest.raises(DataError, match=r"in use by process \d+ on .* or remove .*/\.lock"):
            WorkdirLock(tmp_path).__enter__()
        assert (tmp_path / ".lock").read_text() == text


@pytest.mark.usefixtures("no_flock")
def test_without_kernel_locks_a_second_run_is_refused(tmp_path):
    with WorkdirLock(tmp_path), pytest.raises(DataError, match="in use"):
        WorkdirLock(tmp_path).__enter__()


def test_with_kernel_locks_a_left_over_file_of_any_host_is_free(tmp_path):
    """A run that moved to another machine after a crash must go on without a clean-up."""
    (tmp_path / ".lock").write_text(holder(host="elsewhere") + " " * 500)
    with WorkdirLock(tmp_path):
        assert json.loads((tmp_path / ".lock").read_text())["host"] == socket.gethostname()


def test_lock_removed_by_its_holder_in_between_is_taken_anew(tmp_path, monkeypatch):
    take, calls = guard._flock, []

    def holder_leaves_first(descriptor):
        if not calls:
            (tmp_path / ".lock").unlink()
        calls.append(descriptor)
        return take(descriptor)

    monkeypatch.setattr(guard, "_flock", holder_leaves_first)
    with WorkdirLock(tmp_path):
        assert len(calls) == 2
        with pytest.raises(DataError):
            WorkdirLock(tmp_path).__enter__()


def test_folder_that_cannot_be_written_is_one_clear_message(tmp_path, monkeypatch):
    def read_only(*_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    with pytest.raises(DataError, match=r"absent/\.lock: cannot be written .*--workdir"):
        WorkdirLock(tmp_path / "absent").__enter__()
    monkeypatch.setattr(os, "open", read_only)
    with pytest.raises(DataError, match=re.escape("cannot be written (Read-only file system)")):
        WorkdirLock(tmp_path).__enter__()


def test_object_storage_is_not_locked():
    with WorkdirLock("gs://bucket/run") as lock:
        assert not lock.path.exists()


PEER = """
import os, sys
import jax
number, port, service = int(sys.argv[1]), sys.argv[2], sys.argv[3] == "service"
jax.config.update("jax_enable_preemption_service", service)
jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=number)
import time
import jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from sss_jax.train.checkpoint import Checkpointer
from sss_jax.train.guard import StopSignal

mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
split = NamedSharding(mesh, P("data"))
values = np.arange(8, dtype=np.float32).reshape(4, 2)
state = {"w": jax.make_array_from_callback((4, 2), split, lambda i: values[i])}
with StopSignal() as stop, Checkpointer(sys.argv[4], timeout=30) as checkpointer:
    print("ready", flush=True)
    for step in range(500):
        time.sleep(0.02)
        if stop.agreed(step):
            checkpointer.save(step, state, meta={"by": number})
            checkpointer.wait()
            restored = checkpointer.restore(state)
            for shard in restored.state["w"].addressable_shards:
                np.testing.assert_array_equal(shard.data, values[shard.index])
            print("stopped", step, restored.meta["by"], flush=True)
            break
jax.distributed.shutdown()
"""


@pytest.mark.slow
@pytest.mark.parametrize("service", ["service", "plain"])
@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_two_processes_stop_and_save_at_the_same_step(tmp_path, service, name):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    children = [
        subprocess.Popen(
            [sys.executable, "-c", PEER, str(number), port, service, str(tmp_path / "steps")],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=1"},
        )
        for number in range(2)
    ]
    try:
        for child in children:
            assert child.stdout.readline() == "ready\n", child.stderr.read()
        os.kill(children[1].pid, getattr(signal, name))
        outputs = [child.communicate(timeout=60) for child in children]
    finally:
        for child in children:
            child.kill()
    assert [child.returncode for child in children] == [0, 0], outputs
    # The collectives' library prints to standard output too.
    first, second = (output[output.index("stopped") :].split() for output, _ in outputs)
    assert first == second
    assert (first[0], first[2]) == ("stopped", "0")
    # The step of two processes is whole for one.
    from sss_jax.train.checkpoint import Checkpointer

    with Checkpointer(tmp_path / "steps") as checkpointer:
        loaded, _ = checkpointer.load_params("latest", "w")
    np.testing.assert_array_equal(loaded, np.arange(8, dtype=np.float32).reshape(4, 2))
    assert sorted(p.name for p in (tmp_path / "steps" / first[1]).glob("manifest-*")) == [
        "manifest-0.json",
        "manifest-1.json",
    ]
