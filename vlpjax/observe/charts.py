"""Line charts as inline SVG: no script, no fonts, and colours from the page's style sheet for both themes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from vlpjax.observe.markup import Markup, tag

# Charts scale by their viewBox; this is about their size on a phone, so that text stays legible there.
_WIDTH, _HEIGHT = 360, 190
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 12, 10, 26
_LABEL_WIDTH, _LABEL_HEIGHT = 40, 13
_MOST_POINTS = 240
_MARKED_POINTS = 40  # Up to this many points each gets a dot that tells its value.


@dataclass(frozen=True)
class Series:
    """One line: values over steps, in the order they were written."""

    name: str
    steps: Sequence[float]
    values: Sequence[float]

    @property
    def finite(self) -> tuple[np.ndarray, np.ndarray]:
        steps, values = np.asarray(self.steps, float), np.asarray(self.values, float)
        kept = np.isfinite(values)
        return steps[kept], values[kept]


@dataclass(frozen=True)
class _Frame:
    """Maps data to places on the drawing."""

    x: tuple[float, float]
    y: tuple[float, float]
    right: float

    def place(self, steps: np.ndarray, values: np.ndarray) -> list[tuple[float, float]]:
        left, bottom = _LEFT, _HEIGHT - _BOTTOM
        xs = left + (steps - self.x[0]) / (self.x[1] - self.x[0]) * (_WIDTH - self.right - left)
        ys = bottom - (values - self.y[0]) / (self.y[1] - self.y[0]) * (bottom - _TOP)
        # Values outside the range (a spike of the first steps) leave the plot at its edge.
        return [(float(x), float(y)) for x, y in zip(xs, np.clip(ys, _TOP - 4, bottom + 2), strict=True)]


def line_chart(
    title: str,
    series: Sequence[Series],
    *,
    smooth: bool = False,
    percent: bool = False,
    from_zero: bool = False,
    reference: float | None = None,
    label: str = "",
) -> Markup:
    """A figure with one or more lines over steps.

    Args:
        title: name of the chart, above it.
        series: the lines; more than one are named at their right end.
        smooth: draw raw values faintly and a smooth line on top.
        percent: values are shares and are shown times 100.
        from_zero: the vertical axis begins at 0.
        reference: a value to mark with a dashed line (chance).
        label: what stands at the right of the title instead of the newest value.
    """
    show = _percent if percent else compact
    drawn = [one for one in series if len(one.finite[0])]
    newest = show(_newest(drawn[0], smooth)) if len(drawn) == 1 else ""
    caption = tag("figcaption", tag("span", title), tag("span", label or newest, class_="newest"))
    if not drawn:
        return tag("figure", caption, tag("p", "No finite value.", class_="empty"), class_="chart")
    lost = sum(len(one.values) - len(one.finite[0]) for one in series)
    warning = tag("p", f"{lost} values are not finite and not drawn.", class_="warning") if lost else None
    frame = _frame(drawn, smooth, from_zero, reference)
    parts = [_axes(frame, show), _reference(frame, reference, show)]
    for number, one in enumerate(drawn):
        parts.append(tag("g", _line(frame, one, smooth, show), class_=f"series s{number % 5}"))
    if len(drawn) > 1:
        parts.append(_labels(frame, drawn, smooth))
    spoken = f"{title}: " + "; ".join(_spoken(one, smooth, show) for one in drawn)
    drawing = tag("svg", parts, viewBox=f"0 0 {_WIDTH} {_HEIGHT}", role="img", aria_label=spoken)
    return tag("figure", caption, drawing, warning, class_="chart")


def compact(value: float) -> str:
    """Few characters that still tell the number: ``0.31``, ``12.4``, ``1,250``, ``120k``, ``3e-4``."""
    if not math.isfinite(value):
        return str(value)
    size = abs(value)
    if size == 0 or 1e-3 <= size < 1:
        return f"{value:.3g}"
    if size < 1e-3:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    for unit, name in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e4, "k")):
        if size >= unit:
            return f"{value / unit:.3g}{name}" if name != "k" else f"{value / 1e3:.3g}k"
    return f"{value:,.0f}" if size >= 1000 else f"{value:.4g}" if size >= 100 else f"{value:.3g}"


def smoothed(values: np.ndarray) -> np.ndarray:
    """Local linear fit over a tenth of the points (Cleveland 1979, equal weights).

    In the middle this is the moving average; at both ends the window is cut off, and the slope of the fit
    keeps the line from lagging behind a falling loss.
    """
    count = len(values)
    half = count // 20
    if half == 0:
        return values
    place = np.arange(count, dtype=float)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    products = np.concatenate([[0.0], np.cumsum(place * values)])
    first = np.maximum(np.arange(count) - half, 0)
    stop = np.minimum(np.arange(count) + half + 1, count)
    width, centre = stop - first, (first + stop - 1) / 2
    total = sums[stop] - sums[first]
    slope = (products[stop] - products[first] - centre * total) * 12 / (width * (width**2 - 1.0))
    return total / width + slope * (place - centre)


def _percent(value: float) -> str:
    return f"{value * 100:.3g}%"


def _newest(series: Series, smooth: bool) -> float:
    values = series.finite[1]
    return float(smoothed(values)[-1] if smooth else values[-1])


def _spoken(series: Series, smooth: bool, show: Callable[[float], str]) -> str:
    steps, values = series.finite
    first, last = show(values[0]), show(_newest(series, smooth))
    return f"{series.name} {first} at step {steps[0]:g}, {last} at step {steps[-1]:g}"


def _frame(drawn: Sequence[Series], smooth: bool, from_zero: bool, reference: float | None) -> _Frame:
    steps = np.concatenate([one.finite[0] for one in drawn])
    values = np.concatenate([one.finite[1] for one in drawn])
    if smooth and len(values) >= 20:  # A few wild values must not flatten all the others.
        averages = [smoothed(one.finite[1]) for one in drawn]
        values = np.concatenate([np.quantile(values, [0.01, 0.99]), *averages])
    low, high = float(values.min()), float(values.max())
    if reference is not None:
        low, high = min(low, reference), max(high, reference)
    if from_zero:
        low = min(low, 0.0)
    if low == high:
        low, high = low - (abs(low) or 1.0) * 0.5, high + (abs(high) or 1.0) * 0.5
    if not from_zero:
        low -= (high - low) * 0.04
    high += (high - low) * 0.04
    first, last = float(steps.min()), float(steps.max())
    if first == last:
        first, last = first - 1, last + 1
    return _Frame((first, last), (low, high), _LABEL_WIDTH if len(drawn) > 1 else _RIGHT)


def _ticks(low: float, high: float, wanted: int) -> list[float]:
    """Round numbers (1, 2, 5 times a power of ten) inside the range, about ``wanted`` of them."""
    power = 10.0 ** math.floor(math.log10((high - low) / wanted))
    spacing = min((power * m for m in (1, 2, 5, 10)), key=lambda gap: abs((high - low) / gap - wanted))
    first = math.ceil(low / spacing - 1e-9)
    return [number * spacing for number in range(first, math.floor(high / spacing + 1e-9) + 1)]


def _axes(frame: _Frame, show: Callable[[float], str]) -> list[Markup]:
    parts = []
    for value in _ticks(*frame.y, wanted=4):
        y = frame.place(np.zeros(1), np.array([value]))[0][1]
        line = dict(x1=_LEFT, x2=f"{_WIDTH - frame.right:g}", y1=f"{y:.1f}", y2=f"{y:.1f}")
        parts.append(tag("line", class_="grid", **line))
        parts.append(tag("text", show(value), x=_LEFT - 6, y=f"{y + 3.5:.1f}", text_anchor="end"))
    for step in _ticks(*frame.x, wanted=4):
        if step == int(step):
            x = frame.place(np.array([step]), np.zeros(1))[0][0]
            bottom = _HEIGHT - _BOTTOM
            parts.append(tag("line", class_="tick", x1=f"{x:.1f}", x2=f"{x:.1f}", y1=bottom, y2=bottom + 4))
            parts.append(tag("text", compact(step), x=f"{x:.1f}", y=bottom + 16, text_anchor="middle"))
    axis = dict(x1=_LEFT, x2=f"{_WIDTH - frame.right:g}", y1=_HEIGHT - _BOTTOM, y2=_HEIGHT - _BOTTOM)
    return [*parts, tag("line", class_="axis", **axis)]


def _reference(frame: _Frame, value: float | None, show: Callable[[float], str]) -> Markup | None:
    if value is None:
        return None
    y = frame.place(np.zeros(1), np.array([value]))[0][1]
    line = dict(x1=_LEFT, x2=f"{_WIDTH - frame.right:g}", y1=f"{y:.1f}", y2=f"{y:.1f}")
    return tag("line", tag("title", f"chance {show(value)}"), class_="reference", **line)


def _line(frame: _Frame, series: Series, smooth: bool, show: Callable[[float], str]) -> list[Markup]:
    steps, values = series.finite
    if len(steps) == 1 or (not smooth and len(steps) <= _MARKED_POINTS):
        dots = []
        for step, value, (x, y) in zip(steps, values, frame.place(steps, values), strict=True):
            told = tag("title", f"{series.name}: {show(value)} at step {step:g}")
            dots.append(tag("circle", told, cx=f"{x:.1f}", cy=f"{y:.1f}", r=2.4))
        return [_path(frame, steps, values, "line"), *dots]
    if not smooth:
        return [_path(frame, *_thin(steps, values), "line")]
    return [
        _path(frame, *_thin(steps, values), "raw"),
        _path(frame, *_mean_of_buckets(steps, smoothed(values)), "line"),
    ]


def _path(frame: _Frame, steps: np.ndarray, values: np.ndarray, style: str) -> Markup:
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in frame.place(steps, values))
    return tag("path", d=f"M{points}", class_=style)


def _thin(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Least and greatest value of each bucket: a spike of one step stays visible in a run of a million."""
    if len(steps) <= _MOST_POINTS:
        return steps, values
    kept: list[int] = []
    for bucket in np.array_split(np.arange(len(values)), _MOST_POINTS // 2):
        ends = {int(bucket[values[bucket].argmin()]), int(bucket[values[bucket].argmax()])}
        kept += sorted(ends)
    return steps[kept], values[kept]


def _mean_of_buckets(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if len(steps) <= _MOST_POINTS:
        return steps, values
    means = [[part.mean() for part in np.array_split(array, _MOST_POINTS)] for array in (steps, values)]
    return np.array(means[0]), np.array(means[1])


def _labels(frame: _Frame, drawn: Sequence[Series], smooth: bool) -> list[Markup]:
    """Names at the right ends of the lines, pushed apart where they would overlap."""
    places = []
    for number, one in enumerate(drawn):
        steps, _ = one.finite
        (_, y), *_ = frame.place(steps[-1:], np.array([_newest(one, smooth)]))
        places.append((y, number, one.name))
    parts, lowest = [], float(_HEIGHT - _BOTTOM)
    for y, number, name in sorted(places, reverse=True):
        y = min(y, lowest)
        lowest = y - _LABEL_HEIGHT
        x = _WIDTH - frame.right + 6
        parts.append(tag("text", name, x=f"{x:g}", y=f"{y + 3.5:.1f}", class_=f"label s{number % 5}"))
    return parts
