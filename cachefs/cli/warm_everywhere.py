"""`cachefs warm --all-nodes`: each machine of a Dask cluster fetches its share into its own cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import TYPE_CHECKING

from cachefs.cli import exits
from cachefs.cli.engines import with_engine
from cachefs.cli.index import checked, listed_by_workers
from cachefs.cli.output import ago, complain, count, progress_bar, say, say_failures, say_json, table
from cachefs.cli.target import Target, open_catalog
from cachefs.config import format_size
from cachefs.errors import ObjectNotFound

if TYPE_CHECKING:
    from cachefs.batch.engine import Engine
    from cachefs.batch.everywhere import Everywhere
    from cachefs.catalog import Catalog


def warm_all_nodes(
    target: Target, origin_option: list[str] | None, dirs: Sequence[str] | None, scheduler: str | None, as_json: bool
) -> None:
    """Raises CacheFSError, Unfinished."""
    from cachefs.batch.dask_engine import DaskEngine
    from cachefs.batch.everywhere import Share, warm_everywhere
    from cachefs.messages import Progress

    reach = checked(target, origin_option, "dask", scheduler)
    catalog = _catalog(target, origin_option, scheduler)
    with catalog, progress_bar(f"Warming {target.url}") as show:
        share = Share(reach, catalog.summary.root, [str(path) for path in dirs or ()], target.config.tenant)
        total = _count(target, catalog)

        def progress(done: Everywhere) -> None:
            objects = done.objects + done.failures
            show(Progress(id=0, done=objects, total=total, bytes=done.size, what="objects"))

        async def work(engine: Engine) -> Everywhere:
            assert isinstance(engine, DaskEngine)
            return await warm_everywhere(engine, share, _objects(target, catalog), total, progress)

        done = with_engine("dask", scheduler, work)
    _say_result(target, done, as_json)
    if done.failures:
        raise exits.Unfinished(exits.FAILURES)


def _catalog(target: Target, origin_option: list[str] | None, scheduler: str | None) -> Catalog:
    """The dataset's catalog on this machine, listed now where there is none."""
    record = target.containing()
    catalog = None if record is None else open_catalog(target.config, record)
    if catalog is None:
        reach = checked(target, origin_option, "dask", scheduler)
        root = record.root if record is not None else target.path
        with closing(target.connect(root)) as connection, progress_bar(f"Listing {target.url}") as show:
            if record is not None:
                connection.make_catalog(progress=show)
            else:
                listed_by_workers(target, reach, connection, "dask", scheduler, show)
        record = target.containing()
        assert record is not None
        catalog = open_catalog(target.config, record)
        assert catalog is not None
    return catalog


def _count(target: Target, catalog: Catalog) -> int:
    if target.path == catalog.summary.root:
        return catalog.summary.files
    if catalog.find(target.path) is None:
        raise ObjectNotFound(
            f"{target.url}: was not there when {catalog.summary.root or 'its origin'} was listed "
            f"({ago(catalog.summary.created)}); `cachefs refresh {target.url}` looks again"
        )
    return sum(1 for _ in catalog.files(target.path))


def _objects(target: Target, catalog: Catalog) -> Iterator[tuple[str, str, int]]:
    below = "" if target.path == catalog.summary.root else target.path
    for path, row in catalog.files(below):
        yield path, row.version, row.size


def _say_result(target: Target, done: Everywhere, as_json: bool) -> None:
    if as_json:
        say_json(
            {
                "origin": target.url,
                "objects": done.objects,
                "bytes": done.size,
                "failed": done.failures,
                "failures": [{"path": path, "reason": reason} for path, _, reason in done.failed],
                "nodes": [
                    {
                        "host": host.host,
                        "node": host.node,
                        "cache": host.cache,
                        "objects": host.objects,
                        "bytes": host.size,
                        "gone": host.gone,
                    }
                    for host in done.hosts
                ],
            }
        )
        return
    failed = f"; {done.failures:,} failed" if done.failures else ""
    say(f"{target.url}: {count(done.objects, 'object')}, {format_size(done.size)} on {len(done.hosts)} nodes{failed}")
    for line in table([(host.node or host.host, f"{host.objects:,}", format_size(host.size)) for host in done.hosts]):
        say(line)
    for host in done.hosts:
        if host.gone:
            complain(f"{host.node or host.host}: {host.gone}")
    say_failures([(path, reason) for path, _, reason in done.failed], done.failures, "failed")
