"""`cachefs evict`: give the disk space of one dataset, or of a part of it, back."""

from __future__ import annotations

from contextlib import closing
from typing import Annotated

import typer

from cachefs.cli.options import CacheDirOption, JsonOption, OriginArgument, OriginOptionOption
from cachefs.cli.output import count, progress_bar, say, say_json
from cachefs.cli.target import target_of
from cachefs.config import format_size


def evict(
    origin: OriginArgument,
    cache_dir: CacheDirOption = None,
    origin_option: OriginOptionOption = None,
    force: Annotated[bool, typer.Option("--force", help="Also what is pinned. It stays pinned.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Drop what is cached of ORIGIN, to make room.

    Nothing changes at the origin, and a mount of it goes on: what is read again is fetched again. The
    list of names stays. The cache makes room by itself when it is full; evict is for when you know better.
    Of a dataset that is pinned nothing is dropped, and that is an error, unless you say --force.

    \b
      cachefs evict s3://bucket/imagenet
      cachefs evict s3://bucket/imagenet/val
    """
    target = target_of(origin, origin_option, cache_dir, redacted=True)
    known = target.known()
    if not known:
        raise target.unknown()
    with closing(target.connect(known[0].root)) as connection, progress_bar(f"Evicting {target.url}") as show:
        done = connection.evict(target.path, force=force, progress=show)
    if as_json:
        say_json({"origin": target.url, "objects": done.count, "bytes_freed": done.bytes})
    else:
        say(f"{target.url}: {count(done.count, 'reference')} dropped, {format_size(done.bytes)} freed")
