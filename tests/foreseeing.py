"""A node's consumers and copies as the fetcher has them, for tests that need no fetcher.

What is real is all that decides (Course, Announced, Foresight, Clearing, Copies, Capacity); what is made up is whose
objects are, and their bytes.
"""

from __future__ import annotations

import asyncio
import os
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from cachefs.config import CacheConfig
from cachefs.digest import version_ref
from cachefs.errors import CacheFull
from cachefs.fetcher.capacity import Capacity, allocated
from cachefs.fetcher.clearing import Clearing
from cachefs.fetcher.copies import NoPlans
from cachefs.fetcher.counters import Counters
from cachefs.fetcher.index import Known
from cachefs.fetcher.prefetch.announced import Announced
from cachefs.fetcher.prefetch.course import Course
from cachefs.fetcher.prefetch.foresight import Foresight
from cachefs.fetcher.prefetch.item import Board
from cachefs.fetcher.prefetch.spot import SpotCheck
from cachefs.fetcher.prefetch.trust import MOST
from cachefs.messages import Announce, Plan
from cachefs.plans import INDICES, PAGE, POSITION, shared_memory, write_names, write_order, write_word
from cachefs.store import Reader

DATASET = "d5" * 16
SNAPSHOT = "5" * 32
SIZE = 1 << 20


class Consumers:
    """What one node's fetcher knows of its consumers."""

    def __init__(self, folder: Path) -> None:
        self.courses: list[Course] = []
        self.board: Board = {}
        self.foresight = Foresight(self.courses, self.board)
        self._folder = folder

    def announce(
        self, names: Sequence[str], *, believed: bool = True, prefix: str = "", dataset: str = DATASET, **fields: Any
    ) -> Course:
        attachment: Any = SimpleNamespace(
            dataset=dataset,
            identity="s3 http://origin",
            snapshot=SNAPSHOT,
            catalog=lambda home: None,
            record=SimpleNamespace(covers=lambda path: True, root=""),
        )
        page = shared_memory()
        os.ftruncate(page, PAGE)
        write_names(page, PAGE, names)
        request = Announce(id=0, attachment=0, names=len(names), prefix=prefix, **fields)
        announced = Announced(attachment, self._folder, request, page)
        reader, storage = Reader((self._folder,)), SpotCheck(1024, 16)
        course = Course(announced, request, os.getpid(), reader, self.board, storage)
        if believed:
            course.trust.credit = MOST
        self.courses.append(course)
        return course

    def plan(self, course: Course, order: Sequence[int], at: int | None = None) -> None:
        fd = shared_memory()
        write_order(fd, array("I", order))
        at = course.announced.end if at is None else at
        course.plan(Plan(id=0, consumer=0, at=at, count=len(order), kind=INDICES), fd)

    def at(self, course: Course, position: int, now: float) -> None:
        """It has handed out so many items."""
        write_word(course.announced._page, POSITION, position)
        course.look(now)

    async def look_through(self) -> None:
        """Until all plans are turned round that are going to be."""
        self.foresight.used_again(DATASET, "")
        while self.foresight._making is not None:
            await asyncio.wait((self.foresight._making,))

    async def close(self) -> None:
        await self.foresight.close()
        for course in self.courses:
            course.close()


class Node:
    """A cache of a node in a cluster: what it holds, and its room. counts: whether a path counts on it."""

    def __init__(self, folder: Path, size: int, counts: Callable[[str], bool]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.held: dict[str, int] = {}  # refs of one file each, by version
        self.consumers = Consumers(folder)
        config = CacheConfig.make(folder, size=size, min_free=0)
        room: Any = SimpleNamespace(
            config=config,
            scanned=asyncio.Event(),
            capacity=Capacity(config.size, config.min_free),
            store=SimpleNamespace(
                datasets=lambda: [DATASET],
                refs=lambda dataset: iter(()),
                unlink_ref=self._unlink,
                has=lambda key: False,
                has_part=lambda name: False,
                parts_of=lambda dataset: iter(()),
                discard_part=lambda name: 0,
            ),
            attachments=SimpleNamespace(in_use=lambda dataset: True),
            source=SimpleNamespace(counts_on_us=lambda identity, path, version: counts(path), owners=None),
            origin=None,
            index=SimpleNamespace(flush=lambda: None, records=lambda: iter(())),
            counters=Counters(),
            reader=Reader((folder,)),
            plans=NoPlans(),
        )
        room.scanned.set()
        self.room: Any = room
        self.clearing = Clearing(cast(Any, room))
        self._counts = counts

    def _unlink(self, dataset: str, ref: str) -> int:
        return self.held.pop(ref, 0)

    def has(self, path: str) -> bool:
        return version_ref(path, "v") in self.held

    async def keep(self, path: str, size: int = SIZE) -> bool:
        """As the fetcher stores what it fetched; False where it streams through."""
        copy = not self._counts(path)
        try:
            reserved = await self.clearing.reserve(size, DATASET, None, copy=copy, path=path)
        except CacheFull:
            return False
        self.held[version_ref(path, "v")] = allocated(size)
        self.room.capacity.commit(reserved)
        if copy:
            attachment: Any = SimpleNamespace(record=SimpleNamespace(id=DATASET, identity="s3"), snapshot=SNAPSHOT)
            self.clearing.came(attachment, Known(b"k", size, 0, "v", path, DATASET))
        return True

    def evict(self, path: str) -> None:
        """It is gone, for a reason of its own."""
        self.room.capacity.free(self.held.pop(version_ref(path, "v")))

    async def close(self) -> None:
        await self.clearing.close()
        await self.consumers.close()
