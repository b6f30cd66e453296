"""Which origin and which dataset a reader means, and who is in use.

Readers attach with an origin's options (which may hold credentials: they stay in this process's memory). Equal
options share one origin client. A reader whose credentials were left out (it was unpickled in another process)
is given the client of the same origin that somebody attached with credentials.
"""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from cachefs import datasets
from cachefs.catalog import Catalog
from cachefs.datasets import DatasetRecord
from cachefs.errors import CatalogError
from cachefs.messages import Attach
from cachefs.origin import Origin, OriginSpec, open_origin

log = logging.getLogger("cachefs.fetcher")


@dataclass
class Attachment:
    """One reader's dataset. snapshot: the one it serves, which may be older than the record's."""

    origin: Origin
    record: DatasetRecord
    snapshot: str
    _catalog: Catalog | None = field(default=None, repr=False)
    # Hashed once: the record is replaced by that of another snapshot, never by that of another dataset.
    dataset: str = field(init=False)

    def __post_init__(self) -> None:
        self.dataset = self.record.id

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
        self._saved: set[str] = set()

    def attach(self, request: Attach) -> Attachment:
        """Raises UnsupportedOrigin, ConfigError, OriginAccessDenied (credentials were left out and none known)."""
        spec = OriginSpec(request.protocol, request.options, request.environ)
        origin = self._origin(spec, request.redacted)
        record = datasets.load(self._home, origin.identity, request.root)
        if record is None:
            # Not saved yet: a mistyped bucket must not stay in `cachefs status` for good.
            url = f"{request.protocol}://{request.root}"
            record = DatasetRecord(origin.identity, request.root, url=url)
        datasets.touch(self._home, record.id)
        self._in_use[record.id] += 1
        return Attachment(origin, record, request.snapshot or record.snapshot)

    def remember(self, attachment: Attachment) -> None:
        """Something of the dataset is stored now: keep its record."""
        if attachment.dataset not in self._saved:
            if datasets.load(self._home, attachment.identity, attachment.record.root) is None:
                datasets.save(self._home, attachment.record)
            self._saved.add(attachment.dataset)

    def detach(self, attachment: Attachment) -> None:
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
        """Its origin refused it: from now on the one that somebody has attached with credentials, if any."""
        attachment.origin = self._with_secrets(attachment.identity) or attachment.origin

    async def close(self) -> None:
        for origin in self._origins.values():
            await origin.aclose()
