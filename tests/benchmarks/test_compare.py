"""Verdicts of `sss-jax bench compare`, through the command line."""

import copy
import json

import pytest

from sss_jax import cli
from sss_jax.benchmarks import result


def timing(median):
    return {"median": median, "low": 0.5 * median, "high": 2 * median}


ROWS = [
    {"name": "step", "time_s": timing(1.0), "flops": 100, "share": 0.1},
    {"name": "predict", "volumes_per_min": 60.0},
]
BEFORE = result.document("bench", ROWS, config="hippocampus", settings=[])


@pytest.fixture
def verdict(tmp_path, capsys):
    """Exit code, stdout and stderr of a comparison with a result changed by `change`."""

    def compare(change, *words):
        after = copy.deepcopy(BEFORE)
        change(after)
        files = [tmp_path / "a.json", tmp_path / "b.json"]
        for path, content in zip(files, (BEFORE, after), strict=True):
            path.write_text(json.dumps(content))
        code = cli.main(["bench", "compare", *map(str, files), *words])
        return code, *capsys.readouterr()

    return compare


def set_row(number, **values):
    return lambda document: document["rows"][number].update(values)


@pytest.mark.parametrize(
    ("change", "code", "line"),
    [
        (set_row(0, share=9.0), 0, "0 of 3 numbers worse"),
        (set_row(0, time_s=timing(1.09)), 0, "0 of 3 numbers worse"),
        (set_row(0, time_s=timing(1.11)), 1, "1.110  worse"),
        (set_row(0, time_s=timing(0.5)), 0, "0.500  better"),
        (set_row(0, flops=111), 1, "1.110  worse"),
        (set_row(1, volumes_per_min=50.0), 1, "0.833  worse"),
        (set_row(1, volumes_per_min=90.0), 0, "1.500  better"),
    ],
)
def test_a_number_is_worse_beyond_the_bound(verdict, change, code, line):
    found, out, _ = verdict(change)
    assert found == code
    assert line in out


def test_the_bound_is_the_users(verdict):
    assert verdict(set_row(0, time_s=timing(1.3)), "--bound", "1.5")[0] == 0
    assert verdict(set_row(0, time_s=timing(1.03)), "--bound", "1.02")[0] == 1
    code, _, err = verdict(set_row(0), "--bound", "0.9")
    assert code == 2
    assert "must be at least 1" in err


def test_what_one_side_lacks_is_named(verdict):
    def change(document):
        document["rows"][1]["name"] = "other"
        del document["rows"][0]["flops"]

    code, out, _ = verdict(change)
    assert code == 0
    assert {"only in A: predict", "only in B: other", "only in A: step: flops"} <= set(
        out.splitlines()
    )


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda d: d.update(device="TPU v5e"), "device"),
        (lambda d: d.update(settings=["model.image_size=32"]), "settings"),
        (lambda d: d.update(data="hippocampus"), "data"),
        (lambda d: d["versions"].update(jaxlib="0.0.1"), "jaxlib"),
    ],
)
def test_other_devices_settings_and_versions_are_refused(verdict, change, name):
    code, out, err = verdict(change)
    assert (code, out) == (2, "")
    assert f"not comparable: {name}" in err
    code, out, _ = verdict(change, "--anyway")
    assert code == 0
    assert out.startswith(f"differs: {name}")


def test_versions_that_one_side_does_not_have_do_not_matter(verdict):
    assert verdict(lambda d: d["versions"].update(torch="9.9"))[0] == 0


def test_something_out_of_nothing_is_worse(verdict):
    BEFORE["rows"][0]["collectives"] = 0
    try:
        assert verdict(set_row(0, collectives=0))[0] == 0
        code, out, _ = verdict(set_row(0, collectives=2), "--json")
    finally:
        del BEFORE["rows"][0]["collectives"]
    assert code == 1
    found = json.loads(out)
    (row,) = [row for row in found["rows"] if row["measure"] == "collectives"]
    assert (row["ratio"], row["verdict"], found["worse"]) == (None, "worse", 1)


def test_files_that_are_no_results_are_refused(tmp_path, capsys):
    path = tmp_path / "a.json"
    assert cli.main(["bench", "compare", str(path), str(path)]) == 1
    path.write_text("{}")
    assert cli.main(["bench", "compare", str(path), str(path)]) == 1
    assert "is no result: benchmark must be str" in capsys.readouterr().err
    assert cli.main(["bench", "compare", str(path)]) == 2
