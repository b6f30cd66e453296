"""Which mounts this user has: one small JSON file per mount in the runtime directory.

The keeper writes its mount's record when the mount is usable and removes it when the mount is gone. A keeper that
was killed leaves its record behind; it is known by the process's start time, since pids come again. The record holds
all that another keeper needs to look after the mount instead, but for descriptors and secrets.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

import msgspec

from cachefs import mountinfo
from cachefs.client.session import Session
from cachefs.config import CacheConfig, Floor
from cachefs.errors import ConfigError, MountError
from cachefs.mountpoints import records_folder
from cachefs_sidecar import mounts


@dataclass(frozen=True)
class MountSettings:
    """What to mount, and how.

    catalog: the dataset's catalog file. dataset: its id (digest.dataset_id). session: how the fetcher reaches the
    origin; may hold credentials, which travel to the keeper through a pipe and are shown nowhere. origin: the URL as
    `mount` and `cachefs status` show it, without secrets. workers: processes that answer, None = as many as pay.
    allow_other: whether other users may enter, None = yes for root. uid, gid: who owns the files, None = who mounts.
    notes: JSON that the caller wants back in MountInfo (no secrets). io: "auto", "open-free" or "passthrough", see
    fuse/modes.py.
    """

    mountpoint: Path
    catalog: Path
    dataset: str
    cache: CacheConfig
    session: Session
    origin: str
    workers: int | None = None
    allow_other: bool | None = None
    uid: int | None = None
    gid: int | None = None
    notes: Mapping[str, Any] = field(default_factory=dict)
    io: str = "auto"

    def worker_count(self) -> int:
        """A worker waits for the disk while it reads a cold file, so there are more than cores. Each takes 7 MB;
        more than eight keep no disk busier, and the more there are, the colder each one's caches."""
        return self.workers or min(8, 3 * (os.cpu_count() or 1))


def encode_settings(settings: MountSettings) -> bytes:
    """For the pipe to the keeper. Raises ConfigError, MountError when the origin cannot be reached from there."""
    cache, session = settings.cache, settings.session
    if session.local:
        raise MountError(
            f"{settings.origin}: only the process that made this file system can read it, so it cannot be mounted"
        )
    plain = {
        "mountpoint": str(settings.mountpoint),
        "catalog": str(settings.catalog),
        "dataset": settings.dataset,
        "cache": {
            "dirs": [str(d) for d in cache.dirs],
            "size": cache.size,
            "min_free": [cache.min_free.bytes, cache.min_free.share],
            "idle": cache.idle,
            "deadline": cache.deadline,
            "fetcher": cache.fetcher,
            "tenant": cache.tenant,
        },
        "session": {
            "protocol": session.protocol,
            "options": dict(session.options),
            "environ": dict(session.environ),
            "redacted": session.redacted,
            "root": session.root,
            "snapshot": session.snapshot,
            **({"tenant": session.tenant} if session.tenant else {}),
        },
        "origin": settings.origin,
        "workers": settings.workers,
        "allow_other": settings.allow_other,
        "uid": settings.uid,
        "gid": settings.gid,
        "notes": dict(settings.notes),
        "io": settings.io,
    }
    try:
        return msgspec.msgpack.encode(plain)
    except (TypeError, ValueError, OverflowError) as error:
        raise ConfigError(
            f"an origin option cannot be passed to the mount ({error}); use text, numbers, lists and mappings"
        ) from error


def decode_settings(data: bytes) -> MountSettings:
    """Raises MountError when the pipe broke off."""
    try:
        plain = msgspec.msgpack.decode(data)
        cache = plain["cache"]
        bytes_free, share_free = cache["min_free"]
        config = CacheConfig(
            dirs=tuple(Path(d) for d in cache["dirs"]),
            size=cache["size"],
            min_free=Floor(bytes_free, share_free),
            idle=cache["idle"],
            deadline=cache["deadline"],
            fetcher=cache["fetcher"],
            tenant=cache.get("tenant", ""),
        )
        # What a keeper of an older version does not know is left out, and has its default here.
        optional = ("workers", "allow_other", "uid", "gid", "notes", "io")
        rest = {key: plain[key] for key in optional if key in plain}
        return MountSettings(
            mountpoint=Path(plain["mountpoint"]),
            catalog=Path(plain["catalog"]),
            dataset=plain["dataset"],
            origin=plain["origin"],
            cache=config,
            session=Session(**plain["session"]),
            **rest,
        )
    except (msgspec.DecodeError, KeyError, TypeError, ValueError) as error:
        raise MountError("the settings of the mount did not arrive whole") from error


