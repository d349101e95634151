"""Charts as inline SVG: drawn to be read at the width of a phone, in the page's own colours, and without colours.

A series has a colour, a dash and a marker, so that none of them alone tells it from the others. Every drawing has a
title and a description for those who do not see it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from .markup import Html, el, join

WIDTH, HEIGHT = 420, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 16, 12, 46
_MAX_POINTS = 400
STYLES = 8
_DASHES = ("", "7 3", "2 3", "9 3 2 3", "12 4", "4 2", "1 4", "6 2 1 2 1 2")
_ids = itertools.count()


@dataclass
class Series:
    """A line: points in order of x, and an interval around them.

    Attributes:
        style: 0 to 7, a colour with its dash and marker.
        band: (x, low, high).
    """

    name: str
    points: list[tuple[float, float]]
    style: int = 0
    band: list[tuple[float, float, float]] = field(default_factory=list)


def thinned(points: Sequence[tuple[float, float]], most: int = _MAX_POINTS) -> list[tuple[float, float]]:
    """Thin points to about `most`: of each stretch its smallest and its largest, so that no peak is lost."""
    if len(points) <= most:
        return list(points)
    size = -(-2 * len(points) // most)
    drawn = []
    for start in range(0, len(points), size):
        stretch = points[start : start + size]
        ends = {
            min(range(len(stretch)), key=lambda i: stretch[i][1]),
            max(range(len(stretch)), key=lambda i: stretch[i][1]),
        }
        drawn += [stretch[i] for i in sorted(ends)]
    return drawn if drawn[-1] == points[-1] else [*drawn, points[-1]]


def _drawing(title: str, description: str, height: float, *children: Any) -> Html:
    name = f"drawing-{next(_ids)}"
    return el(
        "svg",
        el("title", title, id=f"{name}-t"),
        el("desc", description, id=f"{name}-d"),
        children,
        viewBox=Html(f"0 0 {WIDTH} {height:g}"),
        role="img",
        aria_labelledby=f"{name}-t {name}-d",
    )


def _text(x: float, y: float, content: Any, **attributes: Any) -> Html:
    return el("text", content, x=f"{x:g}", y=f"{y:g}", **attributes)


def _line(x1: float, y1: float, x2: float, y2: float, **attributes: Any) -> Html:
    return el("line", x1=f"{x1:g}", y1=f"{y1:g}", x2=f"{x2:g}", y2=f"{y2:g}", **attributes)


def _axes(x: Scale, y: Scale, x_ticks: list[float], y_ticks: list[float], x_label: str, y_label: str) -> list[Html]:
    parts = []
    for value in y_ticks:
        parts.append(_line(x.start, y(value), x.end, y(value), class_="grid"))
        parts.append(_text(x.start - 6, y(value) + 4, short(value), class_="end"))
    for value in x_ticks:
        parts.append(_line(x(value), y.start, x(value), y.start + 4, class_="axis"))
        parts.append(_text(x(value), y.start + 17, short(value), class_="middle"))
    parts.append(_line(x.start, y.start, x.end, y.start, class_="axis"))
    parts.append(_text((x.start + x.end) / 2, y.start + 36, x_label, class_="middle label"))
    middle = (y.start + y.end) / 2
    parts.append(_text(12, middle, y_label, class_="middle label", transform=f"rotate(-90 12 {middle:g})"))
    return parts


def _scales(
    xs: tuple[float, float], ys: tuple[float, float], height: float = HEIGHT, *, whole: bool = False
) -> tuple[Scale, Scale, list[float], list[float]]:
    y_ticks, x_ticks = nice_ticks(*ys), nice_ticks(*xs, wanted=6)
    y = Scale(y_ticks[0], y_ticks[-1], height - _BOTTOM, _TOP)
    low, high = (xs[0], xs[1]) if xs[1] > xs[0] else (x_ticks[0], x_ticks[-1])
    x = Scale(low, high, _LEFT, WIDTH - _RIGHT)
    shown = [value for value in x_ticks if low <= value <= high and (value == int(value) or not whole)]
    return x, y, shown, y_ticks


def marker(style: int, x: float, y: float, size: float = 4.0) -> Html:
    """Draw the series' sign: circle, square, triangle, diamond, and these once more, hollow."""
    kind = f"m s{style % STYLES}" + (" hollow" if style % STYLES > 3 else "")
    if style % 4 == 0:
        return el("circle", cx=f"{x:g}", cy=f"{y:g}", r=f"{size:g}", class_=kind)
    around = {
        1: [(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)],
        2: [(0, -1.2), (1.1, 0.9), (-1.1, 0.9)],
        3: [(0, -1.3), (1.3, 0), (0, 1.3), (-1.3, 0)],
    }[style % 4]
    path = " ".join(f"{x + size * dx:.1f},{y + size * dy:.1f}" for dx, dy in around)
    return el("polygon", points=path, class_=kind)


