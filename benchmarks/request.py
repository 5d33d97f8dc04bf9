"""What a user asks `sss-jax bench` to measure, and what a benchmark hands back."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from sss_jax import config
from sss_jax.options import Options


class Measured(NamedTuple):
    """Rows of a result, and what else belongs into its file."""

    rows: list[dict[str, Any]]
    more: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Request:
    """One call of `sss-jax bench`.

    Attributes:
        config: configuration, with or without its method.
        overrides: settings that differ from it, `group.field=value`.
        methods: methods to measure; empty: that of the configuration, or the benchmark's own.
        without: mechanisms of `sss` that `step_time` switches off, one at a time.
        repeats: timings of each row.
        profile: folder of traces; None: no trace.
        data: what is measured with, as `train --data` names it; None: synthetic.
        say: receives lines of progress.
    """

    config: str = "hippocampus"
    overrides: tuple[str, ...] = ()
    methods: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    repeats: int = 5
    profile: Path | None = None
    say: Callable[[str], None] = lambda line: None
    data: str | None = None

    @property
    def name(self) -> str:
        """The configuration without its method."""
        return self.config.partition(":")[0]

    def chosen(self, default: tuple[str, ...] = ("sss",)) -> tuple[str, ...]:
        """Return the methods to measure, where `default` is what the benchmark itself would."""
        named = self.config.partition(":")[2]
        return self.methods or ((named,) if named else default)

    def options(self, default: tuple[str, ...] = ("sss",)) -> dict[str, Options]:
        """Load the configuration once for each method."""
        return {
            method: config.load(f"{self.name}:{method}", self.overrides)
            for method in self.chosen(default)
        }

    def trace(self, benchmark: str) -> Path | None:
        """Return the folder for the trace of one benchmark."""
        return self.profile / benchmark if self.profile else None
