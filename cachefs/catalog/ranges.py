"""One flat listing made by several at once: each lists the names of one range.

A store that lists in the order of its keys, 1,000 at a time and one request after the other, can be told where to
begin. So whoever has a long way to go gives the second half of it to somebody who has nothing to do. Where the middle
is nobody knows: it is guessed by the letters of the last name seen and of the end, and where the half turns out empty
that end has come down for the next guess. Guesses cost one request each, so there may be no more of them than a share
of those that found something.

That there is an order is what S3 promises, and not every server keeps. Where one is seen to give names in another, one
lists all, and from the start if others had begun: a range might lack some.
"""

from __future__ import annotations

import asyncio
import string
from bisect import bisect_left, bisect_right
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Protocol

from cachefs.catalog.format import prefix_of

if TYPE_CHECKING:
    from cachefs.messages import Entry

# Pages after which a listing is long: most directories have ended by then.
LONG = 4

# Guesses that find nothing: at first so many (six find a letter of a name), then one to so many pages.
FREE_GUESSES, PAGES_PER_GUESS = 64, 4

# What guesses end with, in the order of keys. No other letters: some clients change these, or take them for paths.
_LETTERS = "".join(sorted(f"-_{string.digits}{string.ascii_letters}"))

# After all keys of ASCII letters.
_LAST = "\x7f"

Take = Callable[[list["Entry"]], Awaitable[None]]


class Ordered(Protocol):
    """What of an origin (cachefs/origin/contract.py) it needs."""

    def list_all(self, path: str, *, after: str = "") -> AsyncIterator[list[Entry]]: ...

    def in_key_order(self, path: str) -> bool: ...


class _Disorder(Exception):
    """Names came in another order than that of their bytes, and ranges had begun."""


@dataclass
class _Range:
    """Names greater than `last` (seen so far, or where it begins), up to `until`; "" = to the end."""

    last: str
    until: str = ""
    pages: int = 0


class RangedListing:
    """Everything below one directory. idle: how many may list beside those who do; shared by all listings."""

    def __init__(self, origin: Ordered, folder: str, idle: asyncio.Semaphore, take: Take) -> None:
        self._origin = origin
        self._folder = folder
        self._idle = idle
        self._take = take
        self._ordered: bool | None = None  # None: nobody has asked yet
        self._split_once = False
        self._guesses = FREE_GUESSES
        self._pages = 0

    async def run(self) -> None:
        """Raises what the origin raises. The first failure ends all. Names may come twice."""
        try:
            await self._all()
        except _Disorder:
            self._ordered = False
            await self._all()

    async def _all(self) -> None:
        try:
            async with asyncio.TaskGroup() as group:
                await self._list(_Range(""), group)
        except BaseExceptionGroup as failures:
            raise failures.exceptions[0] from None

    async def _list(self, part: _Range, group: asyncio.TaskGroup) -> None:
        begin = part.last
        async with closing(self._origin.list_all(self._folder, after=begin)) as pages:
            async for page in pages:
                self._look(page, part.last)
                # The end may have come nearer while this page was on its way.
                until, last = part.until, max((entry.path for entry in page), default=part.last)
                if until or begin:
                    page = [each for each in page if each.path > begin and (not until or each.path <= until)]
                await self._take(page)
                if page:
                    part.pages += 1
                    self._pages += 1
                    self._guesses += self._pages % PAGES_PER_GUESS == 0
                if until and last >= until:
                    return
                part.last = last
                await self._split(part, group)

    def _look(self, page: list[Entry], last: str) -> None:
        """Raises _Disorder when it is too late to list without ranges."""
        names = [last, *(entry.path for entry in page)]
        if self._ordered is not False and any(a > b for a, b in pairwise(names)):
            if self._split_once:
                raise _Disorder
            self._ordered = False

    async def _split(self, part: _Range, group: asyncio.TaskGroup) -> None:
        """Give what can be given to those who have nothing to do."""
        while part.pages >= LONG and self._guesses > 0 and not self._idle.locked():
            if self._ordered is None:
                self._ordered = self._origin.in_key_order(self._folder)
            prefix = prefix_of(self._folder)
            middle = between(part.last, part.until or prefix + _LAST) if self._ordered else ""
            if not middle:
                return
            half = _Range(middle, part.until)
            part.until = middle
            self._split_once = True
            self._guesses -= 1
            await self._idle.acquire()  # there is one, so this does not wait
            group.create_task(self._half(half, group)).add_done_callback(lambda _: self._idle.release())

    async def _half(self, part: _Range, group: asyncio.TaskGroup) -> None:
        await self._list(part, group)
        self._guesses += part.pages > 0  # it was none in vain


def between(low: str, high: str) -> str:
    """Some text greater than `low` and less than `high`, by its first letters about in the middle; "" = found none.

    In the order of code points, which is that of UTF-8's bytes.
    """
    if low >= high:
        return ""
    same = next(at for at in range(len(high)) if low[at : at + 1] != high[at])
    if middle := _letter(low[same : same + 1], high[same]):
        return low[:same] + middle
    for at in range(same + 1, len(low) + 1):
        if middle := _letter(low[at : at + 1], _LAST):
            return low[:at] + middle
    return ""


def _letter(low: str, high: str) -> str:
    """The middle one of the letters between these two. "" is before all of them."""
    first, stop = bisect_right(_LETTERS, low) if low else 0, bisect_left(_LETTERS, high)
    return _LETTERS[(first + stop) // 2] if first < stop else ""


@asynccontextmanager
async def closing(pages: AsyncIterator[list[Entry]]) -> AsyncIterator[AsyncIterator[list[Entry]]]:
    """`pages`, and their request ended when we leave early (an async generator would wait for the collector)."""
    try:
        yield pages
    finally:
        if isinstance(pages, AsyncGenerator):
            await pages.aclose()
