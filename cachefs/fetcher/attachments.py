"""Which origin and which dataset a reader means, and who is in use.

Readers attach with an origin's options (which may hold credentials: they stay in this process's memory). Equal
options share one origin client. A reader whose credentials were left out (it was unpickled in another process)
is given the client of the same origin that somebody attached with credentials.
"""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

from cachefs import datasets
from cachefs.catalog import Catalog
from cachefs.config import checked_tenant
from cachefs.datasets import DatasetRecord
from cachefs.digest import tenant_tag, version_ref
from cachefs.errors import CatalogError, ConfigError
from cachefs.messages import Attach
from cachefs.origin import Origin, OriginSpec, open_origin
from cachefs.store import Store

log = logging.getLogger("cachefs.fetcher")


def domain_of(record: DatasetRecord) -> str:
    """The origin; for each tenant it is another."""
    return f"{record.identity}\0tenant={record.tenant}" if record.tenant else record.identity


def part_name(domain: str, path: str, version: str) -> str:
    """Under which name the store keeps what it has of an incomplete object."""
    return version_ref(f"{domain}\0{path}", version)


@dataclass
class Attachment:
    """One reader's dataset. snapshot: the one it serves, which may be older than the record's. direct: see Attach."""

    origin: Origin
    record: DatasetRecord
    snapshot: str
    direct: bool = False
    _catalog: Catalog | None = field(default=None, repr=False)
    # Hashed once: the record is replaced by that of another snapshot, never by that of another dataset.
    dataset: str = field(init=False)
    # Within it content is shared, and what is known of objects holds for all.
    domain: str = field(init=False)
    tag: bytes = field(init=False)  # of its blobs

    def __post_init__(self) -> None:
        self.dataset = self.record.id
        self.domain = domain_of(self.record)
        self.tag = tenant_tag(self.record.tenant)

    @property
    def identity(self) -> str:
        return self.record.identity

    def catalog(self, home: Path) -> Catalog | None:
        """The catalog of this attachment's snapshot, opened once; None when it has none (or it is damaged).

        Raises StaleObject when it was removed because newer ones took its place: none of them is this snapshot.
        """
        if self._catalog is None and not self.snapshot.startswith("g"):
            file = home / "catalogs" / self.dataset / f"{self.snapshot}.sqlite"
            try:
                self._catalog = Catalog.open(file)
            except (CatalogError, OSError) as error:
                datasets.require_current(home, self.record, self.snapshot)
                log.warning("%s: cannot be used (%s); versions are taken as first seen", file, error)
                self.snapshot = "g-lost"
        return self._catalog

    def reopen(self) -> None:
        """Another file has the name of its catalog. Whoever reads the old one just now reads it to the end."""
        self._catalog = None

    def close(self) -> None:
        if self._catalog is not None:
            self._catalog.close()
            self._catalog = None


class Attachments:
    """Every attachment of every connection."""

    def __init__(self, home: Path) -> None:
        self._home = home
        self._origins: dict[str, Origin] = {}
        self._bare: set[str] = set()  # of these, those that were opened without the secrets of who asked
        self._in_use: Counter[str] = Counter()
        self._attached: dict[int, Attachment] = {}
        self._saved: set[str] = set()
        self._tenants: dict[str, str] = {}  # of datasets that somebody labelled, whether or not they have a file yet

    def attach(self, request: Attach, store: Store) -> Attachment:
        """Raises UnsupportedOrigin, ConfigError, OriginAccessDenied (credentials were left out and none known)."""
        spec = OriginSpec(request.protocol, request.options, request.environ)
        origin = self._origin(spec, request.redacted)
        record = datasets.load(self._home, origin.identity, request.root)
        if record is None:
            # Not saved yet: a mistyped bucket must not stay in `cachefs status` for good.
            url = f"{request.protocol}://{request.root}"
            record = DatasetRecord(origin.identity, request.root, url=url)
        record = self._labelled(record, request.tenant, store)
        datasets.touch(self._home, record.id)
        self._in_use[record.id] += 1
        attachment = Attachment(origin, record, request.snapshot or record.snapshot, request.direct)
        self._attached[id(attachment)] = attachment
        return attachment

    def _labelled(self, record: DatasetRecord, tenant: str, store: Store) -> DatasetRecord:
        """The record with its tenant, which is the first that anybody named. Raises ConfigError for another."""
        now = record.tenant or self._tenants.get(record.id, "")
        what = record.root or "(everything)"
        if now and tenant and now != tenant:
            raise ConfigError(f"{what}: is a dataset of tenant {now}, not of {tenant} (tenant, CACHEFS_TENANT)")
        if not now and tenant:
            if self.in_use(record.id) or next(store.refs(record.id), None) is not None:
                raise ConfigError(
                    f"{what}: was read without a tenant before, so what is stored of it may be shared with others; end "
                    f"who reads it and `cachefs evict` it, then it can become tenant {checked_tenant(tenant)}'s"
                )
            now = self._tenants[record.id] = tenant  # in the file once it has one, as all of the record
            if datasets.load(self._home, record.identity, record.root) is not None:
                return datasets.update(self._home, record, tenant=tenant)
        return replace(record, tenant=now)

    def remember(self, attachment: Attachment) -> None:
        """Something of the dataset is stored now: keep its record."""
        if attachment.dataset not in self._saved:
            if datasets.load(self._home, attachment.identity, attachment.record.root) is None:
                datasets.save(self._home, attachment.record)
            self._saved.add(attachment.dataset)

    def sealed(self, record: DatasetRecord) -> None:
        """The catalog of the record's snapshot says more than before."""
        for attachment in self._attached.values():
            if (attachment.dataset, attachment.snapshot) == (record.id, record.snapshot):
                attachment.reopen()

    def detach(self, attachment: Attachment) -> None:
        self._attached.pop(id(attachment), None)
        attachment.close()
        datasets.touch(self._home, attachment.dataset)
        self._in_use[attachment.dataset] -= 1

    def in_use(self, dataset: str) -> bool:
        return self._in_use[dataset] > 0

    def origins(self) -> list[Origin]:
        return list(self._origins.values())

    def _origin(self, spec: OriginSpec, redacted: bool) -> Origin:
        key = spec.fingerprint()
        if redacted:
            if (known := self._with_secrets(spec.identity)) is not None:
                return known
            self._bare.add(key)
        else:
            self._bare.discard(key)
        if key not in self._origins:
            self._origins[key] = open_origin(spec)
        return self._origins[key]

    def _with_secrets(self, identity: str) -> Origin | None:
        """The origin as somebody knows it who gave credentials, else as it is known at all."""
        same = [(key in self._bare, origin) for key, origin in self._origins.items() if origin.identity == identity]
        return min(same, key=lambda pair: pair[0])[1] if same else None

    def renew(self, attachment: Attachment) -> None:
        """Its origin refused it, and it came without credentials: from now on the one of somebody who has some, if any.

        Who came with credentials of their own is not given those of others.
        """
        if any(self._origins[key] is attachment.origin for key in self._bare):
            attachment.origin = self._with_secrets(attachment.identity) or attachment.origin

    async def close(self) -> None:
        for origin in self._origins.values():
            await origin.aclose()
