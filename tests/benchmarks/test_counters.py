"""Counters of the step against the file in the repository: what changes must be said."""

import json
from pathlib import Path

import pytest

from sss_jax.benchmarks import counters, schema
from tests.processes import COMPILE_QUICKLY

FILE = Path(__file__).parents[1] / "golden" / "counters.json"
GOLDEN = json.loads(FILE.read_text())
ADVICE = (
    "If this is meant, run `python -m sss_jax.benchmarks.counters --write "
    "tests/golden/counters.json` and say why in the commit."
)


def hold(rows):
    if reason := counters.other_conditions(GOLDEN):
        pytest.skip(reason)
    changed = [line for row in rows for line in counters.changes(row, GOLDEN)]
    assert not changed, "\n".join([*changed, ADVICE])


@pytest.mark.parametrize("method", counters.METHODS)
def test_operations_and_exchanges_of_the_traced_step(method):
    hold(counters.traced([method]))


def test_parts_compiled_for_one_device():
    hold(counters.parts())


@pytest.mark.slow
def test_the_compiled_step_over_eight_devices():
    hold(counters.compiled())


def test_the_file_has_the_form_of_all_results_and_every_row():
    assert schema.problems(GOLDEN) == []
    names = {row["name"] for row in GOLDEN["rows"]}
    assert names == {
        *(f"traced step: {method}" for method in counters.METHODS),
        *(f"part: {name}" for name in counters.PARTS),
        "compiled step: sss",
    }


def test_operations_are_exact_and_bytes_have_slack():
    golden = {"rows": [{"name": "x", "flops": 100, "bytes": 1000, "fusions": 50}]}
    same = {"name": "x", "flops": 100, "bytes": 1020, "fusions": 40}
    assert counters.changes(same, golden) == []
    assert counters.changes({**same, "flops": 99}, golden) == ["x: flops was 100, is 99"]
    assert counters.changes({**same, "bytes": 1021}, golden) == ["x: bytes was 1000, is 1021"]
    assert counters.changes({**same, "fusions": 52}, golden) == ["x: fusions was 50, is 52"]
    assert counters.changes({"name": "y"}, golden) == ["y is not in the file"]


def test_the_counters_are_those_of_these_tests():
    """Or all of them would be skipped, and nothing held."""
    assert counters.FLAGS.endswith(COMPILE_QUICKLY)
    assert GOLDEN["flags"] == counters.FLAGS


def test_another_version_is_skipped_and_said(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", counters.FLAGS)
    assert counters.other_conditions(GOLDEN | {"versions": here()}) == ""
    other = GOLDEN | {"versions": {**here(), "jaxlib": "0.0.1"}}
    assert "jaxlib 0.0.1" in counters.other_conditions(other)
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_use_fusion_emitters=false")
    assert "XLA_FLAGS" in counters.other_conditions(GOLDEN | {"versions": here()})


def here():
    import jax
    import jaxlib

    return {"jax": jax.__version__, "jaxlib": jaxlib.__version__}
