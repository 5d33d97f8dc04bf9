"""The doctor names what is missing and never falls ill itself."""

import json
import os
import re
import subprocess
import sys
import time
from importlib import metadata

import pytest

from sss_jax import doctor
from sss_jax.doctor import Check, Report, diagnose, in_range


@pytest.fixture(scope="module")
def report() -> Report:
    return diagnose()


def found(report: Report, name: str) -> Check:
    return next(check for check in report.checks if check.name == name)


def test_looks_at_everything_on_this_machine(report):
    names = [check.name for check in report.checks]
    for name in ("python", "jax", "jax devices", "jax compile", "cores", "memory", "disk"):
        assert name in names
    assert found(report, "jax devices").found.startswith("cpu: ")
    assert found(report, "jax compile").found.startswith("right result")
    assert "hippocampus" in found(report, "configs").found
    assert "could not be looked at" not in report.render()


def test_every_problem_has_a_fix_and_nothing_else_has(report):
    broken = Report((*report.checks, Check("x", "bad", True, "mend it")))
    for check in broken.checks:
        assert bool(check.fix) == check.problem


def test_report_as_text_and_json():
    sick = Report((Check("a", "fine"), Check("longer", "bad", True, "mend it")))
    assert sick.render().splitlines() == [
        "ok       a       fine",
        "problem  longer  bad",
        "                 fix: mend it",
        "",
        "1 problem found.",
    ]
    assert [check.name for check in sick.problems] == ["longer"]
    content = json.loads(json.dumps(sick.to_json()))
    assert content["ok"] is False
    assert content["checks"][1] == {
        "name": "longer",
        "found": "bad",
        "problem": True,
        "fix": "mend it",
    }
    assert Report((Check("a", "fine"),)).render().endswith("No problems found.")


@pytest.mark.parametrize(
    ("version", "bounds", "expected"),
    [
        ("0.10.2", "<0.12,>=0.10.2", True),
        ("0.12", "<0.12,>=0.10.2", False),
        ("0.12.0", "<0.12", False),
        ("0.9.99", ">=0.10.2", False),
        ("0.11.2", "<0.12,>=0.10.2", True),
        ("2.1", ">=2.1.0", True),
        ("1.26.4", ">=2.1", False),
        ("0.11.0.dev20260101", ">=0.10.2", True),
        ("3", "", True),
        ("1.5", "!=1.5", False),
        ("1.5", "==1.5.0", True),
        ("1.5", ">1.5", False),
        ("1.5", "<=1.5", True),
    ],
)
def test_in_range(version, bounds, expected):
    assert in_range(version, bounds) is expected


def test_wrong_and_missing_packages_are_named_with_the_command(monkeypatch):
    version = metadata.version

    def other(name):
        if name == "grain":
            raise metadata.PackageNotFoundError(name)
        return "0.4.1" if name == "jax" else version(name)

    monkeypatch.setattr(doctor.metadata, "version", other)
    checks = {check.name: check for check in doctor._packages()}
    assert checks["jax"].problem
    assert checks["jax"].found.startswith("0.4.1, ")
    assert re.fullmatch(r'pip install "jax[<>=.,\d]+"', checks["jax"].fix)
    assert checks["grain"].found.startswith("not installed")
    assert not checks["flax"].problem
    assert not any("extra" in name for name in checks)

    def nothing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(doctor.metadata, "requires", nothing)
    (check,) = doctor._packages()
    assert check.problem


def test_hanging_device_is_reported_within_the_limit(monkeypatch):
    """The child and what it started are gone afterwards."""
    program = "import subprocess, time; subprocess.Popen(['sleep', '987']); time.sleep(987)"
    monkeypatch.setattr(doctor, "_PROBE", program)
    began = time.monotonic()
    (check,) = doctor._jax(1.0)
    assert time.monotonic() - began < 5
    assert check.problem
    assert "no answer within 1 s" in check.found
    assert "sleep 987" not in subprocess.run(["ps", "ax"], capture_output=True, text=True).stdout


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("import os; os.abort()", "no message (exit -6)"),
        ("raise ImportError('no jaxlib for this CPU')", "ImportError: no jaxlib for this CPU"),
        ("import sys; print('PROB'); sys.exit(0)", "no message (exit 0)"),
    ],
)
def test_broken_jax_is_a_problem_not_a_crash(monkeypatch, program, reason):
    monkeypatch.setattr(doctor, "_PROBE", program)
    (check,) = doctor._jax(30.0)
    assert check.problem
    assert reason in check.found


