"""What came out, as one table or as JSON, and whether it is what cachefs promises."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

from rich.console import Console
from rich.table import Table

from cachefs.config import format_size
from cachefs_sidecar.testbed import Traffic


@dataclass(frozen=True)
class Row:
    """One epoch over one way. objects: GETs of objects at the origin; other: listings and the like.

    reference: it has no origin; it shows what this machine could do at best.
    """

    way: str
    epoch: int
    images: int
    seconds: float
    objects: int
    other: int
    bytes: int
    reference: bool = False

    @property
    def rate(self) -> float:
        return self.images / self.seconds

    @property
    def hits(self) -> float:
        """The share of images that needed no read at the origin."""
        return 1 - min(self.objects, self.images) / self.images


@dataclass
class Outcome:
    """Everything the demonstration has to say. conditions: in which it ran; left_out: way -> why."""

    conditions: list[str]
    rows: list[Row] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    broken: list[str] = field(default_factory=list)
    checked: int = 0
    seconds: float = 0.0

    def judge(self, way: str, epoch: int, images: int, traffic: Traffic) -> None:
        """Hold one epoch through a cache against the promise: each object once, then nothing at all."""
        if epoch == 1:
            wrong = _other_than_once(traffic.objects, images)
            if wrong:
                self.broken.append(f"{way}, epoch 1: {wrong}")
        elif traffic.total:
            self.broken.append(f"{way}, epoch {epoch}: {traffic.total} requests at the origin instead of none")

    def print(self, console: Console) -> None:
        # The last three columns are what the origin was asked for: reads of objects, other requests, and bytes.
        table = Table(caption="reads, other (requests) and bytes: at the origin", caption_justify="left")
        table.add_column("read through")
        for heading in ("epoch", "images/s", "hit ratio", "reads", "other", "bytes"):
            table.add_column(heading, justify="right")
        last = ""
        for row in self.rows:
            if last and row.way != last:
                table.add_section()
            origin = (f"{row.hits:.1%}", f"{row.objects:,}", f"{row.other:,}", format_size(row.bytes))
            name = row.way if row.way != last else ""
            table.add_row(name, str(row.epoch), f"{row.rate:,.0f}", *(("",) * 4 if row.reference else origin))
            last = row.way
        for line in self.conditions:
            console.print(line, highlight=False, soft_wrap=True)
        console.print(table)
        for way, reason in self.left_out.items():
            console.print(f"[yellow]Left out: {way}.[/] {reason}", highlight=False, soft_wrap=True)
        console.print(
            f"{self.checked:,} images read, each compared with its source: all the same.",
            highlight=False,
            soft_wrap=True,
        )
        if self.broken:
            for line in self.broken:
                console.print(f"[bold red]BROKEN PROMISE[/] {line}", highlight=False, soft_wrap=True)
        else:
            console.print(
                "Through cachefs each object was read once from the origin; epochs 2 and 3 asked it for nothing.",
                style="green",
                highlight=False,
                soft_wrap=True,
            )
        console.print(f"{self.seconds:.0f} s in all.", highlight=False, soft_wrap=True)

    def json(self) -> str:
        rows = [{**asdict(row), "images_per_second": row.rate, "hit_ratio": row.hits} for row in self.rows]
        return json.dumps({**asdict(self), "rows": rows, "ok": not self.broken}, indent=2)


def _other_than_once(objects: Mapping[str, int], images: int) -> str:
    again = [path for path, times in objects.items() if times > 1]
    if again:
        return f"{len(again)} objects were read more than once, such as {again[0]} ({objects[again[0]]} times)"
    if len(objects) != images:
        return f"{len(objects)} objects were read instead of {images}"
    return ""
