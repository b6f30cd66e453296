"""What a cache knows of each dataset: one small JSON file, written by the fetcher, read by every reader.

A reader needs the dataset's snapshot to name its refs, and must get it without asking anybody: a hit costs no
message. What its user settled for the dataset (pinned or not, its quota, whose it is) lies there too, so that no
restart forgets it. The file's mtime is the time of last use, which decides what is evicted first; readers set it now
and then (`touch`), because hits never reach the fetcher.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from cachefs.digest import dataset_id
from cachefs.errors import StaleObject

# How often one process marks a dataset as used. Eviction compares datasets by hours, so a minute is exact enough.
TOUCH_SECONDS = 60.0

# A record is read, changed and written by a listing that ends and by a command, in threads of one fetcher.
_writing = threading.RLock()


@dataclass(frozen=True)
class DatasetRecord:
    """identity and root: see ARCHITECTURE.md. snapshot: its id. catalog: file name below catalogs/<id>/, or "".

    last_id: no inode number above it was ever given away in this dataset; 0 = not known. pinned: nothing that is
    stored of it is evicted to make room for other datasets. quota: bytes that it may take on the disk, None = what
    there is. tenant: whose it is, "" = nobody's.

    edition: when `catalog` was begun, in microseconds since the epoch, and in any case more than that of every catalog
    before it: the greatest is the newest, on whichever node it was made. 0 = not known, older than any.
    """

    identity: str
    root: str
    snapshot: str = "g1"
    catalog: str = ""
    url: str = ""
    last_id: int = 0
    pinned: bool = False
    quota: int | None = None
    tenant: str = ""
    edition: int = 0

    @property
    def id(self) -> str:
        return dataset_id(self.identity, self.root)

    def covers(self, path: str) -> bool:
        return not self.root or path == self.root or path.startswith(self.root + "/")


def _folder(home: Path) -> Path:
    return home / "datasets"


def catalog_file(home: Path, record: DatasetRecord) -> Path | None:
    """Where the record's catalog is; None when it has none."""
    return home / "catalogs" / record.id / record.catalog if record.catalog else None


def last_inode(home: Path, record: DatasetRecord) -> int:
    """Where inode numbers go on though no catalog can be read that says it.

    A mount may still serve the one that is lost, and in the kernel a number must not come to mean something else.
    """
    if record.last_id or not (record.catalog or any((home / "catalogs" / record.id).glob("*.sqlite"))):
        return record.last_id
    # The record is of an older version, or was lost too. More than were ever given away: a million for each second.
    return int(time.time()) << 20


def load(home: Path, identity: str, root: str) -> DatasetRecord | None:
    """The record of one dataset, None when the cache does not know it (or its file is damaged)."""
    return _read(_folder(home) / f"{dataset_id(identity, root)}.json")


def load_by_id(home: Path, dataset: str) -> DatasetRecord | None:
    """The record of the dataset with this id."""
    known = len(dataset) == 32 and dataset.isalnum()
    return _read(_folder(home) / f"{dataset}.json") if known else None


def load_all(home: Path) -> Iterator[DatasetRecord]:
    """Every record of the cache, in no order."""
    try:
        names = sorted(os.listdir(_folder(home)))
    except FileNotFoundError:
        return
    for name in names:
        if name.endswith(".json") and (record := _read(_folder(home) / name)):
            yield record


def require_current(home: Path, record: DatasetRecord, snapshot: str) -> None:
    """For a reader whose catalog of `snapshot` is gone: raises StaleObject when newer ones took its place.

    None of them is what the reader serves, so it must not be answered from them. Returns when there is none: then the
    catalog itself was lost.
    """
    now = load(home, record.identity, record.root)
    if now is not None and now.catalog and now.snapshot != snapshot:
        raise StaleObject(
            f"{record.root}: was refreshed since this reader began, and the catalog of the snapshot that it serves is "
            "gone; `invalidate_cache()`, or a new start, takes the present one",
            path=record.root,
        )


def _read(file: Path) -> DatasetRecord | None:
    try:
        raw = json.loads(file.read_bytes())
        texts = {k: str(raw[k]) for k in ("identity", "root", "snapshot", "catalog", "url")}
        # These came later than the others.
        record = DatasetRecord(
            **texts,
            last_id=int(raw.get("last_id", 0)),
            pinned=raw.get("pinned") is True,
            quota=None if raw.get("quota") is None else max(0, int(raw["quota"])),
            tenant=str(raw.get("tenant", "")),
            edition=max(0, int(raw.get("edition", 0))),
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None  # a lost record costs a listing, never a wrong answer: its refs cannot be named without it
    return record if file.name == f"{record.id}.json" else None


def save(home: Path, record: DatasetRecord) -> None:
    """Write the record, complete or not at all. Only the fetcher calls this. Raises OSError."""
    folder = _folder(home)
    folder.mkdir(mode=0o700, exist_ok=True)
    temporary = folder / f".{record.id}.{os.getpid()}"
    with _writing:
        temporary.write_text(json.dumps(asdict(record)))
        os.replace(temporary, folder / f"{record.id}.json")


def update(home: Path, record: DatasetRecord, **changes: Any) -> DatasetRecord:
    """Change these fields of the dataset's record as it is on disk by now, and no others; the new record.

    `record` is what the caller knows, which may be hours old (a listing takes long), and counts only where there is
    none. To settle something about a dataset is no use of it. Only the fetcher calls this. Raises OSError.
    """
    with _writing:
        used = last_use(home, record.id)
        new = replace(load(home, record.identity, record.root) or record, **changes)
        save(home, new)
        if used:
            os.utime(_folder(home) / f"{record.id}.json", (used, used))
    return new


def pinned(home: Path) -> frozenset[str]:
    """Ids of the datasets that are pinned."""
    return frozenset(record.id for record in load_all(home) if record.pinned)


def remove(home: Path, record: DatasetRecord) -> None:
    (_folder(home) / f"{record.id}.json").unlink(missing_ok=True)


def last_use(home: Path, dataset: str) -> float:
    """Seconds since the epoch of the dataset's last use; 0.0 when unknown, which makes it the first to go."""
    try:
        return os.stat(_folder(home) / f"{dataset}.json").st_mtime
    except OSError:
        return 0.0


def touch(home: Path, dataset: str) -> None:
    """Mark the dataset as used now. Best effort: a cache that cannot be written is still read from."""
    try:
        os.utime(_folder(home) / f"{dataset}.json", (time.time(), time.time()))
    except OSError:
        return
