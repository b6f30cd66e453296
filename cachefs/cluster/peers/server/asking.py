"""What is not stored here, through this node's fetcher: it joins the flight of whoever fetches it, or starts one.

Which datasets peers may have fetched is settled by whoever starts the server, by the sessions it is given: a peer names
a dataset by its id and cannot name an origin. Credentials are not needed where the fetcher has them from a reader.
"""

from __future__ import annotations

import asyncio
import logging
import os

from cachefs.client.aio import AsyncConnection
from cachefs.client.session import Session
from cachefs.cluster.peers.server.blobs import Blobs, Piece
from cachefs.cluster.peers.wire import Item, Status
from cachefs.config import CacheConfig
from cachefs.digest import BLOCK_SIZE
from cachefs.errors import CacheError, CacheFSError, CacheFull

log = logging.getLogger("cachefs.peers")


class Asking:
    """Connections to the fetcher, one for each dataset."""

    def __init__(self, config: CacheConfig, sessions: list[Session], blobs: Blobs) -> None:
        self._blobs = blobs
        self._connections = [AsyncConnection(config, session) for session in sessions]
        self._by_dataset: dict[str, AsyncConnection] = {}
        self._attaching = asyncio.Lock()

    async def knows(self, dataset: str) -> bool:
        """Whether objects of this dataset can be fetched here."""
        async with self._attaching:
            for connection in self._connections:
                if connection not in self._by_dataset.values():
                    try:
                        self._by_dataset[(await connection.attach()).dataset] = connection
                    except CacheFSError as error:
                        log.warning("peers get nothing fetched of %r: %s", connection.session, error)
        return dataset in self._by_dataset

    async def connection(self, dataset: str) -> AsyncConnection | None:
        """To the fetcher, for this dataset; None when it is not one of those that are shared."""
        return self._by_dataset[dataset] if await self.knows(dataset) else None

    async def piece(
        self, index: int, item: Item, *, damaged: bool = False, ahead: bool = False, keep: bool = False
    ) -> Piece:
        """What `item` asks for, fetched if need be. Raises CacheFSError, OSError.

        As much of it as can be read now: of a large object that is still coming in, the part that is here.
        ahead: nobody waits for it. keep: its owner has no room for it.
        """
        if item.length < 0 and item.size > BLOCK_SIZE:
            return Piece(index, -1, 0, 0, 0, item.size, large=True)
        # Of unknown size: a block of it, so that a large object is not fetched whole to learn that it is large.
        offset, length = (0, BLOCK_SIZE) if item.length < 0 else (item.offset, item.length)
        connection = self._by_dataset[item.dataset]
        located = await connection.need(
            item.path,
            version=item.version,
            size=item.size,
            offset=offset,
            length=length,
            damaged=damaged,
            ahead=ahead,
            keep=keep,
        )
        version = "" if item.version else located.version
        if item.length < 0 and located.size > BLOCK_SIZE:
            return Piece(index, located.fd, 0, 0, 0, located.size, version=version, large=True)
        if located.complete:
            piece = self._blobs.cut(index, item, located.fd, located.size)
            piece.version = version
            return piece
        if located.start > offset:
            os.close(located.fd)
            raise CacheError(f"{item.path}: the fetcher answered with another part than it was asked for")
        offset = min(offset, located.size)
        stop = max(offset, min(located.stop, offset + length))
        return Piece(index, located.fd, offset - located.base, stop - offset, offset, located.size, version=version)

    async def kept(self, index: int, item: Item, *, ahead: bool) -> Piece | Status:
        """A block for the owner of its object, kept for that from now on; REFUSED where there is no room for it. Raises
        CacheFSError, OSError."""
        one_block = item.offset // BLOCK_SIZE == (item.offset + item.length - 1) // BLOCK_SIZE
        if (
            not item.version
            or item.size <= BLOCK_SIZE
            or not one_block
            or not 0 < item.length <= item.size - item.offset
        ):
            return Status.MISSING
        try:
            return await self.piece(index, item, ahead=ahead, keep=True)
        except CacheFull:
            return Status.REFUSED

    async def keep(self, item: Item) -> Status:
        """Have the fetcher keep it for its owner: KEPT, REFUSED (there is no room), or MISSING (it cannot be)."""
        if item.key or not item.version or not 0 <= item.size <= BLOCK_SIZE or not await self.knows(item.dataset):
            return Status.MISSING
        try:
            kept = await self._by_dataset[item.dataset].lodge(item.path, item.version, item.size)
        except CacheFull:
            return Status.REFUSED
        except (CacheFSError, OSError) as error:
            log.info("%s: could not be kept for another node: %s", item.path, error)
            return Status.MISSING
        return Status.KEPT if kept else Status.MISSING

    async def close(self) -> None:
        for connection in self._connections:
            await connection.close()
