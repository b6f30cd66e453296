"""Arbitrary entries with hostile names against a dict: what a catalog serves, skips, keeps and reports as changed."""

from __future__ import annotations

import os
import random
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cachefs.catalog import ROOT, Builder, Catalog, Row, changes
from cachefs.messages import Entry

TOP = "b/r"

# Each catalog waits for the disk a few times; in memory that is nothing.
MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None

# Few components, so that they meet: conflicts, prefixes of each other, what sorts around "/", and what is refused.
GOOD = ["a", "b", "a-", "a.", "a0", "A", "é", "e\u0301", "\n", "x" * 255, "\U0001f600", " "]
BAD = ["", ".", "..", "a\0", "x" * 256, "\udc80"]
component = st.sampled_from(GOOD * 3 + BAD)
relative = st.lists(component, min_size=1, max_size=4).map("/".join)


@st.composite
def entry(draw: st.DrawFn) -> Entry:
    directory = draw(st.integers(0, 5)) == 0
    size = 0 if directory else draw(st.integers(0, 2))
    version = "" if directory else draw(st.sampled_from(["v1", "v2"]))
    path = f"{TOP}/{draw(relative)}"
    if directory:
        path = path.rstrip("/") if path.rstrip("/") != TOP else f"{TOP}/d"
    return Entry(path, size, draw(st.integers(0, 2)), version, directory)


# One entry per key, as at an origin; the key of a directory is its name with a slash.
entries = st.lists(
    entry(), max_size=14, unique_by=lambda e: e.path.rstrip("/") + "/" * (e.directory or e.path.endswith("/"))
)


class Model:
    """What should be served, worked out from the rules with nothing in common with the product's code."""

    def __init__(self, listed: list[Entry]) -> None:
        self.files: dict[str, Entry] = {}
        self.directories: dict[str, int] = {"": 0}
        self.skipped: set[str] = set()
        for one in listed:
            name = one.path[len(TOP) + 1 :]
            is_directory = one.directory or name.endswith("/") or not name
            parts = name.removesuffix("/").split("/") if name else []
            if ((name.endswith("/") or not name) and not one.directory and one.size) or any(map(bad, parts)):
                self.skipped.add(one.path)
            else:
                for length in range(1, len(parts)):
                    self.directories.setdefault("/".join(parts[:length]), 0)
                if is_directory:
                    key = "/".join(parts)
                    self.directories[key] = max(one.mtime_ns, self.directories.get(key, 0))
                else:
                    self.files["/".join(parts)] = one
        for name in list(self.files):
            if name in self.directories:
                self.skipped.add(self.files.pop(name).path)

    def everything(self) -> dict[str, tuple[bool, int, int, str]]:
        found = {n: (False, e.size, e.mtime_ns, e.version) for n, e in self.files.items()}
        return found | {n: (True, 0, mtime, "") for n, mtime in self.directories.items()}


def bad(part: str) -> bool:
    try:
        encoded = part.encode()
    except UnicodeEncodeError:
        return True
    return part in ("", ".", "..") or "\0" in part or len(encoded) > 255


@contextmanager
def sealed(listed: list[Entry], previous: Catalog | None = None) -> Iterator[Catalog]:
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        builder = Builder(Path(folder, "c"), identity="i", root=TOP, previous=previous)
        builder.add_all(listed)
        with builder.seal() as catalog:
            yield catalog


def walk(catalog: Catalog) -> dict[str, Row]:
    """Every row by name below the root, through children() in pages of two; each must come once."""
    top = catalog.get(ROOT)
    assert top is not None
    found = {"": top}
    waiting = [("", ROOT)]
    while waiting:
        prefix, id = waiting.pop()
        after = 0
        while page := catalog.children(id, after, 2):
            for row in page:
                assert row.id > after
                after = row.id
                name = prefix + row.name.decode()
                assert name not in found
                found[name] = row
                if row.directory:
                    waiting.append((name + "/", row.id))
    return found


def full(name: str) -> str:
    return f"{TOP}/{name}" if name else TOP


