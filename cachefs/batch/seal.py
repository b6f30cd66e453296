"""Every file's content key into the catalog: each object is read once, by somebody, and hashed.

What was hashed is kept as it comes (catalog/keys), so whoever is killed and starts again reads nothing twice but what
was under way. An object whose version is not the listed one has no key: it is named.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from cachefs.batch.engine import Engine, each
from cachefs.batch.reach import Reach
from cachefs.batch.tasks import BYTES, OBJECTS, Failure, HashObjects, Keys, Parcel, failure, pack
from cachefs.catalog import Catalog
from cachefs.catalog.keys import GatheredKeys
from cachefs.digest import KEY_BYTES, version_ref
from cachefs.errors import CacheFSError, StaleObject

# Failures that are named; the rest are counted.
NAMED = 1000

Objects = list[tuple[int, str, int, str]]


@dataclass
class Sealed:
    """files: that should have a key. known: that have one. read: objects read by this run; size: their bytes."""

    files: int = 0
    known: int = 0
    read: int = 0
    size: int = 0
    failures: int = 0
    failed: list[Failure] = field(default_factory=list)

    def fail(self, failed: Failure) -> None:
        self.failures += 1
        if len(self.failed) < NAMED:
            self.failed.append(failed)

    @property
    def changed(self) -> list[Failure]:
        return [each for each in self.failed if each[1] == StaleObject.__name__]


async def seal(
    engine: Engine,
    reach: Reach,
    catalog: Catalog,
    below: str,
    gathered: GatheredKeys,
    progress: Callable[[Sealed], None] = lambda _: None,
    *,
    batch: int = OBJECTS,
) -> Sealed:
    """Gather the keys of the files below the object path `below`, but for those that are known.

    batch: objects per task. Raises ConfigError, CacheError.
    """
    so_far = Sealed(files=catalog.summary.files)
    progress(so_far)
    answers = each(engine, _tasks(reach, catalog, below, gathered, so_far, batch))
    try:
        async for objects, answer in answers:
            _take(objects, answer, gathered, so_far)
            progress(so_far)
    finally:
        await asyncio.shield(asyncio.ensure_future(answers.aclose()))
    so_far.files = so_far.known + so_far.failures
    return so_far


def _tasks(
    reach: Reach, catalog: Catalog, below: str, gathered: GatheredKeys, so_far: Sealed, most: int
) -> Iterator[tuple[Objects, Parcel]]:
    number = 0
    batch: Objects = []
    size = 0
    for path, row in catalog.files(below):
        if catalog.key(row.id) is not None or gathered.has(row.id, version_ref(path, row.version)):
            so_far.known += 1
            continue
        if batch and (len(batch) >= most or size + row.size > BYTES):
            yield batch, _pack(reach, number, batch)
            number += len(batch)
            batch, size = [], 0
        batch.append((row.id, path, row.size, row.version))
        size += row.size
    if batch:
        yield batch, _pack(reach, number, batch)


def _pack(reach: Reach, number: int, batch: Objects) -> Parcel:
    return pack(f"seal objects {number + 1} to {number + len(batch)}", HashObjects(reach, batch))


def _take(objects: Objects, answer: object, gathered: GatheredKeys, so_far: Sealed) -> None:
    """A worker's answer is believed for what it was asked, and for nothing else."""
    if isinstance(answer, CacheFSError):
        for _, path, _, _ in objects:
            so_far.fail(failure(path, answer))
        return
    assert isinstance(answer, Keys)
    asked = {id: (path, version) for id, path, _, version in objects}
    named = {path for path, _, _ in answer.failed}
    keys = {id: key for id, key in answer.keys if id in asked and len(key) == KEY_BYTES}
    gathered.add((id, version_ref(*asked[id]), key) for id, key in keys.items())
    so_far.known += len(keys)
    so_far.read += len(keys)
    so_far.size += answer.size
    for each_failed in answer.failed:
        so_far.fail(each_failed)
    for id, (path, _) in asked.items():
        if id not in keys and path not in named:
            so_far.fail((path, "FetcherError", f"{path}: the worker answered nothing of it"))
