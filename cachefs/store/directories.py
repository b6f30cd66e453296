"""The directories of one cache: which of them a key goes to, and what it means when one fails.

Rendezvous hashing: each directory scores each key, and a blob goes to the first in that order that has room; taking
a directory out moves only its own keys.

Full is a state that passes; the directory stays in. Failing is taken out until the next start: a disk that has
given one EIO on a write gives more, each after a time-out in the kernel that stalls whoever waits for the fetcher.
Nothing in it is found any more, so its objects are misses and fetched again into the others.
"""

from __future__ import annotations

import contextlib
import errno
import threading
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path
from types import TracebackType

from cachefs.config import CacheConfig, Floor, default_cache_dir
from cachefs.errors import CacheError, CacheFull, CacheUnusable
from cachefs.store.claim import claim, explain
from cachefs.store.folder import Folder
from cachefs.store.layout import Places

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})

_FAILING = frozenset(
    {
        errno.EIO,
        errno.ENODEV,  # the device is gone
        errno.ENXIO,
        errno.EROFS,  # ext4 turns read-only when its metadata is damaged
        errno.EUCLEAN,  # xfs and ext4: structure needs cleaning
        errno.EBADMSG,  # ext4: a checksum of metadata is wrong
        errno.ESHUTDOWN,  # xfs shut down
        errno.ESTALE,  # network storage went away
        errno.ETIMEDOUT,
        errno.ENOTCONN,  # a FUSE file system whose daemon died
        errno.EACCES,  # somebody changed modes or owners beneath us
        errno.EPERM,
        errno.ENOTDIR,
    }
)


class Directories:
    """Those in use, and those that are out. Any thread may call it."""

    def __init__(self, folders: list[Folder], out: dict[Path, str], floor: Floor) -> None:
        self.live = tuple(folders)  # replaced, never changed: whoever walks it needs no lock
        self._out = out
        self._floor = floor
        self._changes = threading.Lock()

    @classmethod
    def claim(cls, config: CacheConfig, seal: int) -> Directories:
        """Take possession of the directories of `config`. Raises CacheUnusable: see Store.open."""
        home = config.home
        try:
            # The default place lies in ~/.cache, which a fresh account does not have (XDG: create it).
            home_id, _ = claim(home, home_id=None, seal=seal, parents=home == default_cache_dir())
        except CacheUnusable:
            raise
        except OSError as error:
            raise explain(home, error) from error
        folders = [Folder(Places(home), home_id, seal)]
        out: dict[Path, str] = {}
        for path in config.dirs[1:]:
            try:
                id, _ = claim(path, home_id=home_id, seal=seal)
            except CacheUnusable:
                raise  # it must not be used at all, which is the user's to settle
            except OSError as error:
                out[path] = explain(path, error).message
            else:
                folders.append(Folder(Places(path), id, seal))
        return cls(folders, out, config.min_free)

    @property
    def out(self) -> dict[Path, str]:
        with self._changes:
            return dict(self._out)

    def ranked(self, key: bytes) -> tuple[Folder, ...]:
        """Live directories, the best for `key` first."""
        live = self.live
        if len(live) < 2:
            return live
        scored = sorted(live, key=lambda f: blake2b(key, key=f.id.encode(), digest_size=8).digest())
        return tuple(scored)

    def room(self, folder: Folder) -> int:
        """Bytes that may be written there, above the free-space floor. Raises OSError."""
        return folder.free(self._floor)

    def require_room(self, folder: Folder, size: int) -> None:
        """Raises CacheFull without room for `size` bytes. Others write to the disk too: ENOSPC may come anyway."""
        if self.room(folder) < size:
            raise CacheFull(f"{folder.places.root}: no room for {size} bytes above the free-space floor")

    @contextlib.contextmanager
    def guard(self, folder: Folder, what: str) -> Iterator[None]:
        """Turn what the disk says into CacheFull or CacheError; take a failing directory out."""
        try:
            yield
        except CacheError:
            raise
        except OSError as error:
            self.judge(folder, error, what)
            raise _translated(folder, error, what) from error

    def tolerant(self, folder: Folder, what: str) -> Tolerant:
        """For what is looked for in every directory: in one that fails, which is taken out, it is not found."""
        return Tolerant(self, folder, what)

    def judge(self, folder: Folder, error: OSError, what: str) -> bool:
        """Take the directory out if this error says that it fails. Whether it does."""
        gone = isinstance(error, FileNotFoundError) and not folder.is_there()
        if not gone and error.errno not in _FAILING:
            return False
        reason = f"{what}: " + ("the directory is gone" if gone else _reason(error))
        with self._changes:
            self.live = tuple(f for f in self.live if f is not folder)
            self._out.setdefault(folder.places.root, reason)
        return True

    def nothing_left(self) -> CacheError:
        reasons = "; ".join(f"{path}: {reason}" for path, reason in self.out.items())
        return CacheError(f"no cache directory is left ({reasons}); repair it and start again")


class Tolerant:
    """See Directories.tolerant. The block ends early, and quietly, when its directory fails or has no such file."""

    __slots__ = ("_directories", "_folder", "_what")

    def __init__(self, directories: Directories, folder: Folder, what: str) -> None:
        self._directories = directories
        self._folder = folder
        self._what = what

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if not isinstance(error, OSError) or isinstance(error, CacheError):
            return False
        if self._directories.judge(self._folder, error, self._what) or isinstance(error, FileNotFoundError):
            return True
        raise _translated(self._folder, error, self._what) from error


def _translated(folder: Folder, error: OSError, what: str) -> CacheError:
    kind = CacheFull if error.errno in _FULL else CacheError
    return kind(f"{folder.places.root}: {what} failed: {_reason(error)}")


def _reason(error: OSError) -> str:
    return error.strerror or str(error)
