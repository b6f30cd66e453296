"""The README's picture: images per second of each epoch, from what `cachefs demo --json` printed.

cachefs demo --json >demo.json && python -m bench.picture demo.json bench/demo.svg
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

# Distinguishable in print and by the colour-blind (Okabe and Ito's palette).
COLOURS = ("#999999", "#0072B2", "#009E73")


def draw(rows: list[dict[str, Any]], file: Path) -> None:
    """A bar for each way and epoch, a line for local files. Raises OSError."""
    import matplotlib as mpl

    mpl.use("Agg")
    # Text stays text and nothing depends on the time of drawing, so that a redrawn picture shows real changes only.
    mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "cachefs", "font.size": 11})
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.2, 3.2), layout="constrained")
    ways = list(dict.fromkeys(row["way"] for row in rows if not row["reference"]))
    width = 0.8 / len(ways)
    for number, (way, colour) in enumerate(zip(ways, COLOURS, strict=False)):
        mine = [row for row in rows if row["way"] == way]
        places = [row["epoch"] + (number - (len(ways) - 1) / 2) * width for row in mine]
        bars = axes.bar(places, [row["images_per_second"] for row in mine], width * 0.95, label=way, color=colour)
        axes.bar_label(bars, fmt="{:.0f}", fontsize=9, padding=2)
    for row in (row for row in rows if row["reference"]):
        axes.axhline(row["images_per_second"], color="black", linewidth=1, linestyle=":", label=row["way"])
    axes.set_xticks(sorted({row["epoch"] for row in rows if not row["reference"]}))
    axes.set_xlabel("epoch")
    axes.set_ylabel("decoded images per second")
    axes.margins(y=0.12)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9, ncols=2, loc="upper left", bbox_to_anchor=(0, 1.22))
    figure.savefig(file, metadata={"Date": None})
    pyplot.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.picture", description=__doc__)
    parser.add_argument("demo", type=Path, help="what `cachefs demo --json` printed")
    parser.add_argument("picture", type=Path, help="the file to write; its ending chooses the format")
    arguments = parser.parse_args()
    draw(json.loads(arguments.demo.read_text())["rows"], arguments.picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
