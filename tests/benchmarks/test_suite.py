"""One command for all benchmarks: its calls are understood, failures do not end it, goals judge."""

import argparse
import importlib
import json

import pytest

from sss_jax.benchmarks import goals, suite

MATMUL, PEAK = 1e12, 1e15
RATES = {"sss": 10.0, "supervised": 20.0}


class Understood(Exception):
    """The arguments of a call were read."""


@pytest.mark.parametrize("device", suite.DEVICES)
def test_every_benchmark_understands_its_call(device, tmp_path, monkeypatch):
    args = suite.parse(["-o", str(tmp_path), "--device", device])
    read = argparse.ArgumentParser.parse_args

    def stop(parser, words=None):
        raise Understood(vars(read(parser, words)))

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    work = suite.commands(args)
    for module, *words in work.values():
        with pytest.raises(Understood):
            importlib.import_module(module).main([*words, "-o", str(tmp_path / "found.json")])
    assert ("peer_step_small" in work) == (device != "tpu")


def test_a_failure_leaves_its_log_and_the_rest_goes_on(tmp_path, monkeypatch, capsys):
    write = "import sys, pathlib; pathlib.Path(sys.argv[-1]).write_text('{}')"
    monkeypatch.setattr(suite, "ROOT", tmp_path)
    (tmp_path / "works.py").write_text(write)
    (tmp_path / "fails.py").write_text(f"{write}; sys.exit('no GPU')")
    monkeypatch.setattr(suite, "commands", lambda args: {"b": ["fails"], "a": ["works"]})
    monkeypatch.setattr(goals, "judge", lambda folder, device: [])
    folder = tmp_path / "found"
    assert suite.main(["-o", str(folder)]) == 1
    assert (folder / "a.json").exists()
    assert not (folder / "b.json").exists()
    assert "no GPU" in (folder / "b.log").read_text()
    assert f"b failed: {folder / 'b'}.log" in capsys.readouterr().err
    (tmp_path / "works.py").write_text("raise SystemExit('ran again')")
    assert suite.main(["-o", str(folder), "--only", "a"]) == 0
    with pytest.raises(SystemExit, match=r"no benchmark \['c'\]; known: b, a"):
        suite.main(["-o", str(folder), "--only", "c"])


def sam2_rows(encoder, compiled):
    """Rows of `sam2_speed`: operations per second of the encoder, and one compiled row."""
    names = ("encoder", "encoder forward and backward", "encoder, torch.compile")
    rates = (encoder, encoder, 0.0)
    return [
        {"variant": "tiny", "row": name, "speedup": s, "ours_flops_per_s": rate}
        for name, s, rate in zip(names, (1.2, 1.1, compiled), rates, strict=True)
    ]


def write(folder, name, benchmark, rows, **more):
    """Write a file as a suite would."""
    more = {"settings": ["model.preset=tiny"], **more}
    (folder / name).write_text(json.dumps({"benchmark": benchmark, "rows": rows, **more}))


@pytest.fixture
def measured(tmp_path):
    """Results in which every goal is just met or just missed."""
    best = {"matmul_flops_per_s": MATMUL, "peak_bfloat16_flops_per_s": PEAK, "chip": "h100"}
    for name, compiled in (("a", 1.31), ("b", 1.29)):
        rows = sam2_rows(0.41 * PEAK, compiled)
        write(tmp_path, f"{name}.json", "sam2_speed", rows, ceilings=best)
    ratios = {"fine-tuning": 0.5, "semi-supervised": 2.1}
    steps = [{"step": s, "torch": "sdpa", "speedup": ratio} for s, ratio in ratios.items()]
    write(tmp_path, "c.json", "peer_step", steps)
    parts = {"DFE forward": 0.3, "DFE forward and backward": 0.1, "PCSW": 0.04, "losses": 0.5}
    rows = [
        {"benchmark": "parts", "part": part, "in_step": part != "DFE forward", "share": share}
        for part, share in parts.items()
    ]
    rows += [{"benchmark": "step_time", "name": m, "slices_per_s": r} for m, r in RATES.items()]
    rows += [
        {"benchmark": "data_rate", "source": source, "slices_per_s": {"median": rate}}
        for source, rate in (("nifti", 90.0), ("prepared, resized by the device", 41.0))
    ]
    write(tmp_path, "d.json", "parts+step_time+data_rate", rows)
    return tmp_path


def test_goals_look_at_the_worst_row(measured):
    found = {j.goal.name: j for j in goals.judge(measured, "cuda")}
    told = {name: (j.value and round(j.value, 4), j.met) for name, j in found.items()}
    assert told == {
        "SAM-2 beside torch.compile with SDPA, every row": (1.29, False),
        "MFU of the encoder's training": (0.41, True),
        "semi-supervised step beside torch": (2.1, True),
        "DFE and PCSW, share of the step": (0.14, True),
        "data over the step's consumption": (2.05, True),
        "PCSW beside scipy": (None, None),
    }
    lines = goals.render(list(found.values())).splitlines()
    assert lines[2].endswith("| at least 1.3 | 1.29 | tiny, encoder, torch.compile | no |")
    assert lines[5].endswith("| at most 0.15 | 0.14 | model.preset=tiny | yes |")
    assert lines[7].endswith("| at least 20 | not measured |  |  |")


def test_a_cpu_has_goals_of_its_own(measured):
    found = {j.goal.name: j.value for j in goals.judge(measured, "cpu")}
    assert found["SAM-2 beside torch, every row"] == 1.1
    assert found["encoder's rate over that of products"] == pytest.approx(0.41 * PEAK / MATMUL)
    assert "PCSW beside scipy" not in found
