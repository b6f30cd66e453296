"""`cachefs verify`: read every stored blob and compare it with its digest."""

from __future__ import annotations

from contextlib import closing

from cachefs.cli import exits
from cachefs.cli.options import CacheDirOption, JsonOption, cache_config
from cachefs.cli.output import count, progress_bar, say, say_failures, say_json
from cachefs.config import format_size


def verify(cache_dir: CacheDirOption = None, as_json: JsonOption = False) -> None:
    """Read everything in the cache and compare it with its digests.

    Damaged files are dropped, and fetched again when somebody reads them: nothing is lost. Damage means
    a failing disk, or a program that wrote into the cache. Exit code 1 when something was damaged.

    \b
      cachefs verify
      cachefs verify --cache-dir /ssd/cachefs --json
    """
    from cachefs.client import Connection

    config = cache_config(cache_dir)
    with closing(Connection(config, None)) as connection, progress_bar(f"Verifying {config.home}") as show:
        done = connection.verify(progress=show)
    if as_json:
        say_json(
            {
                "blobs": done.count,
                "bytes": done.bytes,
                "damaged": done.failed_total,
                "dropped": [path for path, _ in done.failed],
            }
        )
    else:
        say(
            f"{config.home}: {count(done.count, 'blob')} read, {format_size(done.bytes)}, {done.failed_total:,} damaged"
        )
        say_failures(done.failed, done.failed_total, "damaged")
    if done.failed_total:
        raise exits.Unfinished(exits.FAILURES)
