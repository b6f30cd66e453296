"""What stays on the SSD: the policy that the fetcher runs, against SIEVE and S3-FIFO on the same traces.

    python -m bench.residency                  prints the table and writes bench/RESIDENCY.md; some ten minutes
    python -m bench.residency --items 2000     the same, smaller

`Simulated` drives cachefs.fetcher.following and nothing else: it sees misses, and of a resident it is told whether it
was read since it last asked, as the fetcher learns it from the file's access time. SIEVE and S3-FIFO are those of
libcachesim (PyPI), and see every read.
"""

from __future__ import annotations

import argparse
import os
import platform
import random
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bench import machine
from cachefs.fetcher.following import Following

SHARES = (0.1, 0.25, 0.5, 0.75)
REPORT = Path(__file__).with_name("RESIDENCY.md")

# Differences between two runs of one policy on two samples of one distribution are of this order.
NOISE = 0.001


class Trace(NamedTuple):
    """reads: which item, one after the other. counted: from where on hits are counted."""

    reads: list[int]
    counted: int = 0


# --- traces ---------------------------------------------------------------------------------------------------


def _epochs(items: int, number: int, dice: np.random.Generator) -> np.ndarray[Any, Any]:
    return np.concatenate([dice.permutation(items) for _ in range(number)])


def _zipf(items: int, alpha: float, reads: int, dice: np.random.Generator) -> np.ndarray[Any, Any]:
    weights = np.cumsum(np.arange(1, items + 1, dtype=float) ** -alpha)
    ranks = np.searchsorted(weights, dice.random(reads) * weights[-1])
    return np.asarray(dice.permutation(items)[ranks])


def epochs(items: int, dice: np.random.Generator) -> Trace:
    """Every item once per epoch, in a fresh order: 12 epochs, the first 2 not counted."""
    return Trace(_epochs(items, 12, dice).tolist(), 2 * items)


