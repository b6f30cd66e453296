"""`cachefs seal`: every file's content key into the catalog."""

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING

from cachefs.cli import exits
from cachefs.cli.engines import BatchOption, EngineOption, SchedulerOption, with_engine
from cachefs.cli.index import checked, listed_by_workers
from cachefs.cli.options import CacheDirOption, JsonOption, OriginArgument, OriginOptionOption, TenantOption
from cachefs.cli.output import OnProgress, ago, count, progress_bar, say, say_failures, say_json
from cachefs.cli.refresh import complain_behind
from cachefs.cli.target import Target, open_catalog, target_of
from cachefs.config import format_size
from cachefs.errors import ObjectNotFound

if TYPE_CHECKING:
    from cachefs.batch.engine import Engine
    from cachefs.batch.reach import Reach
    from cachefs.batch.seal import Sealed
    from cachefs.catalog import Catalog
    from cachefs.client import Connection
    from cachefs.datasets import DatasetRecord
    from cachefs.messages import Catalogued


def seal(
    origin: OriginArgument,
    engine: EngineOption = "local",
    scheduler: SchedulerOption = None,
    batch: BatchOption = 1000,
    cache_dir: CacheDirOption = None,
    origin_option: OriginOptionOption = None,
    tenant: TenantOption = None,
    as_json: JsonOption = False,
) -> None:
    """Read every object of ORIGIN once, and note its content key in the catalog.

    With the keys the cache knows what an object contains before it reads it: what is stored already, of
    whatever dataset and under whatever name, is not read again. What is sealed is not read by the next
    seal, so one that is interrupted goes on where it was, and after a refresh only new content is read.

    
      cachefs seal s3://bucket/imagenet
      cachefs seal s3://bucket/laion --engine dask --scheduler tcp://head:8786

    Exit code 1 when some objects have no key: they have changed since they were listed, or cannot be read.
    They are named; so are nodes of the cluster that could not be given the keys, and follow by themselves.
    """
    target = target_of(origin, origin_option, cache_dir, tenant=tenant)
    reach = checked(target, origin_option, engine, scheduler)
    record = target.containing()
    with closing(target.connect(record.root if record is not None else target.path)) as connection:
        record, catalog = _catalog(target, reach, connection, engine, scheduler)
        with catalog, progress_bar(f"Sealing {target.url}") as show:
            if target.path != catalog.summary.root and catalog.find(target.path) is None:
                raise ObjectNotFound(
                    f"{target.url}: was not there when {catalog.summary.root or 'its origin'} was listed "
                    f"({ago(catalog.summary.created)}); `cachefs refresh {target.url}` looks again"
                )
            done, made = _seal(target, reach, connection, record, catalog, engine, scheduler, batch, show)
    behind, behind_total = ([], 0) if made is None else (made.behind, made.behind_total)
    _say_result(target, done, behind, as_json)
    if complain_behind(behind, behind_total) or done.failures:
        raise exits.Unfinished(exits.FAILURES)


def _catalog(
    target: Target, reach: Reach, connection: Connection, engine: str, scheduler: str | None
) -> tuple[DatasetRecord, Catalog]:
    """The dataset and its catalog, listed now where there is none."""
    record = target.containing()
    catalog = None if record is None else open_catalog(target.config, record)
    if catalog is None:
        with progress_bar(f"Listing {target.url}") as show:
            if engine == "local" or record is not None:
                connection.make_catalog(progress=show)
            else:
                listed_by_workers(target, reach, connection, engine, scheduler, show)
        record = target.containing()
        assert record is not None
        catalog = open_catalog(target.config, record)
        assert catalog is not None
    assert record is not None
    return record, catalog


def _seal(
    target: Target,
    reach: Reach,
    connection: Connection,
    record: DatasetRecord,
    catalog: Catalog,
    engine: str,
    scheduler: str | None,
    batch: int,
    show: OnProgress,
) -> tuple[Sealed, Catalogued | None]:
    """What was sealed, and the new catalog; None: there is nothing new in it."""
    from cachefs.batch.seal import seal as gather
    from cachefs.catalog.keys import GatheredKeys, add_keys
    from cachefs.messages import Progress

    folder = catalog.file.parent
    gathered = GatheredKeys(folder / "gathered.keys")
    finished, made = False, None

    def progress(done: Sealed) -> None:
        seen = done.known + done.failures
        show(Progress(id=0, done=seen, total=done.files, bytes=done.size, what="objects"))

    async def work(engine: Engine) -> Sealed:
        return await gather(engine, reach, catalog, target.path, gathered, progress, batch=batch)

    try:
        done = with_engine(engine, scheduler, work)
        if done.read or any(gathered.of(catalog)):
            add_keys(catalog, gathered.of(catalog), folder / "sealed.sqlite")
            made = connection.take_catalog("sealed.sqlite", record.snapshot, record.last_id, progress=show)
        finished = True
    finally:
        gathered.close(keep=not finished)
    return done, made


def _say_result(target: Target, done: Sealed, behind: list[tuple[str, str]], as_json: bool) -> None:
    changed = done.changed
    others = [each for each in done.failed if each not in changed]
    if as_json:
        say_json(
            {
                "origin": target.url,
                "files": done.files,
                "sealed": done.known,
                "read": done.read,
                "bytes": done.size,
                "unsealed": done.failures,
                "changed": [path for path, _, _ in changed],
                "failures": [{"path": path, "reason": reason} for path, _, reason in others],
                "behind": [{"node": node, "reason": why} for node, why in behind],
            }
        )
        return
    failed = f"; {done.failures:,} not" if done.failures else ""
    read = f"{count(done.read, 'object')} read, {format_size(done.size)}"
    say(f"{target.url}: {count(done.known, 'file')} sealed{failed}; {read}")
    say_failures([(path, reason) for path, _, reason in done.failed], done.failures, "not sealed")
