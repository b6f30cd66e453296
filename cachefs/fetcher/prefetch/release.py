"""Let go of a descriptor that a consumer passed, without waiting.

Whoever closes a file last may have to wait for it: a socket lingers, a mount that hangs is asked to flush, gigabytes of
memory are given back at some GB per second. The fetcher's loop, on which all reads depend, does none of that. So only
memory of the usual size is closed at once, and the rest by a thread, which is left behind when the fetcher ends.
"""

from __future__ import annotations

import os
import queue
import threading

from cachefs.plans import is_memory

# A plan of two million entries. The kernel frees so much in a millisecond.
_SMALL_BYTES = 8 * 1024 * 1024

_starting = threading.Lock()
_waiting: queue.SimpleQueue[int] | None = None


def release(fd: int) -> None:
    """Close it, now or soon. Called on the fetcher's loop."""
    if is_memory(fd) and os.fstat(fd).st_blocks * 512 <= _SMALL_BYTES:  # stat(2): units of 512 bytes
        os.close(fd)
    else:
        _thread().put(fd)


def _thread() -> queue.SimpleQueue[int]:
    global _waiting
    with _starting:
        if _waiting is None:
            _waiting = queue.SimpleQueue()
            threading.Thread(target=_work, args=(_waiting,), name="cachefs-release", daemon=True).start()
        return _waiting


def _work(waiting: queue.SimpleQueue[int]) -> None:
    while True:
        os.close(waiting.get())


def _after_fork() -> None:
    """A child has no such thread; what waited for it is the parent's to close."""
    global _starting, _waiting
    _starting = threading.Lock()
    _waiting = None


os.register_at_fork(after_in_child=_after_fork)
