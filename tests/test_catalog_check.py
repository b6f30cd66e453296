"""A catalog from another machine: right ones pass, and any change of one is found."""

from __future__ import annotations

import shutil
import sqlite3
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cachefs.catalog import Builder, Catalog, check
from cachefs.catalog.keys import add_keys
from cachefs.digest import content_key
from cachefs.errors import CatalogError
from cachefs.messages import Entry

NAMES = st.text(st.characters(blacklist_characters="/", blacklist_categories=()), max_size=4)
PATHS = st.lists(NAMES, min_size=1, max_size=4).map("/".join)
LISTINGS = st.dictionaries(PATHS, st.tuples(st.integers(0, 2**40), NAMES, st.booleans()), max_size=25)
ROOTS = st.sampled_from(["", "b", "b/c"])


def built(file: Path, root: str, listing: dict[str, tuple[int, str, bool]], previous: Catalog | None = None) -> Catalog:
    builder = Builder(file, identity="s3", root=root, previous=previous, resume=False)
    for path, (size, version, directory) in listing.items():
        builder.add(Entry(f"{root}/{path}" if root else path, size, size * 3, version, directory))
    return builder.seal()


def sealed(catalog: Catalog, file: Path, every: int = 1) -> Catalog:
    """The same with content keys, which tell a path from any other, of some of its files."""
    files = [(row.id, content_key(path.encode())) for path, row in catalog.files()]
    add_keys(catalog, files[::every], file)
    return Catalog.open(file)


def keys_of(catalog: Catalog) -> dict[str, bytes]:
    return {path: key for path, row in catalog.files() if (key := catalog.key(row.id)) is not None}


def shown(catalog: Catalog) -> dict[str, tuple[int, str, int, bool]]:
    found = {}
    for place, row in check.entries(catalog, lambda: None):
        path = f"{place.path}/{row.name.decode()}" if place.path else row.name.decode()
        found[path] = (row.size, row.version, row.mtime_ns, row.directory)
    return found


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(ROOTS, LISTINGS, LISTINGS)
def test_what_the_builder_makes_is_right_and_stays_so_under_other_numbers(tmp_path, root, listing, other):
    """Whatever the names are. Numbers of `other`'s catalog are in use here: none of them may mean another thing."""
    with (
        built(tmp_path / "a.sqlite", root, listing) as catalog,
        built(tmp_path / "b.sqlite", root, other) as here,
    ):
        check.verify(catalog)
        last_id = here.summary.last_id
        with check.renumber(catalog, tmp_path / "c.sqlite", here, last_id) as anew:
            check.verify(anew)
            assert anew.summary._replace(last_id=0) == catalog.summary._replace(last_id=0)
            assert shown(anew) == shown(catalog)
            assert list(anew.skipped()) == list(catalog.skipped())
            assert check.fits(anew, here, last_id)
        if check.fits(catalog, here, last_id):
            for _, row in check.entries(catalog, lambda: None):
                before = here.get(row.id)
                if before is not None:
                    assert (before.name, before.directory) == (row.name, row.directory)
                    assert row.directory or (before.version, before.size) == (row.version, row.size)


def test_numbers_of_one_line_fit_and_those_of_another_do_not(tmp_path):
    listing = {f"d{n % 3}/{n}": (n, str(n), False) for n in range(30)}
    changed = {**listing, "d1/1": (1, "new", False), "d9/more": (5, "5", False)}
    with (
        built(tmp_path / "1.sqlite", "b", listing) as first,
        built(tmp_path / "2.sqlite", "b", changed, previous=first) as second,
        built(tmp_path / "3.sqlite", "b", {**changed, "a": (1, "1", False)}, previous=second) as third,
        built(tmp_path / "other.sqlite", "b", {**changed, "a": (1, "1", False)}) as elsewhere,
    ):
        assert check.fits(first, None, 0)
        assert check.fits(second, first, first.summary.last_id)
        assert check.fits(third, first, first.summary.last_id)
        assert not check.fits(elsewhere, first, first.summary.last_id)
        assert not check.fits(first, None, 1)  # something had numbers here, and nobody knows what
        assert elsewhere.summary.snapshot == third.summary.snapshot


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(ROOTS, LISTINGS, LISTINGS, st.integers(1, 3), st.booleans())
def test_content_keys_stay_with_their_names_under_other_numbers(tmp_path, root, listing, other, every, both):
    with (
        built(tmp_path / "a.sqlite", root, listing) as plain,
        sealed(plain, tmp_path / "sealed.sqlite", every) as catalog,
        built(tmp_path / "b.sqlite", root, other) as b,
        sealed(b, tmp_path / "c.sqlite", 2) as keyed,
    ):
        here = keyed if both else b
        check.verify(catalog)
        with check.renumber(catalog, tmp_path / "d.sqlite", here, here.summary.last_id) as anew:
            check.verify(anew)
            assert shown(anew) == shown(catalog)
            kept = {path for path, row in anew.files() if here.key(row.id) is not None}
            assert keys_of(anew).keys() == keys_of(catalog).keys() | kept
            assert all(key == content_key(path.encode()) for path, key in keys_of(anew).items())
    assert not [file for file in tmp_path.iterdir() if file.suffix == ".keyed"]


