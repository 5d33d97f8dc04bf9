"""The benchmark of data measures every way on equal clips and says what is projected."""

import json

import pytest

from sss_jax.benchmarks import data_rate
from sss_jax.data.synthetic import SplitSizes, write_phantoms


def test_a_small_run_is_written(tmp_path):
    sizes = SplitSizes(labelled=1, unlabelled=1, val=1, test=0)
    folder = write_phantoms(tmp_path / "phantoms", subjects=sizes)
    words = ["--data", f"{folder}=32,64", "--threads", "0", "--steps", "1", "--repeats", "1"]
    assert data_rate.main([*words, "--cold", "-o", str(tmp_path / "rate.json")]) == 0
    result = json.loads((tmp_path / "rate.json").read_text())
    assert len(result["rows"]) == 2 * 8
    assert all(row["slices_per_s"]["median"] > 0 for row in result["rows"])
    assert {row["source"] for row in result["stages"]} == {
        "nifti",
        "prepared",
        "synthetic",
        data_rate.UNRESIZED,
    }
    assert [need["kind"] for need in result["consumption"]] == ["projection"] * 2


def test_a_projection_lists_what_it_assumes():
    projected = data_rate.consumption(1024)
    assert projected["slices_per_s"] == pytest.approx(229.0, abs=0.1)
    assert any("400 TFLOP/s" in line for line in projected["assumes"])
    assert data_rate.consumption(512)["slices_per_s"] == pytest.approx(916.2, abs=0.1)
    seen = data_rate.consumption(256, 120.0)
    assert (seen["slices_per_s"], seen["kind"]) == (120.0, "given by the user")
