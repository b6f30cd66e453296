"""One item of a plan that is not on the disk yet, and where all of them are looked up."""

from __future__ import annotations

from collections.abc import Hashable
from enum import Enum, auto
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cachefs.fetcher.prefetch.course import Course


class State(Enum):
    MISSING = auto()
    FLYING = auto()
    TAKEN = auto()  # a reader came first: its read brings the bytes
    HELD = auto()  # in memory until it is read
    WATCHED = auto()  # not to be fetched; whether somebody asks for it says what the plan is worth
    OVER = auto()


class Item:
    """One item that is not on the disk yet. among: its number among all such (see trust)."""

    __slots__ = ("among", "asked", "course", "key", "late", "number", "path", "size", "state", "transit", "version")

    def __init__(
        self, course: Course, number: int, among: int, key: tuple[str, str], path: str, version: str, size: int
    ) -> None:
        self.course = course
        self.number = number
        self.among = among
        self.key = key
        self.path = path
        self.version = version
        self.size = size
        self.state = State.MISSING
        self.asked = False  # a reader wants it
        self.late = False
        self.transit: Hashable = None


# Items that are not over, of all consumers, by (dataset, path): what a reader asks for is looked up here.
Board = dict[tuple[str, str], Item]
