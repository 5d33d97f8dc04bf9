"""The race against bonsai's encoder, run with a stand-in: bonsai itself is not installed."""

import json
import sys

import jax.numpy as jnp
import pytest

from sss_jax.benchmarks import bonsai_speed
from sss_jax.models.presets import preset


def test_without_bonsai_it_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "bonsai", None)
    with pytest.raises(SystemExit, match="put a checkout of jax-ml/bonsai on PYTHONPATH"):
        bonsai_speed.their_encoder(preset("tiny", 64))


def test_both_rows_are_timed_and_counted(tmp_path, monkeypatch, capsys):
    """A product of 2 x 64 x 64 x 3 x 5 operations stands for the other encoder."""
    other = lambda state, x: [x @ state]  # noqa: E731
    monkeypatch.setattr(bonsai_speed, "their_encoder", lambda config: (other, jnp.ones((3, 5))))
    out = tmp_path / "a.json"
    arguments = ["--variants", "nano", "--size", "64", "--repeats", "1", "-o", str(out)]
    assert bonsai_speed.main(arguments) == 0
    forward, both = json.loads(out.read_text())["rows"]
    assert (forward["row"], both["row"]) == ("encoder", "encoder forward and backward")
    assert forward["bonsai_gflop"] == pytest.approx(2 * 64 * 64 * 15 / 1e9, abs=0.05)
    assert both["ours_gflop"] > 2 * forward["ours_gflop"] > 0
    for row in (forward, both):
        ratio = row["bonsai_s"]["median"] / row["ours_s"]["median"]
        assert row["speedup"] == pytest.approx(ratio, abs=1e-3)
    assert f"{forward['speedup']:.2f} |" in capsys.readouterr().out
