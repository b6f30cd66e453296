"""Hints for whatever reads a list of files in order: shards of WebDataset, file lists of tf.data or Hugging Face.

    for path in cachefs.hinted(paths):       # in the order in which they are read
        ...

The paths come out as they went in; each is announced before, and progress is told as they are taken. Works in the
process that reads, so within a loader's worker too.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator
from contextlib import closing
from itertools import islice

from cachefs.errors import CacheFSError
from cachefs.hints.consumer import Consumer
from cachefs.hints.places import FileSystem, place_of

# Taken from the paths at a time, and how few are left when the next are taken: more than a window.
PATHS, LEFT = 65_536, 4096


def hinted(
    paths: Iterable[str], at: str | os.PathLike[str] | FileSystem | None = None, *, label: str | None = None
) -> Iterator[str]:
    """`paths`, with hints. They may be endless: some thousands are taken ahead.

    at: the mount that they are in (None: they are absolute) or the cachefs file system that reads them. label: what
    `cachefs status` calls it. What goes wrong with hints is one warning; the paths come all the same.
    """
    source = iter(paths)
    ahead = list(islice(source, PATHS))
    try:
        consumer = _begin(ahead, at, f"process {os.getpid()}" if label is None else label)
    except (CacheFSError, OSError) as error:
        warnings.warn(f"cachefs gives no hints: {error}", RuntimeWarning, stacklevel=2)
        yield from ahead
        yield from source
        return
    with closing(consumer):
        number, taken = 0, 0
        while taken < len(ahead):
            if len(ahead) - taken == min(LEFT, len(ahead)) and (more := list(islice(source, PATHS))):
                ahead, taken = ahead[taken:] + more, 0
                _announce(consumer, more, at)
            consumer.at(number)
            path = ahead[taken]
            number, taken = number + 1, taken + 1
            yield path
        consumer.at(number)


def _begin(paths: list[str], at: str | os.PathLike[str] | FileSystem | None, label: str) -> Consumer:
    place = place_of(paths, at)
    consumer = Consumer(place.config, place.session, label=label, mountpoint=place.mountpoint)
    try:
        consumer.plan_names([place.prefix + name for name in place.names])
    except BaseException:
        consumer.close()
        raise
    return consumer


def _announce(consumer: Consumer, paths: list[str], at: str | os.PathLike[str] | FileSystem | None) -> None:
    try:
        place = place_of(paths, at)
        consumer.plan_names([place.prefix + name for name in place.names])
    except (CacheFSError, OSError) as error:
        warnings.warn(f"cachefs gives no more hints: {error}", RuntimeWarning, stacklevel=3)
