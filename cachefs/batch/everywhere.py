"""The caches of all nodes warmed: each machine of a Dask cluster fetches its share of a dataset into its own cache.

The share is what the machine owns: in the cachefs cluster that its fetcher is a node of, where all of them are nodes
of one, else by the same hashing over the machines themselves. An object whose machine is gone goes to who would own it
then. The catalog that is read is that of the node with the command; tasks say versions, so the others need none.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

from cachefs.batch.engine import Engine
from cachefs.batch.reach import Reach
from cachefs.batch.tasks import BYTES, OBJECTS, Failure, Meet, Met, Warmed, WarmObjects, failure, pack
from cachefs.cluster.nodes import Node
from cachefs.cluster.placement import Placement, object_key
from cachefs.errors import CacheFSError, ConfigError, FetcherError

# Tasks that one machine works on: its fetcher has lanes of its own, and the second task fills what the first leaves.
PER_HOST = 2

# Tasks that wait for one machine: their names are in memory here.
WAITING = 16

# A machine whose workers are gone for so long does not come back: a worker that is restarted takes a few seconds.
GONE_SECONDS = 10.0

LOOK_SECONDS = 0.5

# A worker that is free answers at once; one that is not may be in the middle of a task.
MEET_SECONDS = 60.0

# Failures that are named; the rest are counted.
NAMED = 1000

Object = tuple[str, str, int]


class Machines(Engine, Protocol):
    """An engine whose workers are on several machines."""

    def hosts(self) -> frozenset[str]: ...


@dataclass
class Host:
    """host: as Dask calls it. node: in a cluster of cachefs, "" = in none. gone: why it is given nothing any more."""

    host: str
    node: str = ""
    cache: str = ""
    objects: int = 0
    size: int = 0
    gone: str = ""


@dataclass
class Everywhere:
    hosts: list[Host]
    total: int = 0
    failures: int = 0
    failed: list[Failure] = field(default_factory=list)

    @property
    def objects(self) -> int:
        return sum(host.objects for host in self.hosts)

    @property
    def size(self) -> int:
        return sum(host.size for host in self.hosts)

    def fail(self, failed: Failure) -> None:
        self.failures += 1
        if failed[0] and len(self.failed) < NAMED:
            self.failed.append(failed)


@dataclass(frozen=True)
class Share:
    """What is warmed, and where: root and tenant of the dataset, dirs of each machine's cache (none: its default)."""

    reach: Reach
    root: str
    dirs: list[str]
    tenant: str

    def task(self, objects: list[Object]) -> WarmObjects:
        return WarmObjects(self.reach, self.root, self.dirs, self.tenant, objects)


async def warm_everywhere(
    machines: Machines,
    share: Share,
    objects: Iterable[Object],
    total: int,
    progress: Callable[[Everywhere], None] = lambda _: None,
) -> Everywhere:
    """Each of `objects`, (path, version, size), into one cache. Raises ConfigError."""
    hosts, placement = await _meet(machines, share.dirs)
    done = Everywhere(hosts, total)
    work = _Work(machines, share, hosts, placement, done, progress)
    await work.run(objects)
    return done


async def _meet(machines: Machines, dirs: list[str]) -> tuple[list[Host], Placement]:
    """Who is there, and who owns what among them. Raises what a machine met, for then it can warm nothing."""
    while not (names := sorted(machines.hosts())):  # noqa: ASYNC110 - who is there is what was seen last
        await asyncio.sleep(LOOK_SECONDS)
    try:
        async with asyncio.TaskGroup() as group:
            asked = [group.create_task(_meet_one(machines, name, dirs)) for name in names]
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from None
    hosts: list[Host] = []
    views: list[dict[str, int]] = []
    for name, task in zip(names, asked, strict=True):
        met = task.result()
        hosts.append(Host(name, met.name, met.cache))
        views.append(dict(met.nodes))
    known = {host.node for host in hosts}
    if "" not in known and len(known) == len(hosts) and all(known <= view.keys() for view in views):
        return hosts, Placement(Node(name, "", 0, weight) for name, weight in views[0].items())
    if known != {""}:
        for host in hosts:
            host.node = ""  # of different clusters, or some of none: then their owners are no one's
    return hosts, Placement(Node(host.host, "", 0) for host in hosts)


async def _meet_one(machines: Machines, name: str, dirs: list[str]) -> Met:
    try:
        async with asyncio.timeout(MEET_SECONDS):
            met = await machines.run(pack(f"meet {name}", Meet(dirs)), (name,))
    except TimeoutError:
        raise FetcherError(f"{name}: its workers take no task; are they busy, or gone?") from None
    except CacheFSError as error:
        raise type(error)(f"{name}: {error.message}", path=error.path) from None
    assert isinstance(met, Met)
    return met


