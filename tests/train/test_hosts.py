"""Several processes on this machine: the run of one, an orderly stop, and the loss of a partner."""

import json
import signal
import socket
import subprocess
import time

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from sss_jax.data.synthetic import write_phantoms
from sss_jax.errors import CheckpointError, ConfigError, DataError, PeerLost
from sss_jax.options import MeshOptions
from sss_jax.train import hosts
from sss_jax.train.sharding import CLIPS, make_mesh
from tests.processes import environment, train_command

CONFIG = """
from sss_jax.configs import common

def get_config(arg="supervised"):
    config = common.from_scratch(common.base(arg), image_size=32, steps={steps})
    config.model.num_classes = 3
    config.data.clip_slices = 2
    config.train.labelled_batch = 4
    config.train.log_every = 1
    config.train.save_every = 2
    config.train.eval_every = 0
    config.data.threads = 0
    return config
"""


def test_one_process_agrees_with_itself():
    assert hosts.is_lead()
    assert hosts.decided_by_lead(True)
    assert not hosts.decided_by_lead(False)
    hosts.refuse_differing({"a": 1})
    assert hosts.gathered({"a": [1]}) == [{"a": [1]}]


def test_what_the_lead_cannot_do_is_raised():
    def act():
        raise DataError("no")

    with pytest.raises(DataError, match="no"):
        hosts.led(act)


def test_an_error_of_one_process_stays_what_it_is():
    with pytest.raises(jax.errors.JaxRuntimeError), hosts.losses_of_peers():
        raise jax.errors.JaxRuntimeError("Gloo all-reduce failed: Connection closed by peer")


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (jax.errors.JaxRuntimeError("UNKNOWN: Gloo all-reduce failed: closed by peer"), True),
        (CheckpointError("could not be saved: Timed out while waiting for barrier"), True),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory"), False),
        (CheckpointError("could not be saved: No space left on device"), False),
    ],
)
def test_the_loss_of_a_partner_is_told_from_other_faults(monkeypatch, error, lost):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(PeerLost if lost else type(error)), hosts.losses_of_peers():
        raise error


@pytest.mark.parametrize("meeting", [("127.0.0.1:1", None, None), (None, 2, 0)])
def test_half_an_address_is_refused(meeting):
    with pytest.raises(ConfigError, match="go together"):
        hosts.join(hosts.Meeting(*meeting))


@pytest.mark.parametrize(
    ("mesh", "mine", "expected"),
    [
        ({}, range(8), (0, 1)),
        ({}, range(2, 4), (1, 4)),
        ({"fsdp": 4}, range(4, 8), (1, 2)),
        ({"context": 4}, range(4, 8), (1, 2)),
        ({"context": 4}, range(6, 8), (1, 2)),
    ],
)
def test_every_process_reads_what_its_devices_hold(mesh, mine, expected):
    """Devices `mine` of the eight are those of this process."""
    whole = make_mesh(MeshOptions(**mesh), jax.devices())
    sharding = NamedSharding(whole, P(CLIPS))
    held = {d for i, d in enumerate(jax.devices()) if i in mine}

    class Mine:
        def addressable_devices_indices_map(self, shape):
            return {d: i for d, i in sharding.devices_indices_map(shape).items() if d in held}

    assert hosts.part_of_batch(Mine(), 8) == expected


def test_clips_that_do_not_lie_together_are_refused():
    class Apart:
        def addressable_devices_indices_map(self, shape):
            return {0: (slice(0, 1),), 1: (slice(4, 5),)}

    with pytest.raises(ConfigError, match="do not lie together"):
        hosts.part_of_batch(Apart(), 8)


# Real processes.


