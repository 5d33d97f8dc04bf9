"""The table of estimates: what its cells keep, what fits, and what it says."""

import itertools
import json

import pytest

from sss_jax import config
from sss_jax.benchmarks import estimate_table as table
from sss_jax.benchmarks import schema

CELLS = ["/".join(map(str, c)) for c in itertools.product(*table.AXES)]


@pytest.mark.parametrize("cell", CELLS)
def test_a_cell_has_settings_that_the_configuration_takes(cell):
    options = config.load("acdc:sss", table.settings_of(cell))
    assert options.model.dtype == "bfloat16"


def test_what_does_not_fit_is_computed_again():
    assert "model.remat=true" in table.settings_of("large/1024/2xv5e-16")
    assert "mesh.fsdp=16" in table.settings_of("large/1024/v5e-16")
    assert "model.remat=false" in table.settings_of("large/512/2xv5e-16")
    assert "memory.remat=true" in table.settings_of("base_plus/1024/v5e-16")
    assert "memory.remat=false" in table.settings_of("base_plus/1024/v5p-64")


def row(clips, total, cell="tiny/512/v5e-16"):
    memory = {"state": 2, "total": total, "capacity": 20, "fits": total <= 20}
    return {"cell": cell, "clips": clips, "quick": True, "settings": []} | {"memory": memory}


def test_most_clips_lie_on_the_line_through_two_sizes():
    one, two = row(1, 10), row(2, 13)
    assert table.most_clips([one, two], one) == 4
    assert table.most_clips([one, row(2, 11, "tiny/512/v6e-256")], one) == 2


def test_none_fit_where_one_is_too_large():
    alone = row(1, 30)
    assert table.most_clips([alone], alone) == 0


def test_a_row_is_written_as_markdown():
    one = row(1, 10) | {"compile_s": 12.4, "projection": None}
    one["memory"] |= {"total": 2**33, "capacity": 2**34}
    last = table.render([one]).splitlines()[-1]
    assert last.startswith("| tiny | 512 | v5e-16 | 1 | 8.0 of 16.0 | yes |")
    assert last.endswith("| 12 |")
    one["projection"] = {"step": 0.5, "exchange": 0.05, "slices_per_s": 100.0, "mfu": 0.5}
    assert "| 500 | 100 | 50% | 10.0% |" in table.render([one])


def test_one_cell_under_other_settings_is_another_row(tmp_path, monkeypatch):
    memory = {"state": 2, "total": 10, "capacity": 20, "fits": True}
    found = {"memory": memory, "compile_s": 1.0, "projection": None}
    monkeypatch.setattr(table, "compile_cell", lambda *_: dict(found))
    words = ["--only", "tiny/512/v5e-16", "-o", str(tmp_path / "table.json")]
    assert [table.main(words), table.main(words)] == [0, 0]
    assert table.main([*words, "--set", "model.kernels=off"]) == 0
    document = json.loads((tmp_path / "table.json").read_text())
    assert len(document["rows"]) == 2
    assert schema.problems(document) == []
