"""The pictures of a report: one SVG per comparison, bars for single figures, lines where something is varied."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.comparisons.findings import Figure, Findings
from bench.contenders import CONTENDERS, LIMIT, OURS, load

# Okabe and Ito's palette: distinguishable in print and by the colour-blind.
OUR_COLOUR, LIMIT_COLOUR, THEIR_COLOUR = "#009E73", "#999999", "#56B4E9"
LINE_COLOURS = ("#0072B2", "#E69F00", "#CC79A7", "#D55E00", "#56B4E9", "#F0E442", "#000000")

# From here on a linear axis would show the slow as nothing.
WIDE = 30.0

ACROSS = 3


def draw(all_findings: Mapping[str, Findings], folder: Path) -> dict[str, str]:
    """comparison -> the name of its picture in `folder`. Raises OSError."""
    import matplotlib as mpl

    mpl.use("Agg")
    # Text stays text and nothing depends on the time of drawing, so that a redrawn picture shows real changes only.
    mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "cachefs", "font.size": 9})
    return {name: _picture(name, findings, folder) for name, findings in all_findings.items() if _panels(findings)}


def title(contender: str) -> str:
    """Of a contender, in tables and pictures; of one that does not load any more, its name."""
    try:
        return load(contender).title
    except (LookupError, ImportError, AttributeError):
        return contender


def _panels(findings: Findings) -> list[list[Figure]]:
    """What goes into one panel each: a figure, or those of one line."""
    figures = [figure for figure in findings.figures if figure.values and (figure.headline or figure.line)]
    lines = dict.fromkeys(figure.line for figure in figures if figure.line)
    return [[figure] for figure in figures if not figure.line] + [
        [figure for figure in figures if figure.line == line] for line in lines
    ]


def _picture(name: str, findings: Findings, folder: Path) -> str:
    from matplotlib import pyplot

    panels = _panels(findings)
    across = min(ACROSS, len(panels))
    rows = -(-len(panels) // across)
    tallest = max(len(figure.values) for panel in panels for figure in panel)
    size = (4.2 * across, rows * (1.0 + 0.2 * max(tallest, 8)))
    canvas, grid = pyplot.subplots(rows, across, figsize=size, squeeze=False, layout="constrained")
    for number, axes in enumerate(grid.flat):
        if number >= len(panels):
            axes.set_visible(False)
        elif panels[number][0].line:
            _lines(axes, panels[number])
        else:
            _bars(axes, panels[number][0])
    drawn = io.StringIO()
    canvas.savefig(drawn, format="svg", metadata={"Date": None, "Creator": None})
    pyplot.close(canvas)
    # A tenth of a point is more than a screen shows, and half the size of what is committed.
    (folder / f"{name}.svg").write_text(re.sub(r"\d+\.\d\d+", lambda match: f"{float(match[0]):.1f}", drawn.getvalue()))
    return f"{name}.svg"


def _colour(contender: str) -> str:
    return LIMIT_COLOUR if contender == LIMIT else OUR_COLOUR if contender in OURS else THEIR_COLOUR


def _bars(axes: Any, figure: Figure) -> None:
    medians = figure.medians
    names = sorted(medians, key=medians.__getitem__, reverse=not figure.more)  # the best is on top
    middle = [medians[name] for name in names]
    low = [medians[name] - min(figure.values[name]) for name in names]
    high = [max(figure.values[name]) - medians[name] for name in names]
    spread = [low, high] if any(low + high) else None
    bars = axes.barh([title(name) for name in names], middle, xerr=spread, color=[_colour(n) for n in names])
    axes.bar_label(bars, labels=[f" {value:,.3g}" if value < 100 else f" {value:,.0f}" for value in middle], fontsize=7)
    if min(middle) > 0 and max(middle) / min(middle) > WIDE:
        axes.set_xscale("log")
        axes.minorticks_off()
    axes.set_title(f"{figure.title}\n({figure.unit}, {'more' if figure.more else 'less'} is better)", fontsize=8)
    axes.margins(x=0.18)
    axes.spines[["top", "right"]].set_visible(False)


def _lines(axes: Any, figures: list[Figure]) -> None:
    present = {name: None for figure in figures for name in figure.values}
    order = [name for name in CONTENDERS if name in present] + [name for name in present if name not in CONTENDERS]
    others = 0
    for name in order:
        points = sorted((figure.at, figure.medians[name]) for figure in figures if name in figure.values)
        style: dict[str, Any] = {"color": _colour(name), "linewidth": 2 if name in OURS else 1.2}
        if name in OURS:
            style["linestyle"] = ("-", "--", "-.", ":")[OURS.index(name) % 4]
        elif name != LIMIT:
            style["color"] = LINE_COLOURS[others % len(LINE_COLOURS)]
            others += 1
        axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=title(name), **style)
    places = sorted({figure.at for figure in figures})
    axes.set_xscale("log", base=2)
    axes.minorticks_off()
    axes.set_xticks(places, [f"{place:g}" for place in places])
    axes.set_title(f"{figures[0].line} ({figures[0].unit})", fontsize=8)
    axes.set_ylim(bottom=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=6)