CHANGES = [
    "UPDATE OR IGNORE entries SET size = size + 1 WHERE directory = 0",
    "UPDATE OR IGNORE entries SET name = x'2e2e' WHERE name = x'61'",
    "UPDATE OR IGNORE entries SET name = x'2f' WHERE name = x'61'",
    "UPDATE OR IGNORE entries SET name = x'610a62' WHERE name = x'61'",
    "UPDATE OR IGNORE entries SET name = x'ff' WHERE name = x'61'",
    "UPDATE OR IGNORE entries SET name = 'a' WHERE name = x'61'",
    "UPDATE OR IGNORE entries SET size = -1 WHERE name = x'61'",
    "UPDATE OR IGNORE entries SET size = 'large' WHERE name = x'61'",
    "UPDATE OR IGNORE entries SET version = x'00' WHERE name = x'61'",
    "UPDATE OR IGNORE entries SET version = 'other' WHERE name = x'61'",
    "UPDATE OR IGNORE entries SET mtime_ns = 'now' WHERE name = x'61'",
    "UPDATE OR IGNORE entries SET parent = 12345 WHERE name = x'61'",
    "UPDATE OR IGNORE entries SET parent = id WHERE name = x'61'",
    "UPDATE OR IGNORE entries SET directory = 1 WHERE name = x'61'",
    "UPDATE OR IGNORE entries SET directory = 0 WHERE id = 1",
    "UPDATE OR IGNORE entries SET id = 999999 WHERE name = x'61'",
    "DELETE FROM entries WHERE name = x'61'",
    "DELETE FROM entries WHERE id = 1",
    "DELETE FROM entries",
    "INSERT INTO entries VALUES (888, 777, x'6e6577', 0, 1, 1, 'v')",
    "UPDATE summary SET snapshot = '00000000000000000000000000000000'",
    "UPDATE summary SET files = files + 1",
    "UPDATE summary SET bytes = bytes + 1",
    "UPDATE summary SET skipped = 7",
    "UPDATE summary SET last_id = 2",
    "DROP INDEX by_parent",
    "CREATE TABLE more(x)",
    "CREATE TRIGGER t AFTER INSERT ON entries BEGIN SELECT 1; END",
    "CREATE VIEW v AS SELECT * FROM entries",
]


@pytest.mark.parametrize("change", CHANGES)
def test_a_catalog_that_was_changed_is_not_right(tmp_path, change):
    good, bad = tmp_path / "good.sqlite", tmp_path / "bad.sqlite"
    built(good, "b", {f"d{n}/{name}": (n, name, False) for n in range(3) for name in "abc"}).close()
    shutil.copy(good, bad)
    with sqlite3.connect(bad) as database:
        database.execute(change)
    database.close()
    with pytest.raises(CatalogError), Catalog.open(bad) as catalog:
        check.verify(catalog)


KEY_CHANGES = [
    "UPDATE keys SET key = x'00'",
    "UPDATE keys SET key = key || x'00'",
    "UPDATE keys SET key = 'sixteen letters.' WHERE id = (SELECT max(id) FROM keys)",
    "UPDATE keys SET key = 7",
    "UPDATE OR IGNORE keys SET id = 999999 WHERE id = (SELECT max(id) FROM keys)",
    "UPDATE OR IGNORE keys SET id = 1 WHERE id = (SELECT min(id) FROM keys)",
    "INSERT INTO keys VALUES ((SELECT max(id) FROM entries WHERE directory = 1), zeroblob(16))",
    "DROP TABLE keys",
    "CREATE INDEX more ON keys(key)",
    "ALTER TABLE keys ADD COLUMN more",
    "PRAGMA user_version = 1",
    "PRAGMA user_version = 3",
]


@pytest.mark.parametrize("change", KEY_CHANGES)
def test_content_keys_that_are_none_are_found(tmp_path, change):
    with built(tmp_path / "c.sqlite", "b", {f"d{n}/{name}": (n, name, False) for n in range(3) for name in "abc"}) as c:
        sealed(c, tmp_path / "sealed.sqlite").close()
    with sqlite3.connect(tmp_path / "sealed.sqlite") as database:
        database.execute(change)
    database.close()
    with pytest.raises(CatalogError), Catalog.open(tmp_path / "sealed.sqlite") as catalog:
        check.verify(catalog)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.data())
def test_bytes_that_were_changed_do_no_harm(tmp_path, data):
    """Found, or in a place that says nothing; and whoever reads it is never led astray."""
    file = tmp_path / "c.sqlite"
    with built(file, "b", {f"d{n}/{name}": (n, name, False) for n in range(3) for name in "abc"}) as catalog:
        right = shown(catalog)
    content = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at] = data.draw(st.integers(0, 255))
    file.write_bytes(content)
    try:
        with Catalog.open(file) as catalog:
            check.verify(catalog)
            now = {path: (size, version, directory) for path, (size, version, _, directory) in shown(catalog).items()}
    except CatalogError:
        return
    assert now == {path: (size, version, directory) for path, (size, version, _, directory) in right.items()}


def test_whoever_waits_no_more_ends_it(tmp_path):
    class Enough(Exception):
        pass

    def pause() -> None:
        raise Enough

    with built(tmp_path / "c.sqlite", "b", {"a": (1, "1", False)}) as catalog, pytest.raises(Enough):
        check.verify(catalog, pause)
