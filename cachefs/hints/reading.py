"""Hints for whatever reads a list of files in order: shards of WebDataset, file lists of tf.data or Hugging Face.

    for path in cachefs.hinted(paths):       # in the order in which they are read
        ...

What goes in comes out; each path is announced before, and progress is told as they are taken. Works in the process that
reads, so within a loader's worker too.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from itertools import islice
from typing import Any, TypeVar

from cachefs.errors import CacheFSError
from cachefs.hints.consumer import Consumer
from cachefs.hints.places import FileSystem, place_of

# Taken from the paths at a time, and how few are left when the next are taken: more than a window.
PATHS, LEFT = 65_536, 4096

_FAILURES = (CacheFSError, OSError, TypeError, LookupError)  # the last two: of a key that is wrong


T = TypeVar("T")


def hinted(
    paths: Iterable[T],
    at: str | os.PathLike[str] | FileSystem | None = None,
    *,
    label: str | None = None,
    key: Callable[[T], Any] | None = None,
) -> Iterator[T]:
    """`paths`, with hints. They may be endless: some thousands are taken ahead.

    at: the mount that they are in (None: they are absolute) or the cachefs file system that reads them. label: what
    `cachefs status` calls it. key: gives the path of an item, where items are more than paths. What goes wrong with
    hints is one warning; the paths come all the same.
    """
    source = iter(paths)
    ahead = list(islice(source, PATHS))
    try:
        consumer = _begin(_paths(ahead, key), at, f"process {os.getpid()}" if label is None else label)
    except _FAILURES as error:
        warnings.warn(f"cachefs gives no hints: {error}", RuntimeWarning, stacklevel=2)
        yield from ahead
        yield from source
        return
    with closing(consumer):
        number, taken = 0, 0
        while taken < len(ahead):
            if len(ahead) - taken == min(LEFT, len(ahead)) and (more := list(islice(source, PATHS))):
                ahead, taken = ahead[taken:] + more, 0
                _announce(consumer, more, key, at)
            consumer.at(number)
            path = ahead[taken]
            number, taken = number + 1, taken + 1
            yield path
        consumer.at(number)


def _paths(items: list[T], key: Callable[[T], Any] | None) -> list[str]:
    """Raises TypeError for what is no path."""
    found: list[Any] = list(items) if key is None else [key(item) for item in items]
    return [os.fspath(path) for path in found]


def _begin(paths: list[str], at: str | os.PathLike[str] | FileSystem | None, label: str) -> Consumer:
    place = place_of(paths, at)
    consumer = Consumer(place.config, place.session, label=label, mountpoint=place.mountpoint)
    try:
        consumer.plan_names([place.prefix + name for name in place.names])
    except BaseException:
        consumer.close()
        raise
    return consumer


def _announce(
    consumer: Consumer,
    items: list[T],
    key: Callable[[T], Any] | None,
    at: str | os.PathLike[str] | FileSystem | None,
) -> None:
    try:
        place = place_of(_paths(items, key), at)
        consumer.plan_names([place.prefix + name for name in place.names])
    except _FAILURES as error:
        warnings.warn(f"cachefs gives no more hints: {error}", RuntimeWarning, stacklevel=3)
