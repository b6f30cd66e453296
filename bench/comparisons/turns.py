"""Contenders take turns (A B A B ...), so that whatever else the machine does hits all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from bench.comparisons.crew import Crew
from bench.comparisons.findings import Findings
from bench.comparisons.ground import Dataset, Ground
from bench.comparisons.trainer import Trainer
from bench.contenders import Contender, Place, load
from bench.machine import cpu_seconds


@dataclass(frozen=True)
class Entrant:
    """A contender that takes part. spec: its name, or module:Class, by which its readers load it."""

    spec: str
    kind: type[Contender]


@dataclass
class Turn:
    """One contender's in one round. started: seconds that its daemons took until they could be used."""

    name: str
    round: int
    entrant: Entrant
    place: Place
    dataset: Dataset
    environ: Mapping[str, str]
    started: float = 0.0

    @contextmanager
    def running(self) -> Iterator[Sequence[int]]:
        """Its daemons run; yields their pids."""
        began = time.perf_counter()
        with self.entrant.kind(self.place).running({**self.environ, **self.place.environ}) as pids:
            self.started = time.perf_counter() - began
            yield pids

    def crew(self, workers: int) -> Crew:
        return Crew(self.entrant.spec, self.place, self.dataset, workers, self.environ)

    def trainer(self) -> Trainer:
        return Trainer(self.entrant.spec, self.place, self.dataset, self.environ)


def take_turns(
    ground: Ground,
    entrants: Mapping[str, Entrant],
    findings: Findings,
    dataset: Dataset,
    play: Callable[[Turn], None],
    *,
    rounds: int,
    limit: int = 0,
    keep: bool = True,
) -> None:
    """Let each entrant play once per round, from an empty cache; one that failed plays no more.

    limit: of caches. keep: leave caches on the disk until the end, for the sake of new ones: see bench.stage.
    """
    for name, entrant in entrants.items():
        with findings.turn(name):
            ground.prepare(entrant.kind, dataset)
    for number in range(rounds):
        for name, entrant in entrants.items():
            if findings.out(name):
                continue
            ground.stage.step(f"{name}, round {number + 1}")
            with findings.turn(name):
                place = ground.place(entrant.kind, dataset, limit)
                play(Turn(name, number, entrant, place, dataset, ground.environ))
            if not keep:
                ground.clear()
    findings.begin()


def pick(names: Sequence[str], findings: Findings, unfit: Callable[[type[Contender]], str]) -> dict[str, Entrant]:
    """Those of the names that can take part; why the others cannot is noted. unfit: why a contender does not fit."""
    entrants: dict[str, Entrant] = {}
    for name in names:
        kind = load(name)
        if why := kind.missing() or unfit(kind):
            findings.skipped[name] = why
        else:
            entrants[name] = Entrant(name, kind)
    return entrants


def no_loader(kind: type[Contender]) -> str:
    """Why a contender does not fit where no DataLoader is; "" when it does."""
    return "" if kind.loader == Contender.loader else "it is another DataLoader, and there is none here"


def cpu_of(pids: Sequence[int]) -> float:
    """Seconds that these have spent so far; one that has ended counts no more."""
    spent = 0.0
    for pid in pids:
        with suppress(OSError):
            spent += cpu_seconds(pid)
    return spent
