"""`python -m bench`: run scenarios and comparisons, print what came out, write a report, its pictures and its data.

A goal that is missed is a result, so the exit status is 0; it is 1 when any byte was wrong, 2 when the machine lacks
something, 130 after Ctrl-C. Progress is on stderr.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from bench import machine, report
from bench.comparisons import COMPARISONS, room
from bench.comparisons.findings import Findings
from bench.comparisons.ground import Ground
from bench.comparisons.turns import pick
from bench.contenders import CONTENDERS, load
from bench.outcome import Outcome, WrongBytes
from bench.plan import QUICK, Plan
from bench.scenarios import SCENARIOS
from bench.scenarios.cluster import ROWS
from bench.stage import LARGEST, Stage, Unusable, part, stage
from cachefs.errors import CacheFSError

RESULTS = Path(__file__).parent / "results"

EVERYTHING = (*SCENARIOS, *COMPARISONS)

# Of a catalog, and of what is sorted while it is made.
BYTES_PER_NAME = 400


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    if options.again is not None:
        print(report.write_page(options.again.parent, *report.read(options.again)))
        return 0
    plan = QUICK if options.quick else Plan()
    given = {
        name: getattr(options, name)
        for name in ("files", "objects", "trained_steps", "names", "found", "kills", "shared", "shared_nodes")
        if getattr(options, name) is not None
    }
    if options.shard is not None:
        given["shard"] = options.shard << 20
    if options.rounds is not None:
        given |= {name: options.rounds for name in vars(plan) if name.endswith("rounds")}
    plan = replace(plan, **given, rows=tuple(options.row or ()))
    terminal = Console(stderr=True)
    before = signal.signal(signal.SIGTERM, _end)  # as Ctrl-C: everything is taken away again
    try:
        environment, outcomes, all_findings = _run(options, plan, terminal)
    except KeyboardInterrupt:
        terminal.print("Interrupted; everything was taken away again.")
        return 130
    except (Unusable, LookupError, ImportError, FileNotFoundError, RuntimeError, CacheFSError) as error:
        terminal.print(f"[bold red]bench:[/] {error}", highlight=False, soft_wrap=True)
        return 2
    finally:
        signal.signal(signal.SIGTERM, before)
    result = report.as_dict(environment, outcomes, all_findings)
    written = [report.write(options.output, result)]
    written.append(report.write_page(options.output, environment, outcomes, all_findings))
    if options.json:
        print(json.dumps(result, indent=2))
    else:
        console = Console(width=None if sys.stdout.isatty() else 120)
        report.show(console, environment, outcomes)
        report.show_findings(console, all_findings)
    terminal.print(f"Written: {', '.join(map(str, written))}", highlight=False, soft_wrap=True)
    if plan.scenarios and not options.scenario:
        others = ", ".join(name for name in EVERYTHING if name not in plan.scenarios)
        terminal.print(f"Left out by --quick: {others}; --scenario NAME runs one", highlight=False, soft_wrap=True)
    return 0 if result["correct"] else 1


def _run(
    options: argparse.Namespace, plan: Plan, terminal: Console
) -> tuple[dict[str, object], dict[str, Outcome], dict[str, Findings]]:
    """What was asked for: by default all of the plan, and with --contender only what has contenders."""
    asked = options.scenario or [
        name
        for name in (*(() if options.contender else SCENARIOS), *COMPARISONS)
        if name in (plan.scenarios or EVERYTHING)
    ]
    contenders = options.contender or plan.contenders or list(CONTENDERS)
    for contender in contenders:
        load(contender)  # a name that is none is said now
    words = TextColumn("{task.description}")
    columns = (SpinnerColumn(), words, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=terminal, transient=True) as progress:
        task = progress.add_task("making files", total=len(asked))

        def step(text: str) -> None:
            progress.update(task, description=text)

        if machine.load() > machine.QUIET_LOAD:
            terminal.print("[yellow]Something else runs on this machine: figures will be worse than they are.[/]")
        scenarios = [name for name in asked if name in SCENARIOS]
        outcomes: dict[str, Outcome] = {}
        if scenarios:
            needed = plan.files * LARGEST * (1 + sum(SCENARIOS[name].caches(plan) for name in scenarios))
            with stage(
                options.folder, needed + (plan.names + 4 * plan.found) * BYTES_PER_NAME + 2 * plan.shard, step
            ) as whole:
                environment = machine.environment(whole.folder)
                whole.make_files(plan.files)
                for name in scenarios:
                    outcomes[name] = _measure(name, whole, plan)
                    progress.advance(task)
        comparisons = [name for name in asked if name in COMPARISONS]
        all_findings: dict[str, Findings] = {}
        if comparisons:
            with stage(options.folder, room(plan, comparisons), step) as whole:
                environment = machine.environment(whole.folder)
                for name in comparisons:
                    all_findings[name] = _compare(name, contenders, whole, plan)
                    progress.advance(task)
    return environment, outcomes, all_findings


def _measure(name: str, whole: Stage, plan: Plan) -> Outcome:
    """One of our own goals."""
    scenario = SCENARIOS[name]
    outcome = Outcome(scenario.question)
    with _said(whole, name) as own:
        try:
            scenario.measure(own, plan, outcome)
        except WrongBytes as error:
            outcome.wrong[error.contender] = str(error)
    return outcome


def _compare(name: str, contenders: Sequence[str], whole: Stage, plan: Plan) -> Findings:
    comparison = COMPARISONS[name]
    findings = Findings(comparison.question)
    with _said(whole, name) as own:
        comparison.measure(Ground(own, plan), pick(contenders, findings, comparison.unfit), findings)
    return findings


@contextmanager
def _said(whole: Stage, name: str) -> Iterator[Stage]:
    """A part of the stage, whose steps are shown with its name."""
    with part(replace(whole, step=lambda text: whole.step(f"{name}: {text}"))) as own:
        own.step("begins")
        yield own


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="bench", description="cachefs beside what one would have without it.")
    add = parser.add_argument
    add("--scenario", action="append", choices=EVERYTHING, help="only this one; may be repeated [default: all]")
    add(
        "--contender",
        action="append",
        metavar="NAME",
        help=f"only this one, and only comparisons; may be repeated; {', '.join(CONTENDERS)}, or module:Class of yours",
    )
    add(
        "--quick",
        action="store_true",
        help="smaller, coarser, with fewer scenarios and contenders: under three minutes",
    )
    add("--files", type=_positive, help="files that are read for our own goals")
    add("--objects", type=_positive, help="objects of the dataset that is larger than the cache")
    add("--trained-steps", type=_positive, help="steps of an accelerator whose dataset is larger than the cache")
    add("--names", type=_positive, help="names of the large dataset")
    add("--found", type=_positive, help="names that find looks for, native files as many")
    add("--kills", type=_positive, help="processes that are killed under readers")
    add("--shard", type=_positive, help="MiB of the large object")
    add("--shared", type=_positive, help="objects of the dataset that clusters read")
    add("--shared-nodes", type=_positive, help="nodes of a cluster; twice as many at most")
    add("--row", action="append", choices=ROWS, help="of the scenario cluster only this; may be repeated")
    add("--rounds", type=_positive, help="turns of each contender")
    add("--folder", type=Path, help="a directory on the disk to measure [default: the one for temporary files]")
    add("--output", type=Path, default=RESULTS, help="where the report and its data go [default: bench/results]")
    add("--again", type=Path, metavar="results.json", help="measure nothing: write its report anew, with new remarks")
    add("--json", action="store_true", help="print the results as JSON")
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("at least 1")
    return number


def _end(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
