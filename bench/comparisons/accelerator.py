"""Accelerators that compute for a given time per batch and then want the next one, as MLPerf Storage has it.

Each accelerator is a process with a DataLoader of its own; all of them wait for each other after each step, as an
all-reduce would have them. Computing is sleeping. The measure is that of DLIO, which the benchmark runs on: the time
spent computing from the second step on, over the time from the end of the first step to the end of the last.
"""

from __future__ import annotations

import multiprocessing
import random
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Barrier
from typing import Any

from bench.contenders import Contender

# Slower than any storage worth measuring; then an accelerator waits for one that has failed.
STEP_SECONDS = 60.0


def train(contender: Contender, keys: dict[str, str], order: dict[str, Any]) -> dict[str, Any]:
    """order: accelerators, workers of each one's loader, batch, seconds per batch, steps, seed."""
    from bench.comparisons.loading import differences

    fork = multiprocessing.get_context("fork")
    barrier = fork.Barrier(order["accelerators"])
    pipes, processes = [], []
    for rank in range(order["accelerators"]):
        ours, theirs = fork.Pipe(duplex=False)
        share = samples_of(sorted(keys), rank, order)
        processes.append(fork.Process(target=_accelerate, args=(contender, share, order, barrier, theirs)))
        processes[-1].start()
        theirs.close()
        pipes.append(ours)
    answers = [_answer(pipe) for pipe in pipes]
    for process in processes:
        process.join()
    for answer in answers:
        if "error" in answer:
            raise RuntimeError(answer["error"])
    digests = {name: digest for answer in answers for name, digest in answer["digests"]}
    wrong = differences(keys, digests)["wrong"]
    shares = [answer["utilization"] for answer in answers]
    samples = sum(answer["samples"] for answer in answers)
    return {"utilization": sum(shares) / len(shares), "samples": samples, "wrong": wrong, "missing": []}


def samples_of(names: Sequence[str], rank: int, order: dict[str, Any]) -> list[str]:
    """What one accelerator reads: its part of each epoch's order, over as many epochs as its steps need."""
    wanted, share, epoch = order["steps"] * order["batch"], list[str](), 0
    while len(share) < wanted:
        shuffled = list(names)
        random.Random(order["seed"] + epoch).shuffle(shuffled)
        share += shuffled[rank :: order["accelerators"]]
        epoch += 1
    return share[:wanted]


def _accelerate(
    contender: Contender, share: Sequence[str], order: dict[str, Any], barrier: Barrier, report: Connection
) -> None:
    try:
        report.send(_steps(contender, share, order, barrier))
    except Exception as error:  # noqa: BLE001 - whatever a contender's library raises is its result
        barrier.abort()
        report.send({"error": f"{type(error).__name__}: {error}"[-400:]})


def _steps(contender: Contender, share: Sequence[str], order: dict[str, Any], barrier: Barrier) -> dict[str, Any]:
    from bench.comparisons.loading import as_key, loader

    digests: list[tuple[str, bytes]] = []
    barrier.wait(STEP_SECONDS)
    began, first, steps = time.perf_counter(), 0.0, 0
    for batch in loader(contender, share, as_key, order["workers"], order["batch"]):
        digests += batch
        time.sleep(order["seconds"])
        first = first or time.perf_counter() - began
        steps += 1
        barrier.wait(STEP_SECONDS)
    ended = time.perf_counter()
    return {
        "utilization": utilization(order["seconds"], steps, ended - began, first),
        "samples": len(digests),
        "digests": digests,
    }


def utilization(seconds: float, steps: int, whole: float, first: float) -> float:
    """seconds: of computing per step. whole: from the start until after the last step; first: of it, the first."""
    return seconds * (steps - 1) / (whole - first)


def _answer(pipe: Connection) -> dict[str, Any]:
    try:
        answer: dict[str, Any] = pipe.recv()
    except EOFError:
        return {"error": "an accelerator's process ended"}
    return answer
