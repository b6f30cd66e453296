"""Content keys in a catalog: put there whole or not at all, kept where they are true, and never invented."""

from __future__ import annotations

import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from cachefs.catalog import Builder, Catalog
from cachefs.catalog.format import FORMAT, WITH_KEYS
from cachefs.catalog.keys import GatheredKeys, add_keys
from cachefs.digest import content_key, version_ref
from cachefs.errors import CatalogError
from cachefs.messages import Entry

NAMES = [f"b/{folder}/{number}" for folder in "xy" for number in range(5)]


def make(file: Path, versions: dict[str, str], previous: Catalog | None = None) -> Catalog:
    with closing(Builder(file, identity="fake", root="b", previous=previous)) as builder:
        builder.add_all(Entry(name, 7, 1, version) for name, version in versions.items())
        return builder.seal()


def key(name: str, version: str = "1") -> bytes:
    return content_key(f"{name} {version}".encode())


def gather(gathered: GatheredKeys, catalog: Catalog, names: list[str], version: str = "1") -> None:
    rows = {name: catalog.find(name) for name in names}
    gathered.add((row.id, version_ref(name, version), key(name, version)) for name, row in rows.items() if row)


def keys(catalog: Catalog) -> dict[str, bytes | None]:
    return {path: catalog.key(row.id) for path, row in catalog.files()}


@pytest.fixture
def plain(tmp_path: Path) -> Catalog:
    return make(tmp_path / "plain.sqlite", dict.fromkeys(NAMES, "1"))


@pytest.fixture
def sealed(tmp_path: Path, plain: Catalog) -> Catalog:
    gathered = GatheredKeys(tmp_path / "gathered.keys")
    gather(gathered, plain, NAMES)
    add_keys(plain, gathered.of(plain), tmp_path / "sealed.sqlite")
    gathered.close(keep=False)
    return Catalog.open(tmp_path / "sealed.sqlite")


def format_of(catalog: Catalog) -> int:
    with closing(sqlite3.connect(catalog.file)) as database:
        (version,) = database.execute("PRAGMA user_version").fetchone()
    return int(version)


def test_a_catalog_without_keys_is_as_it_was(plain: Catalog):
    assert format_of(plain) == FORMAT
    assert set(keys(plain).values()) == {None}
    assert (list(plain.keys()), plain.count_keys(), plain.has_keys) == ([], 0, False)


def test_everything_else_stays_as_it_was(plain: Catalog, sealed: Catalog):
    assert format_of(sealed) == WITH_KEYS
    assert keys(sealed) == {name: key(name) for name in NAMES}
    assert sealed.count_keys() == len(NAMES)
    assert (sealed.summary, list(sealed.files())) == (plain.summary, list(plain.files()))
    assert sealed.key(2**70) is sealed.key(10**6) is None


def test_a_refresh_keeps_what_is_still_true(tmp_path: Path, sealed: Catalog):
    versions = dict.fromkeys(NAMES, "1") | {"b/x/0": "2", "b/z/new": "1"}
    del versions["b/y/4"]
    newer = make(tmp_path / "newer.sqlite", versions, previous=sealed)
    assert keys(newer) == {name: key(name) for name in NAMES if name != "b/y/4"} | {"b/x/0": None, "b/z/new": None}


def test_what_was_gathered_serves_a_newer_catalog_where_it_is_the_same(tmp_path: Path, plain: Catalog):
    gathered = GatheredKeys(tmp_path / "gathered.keys")
    gather(gathered, plain, NAMES)
    gathered.close()
    newer = make(tmp_path / "newer.sqlite", dict.fromkeys(NAMES, "1") | {"b/x/0": "2"}, previous=plain)
    # Begun anew, as after a lost record: numbers mean something else.
    other = make(tmp_path / "other.sqlite", dict.fromkeys(["b/a", *NAMES], "1"))
    gathered = GatheredKeys(tmp_path / "gathered.keys")
    for catalog, wanted in ((newer, set(NAMES) - {"b/x/0"}), (other, set())):
        found = {catalog.object_path(id): key for id, key in gathered.of(catalog)}
        assert found == {name: key(name) for name in wanted}
    gathered.close(keep=False)


@pytest.mark.parametrize("damage", [b"", b"no database", None])
def test_a_damaged_gathering_is_begun_again(tmp_path: Path, plain: Catalog, damage: bytes | None):
    file = tmp_path / "gathered.keys"
    gathered = GatheredKeys(file)
    gather(gathered, plain, NAMES)
    gathered.close()
    file.write_bytes(file.read_bytes()[:5000] if damage is None else damage)
    with closing(GatheredKeys(file)) as gathered:
        assert list(gathered.of(plain)) == []
        gather(gathered, plain, NAMES)
        assert len(list(gathered.of(plain))) == len(NAMES)


def test_one_at_a_time(tmp_path: Path):
    with closing(GatheredKeys(tmp_path / "gathered.keys")), pytest.raises(CatalogError, match="another process"):
        GatheredKeys(tmp_path / "gathered.keys")


@pytest.mark.parametrize("wrong", ["x'00'", "'text'", "7", "zeroblob(17)"])
def test_a_key_that_is_none(tmp_path: Path, sealed: Catalog, wrong: str):
    shutil.copy(sealed.file, tmp_path / "wrong.sqlite")
    with closing(sqlite3.connect(tmp_path / "wrong.sqlite")) as database:
        database.execute(f"UPDATE keys SET key = {wrong}")
        database.commit()
    with Catalog.open(tmp_path / "wrong.sqlite") as catalog:
        (_, row), *_ = catalog.files()
        with pytest.raises(CatalogError, match="content key"):
            catalog.key(row.id)
        with pytest.raises(CatalogError, match="content key"):
            list(catalog.keys())


def test_a_catalog_that_says_it_has_keys_and_has_none(tmp_path: Path, plain: Catalog):
    with closing(sqlite3.connect(plain.file)) as database:
        database.execute(f"PRAGMA user_version = {WITH_KEYS}")
    with Catalog.open(plain.file) as catalog, pytest.raises(CatalogError, match="damaged"):
        catalog.key(2)


def test_nothing_is_left_where_there_is_no_room(tmp_path: Path, plain: Catalog):
    with closing(GatheredKeys(tmp_path / "gathered.keys")) as gathered:
        gather(gathered, plain, NAMES)
        with pytest.raises(OSError, match="putting content keys"):
            add_keys(plain, gathered.of(plain), tmp_path / "missing" / "sealed.sqlite")
        with sqlite3.connect(plain.file) as database:
            database.execute("DROP TABLE entries")
        database.close()
        with pytest.raises(CatalogError):
            add_keys(plain, gathered.of(plain), tmp_path / "sealed.sqlite")
    assert not (tmp_path / "sealed.sqlite").exists()
