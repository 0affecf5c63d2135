"""Pictures of accuracies: bars with their intervals, and lines over a run's checkpoints."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from unicodedata import east_asian_width

from pandallm import files
from pandallm.data.stats import FONTS, readable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = ("#2a78d6", "#eb6834", "#1b9e70", "#7a5bd6", "#d9a000", "#d55187", "#5f8a1f", "#8a6d5a")  # of the run's page
COLUMNS = 3  # panels beside each other
HATCHES, DASHES = ("", "//", "xx", ".."), ("-", "--", ":", "-.")  # tell what has the same colour apart
AXIS = "accuracy, %, with 95 % interval"
MOST_WIDTH = 16.0  # inches
MOST_LABEL = 60  # characters of a name in a legend
CHARACTERS_AN_INCH = 12  # of a legend


class Figure95(NamedTuple):
    """An accuracy and its 95 % interval, as shares."""

    accuracy: float
    low: float
    high: float


def bars(groups: dict[str, dict[str, Figure95]], chances: dict[str, float], path: Path) -> None:
    """A bar for each name in each group, the same colour in all; `chances`: a dashed line in the group."""
    names = list(dict.fromkeys(name for group in groups.values() for name in group))
    width = 0.8 / len(names)
    figure = _figure(max(6.0, 1.6 + len(groups) * (0.6 + 0.42 * len(names))), 3.6, names)
    axes = figure.subplots()
    handles: dict[str, Any] = {}
    for i, name in enumerate(names):
        at = [n + (i - (len(names) - 1) / 2) * width for n, group in enumerate(groups.values()) if name in group]
        found = [group[name] for group in groups.values() if name in group]
        errors = [[100 * (f.accuracy - f.low) for f in found], [100 * (f.high - f.accuracy) for f in found]]
        heights = [100 * f.accuracy for f in found]
        style: dict[str, Any] = {"color": COLOURS[i % len(COLOURS)], "hatch": HATCHES[i // len(COLOURS) % len(HATCHES)]}
        handles[name] = axes.bar(at, heights, 0.9 * width, yerr=errors, capsize=3, edgecolor="white", **style)
    guessed = [(n, 100 * chances[group]) for n, group in enumerate(groups) if group in chances]
    if guessed:
        at, heights = [n for n, _ in guessed], [height for _, height in guessed]
        begin, end = [n - 0.45 for n in at], [n + 0.45 for n in at]
        handles["guessing"] = axes.hlines(heights, begin, end, "black", "dashed", linewidth=1)
    axes.set_xticks(range(len(groups)), [_label(group) for group in groups], fontfamily=_fonts())
    axes.set_ylim(bottom=0)
    axes.set_ylabel(AXIS)
    _plain(axes)
    _finish(figure, handles, path)


def curves(panels: dict[str, dict[str, dict[int, Figure95]]], path: Path) -> None:
    """Accuracy over steps: a panel for each title, in it a line for each name in the band of its intervals."""
    from matplotlib.ticker import MaxNLocator

    names = list(dict.fromkeys(name for lines in panels.values() for name in lines))
    columns = min(len(panels), COLUMNS)
    rows = -(-len(panels) // columns)
    figure = _figure(1.0 + 4.2 * columns, 3.4 * rows, names)
    grid = figure.subplots(rows, columns, sharey=True, squeeze=False).ravel()
    handles: dict[str, Any] = {}
    for axes, (title, lines) in zip(grid, panels.items(), strict=False):
        for name, points in lines.items():
            i, steps, found = names.index(name), list(points), list(points.values())
            colour, dashes = COLOURS[i % len(COLOURS)], DASHES[i // len(COLOURS) % len(DASHES)]
            heights = [100 * f.accuracy for f in found]
            (handles[name],) = axes.plot(steps, heights, marker="o", markersize=4, color=colour, linestyle=dashes)
            low, high = [100 * f.low for f in found], [100 * f.high for f in found]
            axes.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)
        axes.set_title(_label(title), fontfamily=_fonts(), fontsize=10)
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 5, 10]))
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.set_ylim(bottom=0)
        _plain(axes)
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    for axes in grid[::columns]:
        axes.set_ylabel(AXIS)
    _finish(figure, handles, path)


def _figure(width: float, height: float, names: list[str]) -> Figure:
    """`height` without the legend of these names."""
    from matplotlib.figure import Figure

    width = min(width, MOST_WIDTH)
    rows = -(-len(names) // _legend_columns(names, width))
    return Figure(figsize=(width, height + 0.2 * rows), dpi=120, layout="constrained")


def _legend_columns(names: Iterable[str], width: float) -> int:
    """Two where they fit beside each other into `width` inches."""
    longest = max(sum(1 + (east_asian_width(c) in "WF") for c in _label(name)) for name in names)
    return 2 if 2 * (longest + 6) <= CHARACTERS_AN_INCH * width else 1


def _plain(axes: Any) -> None:
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _finish(figure: Figure, handles: dict[str, Any], path: Path) -> None:
    """One legend for all panels, and the file."""
    columns = _legend_columns(handles, figure.get_figwidth())
    style: dict[str, Any] = {"ncols": columns, "frameon": False, "prop": {"family": _fonts(), "size": 9}}
    figure.legend(list(handles.values()), list(map(_label, handles)), loc="outside upper left", **style)
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
    half = MOST_LABEL // 2
    text = f"{text[:half]}…{text[-half:]}" if len(text) > MOST_LABEL else text
    return " " + text if text.startswith("_") else text
