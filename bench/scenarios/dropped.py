"""Cached files that are not in the page cache: read from the SSD through the mount, and from the local disk.

What an epoch costs whose dataset fits the SSD and not the memory. The page cache is dropped for each turn; names and
attributes stay known, to the mount and to the local file system.
"""

from __future__ import annotations

import os

from bench.outcome import Goal, Outcome, Series, in_turns
from bench.plan import Plan
from bench.readers import Team
from bench.stage import ROOT, Mounted, Stage

QUESTION = "With files on the SSD and not in memory: is reading them through the mount as fast as reading local files?"

READERS = (4, 8)
LEAST_SHARE = 0.9


def measure(stage: Stage, plan: Plan, outcome: Outcome) -> None:
    outcome.conditions.append(
        f"{plan.files:,} files of 60-160 KB, shuffled, page cache dropped before each turn; os.open, os.readv into one "
        "buffer, os.close; readers are processes"
    )
    with stage.cache() as home, stage.mounted(f"s3://{ROOT}", home, io="open-free") as mount:
        for count in READERS:
            through = stage.way("files", root=str(mount.point))
            with (
                Team("native", stage.native(), stage.environ, count) as native,
                Team("mount", through, stage.environ, count) as mounted,
            ):
                outcome.checked += mounted.run(0).files  # fetched
                os.sync()
                _compare(stage, plan, outcome, f"{count} readers", native, mounted, mount)


def _compare(
    stage: Stage, plan: Plan, outcome: Outcome, case: str, native: Team, mounted: Team, mount: Mounted
) -> None:
    costs: list[float] = []

    def local(seed: int) -> float:
        stage.rest()
        stage.forget_pages()
        return native.run(seed).rate

    def through(seed: int) -> float:
        stage.rest()
        stage.forget_below(mount.point, mount.home / "blobs")
        before = mount.cpu_seconds
        rate = mounted.run(seed).rate
        costs.append((mount.cpu_seconds - before) * 1e6 / plan.files)
        return rate

    contenders = {f"native, {case}": local, f"mount, {case}": through}
    here, there = in_turns(contenders, plan.cold_rounds, "files/s", stage.step).values()
    outcome.checked += 2 * plan.cold_rounds * plan.files
    outcome.series += [here, there, Series(f"CPU of keeper and workers, {case}", "us/file", costs)]
    outcome.goals.append(Goal(there.over(here, f"mount / native, {case}"), LEAST_SHARE, at_least=True))
