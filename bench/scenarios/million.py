"""Mounting a very large dataset whose names are known: how long until it can be used, and in how much memory.

The clock runs from the start of the command `cachefs mount`, Python's own start included, until the first stat of
a file deep in the mount has succeeded.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bench.catalogs import URL, give_catalog
from bench.machine import pss_bytes
from bench.outcome import Goal, Outcome, Series, WrongBytes, in_turns
from bench.plan import Plan
from bench.stage import Stage
from cachefs_sidecar.testbed import stop_fetcher
from cachefs_sidecar.testbed.catalogs import ROOT_PATH, entries
from cachefs_sidecar.testbed.fetchers import fetcher_pid

QUESTION = "How soon can a dataset with very many files be used, and how much memory does its mount take?"

MOST_SECONDS = 1.0
MOST_MB = 200.0

# Names that are looked up before the memory is looked at again: a mount that was used.
LOOKUPS = 20_000

COLD, WARM = "mount, no fetcher runs", "mount, a fetcher runs"


def measure(stage: Stage, plan: Plan, outcome: Outcome) -> None:
    outcome.conditions.append(
        f"{plan.names:,} names in directories of 1,000, catalog present; from the start of the command to a stat"
    )
    with stage.cache() as home:
        give_catalog(stage, home, plan.names)
        stage.step("catalog made")
        names = _some_names(plan.names)
        fresh: list[float] = []
        used: list[float] = []

        def cold(number: int) -> float:
            stop_fetcher(home)
            return warm(number)

        def warm(number: int) -> float:
            with _mounted(stage, home, names[0]) as (point, seconds, pids):
                fresh.append(_memory(pids))
                for name in names:
                    os.stat(point / name)
                os.listdir((point / names[-1]).parent)
                used.append(_memory(pids))
            return seconds

        warm(-1)  # the catalog, Python's files: in the page cache, as on a node that mounts again
        fresh.clear()
        used.clear()
        first, again = in_turns({COLD: cold, WARM: warm}, plan.mount_rounds, "s", stage.step).values()
    outcome.series += [Series("memory (PSS), just mounted", "MB", fresh)]
    memory = Series(f"memory (PSS), after {len(names):,} lookups and a listing", "MB", used)
    outcome.goals += [
        Goal(first, MOST_SECONDS, at_least=False),
        Goal(again, MOST_SECONDS, at_least=False),
        Goal(memory, MOST_MB, at_least=False),
    ]
    outcome.notes.append("memory is that of the keeper, all workers and the fetcher together")


def _some_names(count: int) -> list[str]:
    every = max(1, count // LOOKUPS)
    names = [entry.path.removeprefix(f"{ROOT_PATH}/") for n, entry in enumerate(entries(count)) if n % every == 0]
    random.Random(count).shuffle(names)
    return names


@contextmanager
def _mounted(stage: Stage, home: Path, name: str) -> Iterator[tuple[Path, float, list[int]]]:
    began = time.perf_counter()
    with stage.mounted(URL, home) as mount:
        info = os.stat(mount.point / name)
        seconds = time.perf_counter() - began
        if not 60_000 <= info.st_size <= 160_000:
            raise WrongBytes("mount", f"{name}: {info.st_size} bytes")
        fetcher = fetcher_pid(home)
        assert fetcher is not None
        yield mount.point, seconds, [mount.keeper, *mount.workers, fetcher]


def _memory(pids: list[int]) -> float:
    return sum(map(pss_bytes, pids)) / 1e6
