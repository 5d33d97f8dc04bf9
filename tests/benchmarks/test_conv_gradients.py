"""The benchmark of convolutions in loops compares what is equal, and only that."""

import json

import pytest

from sss_jax.benchmarks import conv_gradients
from sss_jax.models import convolution

SMALL = conv_gradients.Size("small", 2, 6, 3, 4, 3, 2)


def test_rows_say_what_was_compared(tmp_path, monkeypatch):
    monkeypatch.setattr(conv_gradients, "SIZES", (SMALL,))
    assert conv_gradients.main(["--repeats", "1", "-o", str(tmp_path / "a.json")]) == 0
    (row,) = json.loads((tmp_path / "a.json").read_text())["rows"]
    assert row["name"] == "small"
    assert row["speedup"] > 0
    assert row["differ_by"] <= conv_gradients.TOLERANCE


def test_other_gradients_are_no_result(monkeypatch):
    wrong = lambda *args: 1.001 * convolution._convolve(*args)  # noqa: E731
    monkeypatch.setattr(convolution, "convolve", wrong)
    with pytest.raises(SystemExit, match="gradients differ"):
        conv_gradients.compare(SMALL, 1)
