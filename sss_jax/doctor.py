"""The `doctor` verb: what this machine can run, what is wrong with it, and how to mend that.

Nothing here may fail because a piece is missing: the missing piece is what is reported. JAX is
tried in a child process under a time limit, since a wrong flag aborts the process that meets it
and a busy accelerator can keep it waiting for ever.
"""

import contextlib
import dataclasses
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from importlib import metadata, util
from pathlib import Path
from typing import Any

_PYTHON = (3, 11)
_LOW_MEMORY = 4 * 2**30
_LOW_DISK = 2 * 2**30
_EXTRAS = {"tb": ("tensorboardX", "TensorBoard files of a run")}
_PROBE = """
import json, sys, time
import jax, jax.numpy as jnp
devices = jax.local_devices()
began = time.monotonic()
x = jnp.arange(6.0).reshape(2, 3)
total = float(jax.jit(lambda x: (x @ x.T).sum())(x))
print("PROBE" + json.dumps({
    "backend": jax.default_backend(),
    "kinds": [d.device_kind for d in devices],
    "memory": (devices[0].memory_stats() or {}).get("bytes_limit"),
    "right": abs(total - 83.0) < 0.5,
    "seconds": round(time.monotonic() - began, 2),
}))
"""


@dataclasses.dataclass(frozen=True)
class Check:
    """One thing that was looked at; `fix` says what to do where it is a problem."""

    name: str
    found: str
    problem: bool = False
    fix: str = ""


@dataclasses.dataclass(frozen=True)
class Report:
    """All checks, in the order they were made."""

    checks: tuple[Check, ...]

    @property
    def problems(self) -> tuple[Check, ...]:
        """The checks that need a fix."""
        return tuple(check for check in self.checks if check.problem)

    def render(self) -> str:
        """Text for people: one line per check, a fix below each problem, a verdict at the end."""
        width = max((len(check.name) for check in self.checks), default=0)
        lines = []
        for check in self.checks:
            mark = "problem" if check.problem else "ok"
            lines.append(f"{mark:<8} {check.name:<{width}}  {check.found}")
            if check.problem:
                lines.append(f"{'':<8} {'':<{width}}  fix: {check.fix}")
        count = len(self.problems)
        verdict = f"{count} problem{'s' * (count != 1)} found." if count else "No problems found."
        return "\n".join([*lines, "", verdict])

    def to_json(self) -> dict[str, Any]:
        """JSON value with the same content."""
        return {"ok": not self.problems, "checks": [dataclasses.asdict(c) for c in self.checks]}


def diagnose(timeout: float = 120.0) -> Report:
    """Look at this machine; takes a few seconds, or `timeout` seconds where a device hangs."""
    steps: tuple[Callable[[], Iterable[Check]], ...] = (
        _python,
        _packages,
        lambda: _jax(timeout),
        _resources,
        _disk,
        _extras,
        _configs,
        _folders,
    )
    checks: list[Check] = []
    for step in steps:
        try:
            checks += step()
        except Exception as error:  # a check that breaks must not hide the others
            name = getattr(step, "__name__", "check").strip("_<>")
            found = f"could not be looked at: {type(error).__name__}: {error}"
            checks.append(Check(name, found, True, "report this with the output of --json"))
    return Report(tuple(checks))


def _python() -> list[Check]:
    found = f"{platform.python_version()}, {platform.system()} {platform.machine()}"
    old = sys.version_info[:2] < _PYTHON
    fix = "use Python {}.{} or newer".format(*_PYTHON)
    return [Check("python", found, old, fix if old else "")]


# Packages.


def _packages() -> list[Check]:
    try:
        required = metadata.requires("sss-jax") or []
    except metadata.PackageNotFoundError:
        return [Check("sss-jax", "not installed", True, "pip install sss-jax, or pip install -e .")]
    checks = [Check("sss-jax", metadata.version("sss-jax"))]
    return checks + [_package(line) for line in required if "extra ==" not in line]


def _package(requirement: str) -> Check:
    """Compare the installed version with a requirement such as `jax<0.12,>=0.10.2`."""
    name, bounds = re.fullmatch(r"([\w.-]+)\s*([^;]*).*", requirement).groups()  # type: ignore[union-attr]
    fix = f'pip install "{name}{bounds.strip()}"'
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return Check(name, f"not installed, {bounds} needed", True, fix)
    bad = not in_range(version, bounds)
    return Check(name, f"{version}, {bounds} needed" if bad else version, bad, fix if bad else "")


def in_range(version: str, bounds: str) -> bool:
    """Whether a release such as `0.10.2` meets bounds such as `>=0.10.2,<0.12`."""
    here = _release(version)
    for bound in filter(None, (part.strip() for part in bounds.split(","))):
        operator, other = re.fullmatch(r"(>=|<=|==|!=|<|>)\s*(.+)", bound).groups()  # type: ignore[union-attr]
        there = _release(other)
        size = max(len(here), len(there))
        a = here + (0,) * (size - len(here))
        b = there + (0,) * (size - len(there))
        met = {">=": a >= b, "<=": a <= b, "==": a == b, "!=": a != b, "<": a < b, ">": a > b}
        if not met[operator]:
            return False
    return True


def _release(version: str) -> tuple[int, ...]:
    numbers = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in numbers.group().split(".")) if numbers else (0,)


# JAX.


