"""A hit: one open() and one fstat(), in whichever process wants the bytes.

A ref is a hard link to a blob, so opening it is the look-up, and its mtime says whether it may be served
(layout.py, "The seal"). There is no lock, no index and no descriptor kept, so a reader may be forked, pickled and
used by any number of threads, and may be made before its cache exists. Whatever goes wrong is a miss: the
fetcher finds out why, and heals it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from cachefs.store.layout import Places, seal_ns

# Bound once: a global is found faster than an attribute of a module, and a hit is a matter of microseconds.
_open = os.open
_fstat = os.fstat
_close = os.close
_READ = os.O_RDONLY | os.O_CLOEXEC


class Reader:
    """The read side of a cache. dirs: its directories, the home first; they need not exist (yet)."""

    __slots__ = ("_prefixes", "_seal", "dirs")

    def __init__(self, dirs: tuple[Path, ...]) -> None:
        self.dirs = dirs
        self._prefixes = tuple(Places(d).refs for d in dirs)
        self._seal = seal_ns()

    def __reduce__(self) -> tuple[type[Reader], tuple[tuple[Path, ...]]]:
        return Reader, (self.dirs,)  # a seal means nothing on another machine

    def __repr__(self) -> str:
        return f"Reader({', '.join(map(str, self.dirs))})"

    def open(
        self, dataset: str, ref: str, opener: Callable[[str, int], int] = _open
    ) -> tuple[int, os.stat_result] | None:
        """(descriptor, its stat) of what `ref` names, owned by the caller; None = ask the fetcher.

        The descriptor stays good when the blob is evicted: the content lives until the last one is closed.
        opener: how, given a path and flags.
        """
        # isalnum: cheaper than the pattern of hex digits, and enough, as no path leads out of a directory
        # without a dot or a slash.
        if not (dataset.isalnum() and ref.isalnum()):
            return None
        for prefix in self._prefixes:
            try:
                fd = opener(f"{prefix}{dataset}/{ref[:2]}/{ref}", _READ)
            except OSError:
                continue  # not here, or the directory is gone or failing: all the same to a reader
            try:
                info = _fstat(fd)
            except OSError:
                _close(fd)
                continue
            if info.st_mtime_ns == self._seal:
                return fd, info
            _close(fd)  # sealed by an earlier boot or written to since: not to be served unchecked
        return None

    def file(self, dataset: str, ref: str) -> str | None:
        """The path of what `ref` names, for those who need a path and not a descriptor; None = ask the fetcher."""
        if not (dataset.isalnum() and ref.isalnum()):
            return None
        for prefix in self._prefixes:
            path = f"{prefix}{dataset}/{ref[:2]}/{ref}"
            try:
                if os.stat(path).st_mtime_ns == self._seal:
                    return path
            except OSError:
                continue
        return None
