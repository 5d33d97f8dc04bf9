"""Charts of the report as SVG text; colours are the page's CSS variables."""

import dataclasses
import html
import itertools
import math
from collections.abc import Sequence

from sss_jax.data.faults import shown

WIDTH, HEIGHT = 520, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 22, 12, 40
_MOST_POINTS = 240
_PITCH, _STRIP_LEFT, _STRIP_RIGHT = 46, 130, 22
PALETTE = 7


@dataclasses.dataclass(frozen=True)
class Series:
    """One line of a chart.

    Attributes:
        name: for the legend.
        points: (step, value) pairs, steps ascending; values that are not finite leave a gap.
        color: number of the palette colour, from 1; 0 is the text colour.
    """

    name: str
    points: Sequence[tuple[float, float]]
    color: int = 0


def escape(text: object) -> str:
    """Return text that is safe inside HTML and inside quoted attributes."""
    return html.escape(shown(text), quote=True)


def color(number: int) -> str:
    """Return the CSS colour of a class or series; they repeat after the seventh."""
    return "var(--ink)" if number == 0 else f"var(--c{(number - 1) % PALETTE + 1})"


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Return about `count` round numbers that cover [low, high]."""
    if not high > low:
        high = low + (abs(low) or 1.0)
    rough = (high - low) / max(count - 1, 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def tick_text(value: float, ticks: Sequence[float]) -> str:
    """Return a tick label with the digits that tell the ticks apart."""
    step = min((b - a for a, b in itertools.pairwise(ticks)), default=1.0)
    largest = max(abs(t) for t in ticks)
    if largest >= 1e5 or 0 < largest < 1e-3:
        return f"{value:.1e}".replace("e-0", "e-").replace("e+0", "e") if value else "0"
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    if round(step, digits) != step and round(step * 10**digits, 6) != round(step * 10**digits):
        digits += 1
    return f"{value:,.{digits}f}"


def thin(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Average neighbouring points until they fit a chart; gaps stay where all of them are gaps."""
    group = math.ceil(len(points) / _MOST_POINTS)
    if group <= 1:
        return list(points)
    thinned = []
    for i in range(0, len(points), group):
        part = points[i : i + group]
        finite = [y for _, y in part if math.isfinite(y)]
        x = sum(x for x, _ in part) / len(part)
        thinned.append((x, sum(finite) / len(finite) if finite else math.nan))
    return thinned


def line_chart(
    title: str,
    unit: str,
    series: Sequence[Series],
    bounds: tuple[float, float] | None = None,
    *,
    from_zero: bool = False,
    x_name: str = "step",
    about: str = "",
) -> str:
    """Return a figure with a legend and one line for each series.

    Args:
        title: heading of the figure.
        unit: what the vertical axis shows.
        series: lines; those without a finite value are left out.
        bounds: ends of the vertical axis; by default round numbers around the data.
        from_zero: start the vertical axis at 0 unless there are values below.
        x_name: what the horizontal axis shows.
        about: a sentence below the title that says how to read the figure.
    """
    lines = [Series(s.name, thin(s.points), s.color) for s in series]
    finite = [(x, y) for s in lines for x, y in s.points if math.isfinite(y)]
    if not finite:
        return ""
    ticks_x = nice_ticks(min(x for x, _ in finite), max(x for x, _ in finite), 6)
    low, high = bounds or (min(y for _, y in finite), max(y for _, y in finite))
    ticks_y = nice_ticks(min(low, 0.0) if from_zero else low, high)
    frame = _Frame(ticks_x, ticks_y)
    drawn = [s for s in lines if any(math.isfinite(y) for _, y in s.points)]
    body = frame.axes(x_name, unit) + "".join(_line(frame, s) for s in drawn)
    reading = f"<p>{escape(about)}</p>" if about else ""
    return (
        f'<figure class="chart"><figcaption>{escape(title)}</figcaption>{reading}{_legend(drawn)}'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{body}</svg>'
        "</figure>"
    )


