"""Estimates: what needs no compiler here, and the whole of it where TPU's compiler is installed."""

import dataclasses
import importlib.util
import json
import subprocess
import sys

import jax
import pytest

from sss_jax import config, estimate, estimate_report
from sss_jax.errors import ConfigError

SMALL = ["model.image_size=32", "data.clip_slices=2", "model.dtype=bfloat16"]


@pytest.fixture(scope="module")
def options():
    return config.load("acdc:supervised", [*SMALL, "model.remat=true"])


def no_compiler(topology):
    raise ConfigError("no compiler for CUDA")


@pytest.fixture(scope="module")
def said():
    return []


@pytest.fixture(scope="module")
def whole(options, said):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(estimate, "devices_of", no_compiler)
        return estimate.estimate(options, "h100-8", clips=2, report=said.append)


def test_gpus_without_their_compiler_get_what_needs_none(whole, said):
    assert said == ["no compiler for CUDA"]
    assert whole.devices == 8
    assert whole.mesh == {"data": 8, "fsdp": 1, "context": 1}
    assert whole.clips == (2, 0)
    assert whole.memory is None
    assert whole.projection is None
    assert whole.fill is None, "no kernels of ours there"
    assert whole.program_flops > 1.1 * whole.model_flops > 0, "the trunk is computed again"
    assert "not compiled" in estimate_report.render(whole)
    assert json.loads(json.dumps(whole.to_json()))["topology"] == "h100-8"


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("h100-8", ["mesh.fsdp=3"], "does not make 8 devices"),
        ("h100-8", ["train.labelled_batch=6"], "labelled_batch=6"),
        ("h300-8", [], "unknown topology"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_traced(name, changes, message):
    options = config.load("acdc:supervised", [*SMALL, *changes])
    with pytest.raises(ConfigError, match=message):
        estimate.estimate(options, name)


@pytest.mark.parametrize(
    "text",
    [
        "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm.",
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
        "temporaries (20.50G) exceeds available HBM (15.75G).",
    ],
)
def test_a_program_that_is_too_large_says_by_how_much(options, whole, monkeypatch, text):

    class Large:
        def lower(self, *_):
            return self

        def compile(self, settings):
            assert settings == {"effort": -1}
            raise jax.errors.JaxRuntimeError(text)

    monkeypatch.setattr(estimate, "make_mesh_step", lambda *_: (Large(), None, None))
    found = estimate._compile(estimate.set_up(options), options, jax.devices(), {"effort": -1})
    assert found.total == int(20.5 * 2**30)
    assert not found.fits
    assert "TOO LARGE by 4.75 GiB" in estimate_report.render(
        dataclasses.replace(whole, memory=found, compile_s=1.0)
    )


@pytest.mark.parametrize(
    ("memory", "tried"),
    [
        (lambda clips: 1 + 3 * clips, [1, 2, 5, 6]),
        (lambda clips: 2 + clips * clips, [1, 2, 5, 3, 4]),
        (lambda clips: 17, [1]),
        (lambda clips: 9 * clips, [1, 2]),
        (lambda clips: 8 + clips // 4, [1, 2, 4, 25, 33, 34, 35, 36]),
    ],
)
def test_the_search_ends_at_the_last_that_fits(options, whole, monkeypatch, memory, tried):
    asked = []

    def pretend(options, name, *, clips, quick, report):
        asked.append(clips)
        held = estimate_report.Memory(0, 0, total=memory(clips), capacity=16)
        return dataclasses.replace(whole, clips=(clips, clips), memory=held)

    monkeypatch.setattr(estimate, "estimate", pretend)
    found = estimate.largest(options, "v5e-16")
    assert asked == tried
    last = max([one.clips[0] for one in found if one.memory.fits], default=0)
    assert last == 0 or memory(last) <= 16
    assert memory(last + 1) > 16


def test_tpus_without_their_compiler_are_refused(options, monkeypatch):
    monkeypatch.setattr(estimate, "devices_of", no_compiler)
    with pytest.raises(ConfigError, match="no compiler"):
        estimate.estimate(options, "v5e-16", clips=1)


@pytest.mark.slow
def test_a_step_compiles_for_gpus_that_are_not_here():
    if importlib.util.find_spec("jax_cuda12_plugin") is None:
        pytest.skip('the compiler for GPUs is not installed: pip install "jax[cuda12]"')
    settings = ["--config", "acdc:supervised", *(f"--config.{one}" for one in SMALL)]
    # A program of its own: the plug-in is registered before JAX first looks for devices.
    command = ["estimate", *settings, "--topology", "h100-16", "--clips", "1", "--json"]
    done = subprocess.run([sys.executable, "-m", "sss_jax.cli", *command], capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    (found,) = json.loads(done.stdout)
    assert found["memory"]["fits"]
    assert found["host_calls"] == []
    assert "f64" not in found["types"]
    assert found["xla"]["flops_with_loops"] == pytest.approx(found["program_flops"], rel=0.3)
    assert 0 < found["projection"]["mfu"] < 1
    assert {row["kind"] for row in found["exchanges"]} >= {"all-reduce"}


@pytest.mark.slow
def test_a_step_compiles_for_tpus_that_are_not_here(options):
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("TPU's compiler is not installed: pip install libtpu")
    found = estimate.estimate(options, "v5e-16", clips=1)
    assert found.memory.fits
    assert found.host_calls == ()
    assert "f64" not in found.types
    assert found.xla["flops_with_loops"] == pytest.approx(found.program_flops, rel=0.3)
    assert 0 < found.projection.mfu < 1
    assert {row["part"] for row in found.exchanges} <= {"reduce_gradients", "losses", "other"}
    assert found.projection.step > 0
    assert 0 < found.fill < 1
    assert f"fill {found.fill:.0%} of the matrix unit" in estimate_report.render(found)
