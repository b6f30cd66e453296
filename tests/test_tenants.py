"""Tenants: a dataset belongs to one, what they share is a quota, and content stops at their border."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from itertools import chain
from pathlib import Path

import fsspec
import pytest

from cachefs import datasets, tenants
from cachefs.client import Connection
from cachefs.config import CacheConfig
from cachefs.digest import BLOCK_SIZE, content_key, tenant_tag, version_ref
from cachefs.errors import ConfigError
from cachefs.store import Store
from cachefs.store.folder import Folder
from cachefs.store.ledger import count_of
from tests.conftest import Bucket, ThrottledBucket
from tests.test_fetcher import config, content, pid_of, read, s3, wait_until
from tests.test_quotas import ONE, Watch, charged, fill_two

MINE, THEIRS = "d5" * 16, "07" * 16


def of(bucket: Bucket, root: str, home: Path, tenant: str) -> Connection:
    """Of the dataset below `root`."""
    session = s3(bucket, root=f"{bucket.name}/{root}" if root else bucket.name)
    return Connection(config(home), replace(session, tenant=tenant))


def inodes(home: Path, dataset: str) -> set[int]:
    return {path.stat().st_ino for path in (home / "refs" / dataset).rglob("*") if path.is_file()}


# --- the store -----------------------------------------------------------------------------------------------------


@pytest.fixture(params=[True, False], ids=["attributes", "no attributes"])
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """On a disk that keeps extended attributes, and on one that keeps none."""
    if not request.param:
        monkeypatch.setattr(Folder, "recorded_name", lambda *_: None)
    return Store.open(CacheConfig.make(tmp_path / "cache", min_free=0))


def large_blob(store: Store, data: bytes, link: tuple[str, str], tag: bytes) -> bytes:
    part = store.part(link[1], len(data))
    part.write(0, data[:BLOCK_SIZE])
    part.write(1, data[BLOCK_SIZE:])
    return part.finish([link], tag)


def test_equal_content_of_two_tenants_does_not_meet(store: Store) -> None:
    tag, ref = tenant_tag("a"), version_ref("x", "v")
    keys = [store.put(b"same", links=[(dataset, ref)], tag=t) for dataset, t in ((MINE, tag), (THEIRS, b""))]
    assert keys == [content_key(b"same") + tag, content_key(b"same")]
    assert set(store.keys()) == set(keys)
    assert store.usage().blobs == 2
    home = store.config.home
    assert not inodes(home, MINE) & inodes(home, THEIRS)
    assert [store.key_of(dataset, ref) for dataset in (MINE, THEIRS)] == keys
    assert store.put(b"same", links=[(MINE, version_ref("y", "v"))], tag=tag) == keys[0]
    assert len(inodes(home, MINE)) == 1
    assert store.sweep() == 0
    for key in keys:
        assert store.check(key)
    assert store.unlink_ref(MINE, ref) == 0
    assert store.unlink_ref(MINE, version_ref("y", "v")) > 0
    assert list(store.keys()) == [keys[1]]


def test_a_tenants_blob_is_checked_by_its_content(store: Store) -> None:
    data, tag = os.urandom(BLOCK_SIZE + 1), tenant_tag("a")
    for key in (store.put(b"small", tag=tag), large_blob(store, data, (MINE, version_ref("x", "v")), tag)):
        assert key.endswith(tag)
        path = store.path(key)
        assert store.check(key)
        path.chmod(0o600)
        with path.open("r+b") as file:
            file.write(b"?")
        assert not store.check(key)
    assert large_blob(store, data, (MINE, version_ref("y", "v")), b"") == content_key(data)


# --- labels --------------------------------------------------------------------------------------------------------


def test_the_first_label_of_a_dataset_stays(bucket: Bucket, cache_dir: Path) -> None:
    objects, _ = fill_two(bucket, 3)
    first = of(bucket, "a", cache_dir, "vision")
    first.attach()  # nothing of it is stored, or written down
    with pytest.raises(ConfigError, match="tenant vision, not of audio"):
        of(bucket, "a", cache_dir, "audio").attach()
    for path, data in objects.items():
        assert read(first, path) == data
    dataset = first.attach().dataset
    os.kill(pid_of(cache_dir), signal.SIGKILL)
    first.close()
    with pytest.raises(ConfigError, match="tenant vision, not of audio"):
        of(bucket, "a", cache_dir, "audio").attach()
    assert {r.id: r.tenant for r in datasets.load_all(cache_dir)} == {dataset: "vision"}
    unlabelled = of(bucket, "a", cache_dir, "")  # a command, or a program that need not know
    for path, data in objects.items():
        assert read(unlabelled, path) == data
    assert all(path.name.endswith(tenant_tag("vision").hex()) for path in (cache_dir / "blobs").glob("*/*"))


def test_what_was_read_without_a_label_gets_none_until_it_is_evicted(bucket: Bucket, cache_dir: Path) -> None:
    objects, _ = fill_two(bucket, 3)
    unlabelled = of(bucket, "a", cache_dir, "")
    for path in objects:
        read(unlabelled, path)
    with pytest.raises(ConfigError, match="cachefs evict"):
        of(bucket, "a", cache_dir, "vision").attach()
    unlabelled.evict(f"{bucket.name}/a")
    with pytest.raises(ConfigError, match="end who reads it"):
        of(bucket, "a", cache_dir, "vision").attach()
    probe = Connection(config(cache_dir), None)
    unlabelled.close()
    wait_until(lambda: probe.status().status["connections"] == 1)
    labelled = of(bucket, "a", cache_dir, "vision")
    assert {read(labelled, path) for path in objects} == set(objects.values())
    assert [record.tenant for record in datasets.load_all(cache_dir)] == ["vision"]


# --- content -------------------------------------------------------------------------------------------------------


def test_content_stops_at_the_border_of_a_tenant(throttled: ThrottledBucket, cache_dir: Path) -> None:
    """Equal objects under other names, and the very same objects through datasets that overlap; small and large."""
    large = os.urandom(BLOCK_SIZE + 5)
    for folder in ("a", "b", "c"):
        for n in range(3):
            throttled.put(f"{folder}/{n}", content(n))
        throttled.put(f"{folder}/large", large)
    found = {}
    for root, tenant in (("a", "vision"), ("b", "audio"), ("", ""), ("c", "vision")):
        connection = of(throttled, root, cache_dir, tenant)
        connection.make_catalog()
        for entry in connection.entries(f"{throttled.name}/{root}".rstrip("/"), recursive=True):
            data = large if entry.path.endswith("large") else content(int(entry.path[-1]))
            located = connection.need(entry.path, version=entry.version, size=len(data))
            with os.fdopen(located.fd):
                assert located.read(0, len(data)) == data
        found[root] = inodes(cache_dir, connection.attach().dataset)
        connection.close()
    assert found["a"] == found["c"]  # of one tenant: shared
    assert len(found["a"]) == len(found["b"]) == len(found[""]) == 4
    assert not found["a"] & found["b"]
    assert not found[""] & (found["a"] | found["b"])


# --- quotas --------------------------------------------------------------------------------------------------------


def test_the_datasets_of_a_tenant_share_its_quota(bucket: Bucket, cache_dir: Path) -> None:
    """One that is known when it is set, one that comes later, and one of nobody's."""
    a, b = fill_two(bucket)
    for n in range(20):
        bucket.put(f"c/{n}", content(n + 900))
    first = of(bucket, "a", cache_dir, "vision")
    first.make_catalog()
    assert first.warm().failed_total == 0
    assert first.quota(10 * ONE, tenant="vision")["dropped"] == 10
    inner = first.attach().dataset
    first.quota(6 * ONE, dataset=inner)
    second = of(bucket, "b", cache_dir, "vision")
    outer = second.attach().dataset
    with Watch(cache_dir, inner) as one, Watch(cache_dir, outer) as two:
        for path, data in chain(b.items(), a.items()):
            assert read(second if "/b/" in path else first, path) == data
    third = of(bucket, "c", cache_dir, "")
    third.make_catalog()
    third.warm()
    assert one.most + two.most <= 10 * ONE
    assert charged(first, inner) == count_of((cache_dir,), inner) == 6 * ONE
    assert charged(first, outer) == count_of((cache_dir,), outer) == 4 * ONE
    assert count_of((cache_dir,), third.attach().dataset) == 20 * ONE
    assert first.status().status["quotas"]["tenants"] == {"vision": {"quota": 10 * ONE, "used": 10 * ONE}}
    os.kill(pid_of(cache_dir), signal.SIGKILL)
    wait_until(lambda: third.status().status["scanned"])
    assert third.status().status["quotas"]["tenants"] == {"vision": {"quota": 10 * ONE, "used": 10 * ONE}}
    # The one that was used longest ago goes first.
    datasets.touch(cache_dir, inner)
    os.utime(cache_dir / "datasets" / f"{outer}.json", (1, 1))
    third.close()
    report = third.quota(6 * ONE, tenant="vision")
    assert (report["dropped"], report["used"]) == (4, 6 * ONE)
    assert count_of((cache_dir,), outer) == 0
    assert third.quota(None, tenant="vision")["changed"]
    assert tenants.quotas(cache_dir) == {}
    assert third.status().status["quotas"]["datasets"] == {inner: 6 * ONE}


