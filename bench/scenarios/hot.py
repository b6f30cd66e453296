"""Hot whole-file reads: open + read + close of files in the page cache, through the mount and on the local disk."""

from __future__ import annotations

from contextlib import ExitStack

from bench.outcome import Goal, Outcome, in_turns
from bench.plan import Plan
from bench.readers import Team
from bench.stage import ROOT, Stage

QUESTION = "Once files are cached, is reading them through the mount as fast as reading local files?"

READERS = (1, 2)
LEAST_SHARE = 0.95


def measure(stage: Stage, plan: Plan, outcome: Outcome) -> None:
    outcome.conditions.append(
        f"{plan.files:,} files of 60-160 KB in the page cache, shuffled; os.open, os.readv into one buffer, os.close; "
        "readers are processes"
    )
    with stage.cache() as home, stage.mounted(f"s3://{ROOT}", home) as mount, ExitStack() as teams:
        through = stage.way("files", root=str(mount.point))
        for readers in READERS:
            by = "1 reader" if readers == 1 else f"{readers} readers"
            native = teams.enter_context(Team("native", stage.native(), stage.environ, readers))
            mounted = teams.enter_context(Team("mount", through, stage.environ, readers))
            for team in (native, mounted, native, mounted):  # fetched, and in the page cache
                outcome.checked += team.run(0).files
            contenders = {
                f"native, {by}": lambda seed, team=native: team.run(seed).rate,
                f"mount, {by}": lambda seed, team=mounted: team.run(seed).rate,
            }
            here, there = in_turns(contenders, plan.rounds, "files/s", stage.step).values()
            outcome.checked += 2 * plan.rounds * plan.files
            outcome.series += [here, there]
            ratio = there.over(here, f"mount / native, {by}")
            outcome.goals.append(Goal(ratio, LEAST_SHARE, at_least=True))
