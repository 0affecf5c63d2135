"""The charts of a run's page: lines over the steps, as paths for an SVG that stretches with the window.

Their words stand beside the SVG as HTML, so that they keep their size on a phone.
"""

from __future__ import annotations

import json
import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

MOST_POINTS = 600  # a line
MOST_DOTS = 40  # a line with at most so many values shows each as a dot
BIGGEST = 1e100  # what is larger is drawn as a gap, like NaN: it would flatten everything else
LOG_FROM = 20.0  # a chart that may be logarithmic is, where its largest value is this many times its smallest
COLOURS = 8


class Line(NamedTuple):
    name: str
    steps: Floats
    values: Floats
    style: str  # CSS classes


class Chart(NamedTuple):
    title: str
    note: str
    legend: list[tuple[str, str, str]]  # (name, style, newest value)
    paths: list[tuple[str, str]]  # (style, path)
    x_ticks: list[tuple[float, str]]  # (place from the left in %, label)
    y_ticks: list[tuple[float, str]]  # (place from the top in %, label)
    data: str  # JSON for the pointer


def column(metrics: list[dict[str, Any]], key: str) -> Floats:
    """The values under a key; NaN where there is none or it can't be drawn."""
    values = np.array([m.get(key) for m in metrics], dtype=np.float64)
    with np.errstate(invalid="ignore"):
        return np.where(np.abs(values) < BIGGEST, values, np.nan)


