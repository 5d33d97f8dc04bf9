"""`sss-jax bench` from the command line to the file, at the smallest sizes."""

import json

import jax
import jax.numpy as jnp
import nibabel as nib
import numpy as np
import pytest

from sss_jax import cli, config
from sss_jax.benchmarks import batches, counters, parts, programs, schema, step_time
from sss_jax.benchmarks.request import Request
from sss_jax.benchmarks.step_parts import WHOLE, Part
from sss_jax.data.synthetic import SplitSizes, write_phantoms
from sss_jax.models import layers, presets

SMALL = [
    "--config.model.image_size=32",
    "--config.data.clip_slices=2",
    "--config.data.threads=0",
    "--config.train.labelled_batch=8",
    "--config.eval.slice_bucket=4",
]


@pytest.fixture
def small(monkeypatch):
    """Make `nano` smaller than it is."""
    nano = presets._PRESETS["nano"] | counters._SMALL
    monkeypatch.setitem(presets._PRESETS, "nano", nano)


@pytest.fixture
def bench(small, tmp_path, capsys):
    """Call the verb with a small network; return the result that was written, and stdout."""

    def call(*words):
        out = tmp_path / "result.json"
        common = ["--repeats", "1", "-o", str(out), *SMALL]
        assert cli.main(["bench", *words, *common]) == 0
        found = json.loads(out.read_text())
        assert schema.problems(found) == []
        return found, capsys.readouterr().out

    return call


def test_parts_become_a_table_a_file_and_a_trace(bench, monkeypatch, tmp_path):
    x = jnp.ones((128, 128))
    pieces = [
        Part(WHOLE, lambda x: (x @ x @ x, x + 1), (x,)),
        Part("product", lambda x: x @ x @ x, (x,), True),
        Part("copy", lambda x: x + 1, (x,), True),
    ]
    monkeypatch.setattr(parts, "make_parts", lambda *_: pieces)
    best = parts.ceilings.Ceilings(1e11, 1e10)
    monkeypatch.setattr(parts.ceilings, "measure", lambda dtype: best)
    found, out = bench("parts", "--profile", str(tmp_path / "trace"))
    rows = {row["part"]: row for row in found["rows"]}
    assert list(rows) == [WHOLE, "product", "copy"]
    assert rows[WHOLE]["flops"] == rows["product"]["flops"] == 2 * 2 * 128**3
    assert rows["copy"]["bytes"] == 2 * 4 * 128**2
    assert rows[WHOLE]["share"] == 1
    assert found["ceilings"]["matmul_flops_per_s"] == 1e11
    assert found["settings"] == [word.removeprefix("--config.") for word in SMALL]
    assert "sss: product +" in out
    assert list((tmp_path / "trace" / "parts").rglob("*.xplane.pb"))


def test_prediction_and_data_in_one_file(bench):
    found, out = bench("predict_rate", "data_rate", "--methods", "supervised")
    rows = {schema.row_name(row): row for row in found["rows"]}
    whole = rows["predict_rate / supervised: end to end"]
    alone = rows["predict_rate / supervised: on the device"]
    assert whole["slices"] == alone["slices"] == 4
    assert whole["volume_s"]["median"] > alone["volume_s"]["median"] > 0
    assert whole["volumes_per_min"] == pytest.approx(60 / whole["volume_s"]["median"], abs=0.01)
    assert sum(row["benchmark"] == "data_rate" for row in found["rows"]) == 6
    assert found["benchmark"] == "predict_rate+data_rate"
    assert "predict_rate\n" in out


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory):
    """A data folder with 2 labelled and 2 unlabelled subjects."""
    few = SplitSizes(labelled=2, unlabelled=2, val=1, test=1)
    return write_phantoms(tmp_path_factory.mktemp("data") / "phantoms", subjects=few)


def test_real_data_are_predicted_and_read(bench, phantoms):
    names = ("predict_rate", "data_rate", "--methods", "supervised")
    found, _ = bench(*names, "--data", str(phantoms))
    volume = nib.load(sorted((phantoms / "images").iterdir())[0])
    slices = {row["slices"] for row in found["rows"] if row["benchmark"] == "predict_rate"}
    assert slices == {layers.padded_size(volume.shape[-1], 4)}
    assert {row["data"] for row in found["rows"] if row["benchmark"] == "data_rate"} == {"phantoms"}
    assert found["data"] == "phantoms"


