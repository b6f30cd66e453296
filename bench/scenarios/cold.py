"""A first epoch: every file once, nothing cached, several readers, through the mount and with bare obstore.

Twice: with the S3 server on this machine and nothing between, where server, client, cache and reader want the same
cores and what is compared is CPU time; and through a line with the latency of distant storage, which is the case
that a cache is for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from bench.machine import cpu_seconds
from bench.outcome import Goal, Outcome, Series, in_turns
from bench.plan import Plan
from bench.readers import Team
from bench.stage import ROOT, Mounted, Stage

QUESTION = "Does the first epoch, when nothing is cached, cost more through the mount than with a bare S3 client?"

READERS = 8
LEAST_SHARE = 0.8

# A round trip to storage in the next region.
LATENCY = 0.02


@dataclass
class _Costs:
    """CPU microseconds per object, by who spent them, one value per round."""

    values: dict[str, list[float]] = field(default_factory=dict)

    def add(self, who: str, seconds: float, files: int) -> None:
        self.values.setdefault(who, []).append(seconds * 1e6 / files)

    def series(self, where: str) -> list[Series]:
        return [Series(f"CPU of {who}, {where}", "us/file", values) for who, values in self.values.items()]


def measure(stage: Stage, plan: Plan, outcome: Outcome) -> None:
    outcome.conditions.append(
        f"{plan.files:,} files of 60-160 KB, shuffled; obstore: {READERS} tasks on uvloop; "
        f"mount: {READERS} threads of one process, os.open, os.read, os.close; a fresh cache for each round"
    )
    _compare(stage, plan, outcome, "loopback", stage.server.port, None)
    throttle = stage.throttle(LATENCY)
    _compare(stage, plan, outcome, f"{LATENCY * 1000:.0f} ms", throttle.port, throttle.pid)


def _compare(stage: Stage, plan: Plan, outcome: Outcome, where: str, port: int, throttle: int | None) -> None:
    costs = _Costs()
    server = stage.server.pid
    assert server is not None
    servers = {"server": server} | ({"throttle": throttle} if throttle else {})
    with Team("obstore", stage.obstore(port, READERS), stage.environ) as bare:
        bare.run(0)  # the server has read its directories, and its files are in the page cache

        def direct(seed: int) -> float:
            with _Watched(costs, "with obstore", lambda: servers, plan.files) as watched:
                done = bare.run(seed)
                watched.also("reader", done.cpu)
            return done.rate

        def through(seed: int) -> float:
            with stage.cache() as home, stage.mounted(f"s3://{ROOT}", home, port) as mount:
                way = stage.way("files", root=str(mount.point), readers=READERS)
                with (
                    Team("mount", way, stage.environ) as team,
                    _Watched(costs, "with the mount", lambda: servers | _parts(mount), plan.files) as watched,
                ):
                    done = team.run(seed)
                    watched.also("reader", done.cpu)
                return done.rate

        contenders = {f"obstore, {where}": direct, f"mount, {where}": through}
        there, here = in_turns(contenders, plan.cold_rounds, "files/s", stage.step).values()
    outcome.checked += (2 * plan.cold_rounds + 1) * plan.files
    outcome.series += [there, here, *costs.series(where)]
    outcome.goals.append(Goal(here.over(there, f"mount / obstore, {where}"), LEAST_SHARE, at_least=True))


def _parts(mount: Mounted) -> dict[str, int]:
    fetcher = mount.fetcher
    assert fetcher is not None
    return {"fetcher": fetcher} | {f"worker {n}": pid for n, pid in enumerate(mount.workers)}


class _Watched:
    """Adds what processes spend within the block to the costs; all workers together."""

    def __init__(self, costs: _Costs, way: str, pids: Callable[[], dict[str, int]], files: int) -> None:
        self._costs, self._way, self._pids, self._files = costs, way, pids(), files
        self._before: dict[str, float] = {}
        self._spent: dict[str, float] = {}

    def __enter__(self) -> _Watched:
        self._before = {who: cpu_seconds(pid) for who, pid in self._pids.items()}
        return self

    def also(self, who: str, seconds: float) -> None:
        """What a process that was not watched says of itself."""
        self._spent[who] = seconds

    def __exit__(self, *failure: object) -> None:
        if failure[0] is not None:
            return
        for who, before in self._before.items():
            name = "workers" if who.startswith("worker") else who
            self._spent[name] = self._spent.get(name, 0.0) + cpu_seconds(self._pids[who]) - before
        for who, seconds in self._spent.items():
            self._costs.add(f"{who} {self._way}", seconds, self._files)