def test_a_file_system_reads_for_its_tenant(bucket: Bucket, cache_dir: Path) -> None:
    path = bucket.put("a/x", content(1))
    options = {"target_protocol": "s3", "target_options": bucket.options, "cache_dir": str(cache_dir)}
    fs = fsspec.filesystem("cachefs", tenant="vision", skip_instance_cache=True, **options)
    assert fs.cat_file(path) == content(1)
    assert [record.tenant for record in datasets.load_all(cache_dir)] == ["vision"]
    other = fsspec.filesystem("cachefs", tenant="audio", skip_instance_cache=True, **options)
    assert other.cat_file(path) == content(1)  # a hit asks nobody
    with pytest.raises(ConfigError, match="tenant vision, not of audio"):
        other.cat_file(bucket.put("a/y", content(2)))
    with pytest.raises(ConfigError, match=r"tenant '\.\./x'"):
        fsspec.filesystem("cachefs", tenant="../x", skip_instance_cache=True, **options)


def test_damaged_quotas_of_tenants_are_none(tmp_path: Path) -> None:
    for text in ("", "{}", "[]", '{"a": 1}', '{"a": {"quota": "x"}}', "nonsense"):
        (tmp_path / "tenants.json").write_text(text)
        assert tenants.quotas(tmp_path) == {}
    tenants.set_quota(tmp_path, "a", 5)
    tenants.set_quota(tmp_path, "b", 6)
    tenants.set_quota(tmp_path, "a", None)
    assert tenants.quotas(tmp_path) == {"b": 6}
