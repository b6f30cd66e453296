"""Storage with a bad day: some requests are refused once, some answers break off. Does the epoch go on?"""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path

from bench.comparisons.findings import Findings
from bench.comparisons.ground import Ground
from bench.comparisons.turns import Entrant, Turn, no_loader, take_turns
from bench.contenders import Contender
from bench.contenders.native import Native

QUESTION = "When storage refuses some requests and breaks off some answers, does the epoch go on?"

READERS = 8

# Of the objects, so many are refused once (503), and of so many others the answer breaks off once.
SHARE = 0.05
BREAKS_AFTER = 20_000


def unfit(kind: type[Contender]) -> str:
    return "it never asks the origin" if issubclass(kind, Native) else no_loader(kind)


def measure(ground: Ground, entrants: Mapping[str, Entrant], findings: Findings) -> None:
    images = ground.photographs()
    findings.conditions += [
        f"the first epoch over {len(images.names):,} JPEGs, read by {READERS} processes; the first request for "
        f"{SHARE:.0%} of the objects is answered 503, and for another {SHARE:.0%} the answer breaks off after "
        f"{BREAKS_AFTER // 1000} KB; whoever asks again is served",
        ground.shape,
    ]
    lost = findings.figure("reads that failed", "files", more=False)
    rate = findings.figure("images that came", "images/s", more=True)

    def play(turn: Turn) -> None:
        with turn.running(), turn.crew(READERS) as crew:
            _strike(ground, turn)
            try:
                done = crew.do("epoch_tolerantly", seed=turn.round)
            finally:
                ground.line.heal()
            findings.checked += done.files
            lost.add(turn.name, len(done.failed))
            rate.add(turn.name, done.rate)
            if done.failed:
                findings.notes.append(f"{turn.name}: {min(done.failed.items())[1]}")

    take_turns(ground, entrants, findings, images, play, rounds=1)


def _strike(ground: Ground, turn: Turn) -> None:
    files = Path(turn.place.source) / turn.place.prefix
    objects = sorted(str(file.relative_to(files)) for file in files.rglob("*") if file.stat().st_size > BREAKS_AFTER)
    struck = max(1, round(len(objects) * SHARE))
    chosen = random.Random(turn.round).sample(objects, min(len(objects), 2 * struck))
    for name in chosen[:struck]:
        ground.line.status(503, f"{turn.place.root}/{name}", times=1)
    for name in chosen[struck:]:
        ground.line.cut(f"{turn.place.root}/{name}", after=BREAKS_AFTER, times=1)
