"""`cachefs index`: the names of a dataset into its catalog, by this machine or by many."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Annotated

import typer

from cachefs import datasets
from cachefs.cli import exits
from cachefs.cli.engines import EngineOption, SchedulerOption, with_engine
from cachefs.cli.options import CacheDirOption, JsonOption, OriginArgument, OriginOptionOption, TenantOption
from cachefs.cli.output import OnProgress, ago, count, progress_bar, say, say_json
from cachefs.cli.refresh import complain_behind, refresh_mounts
from cachefs.cli.target import Target, open_catalog, target_of
from cachefs.config import format_size
from cachefs.datasets import DatasetRecord

if TYPE_CHECKING:
    from cachefs.batch.engine import Engine
    from cachefs.batch.reach import Reach
    from cachefs.catalog import Summary
    from cachefs.client import Connection
    from cachefs.messages import Catalogued


def index(
    origin: OriginArgument,
    refresh: Annotated[bool, typer.Option("--refresh", help="List again; mounts switch to the new names.")] = False,
    engine: EngineOption = "local",
    scheduler: SchedulerOption = None,
    cache_dir: CacheDirOption = None,
    origin_option: OriginOptionOption = None,
    tenant: TenantOption = None,
    as_json: JsonOption = False,
) -> None:
    """List the names of ORIGIN into the catalog of this machine's cache.

    Mount and warm do so by themselves when they need it; this does it ahead, and with --engine dask many
    machines list parts of it at once. A listing that is interrupted goes on within an hour where it was.

    \b
      cachefs index s3://bucket/imagenet
      cachefs index s3://bucket/laion --engine dask --scheduler tcp://head:8786

    In a cluster one node lists for all, and exit code 1 says that some, which are named, could not be told.
    Workers of Dask take credentials from their own environment, and read -o secret=@env:NAME there.
    """
    target = target_of(origin, origin_option, cache_dir, tenant=tenant)
    reach = checked(target, origin_option, engine, scheduler)
    record = datasets.load(target.config.home, target.spec.identity, target.path)
    if record is not None and not refresh and (catalog := open_catalog(target.config, record)) is not None:
        with catalog:
            _say_result(target, catalog.summary, False, as_json)
        return
    with closing(target.connect(target.path)) as connection, progress_bar(f"Listing {target.url}") as show:
        if engine == "local":
            made = connection.make_catalog(refresh=refresh, progress=show)
        else:
            made = listed_by_workers(target, reach, connection, engine, scheduler, show)
    now = datasets.load(target.config.home, target.spec.identity, target.path)
    catalog = None if now is None else open_catalog(target.config, now)
    assert now is not None
    assert catalog is not None
    with catalog:
        _say_result(target, catalog.summary, made.changed, as_json, made.behind)
        broken = refresh and refresh_mounts(target, now, catalog.file, {})[1]
    if complain_behind(made.behind, made.behind_total) or broken:
        raise exits.Unfinished(exits.FAILURES)


def checked(target: Target, origin_option: list[str] | None, engine: str, scheduler: str | None) -> Reach:
    """How workers reach the origin. Raises ConfigError before anything was begun."""
    from cachefs.batch.engine import check
    from cachefs.batch.reach import reach_of

    check(engine, scheduler)
    return reach_of(target.spec, origin_option or (), private=engine == "local")


def listed_by_workers(
    target: Target, reach: Reach, connection: Connection, engine: str, scheduler: str | None, show: OnProgress
) -> Catalogued:
    from cachefs.batch.index import index as list_names
    from cachefs.messages import Progress
    from cachefs.origin import open_origin

    home = target.config.home
    attached = connection.attach()  # makes the cache's directories, and refuses what cannot be used
    record = datasets.load(home, target.spec.identity, target.path) or DatasetRecord(target.spec.identity, target.path)
    previous = open_catalog(target.config, record)

    def progress(objects: int, size: int) -> None:
        show(Progress(id=0, done=objects, total=0, bytes=size, what="objects listed"))

    async def work(engine: Engine) -> str:
        origin = open_origin(target.spec)
        try:
            made = await list_names(engine, reach, origin, home, record, previous, progress)
        finally:
            await origin.aclose()
        return made.name

    assert attached.dataset == record.id
    try:
        name = with_engine(engine, scheduler, work)
    finally:
        if previous is not None:
            previous.close()
    return connection.take_catalog(name, record.snapshot if record.catalog else "", record.last_id, progress=show)


def _say_result(
    target: Target, summary: Summary, changed: bool, as_json: bool, behind: Sequence[tuple[str, str]] = ()
) -> None:
    if as_json:
        say_json(
            {
                "origin": target.url,
                "snapshot": summary.snapshot,
                "files": summary.files,
                "directories": summary.directories,
                "bytes": summary.bytes,
                "skipped": summary.skipped,
                "listed": summary.created,
                "changed": changed,
                "behind": [{"node": node, "reason": why} for node, why in behind],
            }
        )
        return
    skipped = f"; {count(summary.skipped, 'name')} skipped" if summary.skipped else ""
    say(
        f"{target.url}: {count(summary.files, 'file')}, {format_size(summary.bytes)}{skipped}, "
        f"listed {ago(summary.created)}"
    )
