"""The report of a run as a page in Markdown: who is first at what, and where cachefs is not, by how much and why."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from bench import machine
from bench.comparisons.findings import Figure, Findings
from bench.comparisons.plots import title
from bench.contenders import LIMIT, OURS, load
from bench.outcome import Outcome, Series

# One sentence for each comparison, and for each figure of one, in which cachefs is not first; written by people.
REMARKS = Path(__file__).parents[1] / "remarks.toml"


def page(
    environment: dict[str, Any],
    outcomes: Mapping[str, Outcome],
    all_findings: Mapping[str, Findings],
    pictures: Mapping[str, str],
) -> str:
    remarks: dict[str, dict[str, str]] = tomllib.loads(REMARKS.read_text()) if REMARKS.exists() else {}
    lines = [
        "# cachefs beside what one would use instead",
        "",
        machine.line(environment),
        "",
        "Made by `make bench`; what it means: [README.md](README.md). Figures are medians over the rounds, in brackets "
        "the smallest and the largest. Every byte that was read was compared with what is stored.",
        "",
    ]
    if all_findings:
        lines += [*_summary(all_findings, remarks), *_settings(all_findings)]
    for name, findings in all_findings.items():
        lines += _comparison(name, findings, pictures.get(name, ""))
    if outcomes:
        lines += _goals(outcomes)
    return "\n".join(lines)


# --- who is first ----------------------------------------------------------------------------------------------


def _summary(all_findings: Mapping[str, Findings], remarks: Mapping[str, Mapping[str, str]]) -> Iterator[str]:
    yield "## Who is first"
    yield ""
    yield "The local copy is the limit and not ranked. Medians within 3% of each other count as equal."
    yield ""
    yield "| | | best of the others | cachefs | local copy | its better one is |"
    yield "|---|---|---|---|---|---|"
    behind: list[str] = []
    for name, findings in all_findings.items():
        for figure in findings.figures:
            standing = figure.standing()
            if not figure.headline or standing is None:
                continue
            theirs = f"{title(standing.theirs)}: {_amount(figure.medians[standing.theirs], figure)}"
            ours = "; ".join(f"{short(who)}: {number(figure.medians[who])}" for who in OURS if who in figure.values)
            limit = _amount(figure.medians[LIMIT], figure) if LIMIT in figure.medians else ""
            by = "" if standing.times == float("inf") else f" by {standing.times:.2f} x"
            verdict = "equal" if standing.equal else f"**first**{by}" if standing.ahead else f"behind{by}"
            yield f"| {name} | {figure.title} | {theirs} | {ours} | {limit} | {verdict} |"
            if not (standing.ahead or standing.equal):
                why = remarks.get(name, {}).get(figure.title) or remarks.get(name, {}).get("remark", "")
                text = f"- **{name}, {figure.title}**: {title(standing.theirs)} is ahead{by}. {why}"
                behind.append(text.rstrip())
    yield ""
    yield "## Where cachefs is not first"
    yield ""
    yield from behind or ["Nowhere in this run."]
    yield ""


def _settings(all_findings: Mapping[str, Findings]) -> Iterator[str]:
    yield "## The contenders"
    yield ""
    yield "| contender | set up |"
    yield "|---|---|"
    seen = dict.fromkeys(
        name for findings in all_findings.values() for figure in findings.figures for name in figure.values
    )
    for name in seen:
        yield f"| {title(name)} | {load(name).settings.replace('|', chr(92) + '|')} |"
    yield ""
    # As the run said it: a report that is written anew may be written where other packages are.
    reasons = {name: why for findings in all_findings.values() for name, why in findings.skipped.items()}
    for name, why in reasons.items():
        if name not in seen:
            yield f"- Skipped: {title(name)}: {why}."
    yield ""


# --- one comparison --------------------------------------------------------------------------------------------


def _comparison(name: str, findings: Findings, picture: str) -> Iterator[str]:
    yield f"## {name}: {findings.question}"
    yield ""
    yield from (f"- {condition}" for condition in findings.conditions)
    yield ""
    if picture:
        yield f"![{name}]({picture})"
        yield ""
    figures = [figure for figure in findings.figures if figure.values]
    for at in range(0, len(figures), 4):  # more columns do not fit a page
        yield from _table(figures[at : at + 4])
    for who, how in findings.wrong.items():
        yield f"- **WRONG BYTES**: {title(who)}: {how}"
    for who, how in findings.failed.items():
        yield f"- Failed: {title(who)}: {how}"
    if findings.skipped:
        yield "- Not taking part: " + "; ".join(f"{title(who)} ({why})" for who, why in findings.skipped.items()) + "."
    yield from (f"- {note}" for note in findings.notes)
    yield f"- {findings.checked:,} reads compared with what is stored{': all right.' if not findings.wrong else '.'}"
    yield ""


def _table(figures: list[Figure]) -> Iterator[str]:
    yield "| |" + "|".join(f" {figure.title} ({figure.unit}) " for figure in figures) + "|"
    yield "|---|" + "---:|" * len(figures)
    for who in dict.fromkeys(name for figure in figures for name in figure.values):
        mark = "**" if who in OURS else ""
        yield f"| {mark}{title(who)}{mark} |" + "|".join(f" {_spread(figure, who)} " for figure in figures) + "|"
    yield ""


def _spread(figure: Figure, who: str) -> str:
    if who not in figure.values:
        return ""
    values = figure.values[who]
    middle = number(figure.medians[who])
    return middle if len(values) == 1 else f"{middle} ({number(min(values))} - {number(max(values))})"


def short(ours: str) -> str:
    return title(ours).removeprefix("cachefs ").removeprefix("mount, ").removesuffix(" over the mount")


def _amount(value: float, figure: Figure) -> str:
    return f"{number(value)} {figure.unit}"


def number(value: float) -> str:
    """Three digits that matter."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.3g}"


# --- our own goals ---------------------------------------------------------------------------------------------


def _goals(outcomes: Mapping[str, Outcome]) -> Iterator[str]:
    yield "## Our own goals"
    yield ""
    yield "| | figure | median | smallest | largest | goal | |"
    yield "|---|---|---:|---:|---:|---|---|"
    for name, outcome in outcomes.items():
        for goal in outcome.goals:
            yield f"| {name} | {_series(goal.series)} | {goal.text} | {goal.verdict} |"
    yield ""
    for name, outcome in outcomes.items():
        yield f"### {name}: {outcome.question}"
        yield ""
        yield from (f"- {condition}" for condition in outcome.conditions)
        yield ""
        yield "| figure | median | smallest | largest |"
        yield "|---|---:|---:|---:|"
        yield from (f"| {_series(series)} |" for series in outcome.series)
        yield ""
        yield from (f"- {note}" for note in outcome.notes)
        yield from (f"- **WRONG BYTES** {who}: {how}" for who, how in outcome.wrong.items())
        yield ""


def _series(series: Series) -> str:
    middle, low, high = (number(value) for value in (series.median, series.low, series.high))
    return f"{series.name} ({series.unit}) | {middle} | {low} | {high}"
