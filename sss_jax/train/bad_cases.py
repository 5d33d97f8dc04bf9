"""Cases that cannot be read: found before the first step, and left out where that is asked for."""

import json
import sys
import time
from pathlib import Path

import jax

from sss_jax.atomic import write_json
from sss_jax.data.cases import Split
from sss_jax.data.faults import shown
from sss_jax.data.sources import Source
from sss_jax.errors import DataError
from sss_jax.options import Options
from sss_jax.train import hosts

SKIPPED = "skipped.json"
"""File of the run folder with the cases that a run leaves out, and why."""

_EVERY_SECONDS = 10.0
_SHOWN = 20


def find(source: Source, split: Split, options: Options) -> dict[str, list[str]]:
    """Read once what a run will read, each process a part of it, and return the faults by case.

    Args:
        source: where the cases come from.
        split: the cases; those of the test part are not read.
        options: all settings.
    """
    cases = (*split.labelled, *split.unlabelled, *split.val)
    own = cases[jax.process_index() :: jax.process_count()]
    found: dict[str, list[str]] = {}
    told = time.monotonic()
    checked = source.faults(own, options.model.num_classes, options.data)
    for number, (case, faults) in enumerate(checked, start=1):
        if faults:
            found[case.name] = [str(fault) for fault in faults]
        if time.monotonic() - told > _EVERY_SECONDS:
            told = time.monotonic()
            _say(f"reading every case once: {number} of {len(own)}")
    merged = {name: said for part in hosts.gathered(found) for name, said in part.items()}
    return {case.name: merged[case.name] for case in cases if case.name in merged}


def settle(bad: dict[str, list[str]], workdir: Path, *, skip: bool) -> None:
    """Note in the run's folder what it leaves out.

    Args:
        bad: result of `find`.
        workdir: run folder.
        skip: leave out what cannot be read, instead of refusing to begin.

    Raises:
        DataError: naming every file that cannot be used.
    """
    if bad and not skip:
        raise DataError(_complaint(bad))
    if not bad:
        (workdir / SKIPPED).unlink(missing_ok=True)
        return
    write_json(workdir / SKIPPED, bad)
    names = ", ".join(shown(name) for name in bad)
    _say(f"left out, because they cannot be read: {names} ({workdir / SKIPPED} says why)")


def left_out(workdir: Path) -> list[str]:
    """Return the names of the cases that the run in a folder leaves out."""
    path = workdir / SKIPPED
    return list(json.loads(path.read_text())) if path.is_file() else []


def _complaint(bad: dict[str, list[str]]) -> str:
    faults = [fault for own in bad.values() for fault in own]
    lines = [f"{len(faults)} files cannot be used, and nothing was trained:"]
    lines += [f"  {fault}" for fault in faults[:_SHOWN]]
    if len(faults) > _SHOWN:
        lines.append(f"  and {len(faults) - _SHOWN} more; `sss-jax data check` lists all")
    return "\n".join([*lines, "or train without their cases: --skip-bad"])


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
