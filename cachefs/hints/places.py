"""Which cache and which dataset a program's paths are in, and what the origin calls them."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

from cachefs.client.session import Session
from cachefs.config import CacheConfig
from cachefs.errors import PlanError
from cachefs.hints.consumer import Consumer
from cachefs.mountpoints import Mount, mount_of
from cachefs.origin.spec import OriginSpec


class FileSystem(Protocol):
    """The part of cachefs.CacheFileSystem that is needed here."""

    config: CacheConfig

    def dataset_of(self, path: str) -> tuple[str, Session]: ...


class Place(NamedTuple):
    """names: object paths without `prefix`, in the order of the paths that were given. mountpoint: "" = by URL."""

    config: CacheConfig
    session: Session
    names: Sequence[str]
    prefix: str
    mountpoint: str = ""

    def consumer(self, label: str) -> Consumer:
        """A consumer whose plans are indices into the paths."""
        return Consumer(
            self.config, self.session, self.names, prefix=self.prefix, label=label, mountpoint=self.mountpoint
        )

    @property
    def current(self) -> bool:
        """Whether what is read is still the snapshot that it was: a mount may have been refreshed."""
        if not self.mountpoint:
            return True
        mount = mount_of(self.mountpoint)
        return mount is not None and _snapshot_of(mount) == self.session.snapshot


def place_of(paths: Sequence[str], at: str | os.PathLike[str] | FileSystem | None = None) -> Place:
    """Where `paths` are. at: the mount that they are below or relative to (None: the one that they are below), or the
    file system that reads them.

    Raises PlanError when that cannot be told, ConfigError.
    """
    if not paths:
        raise PlanError("no paths were given")
    if at is None or isinstance(at, str | os.PathLike):
        return _on_mount(paths, os.fspath(at) if at is not None else paths[0])
    first, session = at.dataset_of(paths[0])
    start = _common_start(paths)
    bare = at.dataset_of(start)[0].rstrip("/") + "/" if start else ""
    # What the file system takes off the first path, it takes off all that begin alike, as "cachefs::s3://".
    if start and first == bare + paths[0][len(start) :]:
        return Place(at.config, session, _Cut(paths, len(start)), bare)
    return Place(at.config, session, _Each(paths, lambda path: at.dataset_of(path)[0]), "")


def session_of(mount: Mount) -> tuple[CacheConfig, Session]:
    """As the mount itself speaks to the fetcher, but for credentials, which are the fetcher's to know.

    Those that this process has in its environment are offered, should the fetcher be a new one.
    """
    noted = mount.redacted
    spec = OriginSpec.capture(noted["protocol"], noted.get("options", {}))
    environ = {**spec.environ, **noted.get("environ", {})}
    session = Session(
        spec.protocol, spec.options, environ, redacted=True, root=mount.root, snapshot=_snapshot_of(mount)
    )
    return CacheConfig.make(mount.dirs, tenant=""), session


def _snapshot_of(mount: Mount) -> str:
    return os.path.basename(mount.catalog).removesuffix(".sqlite")


def _on_mount(paths: Sequence[str], at: str) -> Place:
    mount = mount_of(at)
    if mount is None:
        raise PlanError(f"{at}: is not in a mount of cachefs (`cachefs status` lists them)")
    config, session = session_of(mount)
    point, root = mount.mountpoint.rstrip("/") + "/", mount.root.rstrip("/") + "/"
    start = _common_start(paths)
    if start.startswith(point) and os.path.normpath(start) + "/" == start:
        return Place(config, session, _Cut(paths, len(start)), root + start[len(point) :], mount.mountpoint)
    base = os.path.abspath(at) if os.path.isdir(at) else point

    def name(path: str) -> str:
        whole = os.path.normpath(os.path.join(base, path))
        return root + whole[len(point) :] if whole.startswith(point) else whole

    return Place(config, session, _Each(paths, name), "", mount.mountpoint)


def _common_start(paths: Sequence[str]) -> str:
    """The directories that all paths begin with, with a slash at the end; "" when there are none."""
    first, last = min(paths), max(paths)
    same = next((n for n, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    return first[: first.rfind("/", 0, same) + 1]


class _Each(Sequence[str]):
    """Each path as `name` says, made when it is asked for: a list of millions of them is not made a second time."""

    def __init__(self, paths: Sequence[str], name: Callable[[str], str]) -> None:
        self._paths, self._name = paths, name

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, which: Any) -> Any:
        found = self._paths[which]
        return [self._name(path) for path in found] if isinstance(which, slice) else self._name(found)


class _Cut(_Each):
    """Each path without its first characters."""

    def __init__(self, paths: Sequence[str], start: int) -> None:
        super().__init__(paths, lambda path: path[start:])
