"""`cachefs status`: what is cached where, who fills it, what is mounted. Starts nothing and changes nothing."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from cachefs import datasets
from cachefs.cli.charged import charges, tenant_lines, used_of
from cachefs.cli.charged import tenants as _tenants
from cachefs.cli.fetcher import running_fetcher
from cachefs.cli.mounted import mounts
from cachefs.cli.options import CacheDirOption, JsonOption, OriginOptionOption, cache_config
from cachefs.cli.output import ago, count, printable, say, say_json, table
from cachefs.cli.target import Target, open_catalog, target_of
from cachefs.config import CacheConfig, Floor, format_size
from cachefs.datasets import DatasetRecord
from cachefs.errors import FetcherError, MountError


def status(
    cache_dir: CacheDirOption = None,
    skipped: Annotated[
        str | None,
        typer.Option(
            "--skipped",
            metavar="ORIGIN",
            show_default=False,
            help="List what of ORIGIN is not served, and why (names that no file system can have).",
        ),
    ] = None,
    origin_option: OriginOptionOption = None,
    as_json: JsonOption = False,
) -> None:
    """What is cached, who fills it, and what is mounted.

    \b
      cachefs status
      cachefs status --json | jq .cache.used
      cachefs status --skipped s3://bucket/imagenet
    """  # fmt: skip
    if skipped is not None:
        _say_skipped(target_of(skipped, origin_option, cache_dir), as_json)
        return
    config = cache_config(cache_dir, require=True)
    fetcher, trouble = _fetcher(config)
    charged = charges(config, fetcher)
    report = {
        "cache": _cache(config, fetcher),
        "fetcher": _fetcher_report(fetcher),
        "datasets": [_dataset(config, record, charged) for record in datasets.load_all(config.home)],
        "tenants": _tenants(config, charged),
        "mounts": _mounts(),
        "consumers": (fetcher or {}).get("consumers", []),
    }
    if as_json:
        say_json(report)
    else:
        for line in _lines(report):
            say(line)
    if trouble:
        raise FetcherError(trouble)


# --- gathering ---


def _fetcher(config: CacheConfig) -> tuple[dict[str, Any] | None, str]:
    """What the fetcher says (None: none runs, or it does not answer), and what is wrong with it ("": nothing)."""
    try:
        return running_fetcher(config), ""
    except FetcherError as error:
        return None, error.message


def _fetcher_report(status: dict[str, Any] | None) -> dict[str, Any]:
    if status is None:
        return {"running": False}
    kept = ("pid", "started", "connections", "size", "min_free", "counters", "memory")
    return {"running": True} | {name: status[name] for name in kept if name in status}  # it may be of another version


def _cache(config: CacheConfig, fetcher: dict[str, Any] | None) -> dict[str, Any]:
    """size and used in bytes. The fetcher knows them; without one the files are counted."""
    from cachefs.fetcher.settings import remembered_size

    dirs = [Path(d) for d in fetcher["dirs"]] if fetcher is not None else list(config.dirs)
    size = fetcher["size"] if fetcher is not None else remembered_size(config.home)
    floor = Floor.parse(fetcher["min_free"]) if fetcher is not None else config.min_free
    out = fetcher["out"] if fetcher is not None else {}
    silent = fetcher.get("silent", []) if fetcher is not None else []  # it may be of an older version
    known = fetcher is not None and fetcher["scanned"]
    used = fetcher["used"] if fetcher is not None and known else sum(_stored_bytes(d) for d in dirs)
    return {
        "home": str(config.home),
        "exists": config.home.is_dir(),
        "used": used,
        "size": size,
        "min_free": str(floor),
        "dirs": [_directory(d, floor, out.get(str(d), "")) | {"follows_use": str(d) not in silent} for d in dirs],
    }


def _directory(path: Path, floor: Floor, out: str) -> dict[str, Any]:
    try:
        info = os.statvfs(path)
    except OSError as error:
        return {"path": str(path), "problem": out or error.strerror}
    total = info.f_blocks * info.f_frsize
    free = info.f_bavail * info.f_frsize
    return {"path": str(path), "free": free, "total": total, "floor": floor.of(total), "problem": out}


def _stored_bytes(directory: Path) -> int:
    """Bytes allocated to blobs and incomplete objects."""
    from cachefs.store.layout import Places

    places = Places(directory)
    used = 0
    for folder in (places.blobs, places.parts):
        for at, _, names in os.walk(folder):  # a directory that is not there is an empty one
            for name in names:
                try:
                    used += os.lstat(os.path.join(at, name)).st_blocks * 512  # stat(2): units of 512 bytes
                except FileNotFoundError:
                    continue  # evicted while we count
    return used


def _dataset(config: CacheConfig, record: DatasetRecord, charged: dict[str, int | None]) -> dict[str, Any]:
    report: dict[str, Any] = {
        "id": record.id,
        "origin": record.identity,
        "root": record.root,
        "snapshot": record.snapshot,
        "last_use": datasets.last_use(config.home, record.id),
        "pinned": record.pinned,
        "tenant": record.tenant,
        "quota": record.quota,
        "used": charged.get(record.id),
        "catalog": str(datasets.catalog_file(config.home, record) or ""),
        "problem": "",
    }
    if not record.catalog:
        return report
    catalog = open_catalog(config, record)
    if catalog is None:
        return report | {"problem": "its catalog cannot be used; it is listed again at the next mount or warm"}
    with catalog:
        summary = catalog.summary
    return report | {
        "files": summary.files,
        "directories": summary.directories,
        "bytes": summary.bytes,
        "skipped": summary.skipped,
        "listed": summary.created,
    }


def _mounts() -> list[dict[str, Any]]:
    reports = []
    for mount in mounts().all():
        report: dict[str, Any] = {
            "mountpoint": mount.mountpoint,
            "origin": mount.origin,
            "dataset": mount.dataset,
            "cache": mount.dirs[0],
            "problem": "" if mount.alive else "its keeper is gone; reads work until a worker ends: mount it again",
        }
        if mount.alive:
            try:
                report |= mounts().details(mount)
            except MountError as error:
                report["problem"] = error.message
        reports.append(report)
    return reports


# --- showing ---


def _lines(report: dict[str, Any]) -> list[str]:
    return [
        *_cache_lines(report["cache"]),
        *_fetcher_lines(report["fetcher"]),
        *_dataset_lines(report["datasets"]),
        *tenant_lines(report["tenants"]),
        *_mount_lines(report["mounts"]),
        *_consumer_lines(report["consumers"]),
    ]


def _cache_lines(cache: dict[str, Any]) -> list[str]:
    if not cache["exists"]:
        return [f"cache {cache['home']}: does not exist yet; the first mount, warm or read makes it"]
    limit = f"to {format_size(cache['size'])}" if cache["size"] is not None else f"until {_floor(cache)} are free"
    lines = [f"cache {cache['home']}: {format_size(cache['used'])} used, may grow {limit}"]
    for d in cache["dirs"]:
        if "free" not in d:
            lines.append(f"  {d['path']}: cannot be used ({d['problem']})")
            continue
        problem = f"; not used: {d['problem']}" if d["problem"] else ""
        free = f"{format_size(d['free'])} of {format_size(d['total'])} free"
        lines.append(f"  {d['path']}: {free}, {format_size(d['floor'])} stay free{problem}")
        if not d["follows_use"] and not problem:
            lines.append(
                "    its file system keeps no access times (noatime): within a dataset in use, what came first stays, "
                "even if other objects are read more often; mount it with relatime to change that"
            )
    return lines


def _floor(cache: dict[str, Any]) -> str:
    text = str(cache["min_free"])
    return text if text.endswith("%") else format_size(int(text))


def _fetcher_lines(fetcher: dict[str, Any]) -> list[str]:
    if not fetcher["running"]:
        return ["fetcher: not running (it is started when something must be fetched)"]
    counters = fetcher["counters"]
    clients = count(fetcher["connections"] - 1, "client")  # we are one
    lines = [
        f"fetcher: pid {fetcher['pid']}, started {ago(fetcher['started'])}, {clients}",
        f"  origin: {count(counters['origin_requests'], 'request')}, {format_size(counters['origin_bytes'])}, "
        f"{count(counters['origin_errors'], 'error')}",
        f"  asked for {counters['needs']:,}: {counters['stored']:,} were stored, {counters['streamed']:,} did not fit, "
        f"{counters.get('replaced', 0):,} gave their place to others",
        f"  readers found {counters.get('found', 0):,} on the disk without asking",
    ]
    if memory := fetcher.get("memory"):
        lines.append(
            f"  memory: {format_size(memory['in_flight'])} of at most {format_size(memory['in_flight_limit'])} in "
            f"flight, of {format_size(memory['usable'])} that may be used"
        )
    if counters["damaged"] or counters["store_errors"]:
        lines.append(f"  disk: {counters['damaged']:,} damaged, {count(counters['store_errors'], 'failed write')}")
    return lines


def _dataset_lines(found: Sequence[dict[str, Any]]) -> list[str]:
    if not found:
        return ["datasets: none"]
    rows = []
    for d in found:
        if "files" in d:
            what = f"{count(d['files'], 'file')}, {format_size(d['bytes'])}"
            what += f", {d['skipped']:,} skipped" if d["skipped"] else ""
            when = f"listed {time.strftime('%Y-%m-%d %H:%M', time.localtime(d['listed']))}"
        else:
            what, when = d["problem"] or "not listed", ""
        what += ", pinned" if d["pinned"] else ""
        what += f", tenant {d['tenant']}" if d["tenant"] else ""
        what += f", {used_of(d)}" if d["quota"] is not None else ""
        used = f"used {ago(d['last_use'])}" if d["last_use"] else ""
        rows.append((printable(d["root"]) or "(everything)", d["origin"], what, used, when))
    return ["datasets:", *table(rows)]


def _mount_lines(found: Sequence[dict[str, Any]]) -> list[str]:
    if not found:
        return ["mounts: none"]
    rows = []
    for m in found:
        workers = m.get("workers", [])
        state = m["problem"] or f"{count(len(workers), 'worker')}"
        if silent := sum(not w["answers"] for w in workers):
            state += f", {silent:,} of them busy or stuck"
        if not m["problem"] and (restarts := sum(w["restarts"] for w in workers)):
            state += f", restarted {restarts:,} times"
        if "io" in m:
            state += f"; {m['io']} ({m['io_why']})"
        rows.append((printable(m["mountpoint"]), printable(m["origin"]), state))
    return ["mounts:", *table(rows)]


def _consumer_lines(found: Sequence[dict[str, Any]]) -> list[str]:
    """Who gave hints: how far they are, and what holds them up. Nothing where nobody did."""
    lines = ["hints:"] if found else []
    for c in found:
        at = f"item {c['position']:,} of {c['end']:,}, {c['rate']:,.0f}/s"
        ahead = f"{c['ahead']:,} of {c['window']:,} ahead are ready"
        where = f"pid {c['pid']}" if c["pid"] else "in another container"  # the kernel has no number of it for us
        lines.append(f"  {printable(c['label']) or 'a program'} ({where}): {at}, {ahead}")
        late = f"{c['late']:,} reads came before their bytes and waited {c['waited']:,.1f} s in all"
        lines.append(
            f"    fetched ahead: {count(c['prefetched'], 'item')}, {format_size(c['prefetched_bytes'])}; {late}"
        )
        if c["failed"] or c["unknown"] or c["left_out"]:
            lines.append(
                f"    not fetched: {c['failed']:,} failed, {c['unknown']:,} are not in the dataset, "
                f"{c['left_out']:,} did not fit"
            )
        lines.append(f"    {c['bottleneck']}: {printable(c['says'])}")
    return lines


def _say_skipped(target: Target, as_json: bool) -> None:
    record = target.containing(any_endpoint=True)
    catalog = open_catalog(target.config, record) if record is not None else None
    if catalog is None:
        raise target.unknown()
    with catalog:
        found = list(catalog.skipped())
    if as_json:
        say_json([{"name": name, "reason": reason} for name, reason in found])
        return
    for name, reason in found:
        say(f"{printable(name)}: {reason}")
    if not found:
        say(f"{target.url}: nothing was skipped")
