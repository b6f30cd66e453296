"""The fetcher of a cache directory, seen from outside: is one running, and end it.

A fetcher is started by whoever reads first and outlives its readers, so whoever throws a cache directory away
ends its fetcher first. A running fetcher has written its pid to run/fetcher.lock; that lock is not tried here,
because holding it for a moment would make a fetcher that starts in that moment give up.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

# A fetcher that is asked to end finishes its writes first; longer than this means that it hangs, on any machine.
GRACE_SECONDS = 60.0


def fetcher_pid(home: Path) -> int | None:
    """The pid of the fetcher process of `home`; None when none runs (or when it runs inside another program)."""
    try:
        words = (home / "run" / "fetcher.lock").read_bytes().split()
        pid = int(words[0])
        # The pid of a fetcher that was killed stays in the file, and may by now be somebody else's.
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
    except (OSError, ValueError, IndexError):
        return None
    return pid if b"cachefs.fetcher" in command else None


def stop_fetcher(home: Path, *, sign: signal.Signals = signal.SIGTERM) -> bool:
    """End the fetcher of `home` and wait until it is gone. True when there was one.

    Raises TimeoutError when it had to be killed because it did not obey.
    """
    pid = fetcher_pid(home)
    if pid is None:
        return False
    deadline = time.monotonic() + GRACE_SECONDS
    _signal(pid, sign)
    while fetcher_pid(home) == pid:
        if time.monotonic() > deadline:
            _signal(pid, signal.SIGKILL)
            raise TimeoutError(f"the fetcher {pid} of {home} did not end within {GRACE_SECONDS:g} s")
        time.sleep(0.005)
    return True


def _signal(pid: int, sign: signal.Signals) -> None:
    try:
        os.kill(pid, sign)
    except ProcessLookupError:
        return
