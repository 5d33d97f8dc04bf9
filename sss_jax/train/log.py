"""What a run tells: metrics.jsonl for programs, one live line or plain lines for people.

Results go to standard output elsewhere; everything here that people read goes to standard error.
"""

import importlib.util
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self, TextIO

from sss_jax import atomic

_NONFINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class MetricsLog:
    """Append-only metrics.jsonl: one strict JSON object per line, on disk when `write` returns.

    NaN and infinity are written as the strings "NaN", "Infinity" and "-Infinity", and read back as
    numbers. With tensorboardX installed the same numbers go to a `tensorboard` folder.

    Args:
        workdir: existing run folder.
        tensorboard: also write TensorBoard files where the package is installed.
        writes: False leaves the file to another process, and only reads it.
    """

    NAME = "metrics.jsonl"

    def __init__(
        self, workdir: str | os.PathLike[str], *, tensorboard: bool = True, writes: bool = True
    ) -> None:
        self.path = Path(workdir) / self.NAME
        self._stream: TextIO | None = None
        self._writes = writes
        self._board = _Board(Path(workdir) / "tensorboard") if tensorboard and writes else None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def write(self, row: Mapping[str, Any]) -> None:
        """Append one row; its values are numbers, strings, booleans, None, lists or dicts."""
        if not self._writes:
            return
        encoded = _encode(row)
        line = json.dumps(encoded, allow_nan=False)
        if self._stream is None:
            self._repair()
            self._stream = self.path.open("a", encoding="utf-8", buffering=1)
        self._stream.write(line + "\n")
        if self._board is not None:
            self._board.write(_decode(encoded))

    def truncate(self, step: int) -> None:
        """Drop the rows after `step`, so that a resumed run's file equals an uninterrupted one's.

        Rows without a step stay. A torn last line goes.
        """
        if not self._writes:
            return
        self._close_stream()
        kept = [line for line, row in self._lines() if row.get("step", step) <= step]
        if self.path.exists():
            atomic.write_text(self.path, "".join(line + "\n" for line in kept))
        if self._board is not None:
            self._board.purge(step)

    def rows(self) -> list[dict[str, Any]]:
        """All whole rows, oldest first."""
        return [row for _, row in self._lines()]

    def best(self, name: str) -> float | None:
        """Highest finite value of a metric over all validation rows, or None."""
        values = [row[name] for row in self.rows() if row.get("kind") == "val" and name in row]
        return max((v for v in values if v is not None and math.isfinite(v)), default=None)

    def close(self) -> None:
        """Close the files."""
        self._close_stream()
        if self._board is not None:
            self._board.close()

    def _close_stream(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def _lines(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Whole lines with their rows; a line that a crash cut off is left out."""
        if not self.path.exists():
            return
        for line in self.path.read_text(encoding="utf-8", errors="replace").split("\n"):
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict):
                yield line, _decode(row)

    def _repair(self) -> None:
        """Remove a last line without an end, before the next row is glued to it."""
        content = self.path.read_bytes() if self.path.exists() else b""
        if content and not content.endswith(b"\n"):
            atomic.write_text(self.path, "".join(line + "\n" for line, _ in self._lines()))


def _encode(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _encode(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_encode(item) for item in value]
    if value is None or isinstance(value, str | bool | int):
        return value
    number = value.item() if hasattr(value, "item") else float(value)
    if isinstance(number, float) and not math.isfinite(number):
        return next(name for name, other in _NONFINITE.items() if str(other) == str(number))
    return number


def _decode(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _decode(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_decode(item) for item in value]
    return _NONFINITE.get(value, value) if isinstance(value, str) else value


class _Board:
    """TensorBoard files, opened at the first number, where tensorboardX is installed."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._purge_step: int | None = None
        self._writer: Any = None
        self._installed = importlib.util.find_spec("tensorboardX") is not None

    def write(self, row: Mapping[str, Any]) -> None:
        if not self._installed or "step" not in row:
            return
        if self._writer is None:
            from tensorboardX import SummaryWriter

            self._writer = SummaryWriter(str(self._folder), purge_step=self._purge_step)
        kind = row.get("kind", "run")
        for name, value in row.items():
            if isinstance(value, int | float) and name != "step":
                self._writer.add_scalar(f"{kind}/{name}", value, row["step"])

    def purge(self, step: int) -> None:
        self.close()
        self._purge_step = step + 1

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


class Progress:
    """One live line on a terminal, plain lines elsewhere; both on standard error.

    Args:
        total: steps of the run.
        start: steps that were done before.
        stream: where to write; standard error by default.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        total: int,
        start: int = 0,
        *,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total, self._start, self._clock = total, start, clock
        self._stream = sys.stderr if stream is None else stream
        self._live: Any = None
        self._began = clock()

    def __enter__(self) -> Self:
        self._began = self._clock()
        if is_terminal(self._stream):
            from rich.console import Console
            from rich.live import Live

            console = Console(file=self._stream, soft_wrap=False)
            self._live = Live("", console=console, refresh_per_second=4, transient=False)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def update(self, step: int, row: Mapping[str, Any]) -> None:
        """Show the newest numbers of a step; `step` counts completed steps."""
        text = f"{progress_line(step, self._total, row)}  {self._remaining(step)}".rstrip()
        if self._live is not None:
            from rich.text import Text

            self._live.update(Text(text, overflow="ellipsis", no_wrap=True))
        else:
            print(text, file=self._stream, flush=True)

    def message(self, text: str) -> None:
        """Show a line that stays, such as a validation result."""
        if self._live is not None:
            self._live.console.print(text, markup=False, highlight=False)
        else:
            print(text, file=self._stream, flush=True)

    def _remaining(self, step: int) -> str:
        done, left = step - self._start, self._total - step
        if done <= 0 or left <= 0:
            return ""
        return f"left {format_seconds((self._clock() - self._began) / done * left)}"


_HIDDEN = ("step", "kind")


def progress_line(step: int, total: int, row: Mapping[str, Any]) -> str:
    """One line for people: step, loss terms, pseudo-labels, speed, in the order of the row."""
    shown = [f"{name} {_short(value)}" for name, value in row.items() if name not in _HIDDEN]
    return "  ".join([f"step {step}/{total}", *shown])


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)


def format_seconds(seconds: float) -> str:
    """Duration as 12s, 3m05s or 2h07m."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def is_terminal(stream: TextIO) -> bool:
    """Whether a live line can be drawn on a stream."""
    return stream.isatty() and os.environ.get("TERM", "dumb") != "dumb"
