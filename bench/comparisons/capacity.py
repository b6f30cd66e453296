"""A dataset twice as large as the cache: what still comes from the cache when not everything fits."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from bench.comparisons.findings import Findings
from bench.comparisons.ground import Ground, forget_pages
from bench.comparisons.process import Failed
from bench.comparisons.turns import Entrant, Turn, no_loader, take_turns
from bench.contenders import Contender

QUESTION = "Of a dataset twice the size of the cache, how much still comes from the cache, epoch after epoch?"

EPOCHS = 3
READERS = 8
SIZE = 256 * 1024

# rclone looks after its cache once a second here, and spares what was used within the last five: epochs that last as
# long as real ones would give it the time. After this, who has more than the limit does not keep it.
SETTLE_SECONDS = 8.0
TOLERANCE = 1.25


def unfit(kind: type[Contender]) -> str:
    if why := no_loader(kind):
        return why
    if not kind.cached:
        return "it has no cache"
    return "" if kind.bounded else "it cannot be told how large its cache may be"


def measure(ground: Ground, entrants: Mapping[str, Entrant], findings: Findings) -> None:
    samples = ground.blobs("overfull", (ground.plan.overfull_mib << 20) // SIZE, SIZE)
    limit = samples.bytes // 2
    findings.conditions += [
        f"{len(samples.names):,} files of {SIZE >> 10} KiB, {samples.bytes / 1e6:.0f} MB; caches of "
        f"{limit / 1e6:.0f} MB; {EPOCHS} epochs by {READERS} processes, the first left out; one round: what is counted "
        "does not vary",
        "the page cache is dropped before each epoch, as a dataset larger than memory would do; "
        "origin: as elsewhere, but 2 ms away and not limited in bandwidth",
        "each file is read once per epoch, in a fresh order: no policy can serve more than half of the bytes from such "
        "a cache, and who serves more uses memory besides",
        f"a cache that is larger than {TOLERANCE:g} times its limit {SETTLE_SECONDS:g} s after an epoch has failed",
    ]
    ground.line.set(latency=0.002, bandwidth_per_connection=None)
    hits = findings.figure("bytes from the cache, later epochs", "share", more=True)
    origin = findings.figure("bytes from the origin, later epochs", "datasets/epoch", more=False)
    rate = findings.figure("later epochs", "MB/s", more=True)
    size = findings.figure("cache on disk after the last epoch / its limit", "x", more=False, headline=False)

    def play(turn: Turn) -> None:
        folder = Path(turn.place.folder)
        with turn.running(), turn.crew(READERS) as crew:
            findings.checked += crew.do("epoch", seed=0).files
            ground.line.reset()
            later = []
            for number in range(1, EPOCHS):
                _settle(folder, limit)
                forget_pages(turn.entrant.kind(turn.place))
                later.append(crew.do("epoch", seed=number))
            share = ground.line.reset().bytes_down / (samples.bytes * len(later))
            findings.checked += sum(done.files for done in later)
            hits.add(turn.name, max(0.0, 1 - share))
            origin.add(turn.name, share)
            rate.add(turn.name, sum(done.bytes / 1e6 for done in later) / sum(done.seconds for done in later))
            size.add(turn.name, _settle(folder, limit) / limit)

    take_turns(ground, entrants, findings, samples, play, rounds=1, limit=limit, keep=False)


def _settle(folder: Path, limit: int) -> int:
    """Wait until the cache is within its limit; returns the bytes it has. Raises Failed when it stays larger."""
    deadline = time.monotonic() + SETTLE_SECONDS
    while (size := on_disk(folder, besides="mount")) > TOLERANCE * limit:
        if time.monotonic() > deadline:
            raise Failed(f"its cache keeps {size / limit:.2f} times its limit")
        time.sleep(0.2)
    return size


def on_disk(folder: Path, besides: str) -> int:
    """Bytes that the files below take on the disk, each once however many names it has."""
    blocks: dict[int, int] = {}
    for file in folder.rglob("*"):
        with suppress(FileNotFoundError):  # it is being emptied
            if file.relative_to(folder).parts[0] != besides and file.is_file():
                info = file.stat()
                blocks[info.st_ino] = info.st_blocks
    return 512 * sum(blocks.values())
