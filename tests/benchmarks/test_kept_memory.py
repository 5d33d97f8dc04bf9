"""All ways take the same steps, or there is no result."""

import importlib.util
import json
import subprocess

import pytest

from sss_jax.benchmarks import kept_memory

RUN = {"seconds": [2.0, 4.0], "faults": [70, 90], "losses": [3.0, 2.0, 1.0], "peak_mib": 100}
KEPT = RUN | {"seconds": [1.0, 2.0], "faults": [0, 1], "peak_mib": 90}
HUGE = RUN | {"seconds": [1.5, 2.5], "faults": [5, 6]}


@pytest.fixture
def runs(monkeypatch):
    """What the processes of each way answer."""
    found = {"usual": RUN, "kept": KEPT, "huge": HUGE, "both": KEPT}
    monkeypatch.setattr(kept_memory, "_run", lambda way, *rest: found[way])
    return found


def test_a_row_compares_medians(runs, tmp_path, capsys):
    assert kept_memory.main(["-o", str(tmp_path / "a.json")]) == 0
    (row,) = json.loads((tmp_path / "a.json").read_text())["rows"]
    assert row == json.loads(capsys.readouterr().out)
    assert (row["kept_speedup"], row["huge_speedup"]) == (2, 1.5)
    assert (row["usual_faults"], row["kept_faults"]) == (90, 1)
    assert (row["usual_peak_mib"], row["kept_peak_mib"]) == (100, 90)


def test_memory_is_settled_before_a_process_starts(monkeypatch):
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.perturb=7")
    seen = {}

    def run(command, env, **rest):
        seen[command[command.index("--as") + 1]] = env.get("GLIBC_TUNABLES")
        return subprocess.CompletedProcess(command, 0, json.dumps(RUN))

    monkeypatch.setattr(kept_memory.subprocess, "run", run)
    monkeypatch.setattr(kept_memory, "__spec__", importlib.util.find_spec(kept_memory.__name__))
    kept_memory.compare("demo", [], 1, 1)
    kept = "glibc.malloc.arena_max=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold="
    huge, most = "glibc.malloc.hugetlb=1", str(2**62)
    both = f"{huge}:{kept}{most}"
    assert seen == {"usual": "", "kept": kept + most, "huge": huge, "both": both}


def test_other_losses_are_no_result(runs):
    runs["kept"] = KEPT | {"losses": [3.0, 2.0, 1.1]}
    with pytest.raises(SystemExit, match="losses differ"):
        kept_memory.main([])


def test_a_process_that_fails_is_no_result(capfd):
    with pytest.raises(SystemExit, match="ended with 1"):
        kept_memory.compare("none", [], 1, 1)
    assert "no configuration" in capfd.readouterr().err
