"""What the commands for work on whole datasets share: who does it, and the loop it runs in."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from cachefs.cli.output import complain

if TYPE_CHECKING:
    from cachefs.batch.engine import Engine

R = TypeVar("R")

EngineOption = Annotated[
    str,
    typer.Option("--engine", metavar="local|dask", help="Who does the work: processes of this machine, or the workers "
                 "of a Dask cluster."),
]  # fmt: skip
SchedulerOption = Annotated[
    str | None,
    typer.Option("--scheduler", envvar="CACHEFS_SCHEDULER", metavar="ADDRESS", show_default=False,
                 help="Where the Dask scheduler is: tcp://host:8786, tls://host:8786, or the file (.json) that it "
                 "has written with --scheduler-file. For tls:// set Dask's own "
                 "DASK_DISTRIBUTED__COMM__TLS__CA_FILE, __CLIENT__CERT and __CLIENT__KEY."),
]  # fmt: skip
BatchOption = Annotated[
    int, typer.Option("--batch", min=1, max=10_000, metavar="N", help="Objects per task: what is lost with a worker.")
]


def with_engine(name: str, scheduler: str | None, work: Callable[[Engine], Awaitable[R]]) -> R:
    """What `work` returns. Ctrl-C cancels it, and every process that was started for it ends before this returns."""
    import asyncio  # not for whoever only asks for help

    from cachefs.batch.engine import open_engine

    async def run() -> R:
        async with open_engine(name, scheduler if name != "local" else None) as engine:
            if not engine.workers:
                complain(f"{scheduler}: has no workers yet; waiting for the first")
            return await work(engine)

    return asyncio.run(run())