def two_jobs(items: int, dice: np.random.Generator) -> Trace:
    """Two jobs read the dataset in orders of their own, the second a third of an epoch ahead; 2 of 10 not counted."""
    one, other = _epochs(items, 10, dice), _epochs(items, 11, dice)[items // 3 :][: 10 * items]
    return Trace(np.stack([one, other], 1).ravel().tolist(), 4 * items)


def validation(items: int, dice: np.random.Generator) -> Trace:
    """3 epochs over 95% of the items, then 7 with the other 5% read whole 20 times an epoch; the last 5 counted."""
    held, train = np.arange(items // 20), np.arange(items // 20, items)
    parts = [dice.permutation(train) for _ in range(3)]
    for _ in range(7):
        for part in np.array_split(dice.permutation(train), 20):
            parts += [part, held]
    reads = np.concatenate(parts)
    return Trace(reads.tolist(), 3 * len(train) + 2 * (len(train) + 20 * len(held)))


def curriculum(items: int, dice: np.random.Generator) -> Trace:
    """Epochs over a prefix that grows from 5% to 100% in 20 steps."""
    return Trace(np.concatenate([dice.permutation(items * step // 20) for step in range(1, 21)]).tolist())


def narrowing(items: int, dice: np.random.Generator) -> Trace:
    """3 epochs over everything, which are not counted, then 30 over a random quarter of it."""
    quarter = dice.permutation(items)[: items // 4]
    later = [quarter[dice.permutation(len(quarter))] for _ in range(30)]
    return Trace(np.concatenate([_epochs(items, 3, dice), *later]).tolist(), 3 * items)


def epochs_then_zipf(items: int, dice: np.random.Generator) -> Trace:
    """5 epochs, then Zipf 1.0 for as long as 30; the last 15 counted."""
    return Trace(np.concatenate([_epochs(items, 5, dice), _zipf(items, 1.0, 30 * items, dice)]).tolist(), 20 * items)


def zipf_then_epochs(items: int, dice: np.random.Generator) -> Trace:
    """Zipf 1.0 for as long as 20 epochs, then 10 epochs; the last 5 counted."""
    return Trace(np.concatenate([_zipf(items, 1.0, 20 * items, dice), _epochs(items, 10, dice)]).tolist(), 25 * items)


def weighted(items: int, dice: np.random.Generator) -> Trace:
    """WeightedRandomSampler: a tenth of the items ten times as often; for as long as 40 epochs, 10 not counted."""
    weights = np.where(dice.permutation(items) < items // 10, 10.0, 1.0)
    return Trace(dice.choice(items, 40 * items, p=weights / weights.sum()).tolist(), 10 * items)


def uniform(items: int, dice: np.random.Generator) -> Trace:
    """RandomSampler with replacement, for as long as 30 epochs, 5 not counted. Nobody can be better than C/N."""
    return Trace(dice.integers(0, items, 30 * items).tolist(), 5 * items)


def drift(items: int, dice: np.random.Generator) -> Trace:
    """Zipf 1.0 whose popular items are others after every 10 epochs, six times; the first not counted."""
    return Trace(np.concatenate([_zipf(items, 1.0, 10 * items, dice) for _ in range(6)]).tolist(), 10 * items)


def zipf(alpha: float) -> Callable[[int, np.random.Generator], Trace]:
    def trace(items: int, dice: np.random.Generator) -> Trace:
        return Trace(_zipf(items, alpha, 100 * items, dice).tolist(), 50 * items)

    trace.__doc__ = f"Independent reads, popularity ~ rank^-{alpha}: for as long as 100 epochs, the last 50 counted."
    return trace


TRACES: dict[str, Callable[[int, np.random.Generator], Trace]] = {
    "epochs": epochs,
    **{f"zipf {alpha}": zipf(alpha) for alpha in (0.6, 0.8, 1.0, 1.2)},
    "validation": validation,
    "curriculum": curriculum,
    "two jobs": two_jobs,
    "epochs, then zipf": epochs_then_zipf,
    "zipf, then epochs": zipf_then_epochs,
    "weighted": weighted,
    "uniform": uniform,
    "narrowing": narrowing,
    "drift": drift,
}


# --- policies -------------------------------------------------------------------------------------------------


class Simulated:
    """A cache of `size` items, where the policy learns what the fetcher can learn."""

    def __init__(self, size: int, items: int) -> None:
        self.size = size
        self.names = [random.Random(item).randbytes(16) for item in range(items)]
        self._numbers = {name: item for item, name in enumerate(self.names)}
        self.stored: set[int] = set()
        self._read: set[int] = set()
        self.policy = Following(self._visited)
        self.looks = self.replaced = 0

    def _visited(self, name: bytes) -> bool:
        self.looks += 1
        item = self._numbers[name]
        visited = item in self._read
        self._read.discard(item)
        return visited

    def read(self, item: int) -> bool:
        """Whether it was there."""
        if item in self.stored:
            self._read.add(item)
            return True
        if len(self.stored) < self.size:
            self.stored.add(item)
            self._read.add(item)  # by whom it was fetched for
            self.policy.kept(self.names[item])
            return False
        name = self.names[item]
        since = self.policy.missed(name)
        if since is not None and (victims := self.policy.place(name, since)):
            self.stored -= {self._numbers[victim] for victim in victims}
            self.stored.add(item)
            self._read.add(item)
            self.policy.kept(name)
            self.replaced += 1
        return False


def followed(trace: Trace, size: int, items: int) -> tuple[float, float, float]:
    """(hit ratio, replacements per read, looks per read)."""
    cache = Simulated(size, items)
    hits = sum([cache.read(item) for item in trace.reads][trace.counted :])
    count = len(trace.reads)
    return hits / (count - trace.counted), cache.replaced / count, cache.looks / count


def kept(trace: Trace, size: int) -> float:
    """What comes first stays."""
    stored: set[int] = set()
    hits = 0
    for at, item in enumerate(trace.reads):
        if item in stored:
            hits += at >= trace.counted
        elif len(stored) < size:
            stored.add(item)
    return hits / (len(trace.reads) - trace.counted)


def public(name: str, trace: Trace, size: int) -> float:
    """A policy of libcachesim."""
    import libcachesim

    cache = getattr(libcachesim, name)(size, hashpower=18)
    request = libcachesim.Request()
    request.obj_size = 1
    hits = 0
    for at, item in enumerate(trace.reads):
        request.obj_id = item
        hits += cache.get(request) and at >= trace.counted
    return hits / (len(trace.reads) - trace.counted)


# --- the table ------------------------------------------------------------------------------------------------


class Cell(NamedTuple):
    trace: str
    share: float
    ours: float
    sieve: float
    s3fifo: float
    keep: float
    replaced: float
    looks: float

    @property
    def gain(self) -> float:
        return self.ours - max(self.sieve, self.s3fifo)

    def verdict(self) -> str:
        if self.trace == "epochs":
            return "at the bound" if self.ours >= 0.99 * self.share else "BELOW THE BOUND"
        return "ahead" if self.gain >= 0 else "level" if self.gain > -NOISE else "BEHIND"


def cells(items: int, seeds: int, names: list[str]) -> Iterator[Cell]:
    """Means over `seeds` traces of each kind."""
    for name in names:
        for share in SHARES:
            size, rows = int(share * items), []
            for seed in range(seeds):
                trace = TRACES[name](items, np.random.default_rng([seed, list(TRACES).index(name)]))
                ours, replaced, looks = followed(trace, size, items)
                others = public("Sieve", trace, size), public("S3FIFO", trace, size), kept(trace, size)
                rows.append((ours, *others, replaced, looks))
            yield Cell(name, share, *(sum(column) / seeds for column in zip(*rows, strict=True)))


HEADER = (
    "| trace | C/N | following | SIEVE | S3-FIFO | keep | against the better of the two | replaced | looks |\n"
    "|---|---|---|---|---|---|---|---|---|"
)


def row(cell: Cell) -> str:
    return (
        f"| {cell.trace} | {cell.share} | {cell.ours:.4f} | {cell.sieve:.4f} | {cell.s3fifo:.4f} | {cell.keep:.4f} "
        f"| {cell.gain:+.4f} {cell.verdict()} | {1000 * cell.replaced:.1f} | {1000 * cell.looks:.0f} |"
    )


def losses(found: list[Cell]) -> str:
    behind = [cell for cell in found if cell.verdict() in ("BEHIND", "level", "BELOW THE BOUND")]
    lines = [f"- {cell.trace}, C/N = {cell.share}: {cell.gain:+.4f} ({cell.verdict()})" for cell in behind]
    return "\n".join(lines) if lines else "Nowhere."


def report(found: list[Cell], items: int, seeds: int) -> str:
    where = (
        f"{time.strftime('%Y-%m-%d %H:%M %z')}; Linux {platform.release()}; {os.cpu_count()} cores; "
        f"Python {platform.python_version()}; libcachesim {version('libcachesim')}, numpy {np.__version__}; "
        f"load {machine.load():.1f} (hit ratios do not depend on it)"
    )
    names = dict.fromkeys(cell.trace for cell in found)
    what = "\n".join(f"- **{name}**: {TRACES[name].__doc__}" for name in names)
    return f"""# Residency within a dataset: what came out

Written by `python -m bench.residency`. {where}.

{items:,} items of one size, means over {seeds} samples of each trace.

- *following*: `cachefs/fetcher/following.py` as the fetcher runs it, which sees misses only.
- *SIEVE*, *S3-FIFO*: libcachesim's, which see every read. *keep*: what comes first is stored, nothing is evicted.
- *level*: behind by less than {NOISE}, which is what two samples of one trace differ by.
- *replaced*: stored objects that gave their place to another; *looks*: how often a stored file was asked whether it was
  read since the last time. Both per 1,000 reads.

{HEADER}
{chr(10).join(row(cell) for cell in found)}

## Where it is not ahead

{losses(found)}

## The traces

{what}
"""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.residency", description=__doc__.partition("\n")[0])
    parser.add_argument("--items", type=int, default=5000, help="items of the dataset")
    parser.add_argument("--seeds", type=int, default=3, help="samples of each trace")
    parser.add_argument("--trace", action="append", choices=list(TRACES), help="only these; writes no report")
    options = parser.parse_args()
    found = []
    print(HEADER)
    for cell in cells(options.items, options.seeds, options.trace or list(TRACES)):
        print(row(cell), flush=True)
        found.append(cell)
    print("\nNot ahead:\n" + losses(found))
    if not options.trace:
        REPORT.write_text(report(found, options.items, options.seeds))
    return 0


if __name__ == "__main__":
    sys.exit(main())
