"""What a scenario hands back: series of measurements, what they come to, and how that compares with the goal.

Contenders take turns (A B A B ...), so that whatever else the machine does hits all of them, and what is judged is
the median over the rounds of the ratio within a round.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any, Self


class WrongBytes(Exception):
    """A contender returned other bytes than were stored. The run goes on; its exit status says so."""

    def __init__(self, contender: str, how: str) -> None:
        super().__init__(how)
        self.contender = contender


@dataclass(frozen=True)
class Series:
    """One thing measured once per round. unit: "files/s", "us", "s", "MB", ..."""

    name: str
    unit: str
    values: list[float]

    @property
    def median(self) -> float:
        return median(self.values)

    @property
    def low(self) -> float:
        return min(self.values)

    @property
    def high(self) -> float:
        return max(self.values)

    def over(self, other: Series, name: str) -> Series:
        """Their ratio, round by round."""
        pairs = zip(self.values, other.values, strict=True)
        return Series(name, "x", [mine / theirs for mine, theirs in pairs])

    def as_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "unit": self.unit,
            "median": self.median,
            "min": self.low,
            "max": self.high,
            "rounds": self.values,
        }

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> Self:
        return cls(saved["name"], saved["unit"], list(saved["rounds"]))


@dataclass(frozen=True)
class Goal:
    """What is promised of a series' median: at least, or at most, `bound`."""

    series: Series
    bound: float
    at_least: bool

    @property
    def met(self) -> bool:
        value = self.series.median
        return value >= self.bound if self.at_least else value <= self.bound

    @property
    def text(self) -> str:
        return f"{'>=' if self.at_least else '<='} {self.bound:g} {self.series.unit}"

    @property
    def verdict(self) -> str:
        """PASS, or by how much it is missed."""
        if self.met:
            return "PASS"
        if not self.bound:
            return f"MISSED: {self.series.median:g} {self.series.unit}"
        short = abs(self.series.median / self.bound - 1)
        return f"MISSED by {short:.0%}"

    def as_dict(self) -> dict[str, Any]:
        return {"figure": self.series.as_dict(), "goal": self.text, "met": self.met, "verdict": self.verdict}

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> Self:
        how, bound, _ = saved["goal"].split(" ", 2)
        return cls(Series.from_dict(saved["figure"]), float(bound), at_least=how == ">=")


@dataclass
class Outcome:
    """One scenario's. wrong: contender -> how its bytes differed. checked: files whose bytes were compared."""

    question: str
    conditions: list[str] = field(default_factory=list)
    series: list[Series] = field(default_factory=list)
    goals: list[Goal] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    wrong: dict[str, str] = field(default_factory=dict)
    checked: int = 0

    def as_dict(self) -> dict[str, Any]:
        return {
            "question": self.question,
            "conditions": self.conditions,
            "series": [series.as_dict() for series in self.series],
            "goals": [goal.as_dict() for goal in self.goals],
            "notes": self.notes,
            "wrong": self.wrong,
            "checked": self.checked,
        }

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> Self:
        series = [Series.from_dict(each) for each in saved["series"]]
        goals = [Goal.from_dict(each) for each in saved["goals"]]
        return cls(**{**saved, "series": series, "goals": goals})


def in_turns(
    contenders: Mapping[str, Callable[[int], float]], rounds: int, unit: str, step: Callable[[str], None]
) -> dict[str, Series]:
    """Measure each contender once per round, in order. A contender is called with the number of the round."""
    values: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds):
        for name, measure in contenders.items():
            values[name].append(measure(number))
            step(f"{name}, round {number + 1}")
    return {name: Series(name, unit, found) for name, found in values.items()}
