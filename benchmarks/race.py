"""Two implementations beside each other: calls alternate, so that a change of load hits both."""

import contextlib
import functools
import gc
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from sss_jax import flops, process
from sss_jax.benchmarks import result

PAUSE = 0.5
"""Seconds between calls: the threads of either side spin for a while after their work."""


DEVICES = ("cpu", "cuda")
"""Where torch and JAX can race, by torch's names."""


def keep_memory() -> None:
    """Let the process keep what either side frees, on large pages; starts the program anew.

    Otherwise the side that frees more in one piece pays for fresh pages, and more so after the
    pause and the other side's turn: on a virtual machine that hands free pages back to its host,
    two thirds of the time of a step that took 2 GB.
    """
    os.environ.setdefault(process.KEEP, "1")
    process.set_up()


def share_device(device: str) -> None:
    """Give both sides the same cores or GPU and the same precision; before the first array.

    Raises:
        SystemExit: torch and JAX do not both see the GPU.
    """
    import torch

    # JAX would take most of a GPU's memory at once.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    torch.set_num_threads(result.cores_allowed())
    if device == "cpu":
        jax.config.update("jax_platforms", "cpu")
        return
    if not torch.cuda.is_available() or jax.default_backend() != "gpu":
        raise SystemExit("--device cuda: torch and JAX must both see the GPU")
    # What XLA does by default on GPUs that can.
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True


def free(device: str) -> None:
    """Give back the memory that torch no longer uses, so that the other side can have it."""
    gc.collect()
    if device == "cuda":
        import torch

        torch.cuda.empty_cache()


def torch_call(run: Callable, device: str, dtype: str = "float32") -> Callable[[], None]:
    """Return a call that waits for torch's result, with autocast where `dtype` is bfloat16."""
    import torch

    low = dtype == "bfloat16"

    def call() -> None:
        with torch.autocast(device, torch.bfloat16) if low else contextlib.nullcontext():
            run()
        if device == "cuda":
            torch.cuda.synchronize()

    return call


def race(mine: Callable, theirs: Callable, repeats: int) -> dict[str, Any]:
    """Alternate two functions that compute the same; the first calls compile and do not count.

    Args:
        mine: returns arrays of JAX; it is compiled twice, the second time from the cache on disk.
        theirs: waits for its own result.
        repeats: timed calls of each side.

    Returns:
        Times and ratios as `alternate` gives them, compile times, memory, and the operations of
        the network, which count once what a backward pass computes again.
    """
    waits = functools.partial(waiting, mine)
    operations = flops.count(mine, again=False)
    first, again = _first_calls(waits)
    # The first call: later ones find the memory that this one leaves behind.
    torch_peak = result.peak_bytes(theirs)
    times = alternate(waits, theirs, repeats)
    return {
        **times,
        "ours_gflop": round(operations / 1e9, 1),
        "ours_flops_per_s": operations / times["ours_s"]["median"],
        "first_call_s": first,
        "first_call_from_cache_s": again,
        "ours_peak_bytes": result.peak_bytes(waits),
        "torch_peak_bytes": torch_peak,
    }


def alternate(
    mine: Callable, theirs: Callable, repeats: int, other: str = "torch"
) -> dict[str, Any]:
    """Time two functions in turn; both wait for their result and have been called before.

    Beside the times there is the processor time of all threads of the process: on a CPU that others
    use too it says more, on a GPU it is what the host spends. `faults` are pages that the system
    had to find: a side that takes many in every call pays for memory, not for work. The other
    side's numbers carry the name `other`.
    """
    clocks: dict[str, list[Clock]] = {"ours": [], other: []}
    for _ in range(repeats):
        for name, run in (("ours", mine), (other, theirs)):
            time.sleep(PAUSE)
            clocks[name].append(_clock(run))
    times = {name: result.summary([call.wall for call in calls]) for name, calls in clocks.items()}
    busy = {name: statistics.median(call.busy for call in calls) for name, calls in clocks.items()}
    return {
        **{f"{name}_s": summary for name, summary in times.items()},
        "speedup": round(times[other]["median"] / times["ours"]["median"], 3),
        **{f"{name}_cpu_s": round(seconds, 4) for name, seconds in busy.items()},
        "speedup_cpu": round(busy[other] / max(busy["ours"], 1e-9), 3),
        **{
            f"{name}_faults": int(statistics.median(call.faults for call in calls))
            for name, calls in clocks.items()
        },
    }


class Clock(NamedTuple):
    """What one call took: seconds on the wall, seconds of all threads, page faults."""

    wall: float
    busy: float
    faults: int


def _clock(run: Callable) -> Clock:
    wall, busy, faults = time.perf_counter(), time.process_time(), result.page_faults()
    run()
    return Clock(
        time.perf_counter() - wall, time.process_time() - busy, result.page_faults() - faults
    )


def keep_compilations() -> None:
    """Cache every compiled program on disk, in a folder of this process."""
    jax.config.update("jax_compilation_cache_dir", tempfile.mkdtemp(prefix="sss-jax-cache-"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


def waiting(run: Callable) -> None:
    """Call a function that returns arrays of JAX, and wait for them."""
    jax.block_until_ready(run())


def _first_calls(run: Callable) -> tuple[float, float]:
    """Seconds of a call that compiles, and of one that finds the program in the cache on disk."""

    def fresh() -> float:
        jax.clear_caches()
        return round(result.seconds(run, 1, 0)[0], 2)

    return fresh(), fresh()
