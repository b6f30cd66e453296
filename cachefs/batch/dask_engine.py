"""Tasks done by the workers of a Dask cluster (distributed), wherever these run.

A worker that dies is Dask's affair: the scheduler gives its task to another one, until it has taken three with it. What
is Dask's own (who may connect, TLS) is configured as Dask is: DASK_DISTRIBUTED__COMM__TLS__CA_FILE and so on.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import uuid
from pathlib import Path
from types import TracebackType
from typing import Any

from cachefs.batch.tasks import Answer, Parcel, lost, unpack_answer
from cachefs.batch.worker import perform_here
from cachefs.errors import ConfigError

# A scheduler that is there answers within a second.
CONNECT_SECONDS = 5.0

# How soon workers that join are given work.
LOOK_SECONDS = 2.0

# Tasks handed out per thread of a worker: one is done while the next waits there.
PER_THREAD = 2

# The scheduler and this loop take some ms for each task under way, whatever the cluster's size.
MOST_SLOTS = 1024


def require_dask() -> Any:
    """The package distributed. Raises ConfigError."""
    try:
        import distributed
    except ImportError:
        raise ConfigError(
            "--engine dask: the package distributed is missing here: pip install 'cachefs-sidecar[dask]'"
        ) from None
    return distributed


def address_of(scheduler: str) -> str:
    """The address itself, or that in the file which a scheduler has written (--scheduler-file). Raises ConfigError."""
    if not scheduler.endswith(".json"):
        return scheduler
    try:
        address = json.loads(Path(scheduler).read_bytes())["address"]
    except OSError as error:
        raise ConfigError(f"--scheduler {scheduler}: cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError):
        raise ConfigError(f"--scheduler {scheduler}: is not what a Dask scheduler writes") from None
    return str(address)


class DaskEngine:
    def __init__(self, scheduler: str) -> None:
        self._distributed: Any = require_dask()
        self._address = address_of(scheduler)
        self._client: Any = None
        self._run = uuid.uuid4().hex[:8]
        self._numbers = itertools.count()
        self._workers: dict[str, Any] = {}
        self._following: asyncio.Task[None] | None = None

    async def __aenter__(self) -> DaskEngine:
        try:
            self._client = self._distributed.Client(
                self._address, asynchronous=True, timeout=CONNECT_SECONDS, set_as_default=False, name="cachefs"
            )
            await self._client
            await self._look()
        except (OSError, ValueError, TypeError, RuntimeError, ImportError) as error:
            # TimeoutError is an OSError. Dask's own configuration of TLS is among what may be wrong.
            if self._client is not None:
                await self._client.close()
            reason = str(error) or type(error).__name__
            raise ConfigError(f"--scheduler {self._address}: no Dask scheduler can be used there ({reason})") from None
        self._following = asyncio.create_task(self._follow())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._following is not None:
            self._following.cancel()
            await asyncio.gather(self._following, return_exceptions=True)
        await self._client.close()

    async def _follow(self) -> None:
        """Workers come and go."""
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            try:
                await self._look()
            except OSError:
                continue  # tasks find out for themselves whether the scheduler is gone

    async def _look(self) -> None:
        async with asyncio.timeout(CONNECT_SECONDS):
            identity = await self._client.scheduler.identity(n_workers=-1)
        self._workers = identity["workers"]

    @property
    def slots(self) -> int:
        threads: int = sum(worker["nthreads"] for worker in self._workers.values())
        return max(1, min(MOST_SLOTS, PER_THREAD * threads))

    @property
    def workers(self) -> int:
        return len(self._workers)

    def hosts(self) -> frozenset[str]:
        """The machines that workers run on, as Dask names them."""
        return frozenset(worker["host"] for worker in self._workers.values())

    async def run(self, parcel: Parcel, workers: tuple[str, ...] = ()) -> Answer:
        # The key is what a dashboard groups by: all before the last number.
        name = parcel.label.partition(" ")[0]
        key = f"cachefs-{name}-{self._run}-{next(self._numbers)}"
        future = self._client.submit(perform_here, parcel, key=key, pure=False, workers=list(workers) or None)
        try:
            data = await future
        except asyncio.CancelledError:
            await future.cancel()
            raise
        except self._distributed.scheduler.KilledWorker as error:
            raise lost(parcel, f"the workers that had it died ({error.last_worker.address} was the last)") from None
        except ImportError as error:
            raise ConfigError(f"a worker cannot load cachefs ({error}): install the same there as here") from None
        except Exception as error:  # noqa: BLE001 - what Dask itself met, among it that the scheduler is gone
            if self._client.status != "running":
                raise ConfigError(f"--scheduler {self._address}: the scheduler is gone") from None
            raise lost(parcel, f"{type(error).__name__}: {error}") from None
        finally:
            future.release()
        return unpack_answer(data)
