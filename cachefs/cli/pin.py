"""`cachefs pin`, `cachefs unpin`: what is stored of a dataset stays, whoever else needs room."""

from __future__ import annotations

from contextlib import closing
from typing import Annotated

import typer

from cachefs.cli.options import CacheDirOption, JsonOption, OriginOptionOption
from cachefs.cli.output import say, say_json
from cachefs.cli.target import Target, target_at
from cachefs.datasets import DatasetRecord
from cachefs.errors import ConfigError

DatasetArgument = Annotated[
    str,
    typer.Argument(metavar="ORIGIN|MOUNTPOINT", show_default=False, help="A dataset the cache knows, or a mount."),
]


def pin(
    origin: DatasetArgument,
    cache_dir: CacheDirOption = None,
    origin_option: OriginOptionOption = None,
    as_json: JsonOption = False,
) -> None:
    """Keep what is cached of ORIGIN, also when nobody uses it and others need room.

    Nothing is fetched: `cachefs warm --pin` fetches everything and pins it. What is read later of a pinned
    dataset is stored as ever, where there is room. What a refresh has replaced stays too, until the dataset
    itself needs the room. A pin holds until `cachefs unpin`, whatever is restarted.

    \b
      cachefs pin s3://bucket/validation
      cachefs pin /data
    """
    _settle(origin, cache_dir, origin_option, pinned=True, as_json=as_json)


def unpin(
    origin: DatasetArgument,
    cache_dir: CacheDirOption = None,
    origin_option: OriginOptionOption = None,
    as_json: JsonOption = False,
) -> None:
    """Let the cache evict ORIGIN again when others need room and nobody uses it. Nothing is dropped now.

    \b
      cachefs unpin s3://bucket/validation
    """
    _settle(origin, cache_dir, origin_option, pinned=False, as_json=as_json)


def _settle(
    origin: str, cache_dir: list[str] | None, options: list[str] | None, *, pinned: bool, as_json: bool
) -> None:
    target, record = dataset_of(origin, cache_dir, options)
    with closing(target.connect_to_cache()) as connection:
        changed = connection.pin(record.id, pinned).count > 0
    if as_json:
        say_json({"origin": target.url, "root": record.root, "pinned": pinned, "changed": changed})
        return
    already = "" if changed else " already"
    if pinned:
        say(f"{target.url}: is{already} pinned; what is cached of it stays until `cachefs unpin`")
    else:
        was = "not pinned any more" if changed else "not pinned"
        say(f"{target.url}: is {was}; it may be evicted when nobody uses it")


def dataset_of(origin: str, cache_dir: list[str] | None, options: list[str] | None) -> tuple[Target, DatasetRecord]:
    """The one dataset that ORIGIN or a mount point names, itself and whole. Raises ConfigError, MountError."""
    target, _ = target_at(origin, cache_dir, options)
    known = target.known()
    exact = [r for r in known if r.root == target.path]
    if exact:
        return target, exact[0]
    if not known:
        raise target.unknown()
    names = ", ".join(sorted(r.root or "(everything)" for r in known))
    relation = "is part of the dataset" if known[0].covers(target.path) else "is no dataset itself, but holds"
    raise ConfigError(f"{target.url}: {relation} {names}; name a whole dataset")
