"""The form of results: what has it, what does not, and which numbers can become worse."""

import copy
import json
from pathlib import Path

import pytest

from sss_jax.benchmarks import result, schema

RESULTS = sorted((Path(__file__).parents[2] / "benchmarks" / "results").glob("*.json"))
TIME = {"median": 2.0, "low": 1.0, "high": 3.0}
GOOD = result.document("parts", [{"name": "a", "time_s": TIME, "flops": 8, "bound": "memory"}])


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_results_of_the_repository_have_the_form(path):
    assert schema.problems(json.loads(path.read_text())) == []


def test_a_new_result_has_the_form():
    assert schema.problems(json.loads(json.dumps(GOOD))) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("device"), "device must be str"),
        (lambda d: d.update(rows={}), "rows must be list"),
        (lambda d: d.update(rows=[]), "rows is empty"),
        (lambda d: d["versions"].update(jaxlib=None), "versions.jaxlib is missing"),
        (lambda d: d["versions"].update(numpy=2), "versions.numpy must be"),
        (lambda d: d["rows"].append(d["rows"][0]), "rows[1] has the name of another"),
        (lambda d: d["rows"].append({"flops": 1}), "rows[1] has no name"),
        (lambda d: d["rows"].append([]), "rows[1] must be an object"),
        (lambda d: d["rows"][0]["time_s"].pop("high"), "median, low and high"),
        (lambda d: d["rows"][0]["time_s"].update(low=2.5), "out of order"),
        (lambda d: d["rows"][0]["time_s"].update(median=float("nan")), "all numbers"),
        (lambda d: d["rows"][0].update(flops="many"), "rows[0].flops: must be a number"),
    ],
)
def test_what_is_wrong_is_named(change, message):
    document = copy.deepcopy(GOOD)
    change(document)
    assert any(message in line for line in schema.problems(document)), schema.problems(document)


def test_something_else_is_no_result():
    assert schema.problems([1]) == ["a result is an object, not list"]


def test_rows_are_found_by_name_or_by_their_texts_and_sizes():
    assert schema.row_name({"benchmark": "parts", "name": "a", "bound": "x"}) == "parts / a"
    assert schema.row_name({"source": "nifti", "size": 64, "slices_per_s": 3.0}) == "nifti / 64"


def test_only_what_can_become_worse_is_a_measure():
    row = {
        "name": "a",
        "time_s": TIME,
        "compile_s": 4,
        "slices_per_s": 5.0,
        "volumes_per_min": 6.0,
        "flops_per_s": 7.0,
        "xla_gflop": 8,
        "temporary_bytes": 9,
        "temporary_mib": 1,
        "share": 0.5,
        "peak_bytes": None,
    }
    found = {key: (m.value, m.kind) for key, m in schema.measures(row).items()}
    assert found == {
        "time_s": (2.0, "time"),
        "compile_s": (4, "time"),
        "slices_per_s": (5.0, "rate"),
        "volumes_per_min": (6.0, "rate"),
        "xla_gflop": (8, "counter"),
        "temporary_bytes": (9, "counter"),
        "temporary_mib": (1, "counter"),
    }