def line_chart(
    series: Sequence[Series],
    *,
    title: str,
    x_label: str,
    y_label: str,
    zero: bool = False,
    limits: tuple[tuple[float, float], tuple[float, float]] | None = None,
    diagonal: bool = False,
) -> Html:
    """Draw lines with their intervals.

    Args:
        limits: of x and y; by default those of the data.
        diagonal: with the line y = x, where a calibrated model would be.
    """
    drawn = [Series(s.name, thinned(s.points), s.style, s.band) for s in series if s.points]
    xs = spread(x for s in drawn for x, _ in s.points)
    ys = spread([y for s in drawn for _, y in s.points] + [v for s in drawn for _, *b in s.band for v in b], zero=zero)
    if limits is not None:
        xs, ys = limits
    whole = all(x == int(x) for s in drawn for x, _ in s.points)  # steps and tokens have no halves
    x, y, x_ticks, y_ticks = _scales(xs, ys, whole=whole and limits is None)
    parts: list[Any] = _axes(x, y, x_ticks, y_ticks, x_label, y_label)
    if diagonal:
        parts.append(_line(x(xs[0]), y(xs[0]), x(xs[1]), y(xs[1]), class_="reference"))
    for curve in drawn:
        if curve.band:
            upper = [f"{x(at)},{y(high)}" for at, _, high in curve.band]
            lower = [f"{x(at)},{y(low)}" for at, low, _ in reversed(curve.band)]
            parts.append(el("polygon", points=" ".join(upper + lower), class_=f"band s{curve.style % STYLES}"))
    for curve in drawn:
        style = curve.style % STYLES
        path = " ".join(f"{x(at)},{y(value)}" for at, value in curve.points)
        parts.append(el("polyline", points=path, class_=f"line s{style}", stroke_dasharray=_DASHES[style] or None))
        every = max(1, len(curve.points) // 8)
        shifted = curve.points[
            style % every if len(curve.points) > every else 0 :: every
        ]  # markers of lines side by side
        parts += [marker(curve.style, x(at), y(value), 3.2) for at, value in shifted]
    return _drawing(title, describe(drawn, x_label, y_label), HEIGHT, parts)


def describe(series: Sequence[Series], x_label: str, y_label: str) -> str:
    """Describe the chart in words: from where to where each line goes, and its extremes."""
    sentences = []
    for curve in series:
        (x0, y0), (x1, y1) = curve.points[0], curve.points[-1]
        values = [value for _, value in curve.points]
        sentences.append(
            f"{curve.name}: from {short(y0)} at {x_label} {short(x0)} to {short(y1)} at {short(x1)}, "
            f"lowest {short(min(values))}, highest {short(max(values))}."
        )
    return f"{y_label} by {x_label}. " + (" ".join(sentences) or "There is nothing to draw.")


def legend(names: Sequence[tuple[str, int]]) -> Html | None:
    """Tell which sign is whose; nothing where there is one series only."""
    if len(names) < 2:
        return None
    entries = []
    for name, style in names:
        line = _line(1, 7, 29, 7, class_=f"line s{style % STYLES}", stroke_dasharray=_DASHES[style % STYLES] or None)
        key = el("svg", line, marker(style, 15, 7), viewBox="0 0 30 14", class_="key", aria_hidden="true")
        entries.append(el("li", key, name))
    return el("ul", entries, class_="legend")


def interval_chart(
    rows: Sequence[tuple[str, int, float, float | None, float | None, str]],
    *,
    title: str,
    x_label: str,
    bounds: tuple[float, float] | None = None,
) -> Html:
    """Draw a value and its interval for each of several models, one below the other.

    Args:
        rows: name, style, value, low, high, and the value as text.
    """
    numbers = [v for _, _, value, low, high, _ in rows for v in (value, low, high) if v is not None]
    ticks = nice_ticks(*(bounds or spread(numbers)), wanted=4)
    height = 30 * len(rows) + 50
    bottom, left = height - 44, 96
    x = Scale(ticks[0], ticks[-1], left, WIDTH - 16)
    parts: list[Any] = []
    for value in ticks:
        parts.append(_line(x(value), 6, x(value), bottom, class_="grid"))
        parts.append(_text(x(value), bottom + 16, short(value), class_="middle"))
    parts.append(_text((x.start + x.end) / 2, bottom + 35, x_label, class_="middle label"))
    for i, (name, style, value, low, high, shown) in enumerate(rows):
        y = 6 + 30 * i + 19
        parts.append(_text(left - 8, y + 4, name if len(name) <= 13 else f"{name[:12]}…", class_="end"))
        if low is not None and high is not None:
            parts.append(_line(x(low), y, x(high), y, class_=f"line s{style % STYLES}"))
            parts += [_line(x(end), y - 4, x(end), y + 4, class_=f"line s{style % STYLES}") for end in (low, high)]
        parts.append(marker(style, x(value), y, 4.5))
        side = x(value) > (x.start + x.end) / 2
        parts.append(_text(x(value) + (-2 if side else 2), y - 9, shown, class_="value end" if side else "value"))
    words = "; ".join(
        f"{name} {shown}"
        + (f", interval {short(low)} to {short(high)}" if low is not None and high is not None else "")
        for name, _, _, low, high, shown in rows
    )
    return _drawing(title, f"{words}.", height, parts)


def share_bar(share: float) -> Html:
    """Draw how much of a whole is done, 0 to 1, for a cell that says it in words."""
    done = min(max(share, 0.0), 1.0) * 60
    bars = [el("rect", width=f"{wide:g}", height="6", class_=kind) for wide, kind in ((60, "all"), (done, "bar s2"))]
    return el("svg", bars, viewBox="0 0 60 6", class_="share", aria_hidden="true")


def histogram_chart(
    edges: Sequence[float], counts: Sequence[int], *, title: str, x_label: str, style: int, most: float | None = None
) -> Html:
    """Draw bars from edge to edge, as shares of all.

    Args:
        most: the highest bar of all histograms that are compared, in per cent.
    """
    y_label = "share (%)"
    total = sum(counts) or 1
    x, y, x_ticks, y_ticks = _scales((edges[0], edges[-1]), (0, most or 100 * max(counts, default=1) / total), 190)
    parts: list[Any] = _axes(x, y, x_ticks, y_ticks, x_label, y_label)
    for left, right, count in zip(edges, edges[1:], counts, strict=False):
        top = y(100 * count / total)
        if count:
            width, tall = max(x(right) - x(left) - 1, 1), max(y.start - top, 0)
            place = {"x": f"{x(left) + 0.5:g}", "y": f"{top:g}", "width": f"{width:g}", "height": f"{tall:g}"}
            parts.append(el("rect", **place, class_=f"bar s{style % STYLES}"))
    fullest = max(range(len(counts)), key=lambda i: counts[i]) if counts else 0
    words = f"{sum(counts)} values of {x_label}; most, {max(counts, default=0)}, between "
    words += f"{short(edges[fullest])} and {short(edges[fullest + 1])}." if counts else "nothing."
    return _drawing(title, words, 190, join(parts))


# ---- Scales, ticks and numbers --------------------------------------------------------------------------------------


def nice_ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Choose about `wanted` round numbers (1, 2 or 5 times a power of ten) that enclose [low, high]."""
    if not high > low:
        margin = abs(low) * 0.1 or 1.0
        low, high = low - margin, high + margin
    rough = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * next(factor for factor in (1, 2, 5, 10) if rough <= factor * power * 1.0001)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) if abs(i * step) < 1e6 else i * step for i in range(first, last + 1)]


def short(value: float | None) -> str:
    """Write a number for an axis or a label: four digits at most."""
    if value is None:
        return "–"
    if value == 0:
        return "0"
    size = abs(value)
    for limit, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= limit:
            divisor = 1e3 if letter == "k" else limit
            return f"{value / divisor:.4g}{letter}"
    if size < 1e-3:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    return f"{value:.4g}"


@dataclass(frozen=True)
class Scale:
    """From values to places in a drawing."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return round(self.start + min(max(share, -0.02), 1.02) * (self.end - self.start), 1)


def spread(values: Iterable[float], *, zero: bool = False) -> tuple[float, float]:
    """Return smallest and largest of the values; with `zero`, 0 counts among them."""
    finite = [value for value in values if math.isfinite(value)] or [0.0, 1.0]
    return (min(0.0, *finite), max(0.0, *finite)) if zero else (min(finite), max(finite))
