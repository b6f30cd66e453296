"""What can go wrong, said once.

Every failure that leaves a room of cachefs is one of these. Each is also the builtin exception that callers of
a file system already catch (FileNotFoundError, PermissionError, TimeoutError, ...), carries the errno that the
mount answers, names the object, and says what to do about it. Errors cross the process border between a reader
and its fetcher by class name (`to_wire`, `from_wire`), so a reader raises what the fetcher met.
"""

from __future__ import annotations

import errno


class CacheFSError(Exception):
    """Base of every error of cachefs. `errno` is what the mount answers for it (see errno(3))."""

    errno: int | None = errno.EIO

    def __init__(self, message: str, *, path: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.path = path

    def __str__(self) -> str:
        return self.message

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (type(self).__name__, self.message, self.path))


class ConfigError(CacheFSError, ValueError):
    """A setting that cannot be used, with the setting's name and what would be accepted."""

    errno = errno.EINVAL


# --- the origin: distributed storage -----------------------------------------------------------------------


class OriginError(CacheFSError, OSError):
    """The origin failed for bytes that are cached nowhere, after retries with a deadline."""

    errno = errno.EIO


class ObjectNotFound(OriginError, FileNotFoundError):
    """No such object (or no such bucket: the message says which)."""

    errno = errno.ENOENT


class OriginAccessDenied(OriginError, PermissionError):
    """The origin refused the credentials, or there were none. Never contains the credentials."""

    errno = errno.EACCES


class OriginUnreachable(OriginError, ConnectionError):
    """Nothing answers at the origin's address."""

    errno = errno.EHOSTUNREACH


class OriginTimeout(OriginError, TimeoutError):
    """The origin did not answer before the deadline."""

    errno = errno.ETIMEDOUT


class StaleObject(OriginError):
    """The object was replaced at the origin and its old version is not cached: `cachefs refresh` takes the new."""

    errno = errno.ESTALE


class UnsupportedOrigin(OriginError, ValueError):
    """A scheme or an object name that this installation cannot reach; says which extra would."""

    errno = errno.EPROTONOSUPPORT


class IsADirectory(OriginError, IsADirectoryError):
    """A file was asked for where the origin has a directory."""

    errno = errno.EISDIR


# --- the cache: what a reader treats as a miss ------------------------------------------------------------


class CacheError(CacheFSError, OSError):
    """The cache directory failed. Readers go on from the origin; commands report it."""

    errno = errno.EIO


class CacheFull(CacheError):
    """No room within the cache's size or above the disk's free-space floor: the object streams through."""

    errno = errno.ENOSPC


class DamagedBlob(CacheError):
    """A stored blob does not match its digest. It is dropped and fetched again."""


class CacheUnusable(CacheError):
    """A cache directory that is missing, read-only, on an unfit file system, or of a future format."""


class CatalogError(CacheError):
    """A catalog file that is damaged or of an unknown format. It is listed again."""


# --- the fetcher process ------------------------------------------------------------------------------------


class FetcherError(CacheFSError, OSError):
    """The fetcher process could not be reached or started, or broke its protocol."""


class FetcherTimeout(FetcherError, TimeoutError):
    """The fetcher did not answer before the deadline."""

    errno = errno.ETIMEDOUT


class FetcherElsewhere(FetcherError):
    """Another process is the fetcher of this cache: it will listen in a moment, or is just ending."""


# --- the other nodes of a cluster: what a reader answers by asking the origin ------------------------------------


class PeerError(CacheFSError, OSError):
    """A node did not give what it was asked for; whoever asked goes to the origin. Says which node, and why."""


class PeerHasNot(PeerError):
    """The node answered: it does not have it, or could not get it. No failure of the node."""

    errno = errno.ENOENT


class PeerBusy(PeerError):
    """The node has too much to do, or is left alone for a while because it failed."""

    errno = errno.EAGAIN


class PeerTimeout(PeerError, TimeoutError):
    """The node did not answer before the deadline, or stopped in the middle."""

    errno = errno.ETIMEDOUT


class PeerWrong(PeerError):
    """The node sent bytes that are not what it said they are, or what is no answer at all. It is left alone."""


class PeerRefused(PeerError, PermissionError):
    """One of the two nodes does not trust the other: no certificate, or another authority, secret or name."""

    errno = errno.EACCES


class PlanError(CacheFSError, ValueError):
    """A plan of what will be read that cannot be understood. Reads go on without it."""

    errno = errno.EINVAL


class MembershipError(CacheFSError, ConnectionError):
    """Who is in the cluster could not be found out. The nodes last seen stay, and reads go on."""

    errno = errno.EHOSTUNREACH


class MountError(CacheFSError, OSError):
    """A mount point that cannot be used, or a mount that could not be made."""


class ReadOnlyError(CacheFSError, OSError):
    """cachefs is read-only: nothing is ever written to the origin."""

    errno = errno.EROFS


_BY_NAME: dict[str, type[CacheFSError]] = {}


def _register(cls: type[CacheFSError]) -> None:
    _BY_NAME[cls.__name__] = cls
    for child in cls.__subclasses__():
        _register(child)


_register(CacheFSError)


def _rebuild(name: str, message: str, path: str | None) -> CacheFSError:
    return _BY_NAME.get(name, FetcherError)(message, path=path)


def to_wire(error: BaseException) -> tuple[str, str, str | None]:
    """(class name, message, object path). An error that is not of this tree travels as FetcherError."""
    if isinstance(error, CacheFSError):
        return type(error).__name__, error.message, error.path
    return FetcherError.__name__, f"{type(error).__name__}: {error}", None


def from_wire(wire: tuple[str, str, str | None]) -> CacheFSError:
    """The error that `to_wire` described. An unknown class name (a newer fetcher) becomes FetcherError."""
    return _rebuild(*wire)


def errno_of(error: BaseException) -> int:
    """The errno the mount answers for `error`: its own, or EIO when it has none."""
    number = getattr(error, "errno", None)
    return number if isinstance(number, int) and number > 0 else errno.EIO
