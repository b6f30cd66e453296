"""Blocks of a large object of another node: what is a copy here, and what this node was asked to keep."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, cast

import pytest

from cachefs.config import CacheConfig
from cachefs.datasets import DatasetRecord
from cachefs.digest import BLOCK_SIZE
from cachefs.fetcher.attachments import Attachment, part_name
from cachefs.fetcher.blocks import Blocks
from cachefs.fetcher.index import Index
from cachefs.fetcher.objects import Objects
from cachefs.fetcher.room import Room
from cachefs.messages import Entry
from cachefs.store import Store

ENTRY = Entry("bucket/shard", 3 * BLOCK_SIZE, 0, "v")


class Elsewhere:
    """A source whose objects count on another node, until this one is asked to keep some of one.

    come: set when a block may come. asked: set when one was asked for.
    """

    owners = None

    def __init__(self) -> None:
        self.guest = False
        self.come, self.asked = asyncio.Event(), asyncio.Event()

    def counts_on_us(self, identity: str, path: str, version: str, block: int | None = None) -> bool:
        return block is None and self.guest

    async def block(self, attachment: Any, entry: Entry, start: int, stop: int, urgency: Any, **how: Any) -> bytes:
        self.asked.set()
        await self.come.wait()
        return bytes(stop - start)


class Node:
    def __init__(self, folder: Path) -> None:
        config = CacheConfig.make(folder, min_free=0)
        self.room = Room(config, Store.open(config), Index(config.home / "index"))
        self.room.scanned.set()
        self.source = Elsewhere()
        self.room.source = cast(Any, self.source)
        origin = Elsewhere()
        origin.come.set()
        self.room.origin = cast(Any, origin)
        self.blocks = Blocks(Objects(self.room))
        record = DatasetRecord("s3 http://origin", "bucket", url="s3://bucket")
        self.attachment = Attachment(cast(Any, None), record, "5" * 32)
        self.name = part_name(self.attachment.domain, ENTRY.path, ENTRY.version)

    async def read(self, block: int) -> None:
        subject = self.blocks.subject(self.attachment, self.name, ENTRY)
        await self.blocks.fetch(self.attachment, subject, self.name, range(block, block + 1), 0)

    async def keep(self, block: int) -> None:
        """For the owner, as the service does: it counts on this node from before it is there."""
        self.source.guest = True
        await self.blocks.take_in(self.attachment, ENTRY, self.name, block, 0)

    def held(self) -> list[int]:
        part = self.blocks.subject(self.attachment, self.name, ENTRY).part
        assert part is not None
        return [block for block in range(3) if part.present(block)]


@pytest.fixture
async def node(tmp_path: Path) -> AsyncIterator[Node]:
    made = Node(tmp_path / "cache")
    yield made
    await made.blocks.close()
    made.room.index.close()


async def test_copies_that_were_there_go_when_a_block_is_to_be_kept(node: Node):
    node.source.come.set()
    await node.read(0)
    assert node.held() == [0]
    await node.keep(1)
    assert node.held() == [1]


async def test_a_copy_that_comes_after_a_block_was_kept_is_not_stored(node: Node):
    """It would stay with that, for as long as the owner has no room: nothing lets go of single blocks."""
    reading = asyncio.create_task(node.read(0))
    await node.source.asked.wait()
    await node.keep(1)
    node.source.come.set()
    await reading
    assert node.held() == [1]


@pytest.mark.parametrize("turns", range(12))
async def test_nor_is_one_that_comes_while_it_is_taken_in(node: Node, turns: int):
    """Wherever the one is when the other comes by."""
    reading = asyncio.create_task(node.read(0))
    await node.source.asked.wait()
    node.source.come.set()
    for _ in range(turns):
        await asyncio.sleep(0)
    await node.keep(1)
    await reading
    assert node.held() == [1]