def port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class Lab:
    def __init__(self, folder, steps, data="synthetic:24x20x6,6"):
        self.folder, self.data = folder, data
        (folder / "config.py").write_text(CONFIG.format(steps=steps))

    def start(self, name, processes, changes=()):
        meeting = f"127.0.0.1:{port()}"
        return [self.process(name, i, processes, meeting, changes) for i in range(processes)]

    def process(self, name, number, processes, meeting, changes):
        config = f"{self.folder / 'config.py'}:supervised"
        words = train_command(config, self.data, self.folder / name, *changes)
        if processes > 1:
            words += ["--coordinator", meeting, "--processes", str(processes)]
            words += ["--process", str(number)]
        return subprocess.Popen(
            words,
            env=environment(self.folder / "cache"),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def finish(self, processes, timeout=600):
        ends = [process.communicate(timeout=timeout) for process in processes]
        return [(p.returncode, *end) for p, end in zip(processes, ends, strict=True)]

    def losses(self, name):
        lines = (self.folder / name / "metrics.jsonl").read_text().splitlines()
        return [row["loss"] for row in map(json.loads, lines) if row["kind"] == "train"]

    def wait_for(self, name, step, processes):
        deadline = time.monotonic() + 400
        log = self.folder / name / "metrics.jsonl"
        while not log.exists() or len(log.read_text().splitlines()) < step:
            assert all(p.poll() is None for p in processes), self.finish(processes)
            assert time.monotonic() < deadline
            time.sleep(0.05)


@pytest.mark.slow
def test_two_and_four_processes_train_as_one(tmp_path):
    lab = Lab(tmp_path, steps=5)
    for count in (1, 2, 4):
        ends = lab.finish(lab.start(f"of{count}", count))
        assert [code for code, *_ in ends] == [0] * count, ends
        assert json.loads(ends[0][1])["steps"] == 5
        assert all(out == "" for _, out, _ in ends[1:]), "one process tells the result"
    for count in (2, 4):
        np.testing.assert_allclose(lab.losses(f"of{count}"), lab.losses("of1"), rtol=1e-5)


@pytest.mark.slow
def test_a_signal_to_one_stops_both_and_they_go_on_in_another_number(tmp_path):
    lab = Lab(tmp_path, steps=400)
    processes = lab.start("stopped", 2)
    lab.wait_for("stopped", 6, processes)
    processes[1].send_signal(signal.SIGTERM)
    ends = lab.finish(processes, timeout=120)
    assert [code for code, *_ in ends] == [75, 75], ends
    done = len(lab.losses("stopped"))
    assert 6 <= done < 400
    # From two processes to one, and the numbers of a run that nobody stopped.
    (tmp_path / "config.py").write_text(CONFIG.format(steps=400))
    (one,) = lab.start("stopped", 1)
    lab.wait_for("stopped", done + 6, [one])
    one.send_signal(signal.SIGTERM)
    assert lab.finish([one], timeout=120)[0][0] == 75
    (whole,) = lab.start("whole", 1)
    lab.wait_for("whole", done + 6, [whole])
    whole.kill()
    lab.finish([whole])
    count = done + 6
    np.testing.assert_allclose(
        lab.losses("stopped")[:count], lab.losses("whole")[:count], rtol=1e-4
    )


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_stops_the_other_with_a_message(tmp_path, victim):
    lab = Lab(tmp_path, steps=400)
    processes = lab.start("killed", 2)
    lab.wait_for("killed", 4, processes)
    processes[victim].kill()
    began = time.monotonic()
    lab.finish([processes[victim]])
    code, _, said = lab.finish([processes[1 - victim]], timeout=150)[0]
    assert time.monotonic() - began < 2 * hosts.HEARTBEAT_SECONDS + 15
    # Where the survivor is not in an exchange, JAX's own service ends it, with a message too.
    assert code in (PeerLost.exit_code, -signal.SIGABRT), said
    assert "Restart all with the same command" in said or "another task died" in said


@pytest.mark.slow
def test_processes_with_other_settings_are_refused_by_all(tmp_path):
    lab = Lab(tmp_path, steps=5)
    meeting = f"127.0.0.1:{port()}"
    processes = [lab.process("torn", i, 2, meeting, [f"--config.train.seed={i}"]) for i in range(2)]
    for code, _, said in lab.finish(processes):
        assert code == 2
        assert "processes [1] were started with other settings" in said
    assert not (tmp_path / "torn" / "run.json").exists()


@pytest.mark.slow
def test_bad_files_that_several_processes_found_are_named_together(tmp_path):
    data = tmp_path / "data"
    write_phantoms(data)
    split = json.loads((data / "split.json").read_text())
    names = split["cases"]["labelled"][0], split["cases"]["val"][0]
    for name in names:
        (data / "images" / f"{name}.nii.gz").write_bytes(b"no image")
    lab = Lab(tmp_path, steps=5, data=data)
    told = [said for code, _, said in lab.finish(lab.start("bad", 2)) if code == 1]
    assert sum(all(f"{name}.nii.gz" in said for name in names) for said in told) == 1
