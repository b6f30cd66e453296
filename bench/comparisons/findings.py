"""What a comparison hands back: figures of all contenders side by side, and what became of those without."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median
from typing import Any, Self

from bench.comparisons.process import Failed
from bench.contenders import LIMIT, OURS
from bench.outcome import WrongBytes

# Closer than this, two medians are the same as far as such a run can tell.
SAME = 1.03


@dataclass
class Figure:
    """One thing measured of each contender, once per round.

    more: whether more is better. headline: whether the summary says who is first. at: where on the axis of a plot with
    lines, and of which of its lines; figures with the same `line` belong together.
    """

    title: str
    unit: str
    more: bool
    headline: bool = True
    line: str = ""
    at: float = 0.0
    values: dict[str, list[float]] = field(default_factory=dict)

    def add(self, contender: str, value: float) -> None:
        self.values.setdefault(contender, []).append(value)

    @property
    def medians(self) -> dict[str, float]:
        return {name: median(values) for name, values in self.values.items()}

    def standing(self) -> Standing | None:
        """None where nobody of ours, or nobody else but the limit, was measured."""
        medians = self.medians
        best = max if self.more else min
        ours = [name for name in medians if name in OURS]
        others = [name for name in medians if name not in OURS and name != LIMIT]
        if not ours or not others:
            return None
        mine, theirs = (best(names, key=medians.__getitem__) for names in (ours, others))
        low, high = sorted((medians[mine], medians[theirs]))
        ahead = best(medians[mine], medians[theirs]) == medians[mine]
        return Standing(theirs, mine, high / low if low else float("inf") if high else 1.0, ahead)

    def as_dict(self) -> dict[str, Any]:
        medians = self.medians
        rows = {
            name: {"median": medians[name], "min": min(values), "max": max(values), "rounds": values}
            for name, values in self.values.items()
        }
        details = {"more_is_better": self.more, "line": self.line, "at": self.at, "headline": self.headline}
        return {"title": self.title, "unit": self.unit, **details, "contenders": rows}

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> Self:
        values = {name: list(row["rounds"]) for name, row in saved["contenders"].items()}
        details = {name: saved[name] for name in ("title", "unit", "headline", "line", "at")}
        return cls(more=saved["more_is_better"], values=values, **details)


@dataclass(frozen=True)
class Standing:
    """The best of others, the best of ours, how many times apart they are (at least 1), and whether ours is ahead."""

    theirs: str
    ours: str
    times: float
    ahead: bool

    @property
    def equal(self) -> bool:
        return self.times <= SAME


@dataclass
class Findings:
    """One comparison's. skipped: contender -> why it did not take part; failed: how it failed; wrong: how its bytes
    differed. checked: reads that were compared with the truth."""

    question: str
    conditions: list[str] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    wrong: dict[str, str] = field(default_factory=dict)
    checked: int = 0
    closed: int = 0
    lost: set[str] = field(default_factory=set)

    def figure(self, title: str, unit: str, *, more: bool, **details: Any) -> Figure:
        self.figures.append(Figure(title, unit, more, **details))
        return self.figures[-1]

    def begin(self) -> None:
        """A new part: figures made until now stand as they are, and who failed may try again."""
        self.closed, self.lost = len(self.figures), set()

    def out(self, contender: str) -> bool:
        """Whether it has failed in this part: it takes no further turn."""
        return contender in self.lost

    @contextmanager
    def turn(self, contender: str) -> Iterator[None]:
        """A contender may fail in the block: it is noted, its figures of this part are dropped, others go on."""
        try:
            yield
            return
        except WrongBytes as error:
            self.wrong.setdefault(contender, str(error))
        except (Failed, RuntimeError, OSError, LookupError, ImportError, subprocess.SubprocessError) as error:
            text = str(error).strip().splitlines() or [type(error).__name__]
            self.failed.setdefault(contender, text[0][:300])
        self.lost.add(contender)
        for figure in self.figures[self.closed :]:
            figure.values.pop(contender, None)

    def as_dict(self) -> dict[str, Any]:
        return {
            "question": self.question,
            "conditions": self.conditions,
            "figures": [figure.as_dict() for figure in self.figures],
            "notes": self.notes,
            "skipped": self.skipped,
            "failed": self.failed,
            "wrong": self.wrong,
            "checked": self.checked,
        }

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> Self:
        figures = [Figure.from_dict(figure) for figure in saved["figures"]]
        return cls(**{**saved, "figures": figures})
