"""`cachefs refresh`: look at the origin again, and let mounts serve what is there now."""

from __future__ import annotations

import os
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import typer

from cachefs import datasets
from cachefs.cli import exits
from cachefs.cli.mounted import mounts
from cachefs.cli.options import CacheDirOption, JsonOption, OriginOptionOption
from cachefs.cli.output import complain, count, progress_bar, say, say_json
from cachefs.cli.target import Target, target_at
from cachefs.datasets import DatasetRecord
from cachefs.errors import CatalogError, MountError
from cachefs.mountpoints import Mount


@dataclass(frozen=True)
class _Refreshed:
    root: str
    snapshot: str
    changed: bool
    files: int | None
    skipped: int
    catalog: Path | None
    behind: list[tuple[str, str]] = field(default_factory=list)
    behind_total: int = 0


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
    fetched again. In a cluster one node lists, and all nodes switch; exit code 1 when one could not be
    told, which is named and follows by itself.

    \b
      cachefs refresh /data
      cachefs refresh s3://bucket/imagenet
    """
    target, mount = target_at(origin, cache_dir, origin_option)
    records = [r for r in target.known() if mount is None or r.id == mount.dataset]
    if not records:
        if os.path.isdir(origin):
            complain(f"{origin}: nothing of cachefs is mounted there, so it is taken for an origin")
        raise target.unknown()
    failed = False
    results = []
    for record in records:
        # What each mount serves now: in a cluster it may have switched when the command hears that it is done.
        before = {mount.mountpoint: mount.catalog for mount in mounts().all()}
        done = _refresh_dataset(target, record)
        served, broken = refresh_mounts(target, record, done.catalog, before)
        failed = complain_behind(done.behind, done.behind_total) or broken or failed
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
        return _Refreshed(
            record.root,
            made.snapshot,
            made.changed,
            made.files,
            made.skipped,
            Path(made.file),
            made.behind,
            made.behind_total,
        )


def complain_behind(behind: list[tuple[str, str]], total: int) -> bool:
    """Name the nodes of the cluster that do not serve a new catalog yet; whether there are any."""
    for node, why in behind:
        complain(f"{node}: does not serve it yet ({why})")
    if total > len(behind):
        complain(f"... and {total - len(behind):,} more nodes")
    return total > 0


def refresh_mounts(
    target: Target, record: DatasetRecord, catalog: Path | None, before: dict[str, str]
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
            names = mounts().refresh(mount, catalog)
            served.append((mount, names or _changed_by_others(before.get(mount.mountpoint, ""), catalog)))
        except MountError as error:
            complain(error.message)
            failed = True
    return served, failed


def _changed_by_others(before: str, catalog: Path) -> int:
    """How many names a mount changed that went over to `catalog` before this command had it do so."""
    from cachefs.catalog import Catalog, changes

    if before in ("", str(catalog)):
        return 0
    try:
        with Catalog.open(Path(before)) as old, Catalog.open(catalog) as new:
            return sum(not (c.old and c.new and c.old.id == c.new.id) for c in changes(old, new))
    except CatalogError:
        return 0  # it was removed meanwhile; how many names changed is nothing to fail for


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
                    "behind": [{"node": node, "reason": why} for node, why in done.behind],
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
