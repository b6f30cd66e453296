"""The settings of a cache, from whichever place its user gives them.

A cache is one or several directories (one per SSD). The first is its *home*: index, catalogs and the fetcher's
socket live there; all of them hold blobs. Settings come from the caller (mount flags, fsspec options), then the
environment (CACHEFS_DIR, CACHEFS_SIZE, CACHEFS_MIN_FREE, CACHEFS_FETCHER, CACHEFS_TENANT), then the defaults below.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from cachefs.errors import ConfigError

# A fetcher started on demand outlives its last client by this long, so that the next job finds it warm.
DEFAULT_IDLE_SECONDS = 60.0

# The longest a reader waits for bytes before it gets an error: origin retries (60 s) twice over.
DEFAULT_DEADLINE_SECONDS = 120.0

_UNITS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4, "P": 5}
_TENANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGTP]?)(I?B?)\s*", re.IGNORECASE)


def parse_size(text: str | int) -> int:
    """Bytes of "200G", "1.5TiB", "500MB" or 4096. Units are powers of 1024, as `du -h` and `df -h` have them.

    Raises ConfigError for anything else.
    """
    if isinstance(text, int):
        if text < 0:
            raise ConfigError(f"size {text}: must not be negative")
        return text
    match = _SIZE.fullmatch(text)
    if match is None or (match[3].upper() == "I"):
        raise ConfigError(f"size {text!r}: write a number and a unit, such as 500M, 200G or 1.5T")
    return int(float(match[1]) * 1024 ** _UNITS[match[2].upper()])


def checked_tenant(name: str) -> str:
    """The name of a tenant, or "" for none. Raises ConfigError for what is none."""
    if name and _TENANT.fullmatch(name) is None:
        raise ConfigError(f"tenant {name!r}: up to 63 letters, digits and . _ - (first a letter or digit) are a name")
    return name


def format_size(count: float) -> str:
    """1536 -> "1.5 KiB": the largest binary unit that leaves at least 1."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(value) < 1024 or unit == "TiB":
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    raise AssertionError("unreachable")


@dataclass(frozen=True)
class Floor:
    """Bytes of the disk that the cache leaves free for others: an amount, or a share of the file system."""

    bytes: int = 0
    share: float = 0.0

    @classmethod
    def parse(cls, text: str | int | Floor) -> Floor:
        """From "20%", "50G" or a number of bytes. Raises ConfigError."""
        if isinstance(text, Floor):
            return text
        if isinstance(text, str) and text.strip().endswith("%"):
            try:
                share = float(text.strip()[:-1]) / 100
            except ValueError:
                share = -1.0
            if not 0 <= share < 1:
                raise ConfigError(f"min_free {text!r}: a percentage is from 0% to 99%")
            return cls(share=share)
        return cls(bytes=parse_size(text))

    def of(self, total: int) -> int:
        """Bytes to leave free on a file system of `total` bytes."""
        return max(self.bytes, int(self.share * total))

    def __str__(self) -> str:
        return f"{self.share * 100:g}%" if self.share else str(self.bytes)


# A node that runs Kubernetes evicts pods when its image file system has less than 15% free (kubelet's default
# hard eviction threshold imagefs.available), so the cache stops well before: 20% stay free.
DEFAULT_MIN_FREE = Floor(share=0.20)


@dataclass(frozen=True)
class CacheConfig:
    """Where a cache is and how large it may grow. Equal configurations mean the same cache.

    dirs: cache directories, the first is the home. size: bytes over all directories, None = up to the floor.
    min_free: left free on each file system. idle: seconds after which a fetcher without clients exits.
    deadline: seconds a read may wait. fetcher: "auto" starts one on demand, "inprocess" fetches in this
    process, "require" only uses a running one. tenant: whose the datasets are that are read with it, "" = nobody's.
    """

    dirs: tuple[Path, ...]
    size: int | None = None
    min_free: Floor = DEFAULT_MIN_FREE
    idle: float = DEFAULT_IDLE_SECONDS
    deadline: float = DEFAULT_DEADLINE_SECONDS
    fetcher: str = "auto"
    tenant: str = ""

    @property
    def home(self) -> Path:
        return self.dirs[0]

    @classmethod
    def make(
        cls,
        dirs: str | os.PathLike[str] | Iterable[str | os.PathLike[str]] | None = None,
        *,
        size: str | int | None = None,
        min_free: str | int | Floor | None = None,
        idle: float | None = None,
        deadline: float | None = None,
        fetcher: str | None = None,
        tenant: str | None = None,
    ) -> CacheConfig:
        """Fill in what is not given from the environment and the defaults. Raises ConfigError."""
        environ = os.environ
        if dirs is None:
            dirs = environ.get("CACHEFS_DIR", "").split(os.pathsep) if environ.get("CACHEFS_DIR") else ()
        elif isinstance(dirs, (str, os.PathLike)):
            dirs = (dirs,)
        paths = tuple(Path(os.path.abspath(os.path.expanduser(d))) for d in dirs) or (default_cache_dir(),)
        if len(set(paths)) != len(paths):
            raise ConfigError("cache directories: one is given twice: " + ", ".join(map(str, paths)))
        size = size if size is not None else environ.get("CACHEFS_SIZE")
        min_free = min_free if min_free is not None else environ.get("CACHEFS_MIN_FREE", DEFAULT_MIN_FREE)
        mode = fetcher or environ.get("CACHEFS_FETCHER", "auto")
        if mode not in ("auto", "inprocess", "require"):
            raise ConfigError(f"fetcher {mode!r}: choose auto, inprocess or require")
        return cls(
            dirs=paths,
            size=None if size is None else parse_size(size),
            min_free=Floor.parse(min_free),
            idle=float(environ.get("CACHEFS_IDLE", DEFAULT_IDLE_SECONDS)) if idle is None else float(idle),
            deadline=DEFAULT_DEADLINE_SECONDS if deadline is None else float(deadline),
            fetcher=mode,
            tenant=checked_tenant(environ.get("CACHEFS_TENANT", "") if tenant is None else tenant),
        )


def default_cache_dir() -> Path:
    """$XDG_CACHE_HOME/cachefs, for root /var/cache/cachefs (the places of the XDG and FHS standards)."""
    if os.geteuid() == 0 and "XDG_CACHE_HOME" not in os.environ:
        return Path("/var/cache/cachefs")
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "cachefs"


def runtime_dir() -> Path:
    """The directory (mode 0700, ours) for what lives as long as the machine runs: records of mounts.

    $CACHEFS_RUNTIME_DIR, else /run/cachefs for root, else $XDG_RUNTIME_DIR/cachefs, else /tmp/cachefs-<uid>.
    Raises ConfigError when someone else owns it or may write into it.
    """
    uid = os.geteuid()
    if override := os.environ.get("CACHEFS_RUNTIME_DIR"):
        path = Path(override)
    elif uid == 0:
        path = Path("/run/cachefs")
    elif base := os.environ.get("XDG_RUNTIME_DIR"):
        path = Path(base) / "cachefs"
    else:
        path = Path(f"/tmp/cachefs-{uid}")  # noqa: S108 - owner and mode are checked below
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    info = path.lstat()
    if not stat.S_ISDIR(info.st_mode) or info.st_uid != uid or info.st_mode & 0o022:
        raise ConfigError(f"{path}: must be a directory of uid {uid} that nobody else may write to")
    return path
