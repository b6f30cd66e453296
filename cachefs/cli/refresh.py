"""`cachefs refresh`: look at the origin again, and let mounts serve what is there now."""

from __future__ import annotations

import os
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from cachefs import datasets
from cachefs.cli import exits
from cachefs.cli.mounted import mounts
from cachefs.cli.options import CacheDirOption, JsonOption, OriginOptionOption
from cachefs.cli.output import complain, count, progress_bar, say, say_json
from cachefs.cli.target import Target, target_of, target_of_mount
from cachefs.datasets import DatasetRecord
from cachefs.errors import MountError
from cachefs.mountpoints import Mount


@dataclass(frozen=True)
class _Refreshed:
    root: str
    snapshot: str
    changed: bool
    files: int | None
    skipped: int
    catalog: Path | None


def refresh(
    origin: Annotated[
        str,
        typer.Argument(metavar="ORIGIN|MOUNTPOINT", show_default=False, help="A dataset the cache knows, or a mount."),
    ],
    cache_dir: CacheDirOption = None,
    origin_option: OriginOptionOption = None,
    as_json: JsonOption = False,
) -> None:
    """Take what is at the origin now.

    cachefs serves a dataset as it was when it was listed. Refresh lists it again; mounts of it switch to
    the new names and contents at once, files that are open go on as they were. Only what has changed is
    fetched again.

    \b
      cachefs refresh /data
      cachefs refresh s3://bucket/imagenet
    """
    mount = mounts().at(origin)
    if mount is not None:
        target = target_of_mount(mount, cache_dir, origin_option)
    elif os.path.ismount(origin):
        raise MountError(f"{origin}: is not a mount of cachefs (`cachefs status` lists them)")
    else:
        target = target_of(origin, origin_option, cache_dir, redacted=True)
    records = [r for r in target.known() if mount is None or r.id == mount.dataset]
    if not records:
        if os.path.isdir(origin):
            complain(f"{origin}: nothing of cachefs is mounted there, so it is taken for an origin")
        raise target.unknown()
    failed = False
    results = []
    for record in records:
        done = _refresh_dataset(target, record)
        served, broken = _refresh_mounts(target, record, done.catalog)
        failed = failed or broken
        results.append((done, served))
    _say_results(results, as_json)
    if failed:
        raise exits.Unfinished(exits.FAILURES)


def _refresh_dataset(target: Target, record: DatasetRecord) -> _Refreshed:
    with closing(target.connect(record.root)) as connection:
        if not record.catalog:
            connection.refresh()
            now = datasets.load(target.config.home, record.identity, record.root) or record
            return _Refreshed(record.root, now.snapshot, True, None, 0, None)
        with progress_bar(f"Listing {target.url}") as show:
            made = connection.make_catalog(refresh=True, progress=show)
        return _Refreshed(record.root, made.snapshot, made.changed, made.files, made.skipped, Path(made.file))


def _refresh_mounts(
    target: Target, record: DatasetRecord, catalog: Path | None
) -> tuple[list[tuple[Mount, int]], bool]:
    """Let the mounts of the dataset serve the catalog: (mount, names changed) each, and whether one failed."""
    served: list[tuple[Mount, int]] = []
    failed = False
    if catalog is None:
        return served, failed
    for mount in mounts().all():
        if mount.dataset != record.id or mount.dirs[0] != str(target.config.home):
            continue
        try:
            served.append((mount, mounts().refresh(mount, catalog)))
        except MountError as error:
            complain(error.message)
            failed = True
    return served, failed


def _say_results(results: list[tuple[_Refreshed, list[tuple[Mount, int]]]], as_json: bool) -> None:
    if as_json:
        say_json(
            [
                {
                    "root": done.root,
                    "snapshot": done.snapshot,
                    "changed": done.changed,
                    "files": done.files,
                    "skipped": done.skipped,
                    "mounts": [{"mountpoint": mount.mountpoint, "changed": names} for mount, names in served],
                }
                for done, served in results
            ]
        )
        return
    for done, served in results:
        root = done.root or "/"
        if done.files is None:
            say(
                f"{root}: versions seen before are forgotten (snapshot {done.snapshot}); "
                "readers opened from now on see what is there now"
            )
        else:
            say(f"{root}: {count(done.files, 'file')}, {'changed' if done.changed else 'nothing changed'}")
        for mount, names in served:
            say(f"{mount.mountpoint}: {count(names, 'name')} changed")
