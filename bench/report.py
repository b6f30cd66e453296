"""What came out: as tables for people, as results.json for programs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench import machine
from bench.outcome import Outcome, Series


def as_dict(environment: Mapping[str, Any], outcomes: Mapping[str, Outcome]) -> dict[str, Any]:
    return {
        "environment": dict(environment),
        "scenarios": {name: outcome.as_dict() for name, outcome in outcomes.items()},
        "correct": not any(outcome.wrong for outcome in outcomes.values()),
        "goals_met": all(goal.met for outcome in outcomes.values() for goal in outcome.goals),
    }


def write(folder: Path, result: Mapping[str, Any]) -> Path:
    """results.json in `folder`, which is made. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "results.json"
    file.write_text(json.dumps(result, indent=2) + "\n")
    return file


def show(console: Console, environment: dict[str, Any], outcomes: Mapping[str, Outcome]) -> None:
    console.print(machine.line(environment), highlight=False, soft_wrap=True)
    for name, outcome in outcomes.items():
        console.print(f"\n[bold]{name}[/]: {outcome.question}", highlight=False, soft_wrap=True)
        for condition in outcome.conditions:
            console.print(condition, highlight=False, soft_wrap=True)
        console.print(_table(outcome))
        for note in outcome.notes:
            console.print(note, highlight=False, soft_wrap=True)
        for contender, how in outcome.wrong.items():
            console.print(f"[bold red]WRONG BYTES[/] {contender}: {how}", highlight=False, soft_wrap=True)
        if outcome.checked and not outcome.wrong:
            console.print(f"{outcome.checked:,} files read and compared: all right.", highlight=False)


def _table(outcome: Outcome) -> Table:
    table = Table()
    table.add_column("", overflow="fold")
    for heading in ("median", "min", "max", "", "goal", ""):
        table.add_column(heading, justify="right")
    for series in outcome.series:
        table.add_row(*_cells(series), "", "")
    if outcome.series and outcome.goals:
        table.add_section()
    for goal in outcome.goals:
        verdict = f"[{'green' if goal.met else 'yellow'}]{goal.verdict}[/]"
        table.add_row(*_cells(goal.series), goal.text, verdict)
    return table


def _cells(series: Series) -> tuple[str, ...]:
    return (series.name, *map(_number, (series.median, series.low, series.high)), series.unit)


def _number(value: float) -> str:
    """Three digits that matter."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.3f}"
