"""Whether the cache's directories are fit: kind of file system, rights, room, and who fills them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

from cachefs.cli.fetcher import running_fetcher
from cachefs.cli.findings import FAIL, OK, WARN, Finding
from cachefs.config import CacheConfig, format_size
from cachefs.errors import FetcherError
from cachefs.mountinfo import mount_of
from cachefs.store.layout import FORMAT, MARKER

# Storage behind a network is what a cache is there to avoid; fuse.* may be anything, and is treated as such.
_NETWORK = frozenset(
    {"nfs", "nfs4", "cifs", "smb3", "ceph", "lustre", "9p", "glusterfs", "beegfs", "gpfs", "afs", "ocfs2", "gfs2"}
)
_MEMORY = frozenset({"tmpfs", "ramfs"})
_NO_HARD_LINKS = frozenset({"vfat", "msdos", "exfat"})
_NO_STORAGE = frozenset({"proc", "sysfs", "cgroup", "cgroup2", "devpts", "devtmpfs", "mqueue", "debugfs", "tracefs"})

CHOOSE = "choose a directory on a local SSD (--cache-dir, CACHEFS_DIR)"

# One inode per blob, one for its dataset's directories; fewer than this are used up by any dataset of images.
INODES_WANTED = 10_000


def cache(config: CacheConfig) -> Iterator[Finding]:
    for directory in config.dirs:
        yield from _directory(directory, config)
    yield from _fetcher(config)


def _directory(directory: Path, config: CacheConfig) -> Iterator[Finding]:
    subject = f"cache {directory}"
    if directory.is_dir():
        yield from _format(subject, directory)
    present = _nearest(directory)
    if not os.access(present, os.W_OK | os.X_OK):
        which = "is" if present == directory else f"does not exist, and {present} is"
        yield Finding(FAIL, subject, f"{which} not writable for uid {os.geteuid()}", f"make it writable, or {CHOOSE}")
        return
    yield _kind(subject, present)
    yield from _room(subject, present, config)
    if present == directory:
        yield from _hard_links(subject, directory)


def _nearest(directory: Path) -> Path:
    """The directory itself, or what exists above it."""
    path = Path(os.path.realpath(directory))
    while not path.is_dir():
        path = path.parent
    return path if path != Path(os.path.realpath(directory)) else directory


def _format(subject: str, directory: Path) -> Iterator[Finding]:
    try:
        version = json.loads((directory / MARKER).read_bytes())["format"]
    except FileNotFoundError:
        return
    except (OSError, ValueError, KeyError, TypeError) as error:
        yield Finding(FAIL, subject, f"its {MARKER} cannot be read ({error})", f"remove the directory, or {CHOOSE}")
        return
    if version != FORMAT:
        advice = f"use the cachefs that wrote it, or {CHOOSE}"
        yield Finding(FAIL, subject, f"has format {version}; this cachefs knows {FORMAT}", advice)


def _kind(subject: str, present: Path) -> Finding:
    mount = mount_of(Path(os.path.realpath(present)))
    if mount is None:
        return Finding(WARN, subject, "lies on a file system that cannot be determined", CHOOSE)
    where = f"on {mount.fstype} ({mount.mountpoint})"
    if mount.fstype in _NO_STORAGE:
        return Finding(FAIL, subject, f"{where}: not a place for files", CHOOSE)
    if mount.fstype in _NO_HARD_LINKS:
        return Finding(FAIL, subject, f"{where}: no hard links", CHOOSE)
    if mount.fstype in _NETWORK or mount.fstype.startswith("fuse"):
        return Finding(WARN, subject, f"{where}: not a local disk", CHOOSE)
    if mount.fstype in _MEMORY:
        return Finding(WARN, subject, f"{where}: takes memory, and is lost at a restart", CHOOSE)
    if mount.fstype == "overlay":
        return Finding(
            WARN, subject, f"{where}: ends with the container", "mount a volume of the node's SSD for the cache"
        )
    return Finding(OK, subject, where)


def _room(subject: str, present: Path, config: CacheConfig) -> Iterator[Finding]:
    info = os.statvfs(present)
    total, free = info.f_blocks * info.f_frsize, info.f_bavail * info.f_frsize
    floor = config.min_free.of(total)
    fact = f"{format_size(free)} of {format_size(total)} free, {format_size(floor)} stay free for others"
    if free <= floor:
        yield Finding(WARN, subject, f"{fact}: no room to cache", "free some space, or lower --min-free")
    elif config.size is not None and config.size > free - floor:
        fact += f", less than the {format_size(config.size)} of --size"
        yield Finding(WARN, subject, fact, "free some space, or lower --size; what does not fit streams through")
    else:
        yield Finding(OK, subject, fact)
    if info.f_files and info.f_favail < INODES_WANTED:
        yield Finding(
            WARN, subject, f"only {info.f_favail:,} inodes free", "each cached object takes one: remove small files"
        )


def _hard_links(subject: str, directory: Path) -> Iterator[Finding]:
    """Tries it, with a file that is gone again at once."""
    folder = directory / "tmp" if (directory / "tmp").is_dir() else directory
    file, link = folder / f"doctor-{os.getpid()}", folder / f"doctor-{os.getpid()}.link"
    try:
        file.touch(mode=0o600)
        try:
            os.link(file, link)
            link.unlink()
        finally:
            file.unlink()
    except OSError as error:
        yield Finding(FAIL, subject, f"cannot be written with hard links ({error.strerror})", CHOOSE)
    else:
        yield Finding(OK, subject, "can be written, hard links work")


def _fetcher(config: CacheConfig) -> Iterator[Finding]:
    try:
        status = running_fetcher(config)
    except FetcherError as error:
        yield Finding(
            FAIL, "fetcher", str(error), f"end it (pid in {config.home}/run/fetcher.lock); the next starts by itself"
        )
        return
    if status is None:
        yield Finding(OK, "fetcher", "not running; it is started when something must be fetched")
        return
    yield Finding(OK, "fetcher", f"pid {status['pid']} answers")
    for directory, why in status["out"].items():
        yield Finding(FAIL, f"cache {directory}", f"taken out of use: {why}", "check the disk; the others go on")
