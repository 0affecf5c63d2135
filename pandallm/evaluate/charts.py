"""Pictures of accuracies: bars with their intervals, and lines over a run's checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pandallm import files
from pandallm.data.stats import FONTS, readable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = ("#2a78d6", "#eb6834", "#1b9e70", "#7a5bd6", "#d9a000", "#d55187", "#5f8a1f", "#8a6d5a")  # of the run's page
MOST_LABEL = 48  # characters of a name in a legend


class Figure95(NamedTuple):
    """An accuracy and its 95 % interval, as shares."""

    accuracy: float
    low: float
    high: float


def bars(groups: dict[str, dict[str, Figure95]], chances: dict[str, float], path: Path) -> None:
    """A bar for each name in each group, the same colour in all; `chances`: a dashed line in the group."""
    names = list(dict.fromkeys(name for group in groups.values() for name in group))
    width = 0.8 / len(names)
    figure = _figure(max(6.0, 1.6 + len(groups) * (0.6 + 0.42 * len(names))), 3.6 + 0.2 * _legend_rows(names))
    axes = figure.subplots()
    for i, name in enumerate(names):
        at = [n + (i - (len(names) - 1) / 2) * width for n, group in enumerate(groups.values()) if name in group]
        found = [group[name] for group in groups.values() if name in group]
        errors = [[100 * (f.accuracy - f.low) for f in found], [100 * (f.high - f.accuracy) for f in found]]
        heights = [100 * f.accuracy for f in found]
        style: dict[str, Any] = {"color": COLOURS[i % len(COLOURS)], "hatch": "//" * (i // len(COLOURS) % 2)}
        axes.bar(at, heights, 0.9 * width, yerr=errors, capsize=3, label=_label(name), edgecolor="white", **style)
    guessed = [(n, 100 * chances[group]) for n, group in enumerate(groups) if group in chances]
    if guessed:
        at, heights = [n for n, _ in guessed], [height for _, height in guessed]
        begin, end = [n - 0.45 for n in at], [n + 0.45 for n in at]
        axes.hlines(heights, begin, end, "black", "dashed", linewidth=1, label="guessing")
    axes.set_xticks(range(len(groups)), [_label(group) for group in groups], fontfamily=_fonts())
    axes.set_ylim(bottom=0)
    _finish(figure, axes, path)


def curves(lines: dict[str, dict[int, Figure95]], path: Path) -> None:
    """Accuracy over steps, a line for each name, in the band of its intervals."""
    from matplotlib.ticker import MaxNLocator

    figure = _figure(8.0, 3.8 + 0.2 * _legend_rows(list(lines)))
    axes = figure.subplots()
    for i, (name, points) in enumerate(lines.items()):
        steps, found = list(points), list(points.values())
        style: dict[str, Any] = {"color": COLOURS[i % len(COLOURS)], "linestyle": ("-", "--")[i // len(COLOURS) % 2]}
        axes.plot(steps, [100 * f.accuracy for f in found], marker="o", markersize=4, label=_label(name), **style)
        low, high = [100 * f.low for f in found], [100 * f.high for f in found]
        axes.fill_between(steps, low, high, color=style["color"], alpha=0.13, linewidth=0)
    axes.set_xlabel("step")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _finish(figure, axes, path)


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(min(width, 16.0), height), dpi=120, layout="constrained")


def _legend_rows(names: list[str]) -> int:
    return -(-len(names) // 2)


def _finish(figure: Figure, axes: Any, path: Path) -> None:
    axes.set_ylabel("accuracy, %, with 95 % interval")
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper left", ncols=2, frameon=False, prop={"family": _fonts(), "size": 9})
    with files.atomic_file(path) as tmp:
        figure.savefig(tmp, format="png")


def _fonts() -> list[str]:
    """A Latin font, and one with Chinese where one is installed."""
    from matplotlib import font_manager

    installed = {font.name for font in font_manager.fontManager.ttflist}
    return ["DejaVu Sans", *[name for name in FONTS if name in installed][:1]]


def _label(name: str) -> str:
    """A name as Matplotlib draws it: no formulas, no leading underscore, not too long."""
    text = readable(name).replace("$", r"\$")
    text = "…" + text[1 - MOST_LABEL :] if len(text) > MOST_LABEL else text
    return " " + text if text.startswith("_") else text
