"""A run folder is continued by the same settings, and by versions that have more of them."""

import json

import pytest

from sss_jax import config
from sss_jax.data.cases import Split
from sss_jax.errors import CheckpointError
from sss_jax.train import run


@pytest.fixture
def folder(tmp_path):
    options, split = config.load("demo:supervised"), Split((), (), (), ())
    run.open_folder(tmp_path, options, split, "data", fresh=False)
    return tmp_path, options, split


def change(folder, **identity):
    """Rewrite what the run says it is; None takes a setting away."""
    file = folder / "run.json"
    content = json.loads(file.read_text())
    content["identity"] |= identity
    content["identity"] = {k: v for k, v in content["identity"].items() if v is not None}
    file.write_text(json.dumps(content))


def test_a_run_of_an_older_version_had_the_defaults_of_newer_options(folder):
    workdir, options, split = folder
    change(workdir, **{"train.accumulate": None, "semi.views": None})
    run.open_folder(workdir, options, split, "data", fresh=False)


@pytest.mark.parametrize("known", [True, False])
def test_a_setting_that_is_not_the_default_is_refused(folder, known):
    workdir, _, split = folder
    change(workdir, **{"train.accumulate": 1 if known else None})
    other = config.load("demo:supervised", ["train.accumulate=2"])
    with pytest.raises(CheckpointError, match=r"train\.accumulate: saved 1, now 2"):
        run.open_folder(workdir, other, split, "data", fresh=False)


def test_the_mesh_may_change(folder):
    workdir, _, split = folder
    other = config.load("demo:supervised", ["mesh.fsdp=4", "mesh.context=2", "train.log_every=3"])
    run.open_folder(workdir, other, split, "data", fresh=False)


def test_how_the_step_is_computed_may_change(folder):
    workdir, _, split = folder
    change(workdir, **{"model.loop_blocks": False})  # older versions asked for the same
    ways = ["model.remat=true", "model.loop_blocks=true", "model.kernels=off", "memory.unroll=on"]
    run.open_folder(workdir, config.load("demo:supervised", ways), split, "data", fresh=False)
