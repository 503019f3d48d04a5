"""Curves of runs as ECharts options."""

import math
from collections.abc import Sequence
from typing import Any

MAX_POINTS = 400
Points = list[tuple[float, float]]
QUIET, LINES = "#7d8794", "#7d879444"
AXIS: dict[str, Any] = {"axisLabel": {"color": QUIET}, "splitLine": {"lineStyle": {"color": LINES}}}
COLOURS = ["#1f77b4", "#d1495b", "#2e8b57", "#b07aa1", "#e08a00", "#5b6c7d"]


def curve(records: Sequence[dict[str, Any]], name: str) -> Points:
    """Return (step, value) of every record that has a finite value."""
    points: Points = []
    for record in records:
        value = record.get(name)
        if isinstance(value, int | float) and math.isfinite(value):
            points.append((record["step"], float(value)))
    return points


def reduced(points: Points) -> Points:
    """Return at most `MAX_POINTS` means of neighbours, each at the last step of its group."""
    size = max(-(-len(points) // MAX_POINTS), 1)
    means: Points = []
    for start in range(0, len(points), size):
        group = points[start : start + size]
        means.append((group[-1][0], sum(value for _, value in group) / len(group)))
    return means


def smoothed(points: Points, weight: float) -> Points:
    """Return the exponential moving average, corrected for its start as TensorBoard's is."""
    result: Points = []
    mean, total = 0.0, 0.0
    for step, value in points:
        mean = weight * mean + (1.0 - weight) * value
        total = weight * total + (1.0 - weight)
        result.append((step, mean / total))
    return result


def chart_options(
    curves: dict[str, Points], smoothing: float, is_log: bool, title: str, has_legend: bool
) -> dict[str, Any]:
    """Return the options of a chart: each curve smoothed, and pale behind it as it is."""
    series: list[dict[str, Any]] = []
    for number, (name, points) in enumerate(curves.items()):
        colour = COLOURS[number % len(COLOURS)]
        shown = [list(point) for point in reduced(points) if not is_log or point[1] > 0]
        if smoothing > 0:
            series.append(_line(name, shown, colour, opacity=0.25))
            smooth = [list(point) for point in reduced(smoothed(points, smoothing)) if not is_log or point[1] > 0]
            series.append(_line(name, smooth, colour, opacity=1.0))
        else:
            series.append(_line(name, shown, colour, opacity=1.0))
    axis = AXIS | {"type": "log" if is_log else "value", "scale": True}
    return {
        "animation": False,
        "title": {"text": title, "left": 8, "top": 4, "textStyle": {"fontSize": 13, "color": QUIET}},
        "grid": {"left": 58, "right": 18, "top": 34, "bottom": 44 if has_legend else 28},
        "tooltip": {"trigger": "axis"},
        "legend": {"show": has_legend, "bottom": 0, "textStyle": {"color": QUIET}},
        "xAxis": AXIS | {"type": "value", "min": "dataMin", "max": "dataMax"},
        "yAxis": axis,
        "series": series,
    }


def histogram_options(values: Sequence[float], title: str, bins: int = 25) -> dict[str, Any]:
    """Return the options of a histogram of numbers from 0 to 1."""
    counts = [0] * bins
    for value in values:
        counts[min(int(value * bins), bins - 1)] += 1
    return {
        "animation": False,
        "title": {"text": title, "left": 8, "top": 4, "textStyle": {"fontSize": 13, "color": QUIET}},
        "grid": {"left": 58, "right": 18, "top": 34, "bottom": 28},
        "tooltip": {"trigger": "axis"},
        "xAxis": {
            "type": "category",
            "data": [f"{(number + 0.5) / bins:.2f}" for number in range(bins)],
            "axisLabel": {"color": QUIET},
        },
        "yAxis": AXIS | {"type": "value"},
        "series": [{"type": "bar", "data": counts, "itemStyle": {"color": COLOURS[0]}}],
    }


def _line(name: str, points: list[list[float]], colour: str, opacity: float) -> dict[str, Any]:
    style = {"color": colour, "opacity": opacity, "width": 1.6 if opacity == 1.0 else 1.0}
    return {"name": name, "type": "line", "showSymbol": False, "data": points, "lineStyle": style, "color": colour}
