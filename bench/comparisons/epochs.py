"""Epochs over images, one after another: the first with nothing cached, the next hot, the last from the disk.

The readers live through all of them, as the persistent workers of a DataLoader do. What they hand back is bytes:
nothing is decoded, so that what differs is the storage.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from bench.comparisons.crew import Crew, Pass
from bench.comparisons.findings import Figure, Findings
from bench.comparisons.ground import Ground, forget_pages
from bench.comparisons.turns import Entrant, Turn, cpu_of, no_loader, take_turns
from bench.contenders import LIMIT
from bench.machine import pss_bytes

QUESTION = "How many images per second come in the first epoch, in later ones, from the disk; and what does it cost?"

READERS = 8

# Hot epochs are short: as many of them as fill this time, at most so many, and their median counts.
HOT_SECONDS = 0.4
MOST_HOT = 15

unfit = no_loader


def measure(ground: Ground, entrants: Mapping[str, Entrant], findings: Findings) -> None:
    images = ground.photographs()
    findings.conditions += [
        f"{len(images.names):,} JPEGs of 60 to 160 KB, shuffled anew in each epoch, read whole by {READERS} processes",
        ground.shape,
    ]
    findings.notes.append(
        "Direct clients have no cache: each of their epochs is as the first, and none is read from a disk. "
        "The local copy has no first epoch."
    )
    play = _Epochs(ground, findings).play
    take_turns(ground, entrants, findings, images, play, rounds=ground.plan.comparison_rounds)


class _Epochs:
    def __init__(self, ground: Ground, findings: Findings) -> None:
        self.ground, self.findings = ground, findings
        figure = findings.figure
        self.first = figure("first epoch, nothing cached", "images/s", more=True)
        self.later = figure("later epochs, hot", "images/s", more=True)
        self.disk = figure("later epochs, page cache dropped", "images/s", more=True)
        self.start = figure("start until the first image, nothing cached", "s", more=False)
        self.memory = figure("memory of daemons and readers (PSS)", "MB", more=False)
        self.cpu_first = figure("CPU, first epoch", "s/GB", more=False)
        self.cpu_later = figure("CPU, hot", "s/GB", more=False)
        self.cpu_disk = figure("CPU, page cache dropped", "s/GB", more=False)
        self.origin = figure("origin bytes of a later epoch / dataset", "x", more=False, headline=False)

    def play(self, turn: Turn) -> None:
        name = turn.name
        with turn.running() as daemons, turn.crew(READERS) as crew:
            if name == LIMIT:  # its files were there before: warm them up as the others do
                crew.do("epoch", seed=turn.round)
            else:
                done = self.epoch(turn, crew, daemons, 0, self.cpu_first)
                self.first.add(name, done.rate)
                self.start.add(name, turn.started + crew.prepared + done.first)
            self.memory.add(name, (crew.memory() + sum(map(pss_bytes, daemons))) / 1e6)
            self.ground.line.reset()
            hot = [self.epoch(turn, crew, daemons, 1, self.cpu_later)]
            self.origin.add(name, self.ground.line.reset().bytes_down / turn.dataset.bytes)
            if turn.entrant.kind.cached:
                while sum(done.seconds for done in hot) < HOT_SECONDS and len(hot) < MOST_HOT:
                    hot.append(self.epoch(turn, crew, daemons, 1 + len(hot), self.cpu_later))
                forget_pages(turn.entrant.kind(turn.place))
                self.disk.add(name, self.epoch(turn, crew, daemons, 99, self.cpu_disk).rate)
            self.later.add(name, sorted(done.rate for done in hot)[len(hot) // 2])

    def epoch(self, turn: Turn, crew: Crew, daemons: Sequence[int], number: int, cpu: Figure) -> Pass:
        before = cpu_of(daemons)
        done = crew.do("epoch", seed=100 * turn.round + number)
        self.findings.checked += done.files
        cpu.add(turn.name, (done.cpu + cpu_of(daemons) - before) / (done.bytes / 1e9))
        return done
