"""The benchmark of PCSW times the same result on both sides."""

import json

import numpy as np
import pytest

from sss_jax.benchmarks import pcsw_cost


def test_a_small_run_agrees_with_scipy_and_is_written(tmp_path):
    out = tmp_path / "cost.json"
    words = ["--slices", "8", "--size", "24", "--classes", "2", "--repeats", "1", "-o", str(out)]
    assert pcsw_cost.main(words) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [row["masks"] for row in rows] == list(pcsw_cost.KINDS)
    assert all(row["ours_s"]["median"] > 0 and row["scipy_s"]["median"] > 0 for row in rows)


def test_another_result_is_not_timed(monkeypatch):
    masks = np.stack([pcsw_cost.make_mask("object", 0, (8, 24, 24))])
    monkeypatch.setattr(pcsw_cost, "with_scipy", lambda mask: (0, True, (0, 0, 1, 1)))
    search = pcsw_cost.jax.jit(
        pcsw_cost.jax.vmap(lambda m: pcsw_cost.search_prompts(m, 8, pcsw_cost.PCSWOptions()))
    )
    with pytest.raises(SystemExit, match="prompts differ"):
        pcsw_cost.compare("object", masks, search, 1)
