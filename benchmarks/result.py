"""Results of benchmarks as JSON: what was measured, on what, with which versions."""

import contextlib
import ctypes
import datetime
import importlib.metadata
import json
import os
import platform
import resource
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax

_GENERATION = (("family", "cpu family"), ("model", "model"))
PACKAGES = ("jax", "jaxlib", "flax", "torch", "transformers", "sam2", "numpy")


def seconds(run: Callable[[], Any], repeats: int, warm_up: int = 2) -> list[float]:
    """Time a call several times, after some that do not count; it must wait for its result."""
    for _ in range(warm_up):
        run()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return times


def alternate(
    runs: Mapping[str, Callable[[], Any]], repeats: int, profile: Path | None = None
) -> dict[str, list[float]]:
    """Time several calls in turn, so that a change of load hits all; each waits for its result.

    A first round does not count. With `profile` one more round, which does not count either, is
    written there as a trace of `jax.profiler`.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats + 1):
        for name, run in runs.items():
            began = time.perf_counter()
            run()
            if turn:
                times[name].append(time.perf_counter() - began)
    with jax.profiler.trace(profile) if profile else contextlib.nullcontext():
        for name, run in runs.items() if profile else ():
            with jax.profiler.TraceAnnotation(name):
                run()
    return times


def summary(times: list[float]) -> dict[str, float]:
    """Median and extremes, seconds."""
    return {"median": statistics.median(times), "low": min(times), "high": max(times)}


def peak_bytes(run: Callable[[], Any]) -> int | None:
    """Bytes of memory that a call takes beyond what the process holds; None where unknown.

    What the process has freed is given back first. Linux with glibc only.
    """
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        before = _resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        run()
        return max(_resident("VmHWM") - before, 0)
    except (OSError, AttributeError):
        return None


def _resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(name)))


def page_faults() -> int:
    """Pages that the system had to find for this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def environment() -> dict[str, Any]:
    """Device, versions and commit of this run."""
    return {
        "date": datetime.date.today().isoformat(),
        "device": jax.devices()[0].device_kind,
        "processor": _processor(),
        "cores": os.cpu_count(),
        "cores_allowed": cores_allowed(),
        "malloc": os.environ.get("GLIBC_TUNABLES"),
        "load_before": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
        "commit": commit(),
    }


def cores_allowed() -> int:
    """Return the number of cores that this process may use; fewer than there are where pinned."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def document(name: str, rows: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    """Return a result with what it was measured on; `sss_jax.benchmarks.schema` describes it."""
    return {"benchmark": name, **environment(), **more, "rows": rows}


def write(path: Path, name: str, rows: list[dict[str, Any]], **more: Any) -> None:
    """Write a result file."""
    save(path, document(name, rows, **more))


def rows_of(path: Path) -> list[dict[str, Any]]:
    """Return the rows that an earlier call left in a file; none where there is no file."""
    return json.loads(path.read_text())["rows"] if path.is_file() else []


def holds(rows: Iterable[dict[str, Any]], facts: dict[str, Any]) -> bool:
    """Whether one of the rows has all these entries."""
    return any(facts.items() <= row.items() for row in rows)


def save(path: Path, content: dict[str, Any]) -> None:
    """Write a result as it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n")


def _processor() -> str:
    try:
        return processor_name(Path("/proc/cpuinfo").read_text())
    except OSError:
        return platform.processor()


def processor_name(cpuinfo: str) -> str:
    """Name a processor from Linux's description, with family and model where it has them.

    Virtual machines call generations that differ by half in speed by one name, as "AMD EPYC".
    """
    pairs = (
        line.split(":", 1) for line in cpuinfo.partition("\n\n")[0].splitlines() if ":" in line
    )
    facts = {name.strip(): value.strip() for name, value in pairs}
    parts = [facts.get("model name", "")]
    parts += [f"{name} {facts[key]}" for name, key in _GENERATION if key in facts]
    return ", ".join(filter(None, parts))


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit() -> str | None:
    """Return the short commit of the code that runs, if it is in a repository."""
    here = Path(__file__).resolve().parent
    done = subprocess.run(
        ["git", "-C", str(here), "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    )
    return done.stdout.strip() or None
