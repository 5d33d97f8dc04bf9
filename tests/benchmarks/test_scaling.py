"""What the tables of scaling and estimates are made of, without measuring anything."""

import pytest

from sss_jax import config
from sss_jax.benchmarks import estimate_table, result, scaling

EXCHANGE = """HloModule jit_step

ENTRY %main (p0: f32[8]) -> f32[8] {
  %p0 = f32[8]{0} parameter(0)
  %sum = f32[8]{0} all-reduce(%p0), to_apply=%add
  %again = f32[8]{0} all-reduce(%sum), to_apply=%add
  ROOT %out = f32[8]{0} collective-permute(%again), source_target_pairs={{0,1}}
}
"""


def test_exchanges_are_added_up_by_kind():
    assert scaling.exchanges(EXCHANGE) == {"all-reduce": 64, "collective-permute": 32}


@pytest.mark.parametrize(
    ("losses", "expected"), [([2.0, 4.0], 0.0), ([2.0, 4.4], 0.1), ([2.0], float("inf"))]
)
def test_the_largest_difference_counts(losses, expected):
    assert scaling.difference(losses, [2.0, 4.0]) == pytest.approx(expected)


def driver(way, losses):
    return {
        "kind": "driver",
        "way": way,
        "devices": 8,
        "losses": losses,
        "exchanges": {"all-reduce": 3 * 2**20},
        "state_bytes_per_device": 2**20,
        "compile_s": 1.5,
        "step_s": {"median": 0.25},
    }


def test_drivers_are_compared_with_drivers_and_processes_with_processes():
    alone = {"kind": "processes", "processes": 1, "devices": 8, "losses": [4.0]}
    rows = [driver("pmap", [2.0]), driver("data", [2.002]), alone]
    lines = scaling.render(rows).splitlines()[2:]
    assert lines[1] == "| data | 8 | 1.0e-03 | 3.00 | 1.0 | 1.5 | 0.25 |"
    assert lines[2].startswith("| 1 processes | 8 | 0.0e+00 |")


def cell(clips, total, capacity=16 * 2**30, projection=None):
    memory = {"state": 2**30, "temporary": total, "total": total, "capacity": capacity}
    return {
        "cell": "tiny/512/v5e-16",
        "clips": clips,
        "quick": True,
        "settings": [],
        "memory": memory | {"fits": total <= capacity},
        "projection": projection,
        "compile_s": 60.0,
    }


def test_two_sizes_foretell_the_most_clips():
    rows = [cell(1, 4 * 2**30), cell(2, 8 * 2**30)]
    assert [estimate_table.most_clips(rows, row) for row in rows] == [4, 4]


def test_one_size_foretells_the_most_clips_from_what_is_not_state():
    rows = [cell(1, 4 * 2**30), cell(2, 8 * 2**30) | {"settings": ["model.remat=false"]}]
    assert [estimate_table.most_clips(rows, row) for row in rows] == [5, 4]
    large = cell(1, 20 * 2**30)
    assert estimate_table.most_clips([large], large) == 0


def test_a_cell_that_does_not_fit_has_no_time():
    time = {"step": 0.5, "exchange": 0.05, "slices_per_s": 256.0, "mfu": 0.2}
    rows = [cell(1, 2**30, projection=time), cell(4, 20 * 2**30)]
    fits, not_ = estimate_table.render(rows).splitlines()[2:]
    assert "| 1.0 of 16.0 | yes |" in fits
    assert "| 500 | 256 | 20% | 10.0% |" in fits
    assert "| 20.0 of 16.0 | no |" in not_


def test_rows_of_an_earlier_call_are_taken_over_and_not_run_again(tmp_path, monkeypatch):
    ran = []

    def run(options, devices, steps):
        ran.append((options.train.parallel, options.mesh.fsdp, devices))
        return {"losses": [1.0]}

    monkeypatch.setattr(scaling, "run", run)
    options = config.load("hippocampus:sss")
    rows = list(scaling.drivers(options, [1, 2], 1))
    assert len(rows) == len(ran) == 6
    assert list(scaling.drivers(options, [1, 2, 4], 1, rows[:-1]))[-1]["devices"] == 4
    assert ran[6:] == [("pmap", 1, 4), ("mesh", 1, 4), ("mesh", 2, 2), ("mesh", 4, 4)]
    path = tmp_path / "rows.json"
    assert scaling.earlier(path, "a", []) == []
    result.write(path, "scaling", rows, config="a", settings=["b=1"])
    assert scaling.earlier(path, "a", ["b=1"]) == rows
    with pytest.raises(SystemExit, match="other settings"):
        scaling.earlier(path, "a", ["b=2"])
