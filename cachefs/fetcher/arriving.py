"""How a catalog of another node comes here: block by block, believed in nothing, and ready only when it is right.

Each block comes with its digest, as all bytes of peers; the whole has the key that its edition names; and then every
row is read (`catalog/check`), so that what has arrived is a catalog of this dataset, whose names are those of its
snapshot. What content a name or a version stands for, the node says, as its origin would; it is a member, and believed
in that. A node that gave another is left alone, as one that gave wrong bytes. Where its inode numbers would mean
something else here, the catalog is written anew.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from cachefs import datasets
from cachefs.catalog import Catalog, check
from cachefs.catalog.builder import Cancelled
from cachefs.catalog.keys import add_keys
from cachefs.cluster.nodes import Node
from cachefs.cluster.peers.catalogs import Block, Edition, packed
from cachefs.cluster.peers.client import Peers
from cachefs.cluster.peers.wire import Item
from cachefs.datasets import DatasetRecord
from cachefs.digest import block_count, block_range, digest, key_of_blocks
from cachefs.errors import CacheError, CacheFull, CatalogError, PeerBusy, PeerWrong
from cachefs.fetcher.tally import Tally

log = logging.getLogger("cachefs.fetcher")

T = TypeVar("T")

# Blocks of 8 MiB asked for at once: the next one is under way while one is written.
AT_ONCE = 3

# A node that has too much to do is asked again, so often, with so many seconds between.
MOST_TRIES = 20
PAUSE_SECONDS = 0.25


async def bring(
    peers: Peers,
    node: Node,
    edition: Edition,
    record: DatasetRecord,
    home: Path,
    last_id: int,
    tally: Tally,
) -> int:
    """Have the catalog of this edition as `arrived`, ready to be put in place; the largest inode number it knows.

    record: of the dataset, as it is here by now. last_id: the largest number that was ever given away here.
    Raises PeerError, CacheFull, CacheError; then nothing has changed.
    """
    folder = home / "catalogs" / record.id
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    file = folder / f"{edition.snapshot}.arriving"
    _see_to_room(folder, edition.size)
    try:
        await _receive(peers, node, edition, record.id, file, tally)
        return await _in_thread(lambda pause: _accept(file, edition, record, home, last_id, pause), tally)
    except _NotRight as error:
        peers.wrong(node, str(error))
        raise PeerWrong(f"{node.name}: {error}", path=record.root) from error
    finally:
        file.unlink(missing_ok=True)


def arrived(home: Path, dataset: str, snapshot: str) -> Path:
    """A catalog that came and is right, until it is the dataset's."""
    return home / "catalogs" / dataset / f"{snapshot}.arrived"


class _NotRight(Exception):
    """What came is not what it was said to be."""


def _see_to_room(folder: Path, size: int) -> None:
    info = os.statvfs(folder)
    if size > info.f_bavail * info.f_frsize:
        raise CacheFull(f"{folder}: no room for a catalog of {size:,} bytes", path=str(folder))


# --- the bytes ---


async def _receive(peers: Peers, node: Node, edition: Edition, dataset: str, file: Path, tally: Tally) -> None:
    """Write the whole file. Raises _NotRight, PeerError, CacheError."""
    count = block_count(edition.size)
    digests = [b""] * count
    waiting = iter(range(count))
    tally.what, tally.done, tally.total, tally.bytes = "blocks of names", 0, count, 0
    try:
        fd = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise _failed(file, error) from error

    async def worker() -> None:
        for index in waiting:
            start, stop = block_range(index, edition.size)
            data = await _block(peers, node, edition, dataset, start, stop)
            digests[index] = digest(data)
            await asyncio.to_thread(_write, fd, data, start, file)
            tally.done += 1
            tally.bytes += len(data)

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(min(AT_ONCE, count)):
                group.create_task(worker())
        await asyncio.to_thread(os.fsync, fd)
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from None
    except OSError as error:
        raise _failed(file, error) from error
    finally:
        os.close(fd)
    if (digests[0] if count == 1 else key_of_blocks(digests)) != edition.key:
        raise _NotRight("gave another catalog than the one it named")


