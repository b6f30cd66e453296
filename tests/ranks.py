"""A distributed job on this machine: processes with torch.distributed (gloo), each of which does the same.

They come from a fork server, so what they do is a function of a module, and what they give back is pickled.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import queue
import time
from array import array
from collections.abc import Callable, Iterator
from typing import Any

from cachefs_sidecar.testbed.ports import free_port

# A job that takes longer hangs.
PATIENCE = 200.0


class Said:
    """What a consumer announces: `items` has it by number, and what a later plan makes void is gone."""

    def __init__(self) -> None:
        from cachefs.hints.consumer import Consumer

        self.items: list[int] = []
        self._plan = Consumer.plan
        said = self

        def plan(consumer: Consumer, order: array[int], *, at: int | None = None) -> None:
            del said.items[consumer.end if at is None else at :]
            said.items += order
            said._plan(consumer, order, at=at)

        Consumer.plan = plan  # type: ignore[assignment, method-assign]

    def undo(self) -> None:
        from cachefs.hints.consumer import Consumer

        Consumer.plan = self._plan  # type: ignore[method-assign]


@contextlib.contextmanager
def job(work: Callable[..., Any], *arguments: Any, world: int = 2) -> Iterator[list[Any]]:
    """What work(*arguments) returns first, in each rank. What it returns after that lives on within the block."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch"])
    results, over = context.Queue(), context.Event()
    port = free_port()
    processes = [
        context.Process(target=_rank, args=(rank, world, port, dict(os.environ), results, over, work, arguments))
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    try:
        yield [result for _, result in sorted(_all(results, processes))]
        over.set()
        for process in processes:
            process.join(PATIENCE)
        assert [process.exitcode for process in processes] == [0] * world
    finally:
        for process in processes:
            process.kill()
            process.join()
        results.close()
        results.join_thread()


def _all(results: Any, processes: list[Any]) -> list[tuple[int, Any]]:
    got: list[tuple[int, Any]] = []
    end = time.monotonic() + PATIENCE
    while len(got) < len(processes):
        with contextlib.suppress(queue.Empty):
            got.append(results.get(timeout=0.2))
        assert time.monotonic() < end, "a rank hangs"
        assert all(process.exitcode in (None, 0) for process in processes), "a rank failed: see what it printed"
    return got


def _rank(
    rank: int, world: int, port: int, environ: dict[str, str], results: Any, over: Any, work: Any, arguments: Any
) -> None:
    os.environ.clear()  # the fork server's, which is older than the test
    os.environ.update(
        environ,
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        NODE_RANK="0",
        GROUP_RANK="0",
        WORLD_SIZE=str(world),
        LOCAL_WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        GLOO_SOCKET_IFNAME="lo",
        OMP_NUM_THREADS="1",
        ACCELERATE_USE_CPU="true",
    )
    import torch.distributed

    result, *_kept = work(*arguments)
    results.put((rank, result))
    over.wait(PATIENCE)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
