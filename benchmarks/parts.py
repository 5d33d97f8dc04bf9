"""Where the time of a step goes, part by part: `sss-jax bench parts`.

Every part is compiled by itself, on one device, with the configuration's batch; see
`sss_jax.benchmarks.step_parts` for what the parts are.
"""

import time
from collections.abc import Callable
from typing import Any

import jax

from sss_jax import compiling, flops
from sss_jax.benchmarks import ceilings, result
from sss_jax.benchmarks.batches import Batch, first_batch
from sss_jax.benchmarks.ceilings import Ceilings
from sss_jax.benchmarks.request import Measured, Request
from sss_jax.benchmarks.step_parts import WHOLE, Part, step_parts
from sss_jax.hlo import Program
from sss_jax.options import Options
from sss_jax.train.setup import set_up
from sss_jax.train.state import init_all_params, state_of
from sss_jax.train.step import root_key


def measure(request: Request) -> Measured:
    """Measure the parts of every method that is asked for."""
    chosen = request.options()
    dtype = next(iter(chosen.values())).model.dtype
    best = ceilings.measure(dtype)
    rows = []
    for method, options in chosen.items():
        rows += [
            {"name": f"{method}: {row['part']}", **row} for row in _rows(request, options, best)
        ]
    return Measured(rows, {"ceilings": best.to_json()})


def _rows(request: Request, options: Options, best: Ceilings) -> list[dict[str, Any]]:
    programs = Programs(options, request.say)
    batch = first_batch(options, request.data)
    parts = make_parts(options, programs.run, batch)
    compiled = {p.name: programs.compiled(p.function, p.args, p.name) for p in parts}

    def runner(part: Part) -> Callable[[], Any]:
        return lambda: jax.block_until_ready(compiled[part.name](*part.args))

    request.say(f"{options.method}: timing {len(parts)} parts")
    runs = {part.name: runner(part) for part in parts}
    times = result.alternate(runs, request.repeats, request.trace("parts"))
    whole = result.summary(times[WHOLE])["median"]
    return [_row(p, compiled[p.name], result.summary(times[p.name]), whole, best) for p in parts]


class Programs:
    """Functions compiled once, as the step would be."""

    def __init__(self, options: Options, say: Callable[[str], None]) -> None:
        large = options.model.image_size >= compiling.LARGE_IMAGE
        self._settings = compiling.compiler_options() if large else {}
        self._made: dict[Any, Any] = {}
        self._say = say

    def compiled(
        self, function: Callable[..., Any], args: tuple[Any, ...], name: str | None = None
    ) -> Any:
        """Compile a function for its arguments."""
        if function not in self._made:
            began = time.monotonic()
            lowered = jax.jit(function).lower(*args)
            self._made[function] = lowered.compile(self._settings)
            taken = time.monotonic() - began
            self._say(f"{name or function.__name__}: compiled in {taken:.0f} s")
        return self._made[function]

    def run(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call a function by its compiled program."""
        return self.compiled(function, args)(*args)


def make_parts(options: Options, run: Callable[..., Any], batch: Batch) -> list[Part]:
    """Draw parameters, and cut the step."""
    setup, key = set_up(options), root_key(0)
    state = jax.jit(
        lambda k: state_of(init_all_params(setup.model, options, k), setup.optimizer, setup.memory)
    )(key)
    return step_parts(options, setup, state, jax.device_put(batch), key, run)


def _row(
    part: Part, compiled: Any, taken: dict[str, float], whole: float, best: Ceilings
) -> dict[str, Any]:
    costs = Program(compiled.as_text()).costs()
    operations = flops.count(part.function, *part.args)
    moved, seconds = sum(c.nbytes * c.times for c in costs), taken["median"]
    return {
        "part": part.name,
        "in_step": part.in_step,
        "flops": operations,
        "bytes": moved,
        "loops_known": all(c.exact for c in costs),
        "time_s": taken,
        "flops_per_s": operations / seconds,
        "bytes_per_s": moved / seconds,
        "share": seconds / whole,
        "bound": ceilings.bound(seconds, operations, moved, best),
    }


_COLUMNS = ("GFLOP", "GB", "ms", "GFLOP/s", "GB/s", "step")


def render(found: Measured) -> str:
    """Write the table."""
    best, width = found.more["ceilings"], max(len(row["name"]) for row in found.rows) + 2
    head = "".join(f"{name:>10}" for name in _COLUMNS)
    lines = [
        f"large products reach {best['matmul_flops_per_s'] / 1e9:.0f} GFLOP/s, "
        f"copies {best['copy_bytes_per_s'] / 1e9:.1f} GB/s",
        f"{'':<{width}}{head}  bound",
    ]
    lines += [_line(row, width) for row in found.rows]
    lines += [
        f"{_method(whole)}: parts marked + take {_counted(found.rows, whole):.0%} of the step"
        for whole in found.rows
        if whole["part"] == WHOLE
    ]
    if not all(row["loops_known"] for row in found.rows):
        lines.append("~ loops of unknown length inside: bytes and GFLOP count one turn of each")
    return "\n".join(lines)


def _line(row: dict[str, Any], width: int) -> str:
    marks = ("+" if row["in_step"] else "") + ("" if row["loops_known"] else "~")
    numbers = (
        f"{row['flops'] / 1e9:>10.3f}{row['bytes'] / 1e9:>10.3f}"
        f"{row['time_s']['median'] * 1e3:>10.2f}{row['flops_per_s'] / 1e9:>10.1f}"
        f"{row['bytes_per_s'] / 1e9:>10.1f}{row['share']:>10.1%}"
    )
    return f"{row['name'] + ' ' + marks:<{width + 2}}"[:width] + f"{numbers}  {row['bound']}"


def _method(row: dict[str, Any]) -> str:
    return row["name"].partition(":")[0]


def _counted(rows: list[dict[str, Any]], whole: dict[str, Any]) -> float:
    return sum(r["share"] for r in rows if r["in_step"] and _method(r) == _method(whole))
