"""A run as a user sees it: it ends, resumes to the same numbers, and refuses what it must."""

import json
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

from sss_jax.data.prepare import prepare_folder
from sss_jax.data.synthetic import SplitSizes, write_phantoms
from sss_jax.train.checkpoint import Checkpointer
from tests.poison import garbage_labels, nan_image, truncated_labels
from tests.processes import environment, train_command

CONFIG = """
from sss_jax.configs import common

def get_config(arg="supervised"):
    config = common.from_scratch(common.base(arg), image_size=32, steps=8)
    config.model.num_classes = 3
    config.data.clip_slices = 2
    config.train.labelled_batch = 1
    config.train.unlabelled_batch = 1
    config.train.log_every = 1
    config.train.save_every = 2
    config.train.eval_every = 4
    config.eval.slice_bucket = 24
    return config
"""
CLASSES = 3
TIMES = ("slices_per_s", "data_wait")


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """A folder with a small data set, a configuration, and a cache of compiled programs."""
    folder = tmp_path_factory.mktemp("lab")
    sizes = SplitSizes(labelled=1, unlabelled=2, val=1, test=1)
    write_phantoms(folder / "data", subjects=sizes, seed=5)
    (folder / "micro.py").write_text(CONFIG)
    return folder


def command(lab, workdir, *words, method="supervised", data=None):
    return train_command(f"{lab / 'micro.py'}:{method}", data or lab / "data", workdir, *words)


def run(lab, workdir, *words, **where):
    return subprocess.run(
        command(lab, workdir, *words, **where),
        env=environment(lab / "cache"),
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )


