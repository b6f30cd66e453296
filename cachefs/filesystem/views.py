"""Which dataset answers for a path, and the hit itself.

A file system serves one snapshot: what the cache knew of the origin's datasets when the instance was made. A path
belongs to the dataset with a catalog whose root is the longest that covers it, else to the dataset "everything at
this origin", which has no catalog and whose versions are those first read.
"""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

from cachefs import datasets, hits
from cachefs.catalog.hold import shared_hold
from cachefs.client import Connection
from cachefs.client.session import Session
from cachefs.config import CacheConfig
from cachefs.datasets import TOUCH_SECONDS, DatasetRecord
from cachefs.digest import snapshot_ref
from cachefs.errors import CatalogError
from cachefs.origin.spec import OriginSpec
from cachefs.store.layout import Places
from cachefs.store.reader import Reader

if TYPE_CHECKING:
    from cachefs.catalog import Catalog

_now = time.monotonic


class View:
    """One dataset as this file system serves it."""

    def __init__(self, config: CacheConfig, session: Session, record: DatasetRecord) -> None:
        self.config = config
        self.session = session
        self.record = record
        self.dataset = record.id
        self.snapshot = record.snapshot
        self.connection = Connection(config, session)
        self.found = 0  # hits that were not told yet
        self.due = 0.0  # when to tell them
        self._touch_at = 0.0
        self._pid = os.getpid()
        self._catalog_file = datasets.catalog_file(config.home, record)
        self._catalogs = threading.local()
        # So that it is still there when a thread, or a forked worker, opens it hours and refreshes later.
        self._hold = shared_hold(self._catalog_file) if self._catalog_file else None

    def catalog(self) -> Catalog | None:
        """This thread's catalog of the dataset; None when it has none, or lost it: then the fetcher is asked.

        Raises StaleObject when newer ones took its place before it was opened.
        """
        if self._catalog_file is None:
            return None
        held: tuple[int, Catalog] | None = getattr(self._catalogs, "held", None)
        if held is not None and held[0] == os.getpid():  # SQLite forbids to carry a connection over a fork
            return held[1]
        from cachefs.catalog import Catalog

        try:
            catalog = Catalog.open(Path(self._catalog_file))
        except CatalogError:
            datasets.require_current(self.config.home, self.record, self.snapshot)
            self._catalog_file = None
            return None
        self._catalogs.held = (os.getpid(), catalog)
        return catalog

    def tell(self) -> None:
        """Tell what was found, and that the dataset is in use, once in TOUCH_SECONDS."""
        now = _now()
        self.due = now + hits.TELL_SECONDS
        if self._pid == os.getpid():
            found = self.found
            if hits.add(self.config.home, found):
                self.found -= found
        else:  # forked: the parent tells what it had found
            self._pid, self.found = os.getpid(), 0
        if now > self._touch_at:
            self._touch_at = now + TOUCH_SECONDS
            datasets.touch(self.config.home, self.dataset)


class Views:
    """All datasets of one origin in one cache. Cheap to make; the origin and the fetcher are not asked."""

    def __init__(self, config: CacheConfig, spec: OriginSpec, *, redacted: bool, local: bool) -> None:
        self.config = config
        self.identity = spec.identity
        self._spec = spec
        self._redacted = redacted
        self._local = local
        self._reader = Reader(config.dirs)
        self._prefix = Places(config.home).refs if len(config.dirs) == 1 else ""
        self.reload()

    def reload(self) -> None:
        """Serve what the cache knows now."""
        records = [r for r in datasets.load_all(self.config.home) if r.identity == self.identity]
        catalogued = sorted((r for r in records if r.catalog and r.root), key=lambda r: -len(r.root))
        everything = next((r for r in records if not r.root), DatasetRecord(self.identity, ""))
        self._catalogued = tuple((r.root, r.root + "/", self._view(r)) for r in catalogued)
        self._everything = self._view(everything)

    def of(self, path: str) -> View:
        """The dataset that answers for an object path."""
        for root, below, view in self._catalogued:
            if path.startswith(below) or path == root:
                return view
        return self._everything

    def hit(self, path: str) -> tuple[int, os.stat_result, str] | None:
        """(descriptor, its stat, name of the file) of an object that is cached; None = ask the fetcher.

        The descriptor is the caller's.
        """
        view = self.of(path)
        ref = snapshot_ref(path, view.snapshot)
        found = self._reader.open(view.dataset, ref)
        if found is None:
            return None
        view.found += 1
        if _now() > view.due:
            view.tell()
        fd, info = found
        if self._prefix:
            return fd, info, f"{self._prefix}{view.dataset}/{ref[:2]}/{ref}"
        return fd, info, os.readlink(f"/proc/self/fd/{fd}")

    def file(self, path: str) -> str | None:
        """The path of the cached object's file; None when it is not cached."""
        view = self.of(path)
        return self._reader.file(view.dataset, snapshot_ref(path, view.snapshot))

    def _view(self, record: DatasetRecord) -> View:
        session = Session(
            protocol=self._spec.protocol,
            options=self._spec.options,
            environ=self._spec.environ,
            redacted=self._redacted,
            root=record.root,
            snapshot=record.snapshot,
            local=self._local,
            tenant=self.config.tenant,
        )
        return View(self.config, session, record)
