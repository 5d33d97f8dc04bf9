"""`sss-jax bench` from the command line to the file, at the smallest sizes."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from sss_jax import cli
from sss_jax.benchmarks import counters, parts, programs, schema, step_time
from sss_jax.benchmarks.request import Request
from sss_jax.benchmarks.step_parts import WHOLE, Part
from sss_jax.models import presets

SMALL = [
    "--config.model.image_size=32",
    "--config.data.clip_slices=2",
    "--config.data.threads=0",
    "--config.train.labelled_batch=8",
    "--config.eval.slice_bucket=4",
]


@pytest.fixture
def bench(tmp_path, capsys, monkeypatch):
    """Call the verb with a small network; return the result that was written, and stdout."""
    nano = presets._PRESETS["nano"] | counters._SMALL
    monkeypatch.setitem(presets._PRESETS, "nano", nano)

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
    monkeypatch.setattr(parts, "make_parts", lambda options, run: pieces)
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


def test_compiling_again_comes_from_the_cache(bench, monkeypatch):
    import jax

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
    ],
)
def test_what_does_not_exist_is_refused(words, message, capsys):
    assert cli.main(["bench", *words]) == 2
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