def start_and_wait(lab, workdir, step, method="supervised"):
    """Start a run and return it once its log has reached a step."""
    process = subprocess.Popen(
        command(lab, workdir, method=method),
        env=environment(lab / "cache"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    log = workdir / "metrics.jsonl"
    deadline = time.monotonic() + 600
    while not (log.exists() and any(row["step"] >= step for row in rows(workdir, whole=False))):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return process


def rows(workdir, whole=True):
    """Rows of the log without times; a line that is being written may be cut off."""
    found = []
    for line in (workdir / "metrics.jsonl").read_text().splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            assert not whole
            continue
        found.append({name: value for name, value in row.items() if name not in TIMES})
    return found


def params(workdir, key="params"):
    with Checkpointer(workdir / "checkpoints") as checkpointer:
        return checkpointer.load_params("latest", key)[0]


def assert_same_run(one, other):
    assert rows(one) == rows(other)
    for key in ("params", "ema"):
        a, b = (flat(params(workdir, key)) for workdir in (one, other))
        assert a.keys() == b.keys()
        assert all(np.array_equal(a[name], b[name]) for name in a)


def flat(tree, prefix=""):
    found = {}
    for name, value in tree.items():
        path = f"{prefix}/{name}"
        found |= flat(value, path) if isinstance(value, dict) else {path: value}
    return found


@pytest.fixture(scope="module")
def whole(lab):
    """An uninterrupted run."""
    done = run(lab, lab / "whole")
    assert done.returncode == 0, done.stderr
    return lab / "whole", json.loads(done.stdout)


def test_a_run_leaves_its_numbers_and_its_best_state(whole):
    workdir, summary = whole
    assert summary["steps"] == 8
    assert summary["best_step"] in (4, 8)
    kinds = [(row["kind"], row["step"]) for row in rows(workdir)]
    assert [step for kind, step in kinds if kind == "train"] == list(range(1, 9))
    assert [step for kind, step in kinds if kind == "val"] == [4, 8]
    about = json.loads((workdir / "run.json").read_text())
    assert about["cases"]["labelled"] == 1
    assert about["data"].endswith("data")


def test_killed_and_restarted_it_ends_with_the_same_bits(lab, whole):
    workdir = lab / "killed"
    process = start_and_wait(lab, workdir, 5)
    process.kill()
    process.communicate()
    assert run(lab, workdir).returncode == 0
    assert_same_run(workdir, whole[0])


def test_a_signal_saves_and_the_same_command_resumes(lab, whole):
    workdir = lab / "stopped"
    process = start_and_wait(lab, workdir, 3)
    process.send_signal(signal.SIGTERM)
    _, message = process.communicate(timeout=60)
    assert process.returncode == 75, message
    assert "SIGTERM" in message
    with Checkpointer(workdir / "checkpoints") as checkpointer:
        saved = checkpointer.latest_step()
    assert saved == rows(workdir)[-1]["step"], "the last finished step is saved"
    assert run(lab, workdir).returncode == 0
    assert_same_run(workdir, whole[0])


def test_another_run_is_refused_and_nothing_is_lost(lab, whole):
    workdir, _ = whole
    before = (workdir / "metrics.jsonl").read_bytes()
    done = run(lab, workdir, "--config.train.seed=1")
    assert done.returncode == 1
    assert "train.seed" in done.stderr
    assert (workdir / "metrics.jsonl").read_bytes() == before


def test_a_finished_run_is_finished(lab, whole):
    done = run(lab, whole[0])
    assert done.returncode == 0
    assert json.loads(done.stdout)["best_val_dice"] == whole[1]["best_val_dice"]
    assert [row["step"] for row in rows(whole[0]) if row["kind"] == "train"] == list(range(1, 9))


def test_a_non_finite_loss_stops_with_step_and_cases(lab):
    workdir = lab / "diverged"
    words = ["optimizer.rate=1e30", "optimizer.encoder_rate=1e30", "optimizer.clip_norm=0"]
    words += ["optimizer.warmup_steps=0", "train.save_every=1", "train.eval_every=0"]
    done = run(lab, workdir, *(f"--config.{word}" for word in words))
    assert done.returncode == 3, done.stderr
    assert "step" in done.stderr
    assert "phantom" in done.stderr, "the cases of the batch are named"
    with Checkpointer(workdir / "checkpoints") as checkpointer:
        for step in checkpointer.steps():
            saved = flat(checkpointer.load_params(step, "params")[0])
            assert all(np.isfinite(value).all() for value in saved.values())


def poisoned(lab, name, labelled=False):
    """A copy of the data whose unlabelled labels and test cases, or whose labels, are poison."""
    data = lab / name
    shutil.copytree(lab / "data", data)
    cases = json.loads((data / "split.json").read_text())["cases"]
    if labelled:
        for case in cases["labelled"]:
            garbage_labels(data, case, CLASSES)
        return data
    for number, case in enumerate(cases["unlabelled"]):
        (truncated_labels if number % 2 else garbage_labels)(data, case, CLASSES)
    for case in cases["test"]:
        nan_image(data, case)
        garbage_labels(data, case, CLASSES)
    return data


def test_nothing_is_learned_from_test_cases_or_withheld_labels(lab, whole):
    """The phantoms withhold labels by having none; here the files are there, and poisoned."""
    workdir = lab / "poisoned_run"
    done = run(lab, workdir, data=poisoned(lab, "poisoned"))
    assert done.returncode == 0, done.stderr
    assert_same_run(workdir, whole[0])


@pytest.fixture(scope="module")
def whole_sss(lab):
    """An uninterrupted run with unlabelled images."""
    done = run(lab, lab / "sss_whole", method="sss")
    assert done.returncode == 0, done.stderr
    return lab / "sss_whole"


@pytest.fixture(scope="module")
def prepared(lab):
    """The data as shards."""
    prepare_folder(lab / "data", lab / "prepared", shards=2)
    return lab / "prepared"


def test_a_run_goes_on_from_prepared_data_to_the_same_bits(lab, whole, prepared):
    workdir = lab / "moved"
    process = start_and_wait(lab, workdir, 2)
    process.kill()
    process.communicate()
    done = run(lab, workdir, data=prepared)
    assert done.returncode == 0, done.stderr
    assert_same_run(workdir, whole[0])
    assert json.loads((workdir / "run.json").read_text())["data"].endswith("prepared")


@pytest.mark.slow
def test_sss_from_prepared_data_is_the_same_run(lab, whole_sss, prepared):
    workdir = lab / "sss_prepared"
    done = run(lab, workdir, method="sss", data=prepared)
    assert done.returncode == 0, done.stderr
    assert_same_run(workdir, whole_sss)


def test_training_needs_no_files(lab):
    workdir = lab / "synthetic"
    done = run(lab, workdir, data="synthetic:24x20x6,4")
    assert done.returncode == 0, done.stderr
    assert [row["step"] for row in rows(workdir) if row["kind"] == "val"] == [4, 8]
    assert json.loads((workdir / "run.json").read_text())["data"] == "synthetic:24x20x6,4"
    other = run(lab, workdir)
    assert other.returncode == 1
    assert "split" in other.stderr


@pytest.mark.slow
def test_sss_learns_from_nothing_but_the_unlabelled_images(lab, whole_sss):
    workdir = lab / "sss_poisoned"
    done = run(lab, workdir, method="sss", data=poisoned(lab, "sss_data"))
    assert done.returncode == 0, done.stderr
    assert_same_run(workdir, whole_sss)


@pytest.mark.slow
def test_poison_would_be_noticed(lab, whole):
    """The control: the same poison in the labels of the labelled case changes the run."""
    workdir = lab / "control"
    done = run(lab, workdir, data=poisoned(lab, "control_data", labelled=True))
    assert done.returncode == 0, done.stderr
    mine, clean = (
        [row["loss"] for row in rows(folder) if row["kind"] == "train"]
        for folder in (workdir, whole[0])
    )
    assert len(mine) == len(clean)
    assert all(one != other for one, other in zip(mine, clean, strict=True))
    one, other = flat(params(workdir)), flat(params(whole[0]))
    assert any(not np.array_equal(one[name], other[name]) for name in one)


@pytest.mark.slow
def test_sss_killed_at_random_steps_ends_with_the_same_bits(lab, whole_sss):
    rng = np.random.default_rng(7)
    workdir = lab / "sss_killed"
    for step in sorted(rng.integers(1, 8, 3)):
        process = start_and_wait(lab, workdir, step, method="sss")
        process.kill()
        process.communicate()
    assert run(lab, workdir, method="sss").returncode == 0
    assert_same_run(workdir, whole_sss)


def test_missing_data_and_bad_settings_exit_before_training(lab, tmp_path):
    nowhere = run(lab, tmp_path / "w", data=tmp_path / "none")
    assert nowhere.returncode == 1
    assert "none" in nowhere.stderr
    typo = run(lab, tmp_path / "w", "--config.train.stpes=3")
    assert typo.returncode == 2
    assert "train.steps" in typo.stderr
    assert not Path(tmp_path / "w").exists(), "nothing is half-written"
