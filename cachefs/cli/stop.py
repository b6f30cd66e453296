"""`cachefs stop`: end the fetcher of a cache, so that other settings or another version can take its place."""

from __future__ import annotations

import os
import select

from cachefs.cli.fetcher import running_fetcher
from cachefs.cli.options import CacheDirOption, cache_config
from cachefs.cli.output import say
from cachefs.errors import FetcherTimeout

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
    from cachefs.client import Connection

    config = cache_config(cache_dir, require=True)
    status = running_fetcher(config)
    if status is None:
        say(f"{config.home}: no fetcher is running")
        return
    pid = int(status["pid"])
    process = _watch(pid)
    Connection(config, None).shutdown()
    if process is not None:
        try:
            if not select.select([process], [], [], STOP_SECONDS)[0]:
                raise FetcherTimeout(
                    f"the fetcher {pid} has not ended within {STOP_SECONDS:g} s; see {config.home}/run/fetcher.log"
                )
        finally:
            os.close(process)
    say(f"{config.home}: fetcher {pid} has ended")


def _watch(pid: int) -> int | None:
    """A descriptor that becomes readable when the process ends; None when it has ended."""
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError:
        return None
