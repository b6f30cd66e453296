"""A real PyTorch DataLoader over hot files: with how many workers, and with or without decoding, storage matters."""

from __future__ import annotations

from collections.abc import Mapping

from bench.comparisons.findings import Findings
from bench.comparisons.ground import Ground
from bench.comparisons.trainer import BATCH, EDGE
from bench.comparisons.turns import Entrant, Turn, take_turns
from bench.contenders import Contender

QUESTION = "How many images per second does a PyTorch DataLoader give, by its number of workers, decoded and not?"

READERS = 8

DECODED, RAW = "decoded", "not decoded"

# The summary looks at this number of workers only.
HEADLINE = 4

# An epoch of those that read fast is over all images, one of the others over as many as they read in this time.
SECONDS = 2.0
LEAST = 64


def unfit(kind: type[Contender]) -> str:
    if kind.hints:
        return "hints are compared where accelerators are kept busy"
    return "" if kind.cached else "it has no cache: the number of its requests at a time is what counts, see epochs"


def measure(ground: Ground, entrants: Mapping[str, Entrant], findings: Findings) -> None:
    images = ground.photographs()
    findings.conditions += [
        f"{len(images.names):,} JPEGs that were read before; batches of {BATCH}; persistent workers, which live "
        f"already; decoded: by Pillow to {EDGE} x {EDGE} pixels; not decoded: their bytes; of a slow contender's epoch "
        f"the first {SECONDS:g} s",
        ground.shape,
    ]
    figures = {
        (decode, workers): findings.figure(
            f"{decode}, {workers} worker{'s' if workers > 1 else ''}",
            "images/s",
            more=True,
            headline=workers == HEADLINE,
            line=decode,
            at=workers,
        )
        for decode in (RAW, DECODED)
        for workers in ground.plan.loader_workers
    }

    def play(turn: Turn) -> None:
        with turn.running():
            with turn.crew(READERS) as crew:
                findings.checked += crew.do("epoch", seed=0).files
            with turn.trainer() as trainer:
                samples = LEAST
                for (decode, workers), figure in figures.items():
                    order = {"decode": decode == DECODED, "workers": workers, "samples": samples}
                    done = trainer.do("load", seed=turn.round + workers, **order)
                    findings.checked += done["samples"]
                    figure.add(turn.name, done["rate"])
                    samples = max(LEAST, min(len(images.names), round(done["rate"] * SECONDS)))

    take_turns(ground, entrants, findings, images, play, rounds=ground.plan.loader_rounds)
