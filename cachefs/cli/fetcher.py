"""The fetcher of a cache, asked without starting one."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import Any

from cachefs.cli.output import complain
from cachefs.config import CacheConfig

# A fetcher answers at once; one that does not in this time is stopped or stuck, and status says so.
ASK_SECONDS = 5.0


def running_fetcher(config: CacheConfig) -> dict[str, Any] | None:
    """What the fetcher of `config` says of itself; None when none runs.

    Raises FetcherError when one runs but does not answer, or speaks another version.
    """
    from cachefs.client import Connection
    from cachefs.packets import dial

    try:
        dial(config.home / "run", ASK_SECONDS).close()
    except (FileNotFoundError, NotADirectoryError, ConnectionRefusedError):
        return None
    except (BlockingIOError, TimeoutError):
        pass  # it has more callers than it takes: it runs
    # Without a size: who only looks must not set one (CACHEFS_SIZE).
    config = replace(config, fetcher="require", deadline=ASK_SECONDS, size=None)
    with contextlib.closing(Connection(config, None)) as connection:
        return connection.status().status


def remark_on_settings(config: CacheConfig, status: dict[str, Any], min_free: str | None) -> None:
    """Say when a running fetcher keeps to other settings than those given here. (It takes a new size at once.)"""
    differing = []
    if min_free is not None and status["min_free"] != str(config.min_free):
        differing.append(f"--min-free {status['min_free']}")
    if [str(d) for d in config.dirs] != status["dirs"]:
        differing.append("directories " + ", ".join(status["dirs"]))
    if differing:
        complain(
            f"warning: {config.home}: its fetcher runs with other settings ({'; '.join(differing)}); "
            "yours take effect after `cachefs stop`"
        )
