"""`cachefs stop`: end the fetcher of a cache, so that other settings or another version can take its place."""

from __future__ import annotations

import contextlib
import os
import select
import signal
from collections.abc import Callable
from pathlib import Path

from cachefs.cli.fetcher import ASK_SECONDS, running_fetcher
from cachefs.cli.options import CacheDirOption, cache_config
from cachefs.cli.output import say
from cachefs.config import CacheConfig
from cachefs.errors import FetcherError, FetcherTimeout
from cachefs.packets import dial, peer_pid

# A fetcher that is told to end finishes its writes first: some 8 MiB each, even on a slow disk not this long.
STOP_SECONDS = 30.0


def stop(cache_dir: CacheDirOption = None) -> None:
    """End the fetcher, the process that fills the cache.

    It is started by whoever needs it and ends by itself when it is idle, so this is only needed before
    an upgrade, or to give it other settings (--size). Reads in progress are repeated by the next fetcher,
    which mounts and readers start when they need one; what is cached stays.

    \b
      cachefs stop
      cachefs stop --cache-dir /ssd/cachefs
    """
    config = cache_config(cache_dir, require=True)
    pid = end_fetcher(config)
    say(f"{config.home}: no fetcher is running" if pid is None else f"{config.home}: fetcher {pid} has ended")


def end_fetcher(config: CacheConfig) -> int | None:
    """End the fetcher of `config` and wait until it is gone; its pid, None when none runs.

    Raises FetcherError, FetcherTimeout.
    """
    from cachefs.client import Connection

    try:
        status = running_fetcher(config)
    except FetcherTimeout:
        raise
    except FetcherError:
        # One of another version, which does not understand us; every version ends on SIGTERM. But one that is part of
        # somebody's program ends with that.
        pid = _answering(config)
        if b"cachefs.fetcher" not in Path(f"/proc/{pid}/cmdline").read_bytes():
            raise
        return _end(config, pid, lambda pid: os.kill(pid, signal.SIGTERM))
    if status is None:
        return None
    return _end(config, int(status["pid"]), lambda _: Connection(config, None).shutdown())


def _answering(config: CacheConfig) -> int:
    """The pid of whoever answers at the fetcher's socket. Raises OSError."""
    with contextlib.closing(dial(config.home / "run", ASK_SECONDS)) as sock:
        return peer_pid(sock)


def _end(config: CacheConfig, pid: int, end: Callable[[int], object]) -> int:
    process = _watch(pid)
    if process is not None:
        try:
            end(pid)
            if not select.select([process], [], [], STOP_SECONDS)[0]:
                raise FetcherTimeout(
                    f"the fetcher {pid} has not ended within {STOP_SECONDS:g} s; see {config.home}/run/fetcher.log"
                )
        finally:
            os.close(process)
    return pid


def _watch(pid: int) -> int | None:
    """A descriptor that becomes readable when the process ends; None when it has ended."""
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError:
        return None