class _Work:
    """One run: a queue of batches for each host, filled in the order of the catalog."""

    def __init__(
        self,
        machines: Machines,
        share: Share,
        hosts: list[Host],
        placement: Placement,
        done: Everywhere,
        progress: Callable[[Everywhere], None],
    ) -> None:
        self._machines = machines
        self._share = share
        self._hosts = {host.node or host.host: host for host in hosts}
        self._placement = placement
        self._done = done
        self._progress = progress
        self._queues: dict[str, asyncio.Queue[list[Object]]] = {name: asyncio.Queue() for name in self._hosts}
        self._left: dict[str, asyncio.Event] = {name: asyncio.Event() for name in self._hosts}
        self._moved = asyncio.Event()  # something was taken from a queue, or settled, or a host is gone
        self._open = 0  # objects handed out and not settled
        self._number = 0

    async def run(self, objects: Iterable[Object]) -> None:
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._watch())]
                tasks += [group.create_task(self._serve(name)) for name in self._hosts for _ in range(PER_HOST)]
                for name, batch in _batches((self._whose(item), item) for item in objects):
                    await self._until_there_is_room(name)
                    self._open += len(batch)
                    self._put(name, batch)
                while self._open:
                    await self._until_moved()
                for task in tasks:
                    task.cancel()
        except BaseExceptionGroup as failures:
            raise failures.exceptions[0] from None

    async def _until_there_is_room(self, name: str) -> None:
        await asyncio.sleep(0)  # names are found without waiting for anything
        while name and self._queues[name].qsize() >= WAITING and not self._left[name].is_set():
            await self._until_moved()

    async def _until_moved(self) -> None:
        self._moved.clear()
        await self._moved.wait()

    # --- which goes where ---

    def _put(self, name: str, batch: list[Object]) -> None:
        if name:
            self._queues[name].put_nowait(batch)
        else:
            self._fail(batch, FetcherError("no machine is left that could warm it"))

    def _whose(self, item: Object) -> str:
        """The name of the host that is to have it; "" = there is none."""
        path, version, _ = item
        key = object_key(self._share.reach.identity, path, version)
        owner = self._placement.owner(key).name
        if owner in self._hosts and not self._left[owner].is_set():
            return owner
        for node in self._placement.ranking(key, len(self._placement.nodes)):
            if node.name in self._hosts and not self._left[node.name].is_set():
                return node.name
        return ""

    # --- a host's work ---

    async def _serve(self, name: str) -> None:
        queue, host, left = self._queues[name], self._hosts[name], self._left[name]
        while True:
            batch = await queue.get()
            self._moved.set()
            if left.is_set() or not await self._warm(host, left, batch):
                # Not where there is room: whoever makes room must not wait for some.
                for other, part in _batches((self._whose(item), item) for item in batch):
                    self._put(other, part)

    async def _warm(self, host: Host, left: asyncio.Event, batch: list[Object]) -> bool:
        """False: the host is gone."""
        label = f"warm objects {self._number + 1} to {self._number + len(batch)} on {host.host}"
        self._number += len(batch)
        running = asyncio.create_task(self._machines.run(pack(label, self._share.task(batch)), (host.host,)))
        leaving = asyncio.create_task(left.wait())
        try:
            await asyncio.wait((running, leaving), return_when=asyncio.FIRST_COMPLETED)
            if not running.done():
                return False
            answer = running.result()
        except ConfigError:
            raise  # it would be the same for all others
        except CacheFSError as error:
            self._fail(batch, error)
            return True
        finally:
            for task in (running, leaving):
                task.cancel()
            await asyncio.gather(running, leaving, return_exceptions=True)
        assert isinstance(answer, Warmed)
        host.objects += answer.objects - len(answer.failed)
        host.size += answer.size
        for failed in answer.failed:
            self._done.fail(failed)
        self._settle(len(batch))
        return True

    def _fail(self, batch: list[Object], error: CacheFSError) -> None:
        for path, _, _ in batch:
            self._done.fail(failure(path, error))
        self._settle(len(batch))

    def _settle(self, count: int) -> None:
        self._open -= count
        self._moved.set()
        self._progress(self._done)

    async def _watch(self) -> None:
        """Hosts whose workers have been gone for a while are given up."""
        missing: dict[str, float] = {}
        now = asyncio.get_running_loop().time
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            there = self._machines.hosts()
            for name, host in self._hosts.items():
                if host.host in there or self._left[name].is_set():
                    missing.pop(name, None)
                elif now() - missing.setdefault(name, now()) >= GONE_SECONDS:
                    host.gone = "its workers are gone; what was left of its share went to others"
                    self._left[name].set()
                    self._moved.set()


def _batches(items: Iterable[tuple[str, Object]]) -> Iterator[tuple[str, list[Object]]]:
    """About a thousand objects each, of one host."""
    batches: dict[str, list[Object]] = {}
    sizes: dict[str, int] = {}
    for name, item in items:
        batch = batches.setdefault(name, [])
        batch.append(item)
        sizes[name] = sizes.get(name, 0) + item[2]
        if len(batch) >= OBJECTS or sizes[name] >= BYTES:
            yield name, batches.pop(name)
            del sizes[name]
    yield from batches.items()
