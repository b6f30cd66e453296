"""`find DIR -size +0`: every name of a dataset and its attributes, through the mount and on the local disk.

First: of the native tree nothing is in memory, nor of the catalog, and the mount is fresh. Again: right after that. In
two layouts: directories of a thousand, as image datasets have them, and one directory with everything. The native files
have the sizes that the catalog says, and no blocks.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from bench.catalogs import URL, give_catalog
from bench.machine import cpu_seconds
from bench.outcome import Goal, Outcome, Series, WrongBytes, in_turns
from bench.plan import Plan
from bench.stage import Mounted, Stage, Unusable
from cachefs_sidecar.testbed.catalogs import FILES_PER_DIRECTORY, ROOT_PATH, entries

QUESTION = "How long does it take to find every file of a large dataset, with its attributes?"

FIRST_AT_MOST = 2.5
AGAIN_AT_MOST = 2.0

DROP_CACHES = Path("/proc/sys/vm/drop_caches")


def measure(stage: Stage, plan: Plan, outcome: Outcome) -> None:
    if not os.access(DROP_CACHES, os.W_OK) or shutil.which("find") is None:
        raise Unusable("names: needs root, to take names out of memory, and findutils")
    outcome.conditions.append(
        f"{plan.found:,} names; find DIR -size +0 -printf x; caches dropped before each first; the catalog is present"
    )
    layouts = {"directories of 1,000": FILES_PER_DIRECTORY, "one directory": plan.found}
    for layout, per_directory in layouts.items():
        _Layout(stage, plan, layout, per_directory).measure(outcome)
    outcome.notes.append("workers' CPU: of all workers together, for each name, in the first look")


class _Layout:
    def __init__(self, stage: Stage, plan: Plan, name: str, per_directory: int) -> None:
        self._stage = stage
        self._plan = plan
        self._name = name
        self._per_directory = per_directory
        self._native = stage.folder / f"names-{per_directory}"
        self._names = 0  # what find must see, with directories
        self._mount: Mounted | None = None
        self._cpu: list[float] = []

    def measure(self, outcome: Outcome) -> None:
        self._names = _make_tree(self._native, self._plan.found, self._per_directory)
        self._stage.step(f"{self._name}: native files made")
        with self._stage.cache() as home, ExitStack() as stack:
            give_catalog(self._stage, home, self._plan.found, self._per_directory)
            self._stage.step(f"{self._name}: catalog made")

            def native_first(_: int) -> float:
                _drop()
                return self._find(self._native)

            def mount_first(_: int) -> float:
                stack.close()  # the mount of the round before
                _drop()
                self._mount = stack.enter_context(self._stage.mounted(URL, home))
                before = self._workers_cpu()
                seconds = self._find(self._mount.point)
                self._cpu.append((self._workers_cpu() - before) / self._names * 1e6)
                return seconds

            def mount_again(_: int) -> float:
                assert self._mount is not None
                return self._find(self._mount.point)

            contenders = {
                f"native, first, {self._name}": native_first,
                f"native, again, {self._name}": lambda _: self._find(self._native),
                f"mount, first, {self._name}": mount_first,
                f"mount, again, {self._name}": mount_again,
            }
            found = in_turns(contenders, self._plan.mount_rounds, "s", self._stage.step)
        self._report(outcome, *found.values())

    def _report(self, outcome: Outcome, here: Series, here_again: Series, there: Series, there_again: Series) -> None:
        first = there.over(here, f"mount / native, first, {self._name}")
        again = there_again.over(here_again, f"mount / native, again, {self._name}")
        outcome.checked += 4 * self._plan.mount_rounds * self._plan.found
        outcome.series += [here, there, here_again, there_again]
        outcome.series.append(Series(f"workers' CPU, {self._name}", "us", self._cpu))
        outcome.goals.append(Goal(first, FIRST_AT_MOST, at_least=False))
        outcome.goals.append(Goal(again, AGAIN_AT_MOST, at_least=False))

    def _find(self, folder: Path) -> float:
        began = time.perf_counter()
        command = ["find", str(folder / "train"), "-size", "+0", "-printf", "x"]
        found = len(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
        seconds = time.perf_counter() - began
        if found != self._names:
            raise WrongBytes(str(folder), f"{found} names of {self._names}")
        return seconds

    def _workers_cpu(self) -> float:
        assert self._mount is not None
        return sum(map(cpu_seconds, self._mount.workers))


def _drop() -> None:
    os.sync()
    DROP_CACHES.write_text("3")


def _relative(count: int, per_directory: int) -> Iterator[tuple[str, int]]:
    for entry in entries(count, per_directory=per_directory):
        yield entry.path.removeprefix(f"{ROOT_PATH}/"), entry.size


def _make_tree(folder: Path, count: int, per_directory: int) -> int:
    """Files without blocks; how many names `find` sees from train/ on."""
    made: set[str] = set()
    for name, size in _relative(count, per_directory):
        file = f"{folder}/{name}"
        parent = os.path.dirname(file)
        if parent not in made:
            os.makedirs(parent)
            made.add(parent)
        fd = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        os.ftruncate(fd, size)
        os.close(fd)
    os.sync()
    return count + len(made) + 1
