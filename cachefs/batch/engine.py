"""Who does the tasks: processes of this machine, or the workers of a Dask cluster."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterable, Iterator
from contextlib import AbstractAsyncContextManager
from typing import Protocol, TypeVar

from cachefs.batch.tasks import Answer, Parcel
from cachefs.errors import CacheFSError, ConfigError

Of = TypeVar("Of")

ENGINES = ("local", "dask")


class Engine(Protocol):
    """slots: how many tasks may be handed out at once, as things are now. workers: how many there are now."""

    @property
    def slots(self) -> int: ...

    @property
    def workers(self) -> int: ...

    async def run(self, parcel: Parcel, workers: tuple[str, ...] = ()) -> Answer:
        """The answer; from one of these workers (addresses, or machines) where some are named.

        A task whose worker dies is given to another. Raises what the worker met, and FetcherError for a task whose
        workers died again and again.
        """
        ...


def check(name: str, scheduler: str | None) -> None:
    """Raises ConfigError for an engine that there is none of, and for one without what it needs."""
    if name not in ENGINES:
        raise ConfigError(f"--engine {name}: there are {' and '.join(ENGINES)}")
    if name == "dask" and not scheduler:
        raise ConfigError("--engine dask: say where its scheduler is, as in --scheduler tcp://host:8786")
    if name == "dask":
        from cachefs.batch.dask_engine import require_dask

        require_dask()


def open_engine(name: str, scheduler: str | None = None) -> AbstractAsyncContextManager[Engine]:
    """Raises ConfigError, as `check` does; and entering it does when the scheduler does not answer."""
    check(name, scheduler)
    if name == "local":
        from cachefs.batch.local import LocalEngine

        return LocalEngine()
    from cachefs.batch.dask_engine import DaskEngine

    assert scheduler is not None
    return DaskEngine(scheduler)


async def each(
    engine: Engine, parcels: Iterable[tuple[Of, Parcel]], workers: tuple[str, ...] = ()
) -> AsyncGenerator[tuple[Of, Answer | CacheFSError], None]:
    """(what it is of, answer or why there is none) of each, as they come. No more are made than are under way."""
    waiting: Iterator[tuple[Of, Parcel]] = iter(parcels)
    running: dict[asyncio.Task[Answer], Of] = {}
    try:
        more = True
        while more or running:
            while more and len(running) < engine.slots:
                following = next(waiting, None)
                more = following is not None
                if following is not None:
                    task = asyncio.create_task(engine.run(following[1], workers))
                    running[task] = following[0]
            if not running:
                break
            done, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                of = running.pop(task)
                try:
                    yield of, task.result()
                except ConfigError:
                    raise  # it would be the same for all others
                except CacheFSError as error:
                    yield of, error
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
