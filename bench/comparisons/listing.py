"""A dataset of many names: how long a loader takes to find them, the first time and again."""

from __future__ import annotations

from collections.abc import Mapping

from bench.comparisons.findings import Findings
from bench.comparisons.ground import Ground
from bench.comparisons.turns import Entrant, Turn, no_loader, take_turns
from bench.contenders import LIMIT, Contender
from bench.contenders.formats import Format
from bench.machine import pss_bytes

QUESTION = "How soon are all names of a dataset known, and what does knowing them cost?"

# Enough for a rate; `million` asks what a mount of a million names is like.
SIZE = 64


def unfit(kind: type[Contender]) -> str:
    return "its index comes with the shards" if issubclass(kind, Format) else no_loader(kind)


def measure(ground: Ground, entrants: Mapping[str, Entrant], findings: Findings) -> None:
    many = ground.blobs("names", ground.plan.listed_names, SIZE)
    findings.conditions += [
        f"{len(many.names):,} files of {SIZE} bytes in directories of 1,000; mounts: os.walk, from the start of the "
        "mount command; fsspec: fs.find; clients: their own listing; again: the same process once more",
        ground.shape,
    ]
    first = findings.figure("all names, the first time", "s", more=False)
    again = findings.figure("all names, again", "s", more=False)
    memory = findings.figure("memory of daemons and reader after it (PSS)", "MB", more=False)

    def play(turn: Turn) -> None:
        with turn.running() as daemons, turn.crew(1) as crew:
            done = crew.do("names")
            findings.checked += 2 * done.files
            if turn.name != LIMIT:
                first.add(turn.name, turn.started + done.seconds)
            again.add(turn.name, crew.do("names").seconds)
            memory.add(turn.name, (crew.memory() + sum(map(pss_bytes, daemons))) / 1e6)

    take_turns(ground, entrants, findings, many, play, rounds=ground.plan.name_rounds)