def widest(total: int) -> int:
    """The most steps that the smoothed loss is the mean of, in a run of `total` steps."""
    return max(5, total // 50)


def smooth(values: Floats, total: int) -> Floats:
    """Mean of the last tenth of the values up to each, so that it follows the fall at the beginning, and of no more
    than `widest`; gaps stay gaps and count for nothing."""
    good = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(good, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(good)])
    end = np.arange(1, len(values) + 1)
    begin = end - np.minimum(-(-end // 10), widest(total))
    return np.where(good, (sums[end] - sums[begin]) / np.maximum(counts[end] - counts[begin], 1), np.nan)


def _thin(values: Floats) -> NDArray[np.intp]:
    """Indices of at most MOST_POINTS values: of each stretch the least, the greatest and the first gap."""
    n = len(values)
    if n <= MOST_POINTS:
        return np.arange(n)
    length = math.ceil(n / (MOST_POINTS // 3 - 1))
    rows = math.ceil(n / length)
    table = np.concatenate([values, np.full(rows * length - n, np.nan)]).reshape(rows, length)
    gap = np.isnan(table)
    chosen = (np.where(gap, np.inf, table).argmin(1), np.where(gap, -np.inf, table).argmax(1), gap.argmax(1))
    kept = np.unique(np.concatenate([np.arange(rows) * length + some for some in chosen] + [np.array([0, n - 1])]))
    return kept[kept < n]


def charts(record: dict[str, Any], metrics: list[dict[str, Any]], heldout: list[dict[str, Any]]) -> list[Chart]:
    """Every chart that has something to show."""
    steps, loss, total = column(metrics, "step"), column(metrics, "loss"), int(record.get("steps") or 0)

    def one(key: str, factor: float = 1.0) -> list[Line]:
        return [Line("", steps, column(metrics, key) * factor, "c0")]

    at = column(heldout, "step")
    scores = [e.get("bits_per_character") or {} for e in heldout]
    names = list(dict.fromkeys(name for score in scores for name in score))
    held = [
        Line(name, at, column(scores, name), f"c{i % COLOURS}{' dashed' if i // COLOURS % 2 else ''}")
        for i, name in enumerate(names)
    ]
    mean = [Line("mean", at, column(heldout, "mean"), "mean")] if len(names) > 1 else []
    last = max([1.0, *steps[-1:], *at[-1:]])
    losses = [Line("each step", steps, loss, "raw"), Line("mean", steps, smooth(loss, total), "c0")]
    how = f"nats a trained token; mean: of the last tenth of the steps, at most {widest(total)}"
    found = [
        _chart("Loss", how, losses, last),
        _chart("Held-out text", "bits per character, less is better", held + mean, last),
        _chart("Learning rate", "", one("lr"), last, zero=True),
        _chart("Gradient norm", "before clipping", one("grad_norm"), last, zero=True, may_log=True),
        _chart("Speed", "tokens a second", one("tokens_per_s"), last, zero=True),
        _chart("MFU", "% of the device's peak", one("mfu", 100.0), last, zero=True),
        _chart("Memory", "GiB at its peak, a device", one("memory", 2.0**-30), last, zero=True),
    ]
    return [chart for chart in found if chart]


def _chart(
    title: str, note: str, lines: list[Line], last: float, *, zero: bool = False, may_log: bool = False
) -> Chart | None:
    """Lines over steps 0 to `last`; None where no value can be drawn."""
    lines = [line for line in lines if np.isfinite(line.values).any()]
    if not lines:
        return None
    every = np.concatenate([line.values for line in lines])
    every = every[np.isfinite(every)]
    log = bool(may_log and (every > 0).all() and every.max() >= LOG_FROM * every.min())
    low, high, ticks = _log_axis(every) if log else _axis(every, zero)
    paths, points = [], []
    for line in lines:
        kept = _thin(line.values)
        steps, values = line.steps[kept], line.values[kept]
        heights = np.log10(values) if log else values
        x, y = 1000 * steps / last, 1000 * (high - heights) / (high - low)
        paths.append((line.style, _path(x, y)))
        good = np.isfinite(values)
        if good.sum() <= MOST_DOTS and line.style != "raw":
            paths.append((f"{line.style} dot", _path(x, y, joined=False)))
        shown = [[int(s), float(f"{v:.6g}")] for s, v in zip(steps[good].tolist(), values[good].tolist(), strict=True)]
        points.append({"name": line.name, "points": shown})
    apart = max(1, round(_step(last, 5)))
    whole = [float(step) for step in range(0, int(last) + 1, apart)]
    return Chart(
        title,
        "; ".join(filter(None, [note, "logarithmic" if log else ""])),
        [(line.name, line.style, number(float(line.values[-1]))) for line in lines],
        paths,
        [(100 * step / last, _label(step, whole)) for step in whole],
        [(100 * (high - (math.log10(v) if log else v)) / (high - low), _label(v, ticks)) for v in ticks],
        json.dumps({"last": last, "lines": points}),
    )


def _path(x: Floats, y: Floats, joined: bool = True) -> str:
    """An SVG path that starts anew after a gap; `h0` makes a point that stands alone a dot."""
    parts, pen = [], False
    for a, b in zip(x.tolist(), y.tolist(), strict=True):
        if math.isfinite(a) and math.isfinite(b):
            parts.append(f"L{a:.1f} {b:.1f}" if pen and joined else f"M{a:.1f} {b:.1f}h0")
            pen = True
        else:
            pen = False
    return "".join(parts)


def _axis(values: Floats, zero: bool) -> tuple[float, float, list[float]]:
    """(low end, high end, ticks), the ends being ticks."""
    low, high = float(values.min()), float(values.max())
    if zero:
        low, high = min(low, 0.0), max(high, 0.0)
    if high - low <= max(1e-6 * max(abs(low), abs(high)), 1e-12):  # one value, as good as
        margin = 0.1 * abs(high) if abs(high) > 1e-12 else 1.0
        low, high = low - margin, high + margin
    step = _step(high - low, 5)
    ticks = [k * step for k in range(math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9) + 1)]
    return ticks[0], ticks[-1], ticks


def _log_axis(values: Floats) -> tuple[float, float, list[float]]:
    """(log10 of the low end, of the high end, ticks)."""
    low, high = math.log10(values.min()), math.log10(values.max())
    margin = 0.04 * (high - low)
    low, high = low - margin, high + margin
    decades = range(math.floor(low), math.ceil(high) + 1)
    every = math.ceil(len(decades) / 6)
    marks = (1, 2, 5) if high - low <= 2.5 else (1,)
    ticks = [mark * 10.0**k for k in decades[::every] for mark in marks]
    return low, high, [v for v in ticks if low <= math.log10(v) <= high]


def _step(span: float, wanted: int) -> float:
    """A round distance that divides a span into about `wanted` parts."""
    unit = 10.0 ** math.floor(math.log10(span / wanted))
    return next(factor * unit for factor in (1, 2, 5, 10) if factor * unit * (wanted + 0.5) >= span)


def _label(value: float, ticks: list[float]) -> str:
    """A tick's label, with as many digits as tell it from its neighbours."""
    top = max(map(abs, ticks))
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if top >= 10 * unit:
            return f"{value / unit:.6g}{name if value else ''}"
    return f"{value:,.6g}" if top >= 1e-3 and value else number(value)


def number(value: float) -> str:
    """A number for people, in about 4 digits; – where there is none."""
    if not math.isfinite(value):
        return "–"
    if value and not 1e-3 <= abs(value) < 1e9:
        return f"{value:.3g}".replace("e-0", "e-").replace("e+", "e").replace("e0", "e")
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
