"""Readers of a mount while its processes are killed, and while all of them are replaced: what do they notice?

Every read goes past the page cache, is compared byte by byte, and is a hit or, since the cache holds half of the
files, a miss that the fetcher must bring from the storage.
"""

from __future__ import annotations

import json
import time

from bench.outcome import Goal, Outcome, Series
from bench.plan import Plan
from bench.stage import LARGEST, ROOT, SMALLEST, Stage
from cachefs_sidecar.testbed.storm import Killer, Readers, Tally

QUESTION = "Does a reader notice when processes of the mount are killed, or all of them replaced?"

READERS = 4

# One kill in 60 ms.
KILL_SECONDS = 0.06

# One restart for so many kills, over the same time.
KILLS_PER_RESTART = 50


def measure(stage: Stage, plan: Plan, outcome: Outcome) -> None:
    restarts = max(1, plan.kills // KILLS_PER_RESTART)
    outcome.conditions.append(
        f"{READERS} readers of {plan.files:,} files, half of which fit into the cache; buffered, O_DIRECT and mmap, "
        "all past the page cache"
    )
    half = plan.files * (SMALLEST + LARGEST + 4096) // 4
    with stage.cache() as home, stage.mounted(f"s3://{ROOT}", home, options=["--size", str(half)]) as mount:
        for name in sorted(json.loads(stage.manifest.read_bytes()))[: plan.files // 2]:
            (mount.point / name).read_bytes()
        stage.step("half is cached")
        keeper = mount.keeper
        killer = Killer(lambda: keeper, home)
        with Readers(mount.point, stage.storage / ROOT, READERS) as readers:
            seconds = killer.storm(plan.kills, plan.kills * KILL_SECONDS)
            _report(outcome, "killed", readers.end())
        killed = ", ".join(f"{count} {what}s" for what, count in killer.killed.items())
        outcome.notes.append(f"kill -9 of {killed} in {seconds:.0f} s")
        stage.step("killed")
        took = []
        with Readers(mount.point, stage.storage / ROOT, READERS) as readers:
            for _ in range(restarts):
                began = time.monotonic()
                told = json.loads(stage.command("restart", str(mount.point), "--json"))
                took.append(time.monotonic() - began)
                assert told["mounts"][0]["pid"] != keeper
                keeper = told["mounts"][0]["pid"]
                time.sleep(max(0.0, KILLS_PER_RESTART * KILL_SECONDS - took[-1]))
            _report(outcome, "restarted", readers.end())
        outcome.series.append(Series("cachefs restart, every process and the fetcher", "s", took))
        stage.step("restarted")


def _report(outcome: Outcome, what: str, tally: Tally) -> None:
    outcome.checked += tally.reads
    outcome.series += [
        Series(f"{what}: reads", "reads", [float(tally.reads)]),
        Series(f"{what}: a read, median", "ms", [tally.quantile(0.5) * 1e3]),
        Series(f"{what}: a read, 99.9 of 100", "ms", [tally.quantile(0.999) * 1e3]),
        Series(f"{what}: the slowest read", "ms", [tally.worst * 1e3]),
    ]
    failed = Series(f"{what}: failed reads", "reads", [float(tally.failed.total())])
    outcome.goals.append(Goal(failed, 0, at_least=False))
    if tally.wrong:
        outcome.wrong[what] = f"{len(tally.wrong)} of {tally.reads} reads, such as {tally.wrong[0]}"
