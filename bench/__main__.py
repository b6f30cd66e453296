"""`python -m bench`: run scenarios, print what came out, write results.json.

A goal that is missed is a result, so the exit status is 0; it is 1 when any byte was wrong, 2 when the machine lacks
something, 130 after Ctrl-C. Progress is on stderr.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import FrameType

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from bench import machine, report
from bench.outcome import Outcome, WrongBytes
from bench.plan import QUICK, Plan
from bench.scenarios import SCENARIOS
from bench.stage import LARGEST, Unusable, part, stage
from cachefs.errors import CacheFSError

RESULTS = Path(__file__).parent / "results"

# Of a catalog, and of what is sorted while it is made.
BYTES_PER_NAME = 400


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    plan = QUICK if options.quick else Plan()
    given = {name: getattr(options, name) for name in ("files", "names", "found", "kills") if getattr(options, name) is not None}
    if options.rounds is not None:
        given |= dict.fromkeys(("rounds", "cold_rounds", "mount_rounds", "hint_rounds"), options.rounds)
    plan = replace(plan, **given)
    terminal = Console(stderr=True)
    before = signal.signal(signal.SIGTERM, _end)  # as Ctrl-C: everything is taken away again
    try:
        environment, outcomes = _run(options.scenario or list(SCENARIOS), plan, options.folder, terminal)
    except KeyboardInterrupt:
        terminal.print("Interrupted; everything was taken away again.")
        return 130
    except (Unusable, FileNotFoundError, RuntimeError, CacheFSError) as error:
        terminal.print(f"[bold red]bench:[/] {error}", highlight=False, soft_wrap=True)
        return 2
    finally:
        signal.signal(signal.SIGTERM, before)
    result = report.as_dict(environment, outcomes)
    file = report.write(options.output, result)
    if options.json:
        print(json.dumps(result, indent=2))
    else:
        report.show(Console(width=None if sys.stdout.isatty() else 120), environment, outcomes)
    terminal.print(f"Written: {file}", highlight=False)
    return 0 if result["correct"] else 1


def _run(
    names: Sequence[str], plan: Plan, folder: Path | None, terminal: Console
) -> tuple[dict[str, object], dict[str, Outcome]]:
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    outcomes: dict[str, Outcome] = {}
    with Progress(*columns, console=terminal, transient=True) as progress:
        task = progress.add_task("making files", total=None)
        now = ""

        def step(text: str) -> None:
            progress.update(task, description=f"{now}: {text}")

        copies = 1 + sum(SCENARIOS[name].caches(plan) for name in names)
        needed = plan.files * LARGEST * copies + (plan.names + 4 * plan.found) * BYTES_PER_NAME
        with stage(folder, needed, step) as whole:
            environment = machine.environment(whole.folder)
            if machine.load() > machine.QUIET_LOAD:
                terminal.print("[yellow]Something else runs on this machine: figures will be worse than they are.[/]")
            whole.make_files(plan.files)
            for now in names:
                scenario = SCENARIOS[now]
                outcome = outcomes[now] = Outcome(scenario.question)
                step("begins")
                try:
                    with part(whole) as own:
                        scenario.measure(own, plan, outcome)
                except WrongBytes as error:
                    outcome.wrong[error.contender] = str(error)
    return environment, outcomes


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="bench", description="cachefs beside what one would have without it.")
    add = parser.add_argument
    add("--scenario", action="append", choices=SCENARIOS, help="only this one; may be repeated [default: all]")
    add("--quick", action="store_true", help="fewer files and rounds: under a minute, and coarser")
    add("--files", type=_positive, help="files that are read")
    add("--names", type=_positive, help="names of the large dataset")
    add("--found", type=_positive, help="names that find looks for, native files as many")
    add("--kills", type=_positive, help="processes that are killed under readers")
    add("--rounds", type=_positive, help="turns of each contender")
    add("--folder", type=Path, help="a directory on the disk to measure [default: the one for temporary files]")
    add("--output", type=Path, default=RESULTS, help="where results.json goes [default: bench/results]")
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