# Some seconds for all three tests.
quick = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@quick
@given(entries, st.randoms(use_true_random=False))
def test_every_entry_is_served_once_or_skipped(listed: list[Entry], shuffle: random.Random) -> None:
    model = Model(listed)
    expected = model.everything()
    with sealed(listed) as catalog:
        found = walk(catalog)
        assert {name: tuple(row[3:]) for name, row in found.items()} == expected
        assert {path for path, _ in catalog.skipped()} == model.skipped
        assert all(reason for _, reason in catalog.skipped())
        files = list(catalog.files())
        assert sorted(path for path, _ in files) == sorted(map(full, model.files))
        for name, row in found.items():
            assert type(row.directory) is bool
            assert catalog.get(row.id) == row
            assert catalog.object_path(row.id) == full(name)
            assert catalog.find(full(name)) == row
            assert row.parent < row.id
            if name:
                assert catalog.lookup(row.parent, row.name) == row
            below = {path for path, _ in catalog.files(full(name))}
            assert below == {full(f) for f in model.files if f == name or not name or f.startswith(name + "/")}
        for path in model.skipped - {full(name) for name in found}:
            assert catalog.find(path) is None or path.endswith("/")
        for id in {row.id for row in found.values() if row.directory}:
            ids = [row.id for row in catalog.children(id)]
            assert ids == list(range(ids[0], ids[0] + len(ids))) if ids else True
            assert list(catalog.named(id)) == sorted(catalog.children(id), key=lambda row: row.name)
        summary = catalog.summary
        assert (summary.files, summary.directories) == (len(model.files), len(model.directories) - 1)
        assert summary.bytes == sum(e.size for e in model.files.values())
        assert summary.skipped == len(model.skipped)
        assert summary.last_id == max(row.id for row in found.values())

        again = listed * 2
        shuffle.shuffle(again)
        with sealed(again) as other:
            assert walk(other) == found
            assert other.summary._replace(created=0) == summary._replace(created=0)
            assert list(changes(catalog, other)) == []


@quick
@given(entries, entries, entries)
def test_ids_over_refreshes_and_changes(first: list[Entry], second: list[Entry], third: list[Entry]) -> None:
    with sealed(first) as one, sealed(second, one) as two, sealed(third, two) as three:
        used: dict[int, tuple[str, str]] = {}
        for old, new in ((None, one), (one, two), (two, three)):
            before = walk(old) if old is not None else {}
            after = walk(new)
            floor = old.summary.last_id if old is not None else 0
            for name, row in after.items():
                was = before.get(name)
                same = was is not None and was.directory == row.directory
                if same and was is not None and (was.version, was.size) == (row.version, row.size):
                    assert row.id == was.id
                else:
                    assert row.id > floor
                # A number never means two things, however many refreshes lie between.
                assert used.setdefault(row.id, (name, row.version)) == (name, row.version)
            assert new.summary.last_id >= max(row.id for row in after.values())
            assert new.summary.last_id >= floor
            if old is not None:
                check_changes(old, before, new, after)
        # Catalogs that are not each other's successors, too.
        check_changes(one, walk(one), three, walk(three))
        check_changes(three, walk(three), one, walk(one))


def check_changes(old: Catalog, before: dict[str, Row], new: Catalog, after: dict[str, Row]) -> None:
    expected = set()
    for name in before.keys() | after.keys():
        was, now = before.get(name), after.get(name)
        if was is not None and now is not None and (was.id, *was[3:]) == (now.id, *now[3:]):
            continue
        above = name.rpartition("/")[0]
        parent = 0
        if name:
            there = before.get(above)
            parent = there.id if there is not None and there.directory else after[above].id
        expected.add((parent, name.rpartition("/")[2].encode(), was, now))
    found = list(changes(old, new))
    assert len(found) == len(set(found))
    assert set(found) == expected


@quick
@given(entries, entries)
def test_snapshot_tells_contents_apart(first: list[Entry], second: list[Entry]) -> None:
    def essence(listed: list[Entry]) -> dict[str, tuple[bool, int, str]]:
        return {n: (d, size, version) for n, (d, size, _, version) in Model(listed).everything().items()}

    with sealed(first) as one, sealed(second, one) as two:
        assert len(one.summary.snapshot) == 32
        assert (one.summary.snapshot == two.summary.snapshot) == (essence(first) == essence(second))