async def _block(peers: Peers, node: Node, edition: Edition, dataset: str, start: int, stop: int) -> memoryview:
    word = packed(Block(edition.snapshot, edition.key))
    item = Item(dataset, size=edition.size, offset=start, length=stop - start, word=word)
    for left in reversed(range(MOST_TRIES)):
        try:
            piece = await peers.get(node, item, fetch=True)
            break
        except PeerBusy:
            if not left:
                raise
            await asyncio.sleep(PAUSE_SECONDS)
    if len(piece.data) != stop - start:
        raise _NotRight("gave a part of a block of a catalog")
    return piece.data


def _write(fd: int, data: memoryview, start: int, file: Path) -> None:
    try:
        while data:
            count = os.pwrite(fd, data, start)
            data, start = data[count:], start + count
    except OSError as error:
        raise _failed(file, error) from error


def _failed(file: Path, error: OSError) -> CacheError:
    if isinstance(error, CacheError):
        return error
    kind = CacheFull if error.errno in (errno.ENOSPC, errno.EDQUOT) else CacheError
    return kind(f"catalog {file}: {error.strerror} while it came from another node", path=str(file))


# --- what they are ---


def _accept(
    file: Path, edition: Edition, record: DatasetRecord, home: Path, last_id: int, pause: Callable[[], None]
) -> int:
    """Check what came. In a thread. Raises _NotRight, CacheError."""
    final, anew = arrived(home, record.id, edition.snapshot), file.with_name(f"{file.name}.anew")
    try:
        catalog = Catalog.open(file)
    except CatalogError as error:
        raise _NotRight(f"gave what is no catalog ({error.message})") from error
    with catalog:
        summary = catalog.summary
        if (summary.identity, summary.root, summary.snapshot) != (record.identity, record.root, edition.snapshot):
            raise _NotRight("gave a catalog of another dataset or snapshot")
        try:
            check.verify(catalog, pause)
            if catalog.count_keys() != edition.keys:
                raise _NotRight("gave a catalog with other content keys than it named")
        except CatalogError as error:
            raise _NotRight(f"gave a catalog that is not right ({error.message})") from error
        previous = _previous(home, record)
        try:
            if check.fits(catalog, previous, last_id, pause):
                if previous is not None and previous.has_keys and not catalog.has_keys:
                    # Listed by a node that was away when the dataset was sealed. A number is one version of one file.
                    add_keys(catalog, _paused(previous.keys(), pause), anew)
                    os.replace(anew, final)
                else:
                    os.replace(file, final)
                return max(last_id, summary.last_id)
            log.info("%s: its numbers mean other things here, so it is written anew", final)
            with check.renumber(catalog, anew, previous, last_id, pause) as made:
                os.replace(anew, final)
                return made.summary.last_id
        finally:
            if previous is not None:
                previous.close()


def _paused(keys: Iterator[tuple[int, bytes]], pause: Callable[[], None]) -> Iterator[tuple[int, bytes]]:
    for count, each in enumerate(keys):
        if count % check.STEP == 0:
            pause()
        yield each


def _previous(home: Path, record: DatasetRecord) -> Catalog | None:
    file = datasets.catalog_file(home, record)
    try:
        return None if file is None else Catalog.open(file)
    except CatalogError:
        return None


async def _in_thread(work: Callable[[Callable[[], None]], T], tally: Tally) -> T:
    """What `work` returns, which is given what it must call now and then. It has ended when this ends."""
    stop = threading.Event()
    tally.what, tally.done, tally.total = "names checked", 0, 0

    def pause() -> None:
        tally.done += check.STEP
        if stop.is_set():
            raise Cancelled("nobody waits for this catalog any more")

    running = asyncio.get_running_loop().run_in_executor(None, work, pause)
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        stop.set()
        await asyncio.wait((running,))
        if not running.cancelled():
            running.exception()  # seen
        raise
