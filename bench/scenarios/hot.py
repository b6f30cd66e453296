"""Hot whole-file reads: open + read + close of files in the page cache, through the mount and on the local disk.

Against local files in two states, because it matters how their pages came to be in memory. ext4 keeps what a program
just wrote in pages of up to 128 KiB, which are copied faster than the 4 KiB that a file read from the disk gets, and
that every file of a FUSE mount gets (as of Linux 6.18).
"""

from __future__ import annotations

from contextlib import ExitStack

from bench.outcome import Goal, Outcome, Series, in_turns
from bench.plan import Plan
from bench.readers import Team
from bench.stage import ROOT, Mounted, Stage

QUESTION = "Once files are cached, is reading them through the mount as fast as reading local files?"

READERS = {1: "1 reader", 2: "2 readers", 8: "8 readers"}
LEAST_SHARE = 0.97

# Milliseconds of CPU that keeper and workers take for a GB that is read: what their clocks tick meanwhile. A single
# request for each file would be some 200.
MOST_CPU = 5.0


def measure(stage: Stage, plan: Plan, outcome: Outcome) -> None:
    outcome.conditions.append(
        f"{plan.files:,} files of 60-160 KB in the page cache, shuffled; os.open, os.readv into one buffer, os.close; "
        "readers are processes"
    )
    costs: list[float] = []
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
                costs += _compare(plan, outcome, stage, f"{by}, {state}", native, mounted, mount)
    spent = Series("CPU of keeper and workers", "ms/GB", costs)
    outcome.goals.append(Goal(spent, MOST_CPU, at_least=False))


def _compare(
    plan: Plan, outcome: Outcome, stage: Stage, case: str, native: Team, mounted: Team, mount: Mounted
) -> list[float]:
    """CPU milliseconds of the mount's processes for each GB of each round."""
    costs: list[float] = []

    def through(seed: int) -> float:
        before = mount.cpu_seconds
        done = mounted.run(seed)
        costs.append((mount.cpu_seconds - before) * 1e3 / (done.bytes / 1e9))
        return done.rate

    for team in (native, mounted, native, mounted):  # fetched, and in the page cache
        team.run(0)
    contenders = {
        f"native, {case}": lambda seed: native.run(seed).rate,
        f"mount, {case}": through,
    }
    here, there = in_turns(contenders, plan.rounds, "files/s", stage.step).values()
    outcome.checked += (2 * plan.rounds + 4) * plan.files
    outcome.series += [here, there]
    outcome.goals.append(Goal(there.over(here, f"mount / native, {case}"), LEAST_SHARE, at_least=True))
    return costs
