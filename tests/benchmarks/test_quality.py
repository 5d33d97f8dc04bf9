"""The quality table: which runs it needs, which it has, and its arithmetic."""

import dataclasses
import json
from pathlib import Path

import pytest

from sss_jax.benchmarks import quality, result
from sss_jax.benchmarks.quality import METHODS, Run, plan

ROOT = Path(__file__).parents[2]


def row(method, dice, labelled=1, seed=0, extra=()):
    """Row of a finished run, as far as the table reads it."""
    run = Run("hippocampus", 0 if method == "ceiling" else labelled, method, seed, extra)
    return {
        **dataclasses.asdict(run),
        "extra": list(extra),
        "settings": json.dumps(dataclasses.asdict(run.options)),
        "test": {"dice": dice, "hd95_mm": 2.0},
        "train_s": 60.0,
        "slices_per_s": 10.0,
        "peak_mib": 100,
    }


def test_every_method_is_a_valid_configuration():
    runs = plan(["hippocampus", "acdc"], [1], list(METHODS), [0])
    assert len(runs) == 2 * len(METHODS)
    options = {(run.data, run.method): run.options for run in runs}
    assert not options["hippocampus", "floor"].semi.enabled
    assert options["hippocampus", "ceiling"].train.all_labels
    for name, group in (("+ DFE", "dfe"), ("+ PCSW", "pcsw")):
        assert getattr(options["hippocampus", name], group).enabled
        assert not getattr(options["hippocampus", "unimatch_v2"], group).enabled
    assert options["hippocampus", "+ memory"].memory.kind == "fifo"
    assert options["hippocampus", "unimatch_v2"].memory.kind == "none"
    full = options["hippocampus", "sss"]
    assert full.dfe.enabled
    assert full.pcsw.enabled
    assert full.memory.kind == "fifo"
    sketch = options["acdc", "sss_sketch"]
    assert (sketch.semi.teacher, sketch.semi.confidence) == ("student", 0.0)
    assert (sketch.dfe.merge, sketch.semi.dropout) == ("replace", False)
    assert (sketch.dfe.pair, full.dfe.pair) == ("weak_strong", "strong_strong")
    assert (sketch.dfe.level_4, full.dfe.level_4) == (True, False)


def test_the_plan_goes_seed_by_seed_and_has_one_ceiling():
    runs = plan(["hippocampus"], [1, 3], ["floor", "ceiling"], [0, 1])
    assert [(r.seed, r.method, r.labelled) for r in runs] == [
        (0, "floor", 1),
        (0, "ceiling", 0),
        (0, "floor", 3),
        (1, "floor", 1),
        (1, "ceiling", 0),
        (1, "floor", 3),
    ]


def test_a_run_is_done_only_with_the_very_same_settings():
    run = Run("hippocampus", 1, "sss", 0)
    rows = [row("sss", 0.7)]
    assert run.is_done(rows)
    assert not dataclasses.replace(run, seed=1).is_done(rows)
    assert not dataclasses.replace(run, labelled=3).is_done(rows)
    assert not dataclasses.replace(run, extra=("train.steps=7",)).is_done(rows)
    settings = json.loads(rows[0]["settings"])
    del settings["memory"]["truncate"]  # an option that is newer than the row
    assert run.is_done([{**rows[0], "settings": json.dumps(settings)}])


def test_published_rows_have_the_settings_that_their_names_stand_for():
    rows = result.rows_of(ROOT / "benchmarks/results/quality_cpu.json")
    assert rows
    for found in rows:
        names = ("data", "labelled", "method", "seed")
        run = Run(*(found[name] for name in names), extra=tuple(found["extra"]))
        assert run.is_done([found]), run


@pytest.mark.parametrize(
    ("method", "changed", "same"),
    [
        ("floor", "dfe.pair=weak_strong", True),  # it has no DFE
        ("floor", "semi.ramp_steps=7", True),
        ("floor", "pcsw.tau=0.5", True),
        ("floor", "memory.capacity=9", True),
        ("floor", "train.unlabelled_batch=8", True),
        ("floor", "optimizer.rate=0.1", False),
        ("sss", "train.unlabelled_batch=8", False),
        ("sss", "dfe.pair=weak_strong", False),
        ("sss", "pcsw.tau=0.5", False),
        ("sss", "memory.truncate=2", False),
        ("sss", "semi.ramp_steps=7", False),
        ("sss", "dfe.remat=true", True),  # the same numbers, computed again
        ("sss", "model.loop_blocks=true", True),
    ],
)
def test_settings_without_effect_make_no_other_run(method, changed, same):
    other = row(method, 0.7)
    run = Run("hippocampus", 1, method, 0, (changed,))
    assert run.is_done([other]) == same


def test_table_over_seeds():
    rows = [row("floor", 0.5), row("floor", 0.7, seed=1), row("ceiling", 0.9)]
    rows += [row("sss", 0.8), row("sss", 0.7, seed=1)]
    text = quality.table(rows)
    assert (
        "| hippocampus | 1 | floor | 2 | 0.600 ± 0.141 | 2.00 ± 0.00 |  | 1.0 | 10.0 | 100 |"
        in text
    )
    assert "| hippocampus | 1 | sss | 2 | 0.750 ± 0.071 | 2.00 ± 0.00 | +50% |" in text
    assert "| hippocampus | all | ceiling | 1 | 0.900 |" in text


def test_the_gap_is_that_of_the_seeds_a_method_has():
    rows = [row("floor", 0.5), row("floor", 0.7, seed=1), row("ceiling", 0.9)]
    text = quality.table([*rows, row("sss", 0.8, seed=1)])
    assert "| sss | 1 | 0.800 | 2.00 | +50% |" in text  # of 0.7 to 0.9; the ceiling has seed 0
    assert "| +67% |" in quality.table([*rows, row("sss", 0.766667)])


@pytest.mark.parametrize(
    ("extra", "gap"), [("train.unlabelled_batch=2", "+75%"), ("train.steps=7", "")]
)
def test_the_gap_is_that_of_the_same_labels_and_steps(extra, gap):
    rows = [row("floor", 0.5), row("ceiling", 0.9), row("sss", 0.8, extra=(extra,))]
    assert f"| hippocampus ({extra}) | 1 | sss | 1 | 0.800 | 2.00 | {gap} |" in quality.table(rows)


def test_no_gap_is_said():
    rows = [row("floor", 0.9), row("ceiling", 0.8), row("sss", 0.7)]
    assert "| no gap |" in quality.table(rows)


def test_curves_are_thinned():
    log = [{"kind": "train", "step": s, "coverage": s / 7} for s in range(100)]
    log.append({"kind": "val", "step": 100, "dice": 0.5, "pseudo_recall": 0.123456})
    found = quality.curves(log, points=10)
    assert len(found["coverage"]) == 10
    assert found["coverage"][1] == [10, pytest.approx(10 / 7, abs=1e-4)]
    assert found["pseudo_recall"] == [[100, 0.1235]]


def test_distances_without_a_spacing_are_in_voxels():
    assert quality._distance([{"hd95_mm": 2.0}, {"hd95_mm": 3.0}]) == "2.50 ± 0.71"
    assert quality._distance([{"hd95_voxel": 8.142}]) == "8.14 voxels"
    assert quality._distance([{"hd95_mm": None}]) == quality._distance([{}]) == "none"