class _Frame:
    """Maps data to the drawing area of a line chart."""

    def __init__(self, ticks_x: Sequence[float], ticks_y: Sequence[float]) -> None:
        self.ticks_x, self.ticks_y = ticks_x, ticks_y

    def x(self, value: float) -> float:
        share = (value - self.ticks_x[0]) / (self.ticks_x[-1] - self.ticks_x[0])
        return _LEFT + share * (WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        share = (value - self.ticks_y[0]) / (self.ticks_y[-1] - self.ticks_y[0])
        return HEIGHT - _BOTTOM - share * (HEIGHT - _TOP - _BOTTOM)

    def axes(self, x_name: str, y_name: str) -> str:
        parts = []
        for tick in self.ticks_y:
            y, text = self.y(tick), tick_text(tick, self.ticks_y)
            parts.append(
                f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" '
                f'y2="{y:.1f}"/><text class="tick" x="{_LEFT - 7}" y="{y + 4:.1f}" '
                f'text-anchor="end">{text}</text>'
            )
        base = HEIGHT - _BOTTOM
        for tick in self.ticks_x:
            x, text = self.x(tick), tick_text(tick, self.ticks_x)
            parts.append(
                f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{base}" y2="{base + 4}"/>'
                f'<text class="tick" x="{x:.1f}" y="{base + 17}" text-anchor="middle">{text}</text>'
            )
        middle_x, middle_y = (_LEFT + WIDTH - _RIGHT) / 2, (_TOP + base) / 2
        return "".join(parts) + (
            f'<line class="axis" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{base}" y2="{base}"/>'
            f'<text class="name" x="{middle_x}" y="{HEIGHT - 5}" text-anchor="middle">'
            f"{escape(x_name)}</text>"
            f'<text class="name" transform="translate(11 {middle_y}) rotate(-90)" '
            f'text-anchor="middle">{escape(y_name)}</text>'
        )


def _line(frame: _Frame, series: Series) -> str:
    """One path, broken at gaps; a value without neighbours becomes a dot."""
    pieces: list[list[str]] = [[]]
    for x, y in series.points:
        if math.isfinite(y):
            pieces[-1].append(f"{frame.x(x):.1f} {frame.y(y):.1f}")
        elif pieces[-1]:
            pieces.append([])
    paths = "".join("M" + "L".join(p) for p in pieces if len(p) > 1)
    few = len(series.points) <= 30
    dots = [at for p in pieces for at in p if few or len(p) == 1]
    style = f'style="--s:{color(series.color)}"'
    circles = "".join(f'<circle cx="{at.split()[0]}" cy="{at.split()[1]}" r="2.4"/>' for at in dots)
    return (
        f'<g class="series" {style}><path d="{paths}"/>{circles}</g>'
        if paths
        else (f'<g class="series" {style}>{circles}</g>')
    )


def _legend(series: Sequence[Series]) -> str:
    entries = []
    for s in series:
        last = next(y for _, y in reversed(s.points) if math.isfinite(y))
        entries.append(
            f'<li><i style="background:{color(s.color)}"></i>{escape(s.name)} '
            f"<b>{_short(last)}</b></li>"
        )
    return f'<ul class="legend">{"".join(entries)}</ul>'


def _short(value: float) -> str:
    if value == 0:
        return "0"
    text = f"{value:.3g}"
    return text if "e" in text or abs(value) >= 100 else f"{value:#.3g}".rstrip(".")


def strip_chart(
    title: str,
    x_name: str,
    groups: Sequence[tuple[str, Sequence[float]]],
    largest: float = 1.0,
) -> str:
    """Return a figure with a row of dots for each group.

    Args:
        title: heading of the figure.
        x_name: what the axis shows.
        groups: name and values of each row; dots that would overlap are stacked, the mean is a bar.
        largest: value that the axis must reach; it starts at 0.
    """
    height = _PITCH * len(groups) + 46
    base = height - 40
    ticks = nice_ticks(0.0, largest, 6)
    scale = (WIDTH - _STRIP_LEFT - _STRIP_RIGHT) / ticks[-1]
    parts = []
    for tick in ticks:
        x = _STRIP_LEFT + tick * scale
        parts.append(
            f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="4" y2="{base}"/>'
            f'<text class="tick" x="{x:.1f}" y="{base + 16}" text-anchor="middle">'
            f"{tick_text(tick, ticks)}</text>"
        )
    parts += [_strip(i, name, values, scale) for i, (name, values) in enumerate(groups)]
    middle = (_STRIP_LEFT + WIDTH - _STRIP_RIGHT) / 2
    parts.append(
        f'<line class="axis" x1="{_STRIP_LEFT}" x2="{WIDTH - _STRIP_RIGHT}" y1="{base}" '
        f'y2="{base}"/><text class="name" x="{middle}" y="{height - 5}" text-anchor="middle">'
        f"{escape(x_name)}</text>"
    )
    return (
        f'<figure class="chart"><figcaption>{escape(title)}</figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(title)}">'
        f"{''.join(parts)}</svg></figure>"
    )


def _strip(row: int, name: str, values: Sequence[float], scale: float) -> str:
    middle = 6 + _PITCH * (row + 0.5)
    label = name if len(name) <= 18 else name[:17] + "…"
    parts = [
        f'<text class="label" x="{_STRIP_LEFT - 12}" y="{middle + 4}" text-anchor="end">'
        f"{escape(label)}<title>{escape(name)}</title></text>"
    ]
    stacks: dict[int, int] = {}
    for value in sorted(values):
        x = _STRIP_LEFT + value * scale
        level = stacks[round(x / 6)] = stacks.get(round(x / 6), -1) + 1
        # Stacked dots alternate around the middle of the row and stay within it.
        offset = min((level + 1) // 2 * 5, 17) * (1 if level % 2 else -1)
        parts.append(
            f'<circle cx="{x:.1f}" cy="{middle + offset:.1f}" r="3.6">'
            f"<title>{value:.3g}</title></circle>"
        )
    if values:
        x = _STRIP_LEFT + sum(values) / len(values) * scale
        parts.append(
            f'<line class="mean" x1="{x:.1f}" x2="{x:.1f}" y1="{middle - 15}" y2="{middle + 15}"/>'
        )
    return f'<g class="strip" style="--s:{color(row + 1)}">{"".join(parts)}</g>'
