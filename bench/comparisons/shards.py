"""Large files: read from beginning to end, as shards are, and a little at random places, as indexed formats are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bench.comparisons.findings import Findings
from bench.comparisons.ground import Ground, forget_pages
from bench.comparisons.turns import Entrant, Turn, no_loader, take_turns
from bench.contenders import LIMIT, Contender
from bench.contenders.formats import Format

QUESTION = "How fast are large files, read through, and at random places?"

SHARDS = 2
READERS = 2

RANGE = 64 * 1024
RANGE_READERS = 4


def unfit(kind: type[Contender]) -> str:
    return "it reads files of its own form only" if issubclass(kind, Format) else no_loader(kind)


def measure(ground: Ground, entrants: Mapping[str, Entrant], findings: Findings) -> None:
    plan = ground.plan
    shards = ground.blobs("shards", SHARDS, plan.shard_mib << 20)
    findings.conditions += [
        f"{SHARDS} files of {plan.shard_mib} MiB; read through: in pieces of 1 MiB by {READERS} processes, a file each",
        f"at random: {plan.ranges} ranges of {RANGE >> 10} KiB of both files by {RANGE_READERS} processes, "
        "which keep the files open; cached: the same ranges again",
        ground.shape,
    ]
    through = _Through(ground, findings)
    take_turns(ground, entrants, findings, shards, through.play, rounds=plan.shard_rounds, keep=False)
    at_random = _AtRandom(ground, findings)
    take_turns(ground, entrants, findings, shards, at_random.play, rounds=plan.shard_rounds, keep=False)


class _Through:
    def __init__(self, ground: Ground, findings: Findings) -> None:
        self.ground, self.findings = ground, findings
        self.first = findings.figure("read through, nothing cached", "MB/s", more=True)
        self.hot = findings.figure("read through, hot", "MB/s", more=True)
        self.disk = findings.figure("read through, page cache dropped", "MB/s", more=True)

    def play(self, turn: Turn) -> None:
        with turn.running(), turn.crew(READERS) as crew:

            def speed() -> float:
                done = crew.do("stream", seed=turn.round)
                self.findings.checked += done.files
                return done.bytes / 1e6 / done.seconds

            first = speed()
            if turn.name != LIMIT:
                self.first.add(turn.name, first)
            if turn.entrant.kind.cached:
                self.hot.add(turn.name, sorted(speed() for _ in range(3))[1])
                forget_pages(turn.entrant.kind(turn.place))
                self.disk.add(turn.name, speed())


class _AtRandom:
    def __init__(self, ground: Ground, findings: Findings) -> None:
        self.ground, self.findings = ground, findings
        self.first = findings.figure("at random, nothing cached", "ranges/s", more=True)
        self.hot = findings.figure("at random, cached", "ranges/s", more=True)
        self.more = findings.figure("origin bytes / bytes asked for, nothing cached", "x", more=False)

    def play(self, turn: Turn) -> None:
        order: dict[str, Any] = {"seed": turn.round, "size": RANGE, "count": self.ground.plan.ranges, "whole": False}
        with turn.running(), turn.crew(RANGE_READERS) as crew:
            self.ground.line.reset()
            done = crew.do("ranges", **order)
            self.findings.checked += done.files
            if turn.name != LIMIT:
                self.first.add(turn.name, done.rate)
                self.more.add(turn.name, self.ground.line.reset().bytes_down / done.bytes)
            if turn.entrant.kind.cached:
                again = [crew.do("ranges", **order) for _ in range(3)]
                self.findings.checked += sum(done.files for done in again)
                self.hot.add(turn.name, sorted(done.rate for done in again)[1])