def _jax(timeout: float) -> list[Check]:
    fix = "reinstall JAX for this machine; JAX_PLATFORMS=cpu leaves the accelerator out"
    try:
        status, output, errors = _run([sys.executable, "-P", "-c", _PROBE], timeout)
    except subprocess.TimeoutExpired:
        return [
            Check(
                "jax devices",
                f"no answer within {timeout:.0f} s",
                True,
                "end the process that holds the accelerator, or leave it out: JAX_PLATFORMS=cpu",
            )
        ]
    answer = next((line for line in output.splitlines() if line.startswith("PROBE")), None)
    if answer is None:
        return [Check("jax devices", f"JAX fails: {_reason(status, errors)}", True, fix)]
    probe = json.loads(answer.removeprefix("PROBE"))
    kinds = [f"{probe['kinds'].count(kind)} x {kind}" for kind in dict.fromkeys(probe["kinds"])]
    memory = f", {_gib(probe['memory'])} each" if probe["memory"] else ""
    found = f"{probe['backend']}: {', '.join(kinds)}{memory}"
    compiled = f"{'right' if probe['right'] else 'WRONG'} result in {probe['seconds']} s"
    return [
        _unused_accelerator(probe["backend"], found),
        Check("jax compile", compiled, not probe["right"], fix if not probe["right"] else ""),
    ]


def _unused_accelerator(backend: str, found: str) -> Check:
    """Find the usual mistake: an accelerator in the machine and a JAX built for the CPU."""
    if backend != "cpu" or "cpu" in os.environ.get("JAX_PLATFORMS", ""):
        return Check("jax devices", found)
    if shutil.which("nvidia-smi") and Path("/proc/driver/nvidia/version").exists():
        found, fix = f"{found}, and an NVIDIA GPU that is not used", "sss-jax[cuda12]"
    elif any(Path("/dev").glob("accel*")):
        found, fix = f"{found}, and a TPU that is not used", "sss-jax[tpu]"
    else:
        return Check("jax devices", found)
    return Check("jax devices", found, True, f'pip install "{fix}"')


def _run(command: list[str], timeout: float) -> tuple[int, str, str]:
    """Run a command in its own process group, which is killed as a whole at the time limit."""
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        output, errors = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        _kill_group(process)
        raise
    return process.returncode, output, errors


def _kill_group(process: "subprocess.Popen[str]") -> None:
    if hasattr(os, "killpg"):
        os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()
    process.communicate()


def _reason(status: int, errors: str) -> str:
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    told = [line for line in lines if re.match(r"[\w.]*(Error|Exception)\b|.*Unknown flag", line)]
    text = (told or lines or ["no message"])[-1][:200]
    return f"{text} (exit {status})"


# The machine.


def _resources() -> list[Check]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    checks = [Check("cores", str(cores or "unknown"))]
    memory = _memory()
    if memory is not None:
        low = memory < _LOW_MEMORY
        fix = f"use a machine with {_gib(_LOW_MEMORY)} or more" if low else ""
        checks.append(Check("memory", f"{_gib(memory)} available", low, fix))
    return checks


def _disk() -> list[Check]:
    free = shutil.disk_usage(os.curdir).free
    low = free < _LOW_DISK
    fix = "free some space, or choose another --workdir; a checkpoint takes up to 3 GiB"
    return [Check("disk", f"{_gib(free)} free here", low, fix if low else "")]


def _memory() -> int | None:
    """Memory that a new process may use, bytes: what is available, within the container's limit."""
    amounts = []
    with contextlib.suppress(OSError):
        found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
        amounts += [int(found.group(1)) * 1024] if found else []
    with contextlib.suppress(OSError, ValueError):  # no cgroup, or "max"
        amounts.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return min(amounts, default=None)


def _extras() -> list[Check]:
    checks = []
    for extra, (module, use) in _EXTRAS.items():
        present = util.find_spec(module) is not None
        absent = f'absent: no {use} (pip install "sss-jax[{extra}]")'
        checks.append(Check(f"extra {extra}", f"present: {use}" if present else absent))
    return checks


def _configs() -> list[Check]:
    from sss_jax import config
    from sss_jax.errors import ConfigError

    broken, names = [], []
    try:
        names = list(config.packaged())
    except ConfigError as error:
        broken.append(str(error))
    for name in names:
        try:
            config.load(name)
        except ConfigError as error:
            broken.append(f"{name}: {error}")
    found = "; ".join(broken) or ", ".join(names)
    return [Check("configs", found, bool(broken), "install sss-jax again" if broken else "")]


def _folders() -> list[Check]:
    fix_here = "run in a folder you may write to, or give -o and --workdir elsewhere"
    checks = [_writable("this folder", Path.cwd, fix_here)]
    fix_temporary = "set TMPDIR to a folder you may write to"
    checks.append(_writable("temporary files", lambda: Path(tempfile.gettempdir()), fix_temporary))
    checks.append(Check("home", os.environ.get("HOME") or "HOME is not set; nothing needs it"))
    encoding = sys.getfilesystemencoding()
    bad = encoding.lower().replace("-", "") != "utf8"
    checks.append(Check("file names", encoding, bad, "set PYTHONUTF8=1" if bad else ""))
    return checks


def _writable(name: str, find: Callable[[], Path], fix: str) -> Check:
    try:
        folder = find()
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        return Check(name, f"cannot be written: {error.strerror or error}", True, fix)
    return Check(name, f"{folder} can be written")


def _gib(count: float) -> str:
    return f"{count / 2**30:.1f} GiB"
