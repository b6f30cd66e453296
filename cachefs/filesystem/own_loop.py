"""Coroutines called from code that blocks, without a loop that others own.

fsspec's loop is in another thread and does not survive a fork, so each such call has a loop of its own, in the
calling thread. It costs a millisecond, against the many objects that such a call brings.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


def run(work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`. May be called from a coroutine, as notebooks do, whose loop then waits."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return _run_here(work)
    return _run_in_thread(work)


def _run_here(work: Coroutine[Any, Any, T]) -> T:
    # Not asyncio.run: it would take away the loop that the calling thread may have set for itself.
    with asyncio.Runner(loop_factory=asyncio.new_event_loop) as runner:
        return runner.run(work)


def _run_in_thread(work: Coroutine[Any, Any, T]) -> T:
    outcome: list[T] = []
    failure: list[BaseException] = []

    def call() -> None:
        try:
            outcome.append(_run_here(work))
        except BaseException as error:  # noqa: BLE001 - raised again in the calling thread
            failure.append(error)

    thread = threading.Thread(target=call, name="cachefs-call")
    thread.start()
    thread.join()
    if failure:
        raise failure[0]
    return outcome[0]
