"""Which dataset of which cache a command means by ORIGIN.

A dataset is where bytes are found again: what is warmed for one is not looked for in another. So a command about
a part of a dataset that the cache knows works on that dataset, and only a new ORIGIN makes a new one.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cachefs import datasets
from cachefs.cli.mounted import mounts
from cachefs.cli.options import cache_config, origin_options
from cachefs.config import CacheConfig
from cachefs.datasets import DatasetRecord
from cachefs.errors import CatalogError, ConfigError, MountError
from cachefs.mountpoints import Mount

if TYPE_CHECKING:
    from cachefs.catalog import Catalog
    from cachefs.client import Connection
    from cachefs.client.session import Session
    from cachefs.origin import OriginSpec


@dataclass(frozen=True)
class Target:
    """An origin's path and a cache. url: as it was given, without secrets: what is shown."""

    config: CacheConfig
    spec: OriginSpec
    path: str
    url: str
    redacted: bool = False

    @classmethod
    def parse(
        cls, origin: str, options: Sequence[str] | None, config: CacheConfig, *, redacted: bool = False
    ) -> Target:
        """From the command line. redacted: credentials may be left out if the fetcher knows them.

        Raises ConfigError, UnsupportedOrigin.
        """
        from cachefs.origin.spec import parse_origin

        if not origin.strip():
            raise ConfigError("ORIGIN is empty; is a variable of your script unset?")
        if "\0" in origin:
            raise ConfigError("ORIGIN: a name cannot contain a NUL character")
        spec, path = parse_origin(origin, origin_options(options))
        return cls(config, spec, path, shown(origin), redacted and _without_secrets(spec))

    def known(self) -> list[DatasetRecord]:
        """Datasets of this origin that the cache knows at `path` or below it, else those that contain it."""
        own = [r for r in datasets.load_all(self.config.home) if r.identity == self.spec.identity]
        below = [r for r in own if not self.path or r.root == self.path or r.root.startswith(self.path + "/")]
        return below or [r for r in own if r.covers(self.path)]

    def containing(self, *, any_endpoint: bool = False) -> DatasetRecord | None:
        """The innermost dataset with a catalog that contains `path`; None: the cache knows none.

        any_endpoint: also one of another endpoint of the protocol, if the cache knows only one. For commands that
        only look, whose user should not have to repeat how the storage is reached.
        """
        found = [r for r in datasets.load_all(self.config.home) if r.catalog and r.covers(self.path)]
        own = [r for r in found if r.identity == self.spec.identity]
        if any_endpoint and not own:
            own = [r for r in found if r.identity.split()[0] == self.spec.protocol]
            own = own if len({r.identity for r in own}) == 1 else []
        return max(own, key=lambda r: len(r.root), default=None)

    def unknown(self) -> ConfigError:
        """Says that the cache knows nothing of `path`, and what it knows that may have been meant."""
        similar = [
            record
            for record in datasets.load_all(self.config.home)
            if record.identity != self.spec.identity
            and record.identity.split()[0] == self.spec.protocol
            and (record.covers(self.path) or record.root.startswith(self.path))
        ]
        message = f"{self.url}: the cache {self.config.home} knows no such dataset (`cachefs status` lists them)"
        if similar:
            record = similar[0]
            message += (
                f"; it knows {record.root} of the origin {record.identity!r}: name that endpoint "
                "(--origin-option endpoint_url=..., or the environment)"
            )
        return ConfigError(message)

    def session(self, root: str, snapshot: str = "") -> Session:
        from cachefs.client.session import Session

        return Session(
            protocol=self.spec.protocol,
            options=self.spec.options,
            environ=self.spec.environ,
            redacted=self.redacted,
            root=root,
            snapshot=snapshot,
            tenant=self.config.tenant,
        )

    def connect_to_cache(self) -> Connection:
        """To the fetcher, for what asks nothing of the origin and is no use of the dataset."""
        from cachefs.client import Connection

        return Connection(self.config, None)

    def connect(self, root: str) -> Connection:
        """To the fetcher, for the dataset `root` of this origin."""
        from cachefs.client import Connection

        return Connection(self.config, self.session(root))


def open_catalog(config: CacheConfig, record: DatasetRecord) -> Catalog | None:
    """The record's catalog; None when it has none, or one that cannot be used any more."""
    from cachefs.catalog import Catalog

    file = datasets.catalog_file(config.home, record)
    if file is None:
        return None
    try:
        return Catalog.open(file)
    except (CatalogError, OSError):
        return None


def shown(origin: str) -> str:
    """The URL without user, password and query, which may be secrets."""
    from cachefs.origin.redaction import plain_url

    return "::".join(plain_url(part) if "://" in part else part for part in origin.split("::"))


def target_of(
    origin: str,
    options: Sequence[str] | None,
    dirs: Sequence[str] | None,
    size: str | None = None,
    min_free: str | None = None,
    *,
    redacted: bool = False,
    tenant: str | None = "",
) -> Target:
    """The target of a command's options. tenant: see cache_config. Raises ConfigError, UnsupportedOrigin."""
    return Target.parse(origin, options, cache_config(dirs, size, min_free, tenant=tenant), redacted=redacted)


def target_of_mount(mount: Mount, dirs: Sequence[str] | None, given: Sequence[str] | None) -> Target:
    """The origin of a mount, with what its mount noted, and credentials of this command where there are any."""
    from cachefs.origin import OriginSpec

    if dirs:
        raise ConfigError(f"{mount.mountpoint}: a mount knows its cache; leave --cache-dir out")
    noted = mount.redacted
    options = {**noted.get("options", {}), **origin_options(given)}
    captured = OriginSpec.capture(noted["protocol"], options)
    spec = OriginSpec(captured.protocol, captured.options, {**captured.environ, **noted.get("environ", {})})
    return Target(cache_config(mount.dirs), spec, mount.root, mount.origin, redacted=not given)


def target_at(
    origin: str, dirs: Sequence[str] | None, given: Sequence[str] | None, *, tenant: str | None = ""
) -> tuple[Target, Mount | None]:
    """The target of a command that works on what is known: ORIGIN is a URL or a mount point, and then the mount too.

    Raises ConfigError, MountError, UnsupportedOrigin.
    """
    mount = mounts().at(origin)
    if mount is not None:
        return target_of_mount(mount, dirs, given), mount
    if os.path.ismount(origin):
        raise MountError(f"{origin}: is not a mount of cachefs (`cachefs status` lists them)")
    return target_of(origin, given, dirs, redacted=True, tenant=tenant), None


def _without_secrets(spec: OriginSpec) -> bool:
    bare = spec.redacted()
    return dict(bare.options) == dict(spec.options) and dict(bare.environ) == dict(spec.environ)