@dataclass(frozen=True)
class MountInfo:
    """A mount as its record tells it. pid: the keeper's. started: when it was mounted, in seconds since the epoch.

    ticks: the keeper's start in clock ticks since boot. control: its socket. log: where its messages go, "" = stderr.
    device: of the mount, as mountinfo writes it. catalogs: all that are served, newest first. minor, flags: what was
    agreed on with the kernel (fuse.negotiation.Agreement).
    io: "open-free" or "passthrough" as it was when mounted, io_why: why so. opens: the table of open files, "" = none.
    """

    mountpoint: str
    origin: str
    dataset: str
    root: str
    dirs: tuple[str, ...]
    catalog: str
    pid: int
    ticks: int
    control: str
    workers: int
    started: float
    log: str = ""
    notes: Mapping[str, Any] = field(default_factory=dict)
    device: str = ""
    catalogs: tuple[str, ...] = ()
    minor: int = 0
    flags: int = 0
    io: str = "open-free"
    io_why: str = ""
    opens: str = ""

    @property
    def home(self) -> str:
        return self.dirs[0]

    @property
    def alive(self) -> bool:
        """Whether the keeper runs. Without it a mount works on, but is not looked after."""
        return start_ticks(self.pid) == self.ticks


def start_ticks(pid: int) -> int:
    """When a process started, in clock ticks since boot; 0 = there is none, or it has ended and is not reaped."""
    try:
        raw = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return 0
    # The name in parentheses may hold anything, spaces and parentheses too; the fields behind it are counted from 3.
    fields = raw[raw.rindex(b")") + 2 :].split()
    return 0 if fields[0] in (b"Z", b"X") else int(fields[19])


def folder() -> Path:
    """Where records and control sockets are. Raises ConfigError."""
    path = records_folder()
    path.mkdir(mode=0o700, exist_ok=True)
    return path


def name_of(mountpoint: Path) -> str:
    """What a mount's files are called."""
    return blake2b(os.fsencode(mountpoint), digest_size=8).hexdigest()


def record_file(mountpoint: Path) -> Path:
    return folder() / f"{name_of(mountpoint)}.json"


@contextlib.contextmanager
def short_address(path: Path) -> Iterator[str]:
    """An address for a socket file of any depth: a socket address holds 107 bytes, so it goes by a descriptor."""
    directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{directory}/{path.name}"
    finally:
        os.close(directory)


@contextlib.contextmanager
def starting(timeout: float) -> Iterator[None]:
    """One mount of this user is started at a time, else two could be put on one another. Raises MountError."""
    lock = os.open(folder() / "start.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    deadline = time.monotonic() + timeout
    try:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise MountError(f"another mount has been starting for {timeout:g} s; try again") from None
                time.sleep(0.01)
        yield
    finally:
        # Not by closing alone: a keeper in the foreground has forked workers meanwhile, which have it open too.
        fcntl.flock(lock, fcntl.LOCK_UN)
        os.close(lock)


def control_path(mountpoint: Path, pid: int) -> Path:
    """The control socket of the keeper `pid`: while one keeper follows another there are two."""
    return folder() / f"{name_of(mountpoint)}-{pid}.sock"


def opens_path(mountpoint: Path, pid: int) -> Path:
    """The table of open files (fuse/opens.py) of a mount that the keeper `pid` made. Its heirs go on with it."""
    return folder() / f"{name_of(mountpoint)}-{pid}.opens"


def save(info: MountInfo) -> None:
    file = record_file(Path(info.mountpoint))
    temporary = file.with_suffix(f".{os.getpid()}")
    temporary.write_text(json.dumps(asdict(info)))
    os.replace(temporary, file)


def as_info(raw: Mapping[str, Any]) -> MountInfo:
    """Of the fields in `raw`, whatever else another version put there. Raises KeyError, TypeError."""
    known = {name: raw[name] for name in MountInfo.__dataclass_fields__ if name in raw}
    for name in ("dirs", "catalogs"):
        known[name] = tuple(known.get(name, ()))
    return MountInfo(**known)


def remove(info: MountInfo) -> None:
    """Remove a mount's record and socket; the record only if it is still this keeper's."""
    Path(info.control).unlink(missing_ok=True)
    present = load(Path(info.mountpoint))
    if present is not None and (present.pid, present.ticks) == (info.pid, info.ticks):
        record_file(Path(info.mountpoint)).unlink(missing_ok=True)


def load(mountpoint: Path) -> MountInfo | None:
    """The record of a mount point, whether or not its keeper still runs."""
    return _read(record_file(mountpoint))


def _read(file: Path) -> MountInfo | None:
    try:
        return as_info(json.loads(file.read_text()))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def list_mounts() -> list[MountInfo]:
    """The mounts of this user, by mount point. What a killed keeper left behind is removed, unless its mount lives."""
    found = []
    mounted = {m.mountpoint for m in mountinfo.mounts() if m.fstype == mounts.FSTYPE}
    for file in sorted(folder().glob("*.json")):
        info = _read(file)
        if info is None:
            file.unlink(missing_ok=True)
        elif info.alive or (info.mountpoint in mounted and not mounts.is_dead(Path(info.mountpoint))):
            found.append(info)
        else:
            remove(info)
    return sorted(found, key=lambda info: info.mountpoint)