def test_the_first_batch_of_real_data_is_that_of_training(phantoms):
    words = [word.removeprefix("--config.") for word in SMALL]
    options = config.load("demo:sss", [*words, "train.unlabelled_batch=2"])
    batch = batches.first_batch(options, str(phantoms))
    drawn = batches.synthetic_batch(options)
    shape = lambda x: x.shape  # noqa: E731
    assert jax.tree.map(shape, batch) == jax.tree.map(shape, drawn)
    again = batches.first_batch(options, str(phantoms))
    assert jax.tree.all(jax.tree.map(np.array_equal, batch, again))
    assert batch["labelled"]["label"].any()
    assert not np.array_equal(batch["labelled"]["image"], drawn["labelled"]["image"])
    alone = config.load("demo:supervised", words)
    assert list(batches.first_batch(alone, str(phantoms))) == ["labelled"]


def test_steps_and_parts_are_measured_with_the_data_named(small, phantoms, monkeypatch):
    seen = []

    def note(options, data):
        seen.append(data)
        raise InterruptedError

    words = tuple(word.removeprefix("--config.") for word in SMALL)
    request = Request("demo:supervised", words, data=str(phantoms))
    for module, measure in ((parts, parts.measure), (step_time, step_time.measure)):
        monkeypatch.setattr(module, "first_batch", note)
        with pytest.raises(InterruptedError):
            measure(request)
    with pytest.raises(InterruptedError):
        next(programs.programs(request))
    assert seen == 3 * [str(phantoms)]


def test_compiling_again_comes_from_the_cache(bench, monkeypatch):
    jitted = jax.jit(lambda x: jnp.sin(x @ x) @ x)
    program = programs.Program("sss: step", jitted, (np.ones((64, 64), np.float32),))
    monkeypatch.setattr(programs, "programs", lambda request: iter([program]))
    before = jax.config.jax_compilation_cache_dir
    found, _ = bench("compile_time", "memory")
    time_, memory = found["rows"]
    assert time_["cache_files"] >= 1
    assert time_["cache_hits"] == 1
    assert min(time_[name] for name in ("trace_s", "compile_s", "cached_compile_s")) > 0
    assert memory["argument_bytes"] == memory["output_bytes"] == 4 * 64**2
    assert jax.config.jax_compilation_cache_dir == before


def test_every_method_and_mechanism_is_a_variant():
    request = Request("hippocampus", without=("DFE", "memory"))
    found = step_time.variants(request)
    assert list(found) == [*step_time.METHODS, "sss without DFE", "sss without memory"]
    assert not found["sss without DFE"].dfe.enabled
    assert found["sss"].dfe.enabled
    assert list(step_time.variants(Request("hippocampus:fixmatch"))) == ["fixmatch"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["speed"], "no benchmark is called 'speed'"),
        (["parts", "--repeats", "0"], "--repeats 0"),
        (["parts", "--methods", "magic"], "magic"),
        (["step_time", "--without", "magic"], "magic"),
        (["predict_rate", "--data", "nowhere"], "nowhere"),
    ],
)
def test_what_does_not_exist_is_refused(words, message, capsys):
    assert cli.main(["bench", *words]) == (1 if "nowhere" in words else 2)
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_a_real_step_is_measured_whole_and_in_parts(bench):
    names = ("step_time", "parts", "compile_time", "memory")
    found, out = bench(*names, "--methods", "supervised")
    rows = {schema.row_name(row): row for row in found["rows"]}
    assert rows["step_time / supervised"]["slices_per_s"] > 0
    assert rows["parts / supervised: whole step"]["share"] == 1
    assert rows["memory / supervised: step"]["temporary_bytes"] > 0
    step = rows["compile_time / supervised: step"]
    assert step["cached_compile_s"] < step["compile_s"]
    assert "supervised: parts marked + take" in out
