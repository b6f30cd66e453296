"""What a worker does: one task after the other, each of which is complete in itself and may be done twice.

`python -m cachefs.batch.worker FD` is a worker of `local`: tasks come over a socket, and it ends when that does, also
in the middle of a task, so it never outlives whoever started it. In a Dask worker `perform_here` is what Dask calls.
"""

from __future__ import annotations

import asyncio
import socket
import sys
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

from cachefs.batch.frames import read_frame, write_frame
from cachefs.batch.tasks import (
    Answer,
    Failure,
    HashObjects,
    Keys,
    ListNames,
    Meet,
    Met,
    Name,
    Names,
    Parcel,
    Warmed,
    WarmObjects,
    failure,
    name_of,
    pack_answer,
    pack_error,
    to_text,
    unpack,
)
from cachefs.config import CacheConfig
from cachefs.digest import BLOCK_SIZE, block_count, block_range, content_key, digest, key_of_blocks
from cachefs.errors import CacheFSError, FetcherError, ObjectNotFound, StaleObject
from cachefs.messages import PAGE_BYTES
from cachefs.origin import Origin

# Objects read at once by one task: hides 50 ms of latency, and takes 128 MiB at the most.
AT_ONCE = 16

# Blocks of one large object at once.
BLOCKS_AT_ONCE = 4

# How long a fetcher is given to say which node it is.
MEET_SECONDS = 10.0


def perform_here(parcel: Parcel) -> bytes:
    """Do a task in this thread, which has no loop. Never raises what another process could not read."""
    return asyncio.run(perform(parcel.data))


async def perform(data: bytes) -> bytes:
    try:
        return pack_answer(await _do(data))
    except CacheFSError as error:
        return pack_error(error)
    except Exception as error:  # noqa: BLE001 - the other end says which task it was
        return pack_error(error)


async def _do(data: bytes) -> Answer:
    match unpack(data):
        case ListNames() as task:
            return await _with_origin(task.reach.open, partial(_list, task))
        case HashObjects() as task:
            return await _with_origin(task.reach.open, partial(_hash, task))
        case Meet() as task:
            return await asyncio.to_thread(_meet, task)
        case WarmObjects() as task:
            return await asyncio.to_thread(_warm, task)


async def _with_origin(open_it: Callable[[], Origin], work: Callable[[Origin], Coroutine[Any, Any, Answer]]) -> Answer:
    origin = open_it()
    try:
        return await work(origin)
    finally:
        await origin.aclose()


# --- names ---


async def _list(task: ListNames, origin: Origin) -> Names:
    names: list[Name] = []
    pages = origin.list_all(to_text(task.folder), after=to_text(task.after))
    try:
        async for page in pages:
            names += map(name_of, page)
            if len(names) >= task.most:
                return Names(names, True)
    finally:
        if (close := getattr(pages, "aclose", None)) is not None:
            await close()
    return Names(names, False)


# --- content keys ---


async def _hash(task: HashObjects, origin: Origin) -> Keys:
    keys: list[tuple[int, bytes]] = []
    failed: list[Failure] = []
    read = 0
    waiting = iter(task.objects)

    async def reader() -> None:
        nonlocal read
        for number, path, size, version in waiting:
            try:
                keys.append((number, await _key(origin, path, size, version)))
                read += size
            except CacheFSError as error:
                failed.append(failure(path, error))

    async with asyncio.TaskGroup() as group:
        for _ in range(min(AT_ONCE, len(task.objects))):
            group.create_task(reader())
    return Keys(keys, failed, read)


async def _key(origin: Origin, path: str, size: int, version: str) -> bytes:
    """Raises StaleObject where the origin has another version by now, OriginError."""
    try:
        if size <= BLOCK_SIZE:
            entry, data = await origin.get(path, version=version, limit=BLOCK_SIZE)
            if entry.version != version or data is None or len(data) != size:
                raise _replaced(path)
            return content_key(data)
        return await _key_of_large(origin, path, size, version)
    except ObjectNotFound:
        raise StaleObject(f"{path}: was deleted at the origin since it was listed", path=path) from None


async def _key_of_large(origin: Origin, path: str, size: int, version: str) -> bytes:
    digests = [b""] * block_count(size)
    waiting = iter(range(len(digests)))

    async def reader() -> None:
        for index in waiting:
            start, stop = block_range(index, size)
            digests[index] = digest(await origin.get_range(path, start, stop, version=version))

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(min(BLOCKS_AT_ONCE, len(digests))):
                group.create_task(reader())
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from None
    return key_of_blocks(digests)


def _replaced(path: str) -> StaleObject:
    return StaleObject(
        f"{path}: was replaced at the origin since it was listed; `cachefs refresh` takes the new one", path=path
    )


# --- this machine's cache ---


def _config(dirs: list[str], tenant: str = "") -> CacheConfig:
    return CacheConfig.make(dirs or None, fetcher="auto", tenant=tenant)


def _meet(task: Meet) -> Met:
    from cachefs.client import Connection

    config = _config(task.dirs)
    # Without a size, and without starting one: who only looks changes nothing.
    connection = Connection(replace(config, fetcher="require", size=None, deadline=MEET_SECONDS), None)
    try:
        cluster = connection.status().status["cluster"]
    except FetcherError:
        cluster = None  # none runs, so this machine is no node
    finally:
        connection.close()
    if cluster is None:
        return Met("", [], str(config.home))
    return Met(cluster["me"], [(node["name"], node["weight"]) for node in cluster["nodes"]], str(config.home))


def _warm(task: WarmObjects) -> Warmed:
    from cachefs.client import Connection
    from cachefs.client.session import Session

    spec = task.reach.spec()
    session = Session(spec.protocol, spec.options, spec.environ, root=task.root, tenant=task.tenant)
    connection = Connection(_config(task.dirs, task.tenant), session)
    try:
        warmed = Warmed(0, 0, [])
        for batch in _packets(task.objects):
            done = connection.warm_versions(batch)
            failed = [(path, FetcherError.__name__, reason) for path, reason in done.failed]
            failed += [("", FetcherError.__name__, "")] * (done.failed_total - len(failed))  # counted, not named
            warmed = Warmed(warmed.objects + done.count, warmed.size + done.bytes, warmed.failed + failed)
        return warmed
    finally:
        connection.close()


def _packets(objects: list[tuple[str, str, int]]) -> Iterator[list[tuple[str, str, int]]]:
    """Cut into lists that fit into one packet to the fetcher each."""
    batch: list[tuple[str, str, int]] = []
    size = 0
    for path, version, length in objects:
        count = len(path.encode()) + len(version.encode()) + 24
        if batch and size + count > PAGE_BYTES:
            yield batch
            batch, size = [], 0
        batch.append((path, version, length))
        size += count
    if batch:
        yield batch


# --- a process of its own ---


async def _serve(sock: socket.socket) -> None:
    reader, writer = await asyncio.open_connection(sock=sock)
    try:
        coming = asyncio.ensure_future(read_frame(reader))
        while (data := await coming) is not None:
            # Nothing more comes before the answer but the end, and then nobody wants the answer.
            coming = asyncio.ensure_future(read_frame(reader))
            work = asyncio.ensure_future(perform(data))
            await asyncio.wait((coming, work), return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                work.cancel()
                return
            write_frame(writer, work.result())
            await writer.drain()
    finally:
        writer.close()


def main() -> None:
    asyncio.run(_serve(socket.socket(fileno=int(sys.argv[1]))))


if __name__ == "__main__":
    main()
