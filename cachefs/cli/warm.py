"""`cachefs warm`: fetch ahead, a whole dataset or a list of its files."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cachefs.cli import exits
from cachefs.cli.engines import SchedulerOption
from cachefs.cli.fetcher import remark_on_settings
from cachefs.cli.options import (
    CacheDirOption,
    JsonOption,
    MinFreeOption,
    OriginArgument,
    OriginOptionOption,
    SizeOption,
    TenantOption,
)
from cachefs.cli.output import OnProgress, ago, complain, count, progress_bar, say, say_failures, say_json
from cachefs.cli.target import Target, open_catalog, target_of
from cachefs.config import format_size
from cachefs.datasets import DatasetRecord
from cachefs.errors import ConfigError, ObjectNotFound

if TYPE_CHECKING:
    from cachefs.client import Connection
    from cachefs.messages import Done, Progress

# Paths travel to the fetcher in packets of at most MAX_PACKET (96 KiB); MessagePack adds at most 5 bytes to each.
BATCH_BYTES = 64 * 1024

# An S3 key has at most 1 KiB, a local path 4 KiB. What is longer is not a list of names.
NAME_BYTES = 16 * 1024


def warm(
    origin: OriginArgument,
    list_file: Annotated[
        str | None,
        typer.Option(
            "--list",
            metavar="FILE",
            show_default=False,
            help="Fetch only the objects and directories named in FILE, one per "
            "line: URLs, object paths, or names relative to ORIGIN. - reads standard input.",
        ),
    ] = None,
    null: Annotated[
        bool, typer.Option("--null", "-0", help="Names in --list end with NUL, not newline (as from find -print0).")
    ] = False,
    pin: Annotated[
        bool, typer.Option("--pin", help="Pin the dataset too: it is not evicted for others (see cachefs pin).")
    ] = False,
    all_nodes: Annotated[
        bool,
        typer.Option("--all-nodes", help="On every machine of a Dask cluster (--scheduler), each its share."),
    ] = False,
    scheduler: SchedulerOption = None,
    cache_dir: CacheDirOption = None,
    size: SizeOption = None,
    min_free: MinFreeOption = None,
    origin_option: OriginOptionOption = None,
    tenant: TenantOption = None,
    as_json: JsonOption = False,
) -> None:
    """Fetch ORIGIN into the cache ahead of reading it.

    The first time, ORIGIN is listed and its names are kept (`cachefs refresh` lists again). What is cached
    already is not fetched again, so an interrupted warm goes on where it was. What does not fit into the
    cache is left out. Afterwards reads need no network.

    \b
      cachefs warm s3://bucket/imagenet
      cachefs warm s3://bucket/validation --pin
      cachefs warm s3://bucket/imagenet --list epoch-0.txt
      head -100 names.txt | cachefs warm s3://bucket/imagenet --list -
      cachefs warm s3://bucket/imagenet --all-nodes --scheduler tcp://head:8786
      cachefs warm s3://bucket/imagenet -o endpoint_url=http://minio:9000 -o key=@key.txt -o secret=@env:SECRET

    Exit code 1 when some objects could not be fetched; they are named.
    """  # fmt: skip
    if null and list_file is None:
        raise ConfigError("--null: says how names in --list FILE are separated; give --list too")
    target = target_of(origin, origin_option, cache_dir, size, min_free, tenant=tenant)
    if all_nodes:
        _refuse_with_all_nodes({"--list": list_file, "--pin": pin, "--size": size, "--min-free": min_free})
        from cachefs.cli.warm_everywhere import warm_all_nodes

        warm_all_nodes(target, origin_option, cache_dir, scheduler, as_json)
        return
    names = None if list_file is None else read_names(list_file, null=null)
    missing: list[tuple[str, str]] = []
    record = target.containing()
    with closing(target.connect(record.root if record is not None else target.path)) as connection:
        remark_on_settings(target.config, connection.status().status, min_free)
        if names is None:
            paths, total = _everything(target, record, connection)
        else:
            paths, missing = listed(target, record, names)
            total = len(paths)
        # Before it is fetched, so that nobody takes the room meanwhile; a dataset that nothing is known of has no
        # record to write that into until something of it is stored.
        if pin and (known := names is None or record is not None):
            connection.pin(connection.attach().dataset)
        with progress_bar(f"Warming {target.url}") as show:
            result = _fetch(connection, paths, total, show)
        if pin and not known:
            connection.pin(connection.attach().dataset)
    result.objects += len(missing)
    result.failures += len(missing)
    result.failed += missing
    _say_result(target, result, pin, as_json)
    if result.failures:
        raise exits.Unfinished(exits.FAILURES)


def _refuse_with_all_nodes(options: dict[str, object]) -> None:
    for name, value in options.items():
        if value:
            raise ConfigError(f"{name}: not with --all-nodes; the settings of each node's cache are its own")


@dataclass
class Warmed:
    """What the batches of one command have done so far. objects: tried, whether or not they could be fetched."""

    objects: int = 0
    bytes: int = 0
    failures: int = 0
    failed: list[tuple[str, str]] = field(default_factory=list)

    @property
    def fetched(self) -> int:
        return self.objects - self.failures

    def add(self, done: Done) -> None:
        self.objects += done.count
        self.bytes += done.bytes
        self.failures += done.failed_total
        self.failed += done.failed


def _everything(target: Target, record: DatasetRecord | None, connection: Connection) -> tuple[list[str] | None, int]:
    """What to fetch when no list was given, and how many: the paths of a part, or None = the whole dataset."""
    from cachefs.catalog import Catalog

    catalog = open_catalog(target.config, record) if record is not None else None
    if catalog is None:
        if record is not None:
            complain(f"{target.url}: its list of names was damaged; listing it again")
        with progress_bar(f"Listing {target.url}") as show:
            catalog = Catalog.open(Path(connection.make_catalog(progress=show).file))
    with catalog:
        if catalog.summary.root == target.path:
            return None, catalog.summary.files
        if catalog.find(target.path) is None:
            raise ObjectNotFound(
                f"{target.url}: was not there when {catalog.summary.root or 'its origin'} was listed "
                f"({ago(catalog.summary.created)}); `cachefs refresh {target.url}` looks again"
            )
        paths = [path for path, _ in catalog.files(target.path)]
        return paths, len(paths)


def listed(target: Target, record: DatasetRecord | None, names: list[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """Object paths of what a list names, directories with all that is below, and (path, why) of what is not there."""
    paths = [object_path(name, target) for name in names]
    catalog = open_catalog(target.config, record) if record is not None else None
    if catalog is None:
        return paths, []  # nothing is known of the names; the origin will say
    found: list[str] = []
    missing: list[tuple[str, str]] = []
    with catalog:
        for path in paths:
            row = catalog.find(path)
            if row is None:
                missing.append((path, f"{path}: was not there when the dataset was listed (`cachefs refresh`)"))
            elif row.directory:
                found += (file for file, _ in catalog.files(path))
            else:
                found.append(path)
    return found, missing


def _fetch(connection: Connection, paths: list[str] | None, total: int, show: OnProgress) -> Warmed:
    result = Warmed()
    if paths is None:
        result.add(connection.warm(progress=show))
        return result
    for batch in batches(paths):
        result.add(connection.warm(batch, progress=_after(result.objects, result.bytes, total, show)))
    return result


def _after(objects: int, size: int, total: int, show: OnProgress) -> OnProgress:
    """Shows a batch's progress as that of the whole, of which so much is done."""

    def shifted(progress: Progress) -> None:
        done, so_far = objects + progress.done, size + progress.bytes
        show(type(progress)(id=progress.id, done=done, total=total, bytes=so_far, what=progress.what))

    return shifted


