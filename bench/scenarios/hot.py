"""Hot whole-file reads: open + read + close of files in the page cache, through the mount and on the local disk.

Against local files in two states, because it matters how their pages came to be in memory. ext4 keeps what a program
just wrote in pages of up to 128 KiB, which are copied faster than the 4 KiB that a file read from the disk gets, and
that every file of a FUSE mount gets (as of Linux 6.18).
"""

from __future__ import annotations

from contextlib import ExitStack

from bench.outcome import Goal, Outcome, in_turns
from bench.plan import Plan
from bench.readers import Team
from bench.stage import ROOT, Stage

QUESTION = "Once files are cached, is reading them through the mount as fast as reading local files?"

READERS = {1: "1 reader", 2: "2 readers"}
LEAST_SHARE = 0.95


def measure(stage: Stage, plan: Plan, outcome: Outcome) -> None:
    outcome.conditions.append(
        f"{plan.files:,} files of 60-160 KB in the page cache, shuffled; os.open, os.readv into one buffer, os.close; "
        "readers are processes"
    )
    with stage.cache() as home, stage.mounted(f"s3://{ROOT}", home) as mount, ExitStack() as stack:
        through = stage.way("files", root=str(mount.point))
        teams = [
            (
                by,
                stack.enter_context(Team("native", stage.native(), stage.environ, count)),
                stack.enter_context(Team("mount", through, stage.environ, count)),
            )
            for count, by in READERS.items()
        ]
        for state in ("once on disk", "just written"):
            if state.endswith("written"):
                stage.write_again()
            else:
                stage.forget_pages()
            for by, native, mounted in teams:
                _compare(plan, outcome, stage, f"{by}, {state}", native, mounted)


def _compare(plan: Plan, outcome: Outcome, stage: Stage, case: str, native: Team, mounted: Team) -> None:
    for team in (native, mounted, native, mounted):  # fetched, and in the page cache
        team.run(0)
    contenders = {
        f"native, {case}": lambda seed: native.run(seed).rate,
        f"mount, {case}": lambda seed: mounted.run(seed).rate,
    }
    here, there = in_turns(contenders, plan.rounds, "files/s", stage.step).values()
    outcome.checked += (2 * plan.rounds + 4) * plan.files
    outcome.series += [here, there]
    outcome.goals.append(Goal(there.over(here, f"mount / native, {case}"), LEAST_SHARE, at_least=True))
