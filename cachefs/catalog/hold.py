"""How a catalog stays as long as anybody serves it.

A refresh puts a newer catalog beside the old ones, and old ones are removed sometime. A mount must be able to open
the one it serves for as long as it lives (a worker that dies is replaced), and so must a file system in a training
job. So whoever serves a catalog holds a shared lock (flock) on its file, and the fetcher removes a file only when it
gets the lock for itself. The kernel gives a lock back when its process dies, however it dies.

A catalog that is listed again, or sealed, may come under a name that is served already (`put`): the lock is on the file
that had it, which then stays under another name, FILE.<inode>.held, and FILE stays for as long.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import threading
import time
import weakref
from pathlib import Path

log = logging.getLogger("cachefs.fetcher")

# Kept although nobody holds them: a reader that begins reads the dataset's record first and takes its hold then.
KEEP = 3

# Ends the name of a file that has lost its own to another one, and is served.
_HELD = ".held"


class Hold:
    """A shared lock on one catalog file, given back by `release`, or when nobody has this object any more."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def release(self) -> None:
        """Give it back at once, also for the processes that were forked meanwhile and inherited it."""
        if self._fd >= 0:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(self._fd, fcntl.LOCK_UN)
            self._close()

    def _close(self) -> None:
        fd, self._fd = self._fd, -1
        os.close(fd)

    def __del__(self) -> None:
        # Not unlocked: in a forked child that would unlock for its parent too.
        if self._fd >= 0:
            self._close()


def hold(file: Path) -> Hold | None:
    """Keep `file` from being removed. None when it is gone already, or cannot be opened."""
    try:
        fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None  # whoever opens the catalog next is told why
    held = Hold(fd)
    try:
        fcntl.flock(fd, fcntl.LOCK_SH)
    except OSError as error:
        log.info("%s: cannot be locked (%s); it may be removed after %d refreshes", file, error.strerror, KEEP)
    # Opened before it was removed and locked after: the lock is on a file without a name.
    return held if os.fstat(fd).st_nlink else None


_shared: weakref.WeakValueDictionary[Path, Hold] = weakref.WeakValueDictionary()
_sharing = threading.Lock()


def shared_hold(file: Path) -> Hold | None:
    """The same, one for all who ask in this process: file systems of one cache are made by the dozen."""
    with _sharing:
        found = _shared.get(file) or hold(file)
        if found is not None:
            _shared[file] = found
        return found


def put(made: Path, file: Path) -> None:
    """Let the catalog `made` have the name `file`, whoever holds what had it. Raises OSError."""
    try:
        fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        os.replace(made, file)
        return
    try:
        with contextlib.suppress(OSError):  # a file system without locks: nobody can hold anything there
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.link(file, file.with_name(f"{file.name}.{os.fstat(fd).st_ino}{_HELD}"))
        os.replace(made, file)
    finally:
        os.close(fd)


def forget_old(folder: Path, current: str) -> None:
    """Remove the catalogs in `folder` that nobody serves, but for `current` and the few newest."""
    served = {was.name.rsplit(".", 2)[0] for was in folder.glob(f"*{_HELD}") if not _remove_unless_held(was)}
    files = sorted(folder.glob("*.sqlite"), key=lambda f: f.stat().st_mtime, reverse=True)
    for file in [f for f in files if f.name != current and f.name not in served][KEEP - 1 :]:
        age = time.time() - file.stat().st_mtime
        if _remove_unless_held(file):
            log.info("%s: made %d s ago and superseded, removed", file.name, age)


def _remove_unless_held(file: Path) -> bool:
    try:
        fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        with contextlib.suppress(OSError):  # a file system without locks: nobody can hold anything there
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
        file.unlink()
    except OSError as error:
        log.warning("%s: superseded, and cannot be removed (%s)", file, error.strerror)
        return False
    finally:
        os.close(fd)
    return True