def test_unknown_flag_that_aborts_jax_is_named(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_no_such_flag=1")
    (check,) = doctor._jax(60.0)
    assert "xla_no_such_flag" in check.found


def test_wrong_result_of_a_device_is_a_problem(monkeypatch):
    answer = {"backend": "gpu", "kinds": ["X", "X"], "memory": 2**34, "right": False, "seconds": 1}
    monkeypatch.setattr(
        doctor, "_PROBE", f"import json; print('PROBE' + '''{json.dumps(answer)}''')"
    )
    devices, compiled = doctor._jax(30.0)
    assert devices.found == "gpu: 2 x X, 16.0 GiB each"
    assert compiled.problem
    assert "WRONG" in compiled.found


def test_gpu_that_jax_does_not_use_is_a_problem(monkeypatch):
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    monkeypatch.setattr(doctor.Path, "exists", lambda path: True)
    check = doctor._unused_accelerator("cpu", "cpu: 1 x cpu")
    assert check.problem
    assert "sss-jax[cuda12]" in check.fix
    assert not doctor._unused_accelerator("gpu", "gpu: 1 x H100").problem
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert not doctor._unused_accelerator("cpu", "cpu: 1 x cpu").problem


def test_little_memory_and_disk_are_problems(monkeypatch):
    monkeypatch.setattr(doctor, "_memory", lambda: 2**30)
    assert [check.name for check in doctor._resources() if check.problem] == ["memory"]
    monkeypatch.setattr(doctor, "_memory", lambda: None)
    assert [check.name for check in doctor._resources()] == ["cores"]
    usage = doctor.shutil.disk_usage(".")._replace(free=2**20)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage)
    (disk,) = doctor._disk()
    assert disk.problem


def test_absent_extras_are_no_problem(monkeypatch):
    monkeypatch.setattr(doctor.util, "find_spec", lambda name: None)
    checks = doctor._extras()
    assert not any(check.problem for check in checks)
    assert all("sss-jax[" in check.found for check in checks)


def test_a_check_that_breaks_does_not_hide_the_others(monkeypatch):
    def broken():
        raise RuntimeError("surprise")

    monkeypatch.setattr(doctor, "_extras", broken)
    monkeypatch.setattr(doctor, "_jax", lambda timeout: [])
    report = diagnose()
    (check,) = report.problems
    assert "surprise" in check.found
    assert found(report, "file names")


HOSTILE = """
import json, os, sys, tempfile
from sss_jax import doctor
doctor._jax = lambda timeout: []
os.chdir(sys.argv[1])
os.rmdir(sys.argv[1])
report = doctor.diagnose()
report.render()
print(json.dumps(report.to_json()))
"""


def test_deleted_folder_no_home_and_no_temporary_folder(tmp_path):
    """One run without everything a process usually has."""
    gone = tmp_path / "gone"
    gone.mkdir()
    environment = {"PATH": os.environ["PATH"], "TERM": "dumb", "LC_ALL": "C"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run(
        [sys.executable, "-c", HOSTILE, str(gone)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    checks = {check["name"]: check for check in json.loads(done.stdout)["checks"]}
    assert checks["this folder"]["problem"]
    assert "HOME is not set" in checks["home"]["found"]
    assert not checks["home"]["problem"]
    assert not checks["configs"]["problem"]


def test_read_only_folder_is_named(tmp_path, monkeypatch):
    def refuse(dir):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(doctor.tempfile, "TemporaryFile", refuse)
    checks = {check.name: check for check in doctor._folders()}
    assert checks["this folder"].found == "cannot be written: Read-only file system"
    assert "--workdir" in checks["this folder"].fix
    assert "TMPDIR" in checks["temporary files"].fix
