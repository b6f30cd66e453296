"""What came out: as tables for people, as results.json for programs, as a page with pictures for both."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench import machine
from bench.comparisons import markdown, plots
from bench.comparisons.findings import Figure, Findings
from bench.contenders import LIMIT
from bench.outcome import Outcome, Series

# The folder of the pictures, beside the page.
PICTURES = "report"


def as_dict(
    environment: Mapping[str, Any], outcomes: Mapping[str, Outcome], all_findings: Mapping[str, Findings]
) -> dict[str, Any]:
    wrong = [each.wrong for each in outcomes.values()] + [each.wrong for each in all_findings.values()]
    return {
        "environment": dict(environment),
        "scenarios": {name: outcome.as_dict() for name, outcome in outcomes.items()},
        "comparisons": {name: findings.as_dict() for name, findings in all_findings.items()},
        "correct": not any(wrong),
        "goals_met": all(goal.met for outcome in outcomes.values() for goal in outcome.goals),
    }


def write(folder: Path, result: Mapping[str, Any]) -> Path:
    """results.json in `folder`, which is made. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "results.json"
    file.write_text(json.dumps(result, indent=2) + "\n")
    return file


def write_page(
    folder: Path, environment: dict[str, Any], outcomes: Mapping[str, Outcome], all_findings: Mapping[str, Findings]
) -> Path:
    """REPORT.md in `folder`, and its pictures below it. Raises OSError."""
    pictures = folder / PICTURES
    pictures.mkdir(parents=True, exist_ok=True)
    drawn = {name: f"{PICTURES}/{picture}" for name, picture in plots.draw(all_findings, pictures).items()}
    file = folder / "REPORT.md"
    file.write_text(markdown.page(environment, outcomes, all_findings, drawn))
    return file


def read(file: Path) -> tuple[dict[str, Any], dict[str, Outcome], dict[str, Findings]]:
    """What `write` wrote. Raises OSError, and ValueError or KeyError for what is no such file."""
    saved = json.loads(file.read_bytes())
    outcomes = {name: Outcome.from_dict(outcome) for name, outcome in saved["scenarios"].items()}
    all_findings = {name: Findings.from_dict(findings) for name, findings in saved["comparisons"].items()}
    return saved["environment"], outcomes, all_findings


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


def show_findings(console: Console, all_findings: Mapping[str, Findings]) -> None:
    """Only who is first; the tables are in the report."""
    for name, findings in all_findings.items():
        console.print(f"\n[bold]{name}[/]: {findings.question}", highlight=False, soft_wrap=True)
        table = Table()
        for heading in ("", "best of the others", "best of cachefs", "local copy"):
            table.add_column(heading, overflow="fold")
        for figure in findings.figures:
            if figure.headline and (standing := figure.standing()) is not None:
                table.add_row(figure.title, *(_of(figure, who) for who in (standing.theirs, standing.ours, LIMIT)))
        console.print(table)
        for who, how in findings.wrong.items():
            console.print(f"[bold red]WRONG BYTES[/] {who}: {how}", highlight=False, soft_wrap=True)
        for who, how in findings.failed.items():
            console.print(f"[yellow]Failed:[/] {who}: {how}", highlight=False, soft_wrap=True)
        for who, why in findings.skipped.items():
            console.print(f"Skipped: {who}: {why}", highlight=False, soft_wrap=True)


def _of(figure: Figure, who: str) -> str:
    return f"{plots.title(who)}: {_number(figure.medians[who])} {figure.unit}" if who in figure.values else ""


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