def _say_result(target: Target, result: Warmed, pinned: bool, as_json: bool) -> None:
    if as_json:
        say_json(
            {
                "origin": target.url,
                "objects": result.fetched,
                "bytes": result.bytes,
                "pinned": pinned,
                "failed": result.failures,
                "failures": [{"path": path, "reason": reason} for path, reason in result.failed],
            }
        )
        return
    size = f", {format_size(result.bytes)}" if result.bytes else ""  # unknown where there is no list of names
    failed = f"; {result.failures:,} failed" if result.failures else ""
    say(f"{target.url}: {count(result.fetched, 'object')}{size}{failed}{'; pinned' if pinned else ''}")
    say_failures(result.failed, result.failures, "failed")


# --- lists of names ---


def read_names(file: str, *, null: bool) -> list[str]:
    """The names in a file ("-" = standard input), empty ones left out. Raises ConfigError."""
    try:
        if file == "-":
            data = sys.stdin.buffer.read()
        else:
            with open(os.path.expanduser(file), "rb") as stream:
                data = stream.read()
    except OSError as error:
        raise ConfigError(f"--list {file}: cannot be read ({error.strerror})") from None
    names = data.split(b"\0") if null else data.splitlines()
    return [checked_name(raw, number, f"--list {file}") for number, raw in enumerate(names, 1) if raw]


def checked_name(raw: bytes, number: int, file: str) -> str:
    """The name that is written in a file of names. Raises ConfigError."""
    try:
        name = raw.decode()
    except UnicodeDecodeError:
        raise ConfigError(f"{file}: name {number} is not UTF-8") from None
    if len(raw) > NAME_BYTES or "\0" in name:
        raise ConfigError(f"{file}: name {number} is no name of an object; if its names end with NUL, add -0")
    return name


def object_path(name: str, target: Target) -> str:
    """The object path of a name in a list: a URL, an object path at or below ORIGIN, or relative to ORIGIN."""
    if "://" in name:
        from cachefs.origin.spec import ALIASES, parse_origin

        scheme = name.partition("://")[0].lower()
        if ALIASES.get(scheme, scheme) == target.spec.protocol or "::" in name:
            return parse_origin(name, {})[1]
    root = target.path
    if not root or name == root or name.startswith(root.rstrip("/") + "/"):
        return name
    return f"{root.rstrip('/')}/{name}"


def batches(paths: Iterable[str]) -> Iterator[list[str]]:
    """Cut into lists that fit into one packet each."""
    batch: list[str] = []
    size = 0
    for path in paths:
        length = len(path.encode()) + 5
        if batch and size + length > BATCH_BYTES:
            yield batch
            batch, size = [], 0
        batch.append(path)
        size += length
    if batch:
        yield batch
