"""How often readers found an object on the disk by themselves, which nobody sees but the reader.

Each reader counts in its own memory and adds that now and then to the one number in HOME/run/hits, which the fetcher
reads when somebody asks. A file and not shared memory: a page that a full disk cannot take, or a failing one give,
kills whoever touches it, and a figure for people must not cost a training process its life. Nor need it wait: where
another process holds the number just then, and where it cannot be written, it is tried again the next time.

What a process found in its last moments is lost with it.
"""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path

# Between two additions of a reader: some 10 us each, so nothing of a core; and no more than this is lost when it ends.
TELL_SECONDS = 0.25

# For whoever has no next time.
LAST_SECONDS = 0.2

_DIGITS = 20


def add(home: Path, count: int, *, patience: float = 0.0) -> bool:
    """Whether they were added. patience: seconds to wait while others hold the number."""
    try:
        fd = os.open(_file(home), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError:
        return False
    try:
        _lock(fd, time.monotonic() + patience)
        os.pwrite(fd, b"%0*d\n" % (_DIGITS, _read(fd) + count), 0)
    except OSError:
        return False
    finally:
        os.close(fd)
    return True


def total(home: Path) -> int:
    """Since the cache was made, or the file was damaged or lost: what a difference is taken of."""
    try:
        fd = os.open(_file(home), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return 0
    try:
        return _read(fd)
    except OSError:
        return 0
    finally:
        os.close(fd)


def _lock(fd: int, deadline: float) -> None:
    """Raises BlockingIOError. With a deadline, because the holder may be stopped in a debugger."""
    while True:
        try:
            return fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise
        time.sleep(0.001)


def _read(fd: int) -> int:
    text = os.pread(fd, _DIGITS, 0)
    return int(text) if len(text) == _DIGITS and text.isdigit() else 0


def _file(home: Path) -> str:
    return f"{home}/run/hits"
