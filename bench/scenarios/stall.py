"""The cache holds half of the dataset, and storage gives hardly more than the other half takes: does the GPU wait?

A training process with a DataLoader and hints wants samples at a steady rate. First the line to the storage carries
1.05 of what an epoch must fetch, then several times that. It is counted when the requests come, because storage and
network are shared: what one job asks for in bursts, others wait for.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

from bench.objects import BUCKET, ON_DISK, make_objects
from bench.outcome import Goal, Outcome, Series, WrongBytes
from bench.plan import Plan
from bench.processes import told
from bench.stage import Stage, credentials
from cachefs_sidecar.testbed import Throttle

QUESTION = "When storage gives just what the cache lacks: does training wait, and are requests spread over the epoch?"

SHARE = 0.5

# Of which a fetcher holds 16 MiB ahead and remembers as much of what it could not store: less than an epoch lacks.
MEMORY = "1G"

LATENCY = 0.02

# Samples a second: of the rate of an H100 what two cores can serve, read and compare at once.
RATE = 400

# What the line carries, of what an epoch must fetch.
SCARCE, AMPLE = 1.05, 4.0

MOST_STALL = 0.5  # percent of the epoch
MOST_UNEVEN = 1.2
TENTHS = 10

POLL_SECONDS = 0.1


def measure(stage: Stage, plan: Plan, outcome: Outcome) -> None:
    count = plan.objects
    outcome.conditions.append(
        f"{count:,} objects that take 32 KiB each, the cache holds half of them, and is full; one torch DataLoader by "
        f"URL, 2 workers, batches of 32, hints on, {RATE} samples/s; S3 behind a line of {LATENCY * 1000:.0f} ms that "
        f"carries {SCARCE:g} x what an epoch lacks, and in the next epoch {AMPLE:g} x; from the first batch to the last"
    )
    _, manifest = make_objects(stage, plan.objects)
    throttle = stage.throttle(LATENCY)
    way = {"manifest": str(manifest), "root": BUCKET, "options": credentials(stage.s3(throttle.port)), "files": count}
    with stage.cache() as home, told(stage, "bench.demand", way, CACHEFS_MEMORY=MEMORY) as tell:
        order = {"home": str(home), "size": int(count * SHARE) * ON_DISK}
        stage.step("filling the cache")
        throttle.reset()
        tell({**order, "seed": 0, "rates": [0]})
        traffic = throttle.reset()
        per_second = RATE * (1 - SHARE) * traffic.bytes_down / max(1, traffic.object_reads)
        for name, times in (("scarce", SCARCE), ("ample", AMPLE)):
            stage.step(f"a line of {times:g} x")
            throttle.set(total_bandwidth=times * per_second)
            with _watched(throttle) as requests:
                epochs = tell({**order, "seed": 1, "rates": [RATE, RATE]})["epochs"]
            _judge(outcome, name, epochs, requests)


def _judge(
    outcome: Outcome, line: str, epochs: Sequence[Mapping[str, Any]], requests: Sequence[tuple[float, int]]
) -> None:
    """The first epoch of a job begins with nothing ahead, and fills that; goals are for those that follow it."""
    if wrong := sum(epoch["wrong"] for epoch in epochs):
        raise WrongBytes(f"stall: {line} line", f"{wrong} of {sum(epoch['files'] for epoch in epochs)} files")
    outcome.checked += sum(epoch["files"] for epoch in epochs)
    stalls = [100 * epoch["stall"] / (epoch["end"] - epoch["begin"]) for epoch in epochs]
    uneven = [busiest(requests, epoch["begin"], epoch["end"]) for epoch in epochs]
    for number, what in enumerate(("first epoch", "second epoch")):
        stall = Series(f"stall, {line} line, {what}", "%", [max(0.001, stalls[number])])
        tenth = Series(f"busiest tenth / mean, {line} line, {what}", "x", [uneven[number]])
        if number:
            outcome.goals += [Goal(stall, MOST_STALL, at_least=False), Goal(tenth, MOST_UNEVEN, at_least=False)]
        else:
            outcome.series += [stall, tenth]


def busiest(requests: Sequence[tuple[float, int]], begin: float, end: float) -> float:
    """Of the tenths between two times the one with most requests, over their mean. requests: (time, since the last)."""
    tenths = [0.0] * TENTHS
    for (before, _), (now, count) in pairwise(requests):
        for number in range(TENTHS):
            start, stop = (begin + (end - begin) * (number + more) / TENTHS for more in (0, 1))
            tenths[number] += count * max(0.0, min(now, stop) - max(before, start)) / (now - before)
    return max(tenths) / (sum(tenths) / TENTHS) if sum(tenths) else 1.0


@contextmanager
def _watched(throttle: Throttle) -> Iterator[list[tuple[float, int]]]:
    """When how many requests for objects came: (time, since the one before)."""
    found: list[tuple[float, int]] = []
    over = threading.Event()

    def watch() -> None:
        while not over.wait(POLL_SECONDS):
            found.append((time.monotonic(), throttle.reset().object_reads))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield found
    finally:
        over.set()
        thread.join()
