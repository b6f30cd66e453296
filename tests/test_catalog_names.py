"""Which names are served, and with which reason the others are not."""

from __future__ import annotations

from pathlib import Path

import pytest

from cachefs.catalog import Builder, names
from cachefs.catalog.names import Judge, Place
from cachefs.messages import Entry

SERVED = [
    ("b/r/a", Place(1, b"", b"a", False)),
    ("b/r/d/e/f.jpg", Place(3, b"d\0e", b"f.jpg", False)),
    ("b/r/d/", Place(1, b"", b"d", True)),
    ("b/r/d/e/", Place(2, b"d", b"e", True)),
    ("b/r/" + "x" * 255, Place(1, b"", b"x" * 255, False)),
    ("b/r/" + "é" * 127 + "x", Place(1, b"", "é".encode() * 127 + b"x", False)),
    ("b/r/...", Place(1, b"", b"...", False)),
    ("b/r/.hidden", Place(1, b"", b".hidden", False)),
    ("b/r/new\nline", Place(1, b"", b"new\nline", False)),
    ("b/r/caf\u00e9", Place(1, b"", b"caf\xc3\xa9", False)),
    ("b/r/cafe\u0301", Place(1, b"", b"cafe\xcc\x81", False)),
    ("b/r/ ", Place(1, b"", b" ", False)),
    ("b/r/a\\b", Place(1, b"", b"a\\b", False)),
    ("b/r/\U0001f600", Place(1, b"", "\U0001f600".encode(), False)),
]

SKIPPED = [
    ("b/r//a", names.EMPTY),
    ("b/r/a//b", names.EMPTY),
    ("b/r//", names.EMPTY),
    ("b/r/a//", names.EMPTY),
    ("b/r/.", names.DOTS),
    ("b/r/..", names.DOTS),
    ("b/r/../x", names.DOTS),
    ("b/r/a/./x", names.DOTS),
    ("b/r/a/../../x", names.DOTS),
    ("b/r/../", names.DOTS),
    ("b/r/a\0b", names.NUL),
    ("b/r/\0/x", names.NUL),
    ("b/r/" + "x" * 256, names.LONG),
    ("b/r/" + "x" * 256 + "/y", names.LONG),
    ("b/r/" + "é" * 128, names.LONG),
    ("b/r/\udc80", names.NOT_UTF8),
    ("b/r/\ud800/x", names.NOT_UTF8),
    ("b/other", names.OUTSIDE),
    ("b/rr", names.OUTSIDE),
    ("/b/r/a", names.OUTSIDE),
    ("b/r", names.BESIDE_DIRECTORY),
]


@pytest.mark.parametrize(("path", "place"), SERVED)
def test_served(path, place):
    judge = Judge("b/r")
    assert judge.place(path) == place
    assert judge.place(path) == place  # from memory the same
    assert names.path_of("b/r", place.folder, place.name).decode() == path.removesuffix("/")


@pytest.mark.parametrize(("path", "reason"), SKIPPED)
def test_skipped(path, reason):
    judge = Judge("b/r")
    assert judge.place(path) == reason
    assert judge.place(path) == reason


def test_trailing_slash_with_content_is_no_directory():
    judge = Judge("b/r")
    assert judge.place("b/r/a/", size=5) == names.SLASH
    assert judge.place("b/r/", size=5) == names.SLASH
    assert judge.place("b/r/a/", size=5, directory=True) == Place(1, b"", b"a", True)


@pytest.mark.parametrize(
    ("root", "path", "name"),
    [("", "bucket/a", b"a"), ("/", "/data/a", b"a"), ("https://h", "https://h/x/a", b"a"), ("/data", "/data/a", b"a")],
)
def test_roots_of_all_protocols(root, path, name):
    place = Judge(root).place(path)
    assert isinstance(place, Place)
    assert place.name == name
    assert names.path_of(root, place.folder, place.name).decode() == path


@pytest.mark.parametrize("root", ["", "/", "b/r"])
def test_the_root_itself(root):
    judge = Judge(root)
    assert judge.place(root, directory=True) == names.ROOT_PLACE
    if root == "b/r":
        assert judge.place("b/r/") == names.ROOT_PLACE


def test_remembered_directories_stay_bounded():
    judge = Judge("b")
    for number in range(5000):
        assert judge.place(f"b/d{number}/x") == Place(2, b"d%d" % number, b"x", False)
    assert len(judge._folders) <= 1024


def test_through_a_catalog(tmp_path: Path):
    """Each odd name is served byte for byte, or listed as skipped with its reason; neighbours are not disturbed."""
    builder = Builder(tmp_path / "c", identity="i", root="b/r")
    for path, _ in SERVED + SKIPPED:
        builder.add(Entry(path, 0 if path.endswith("/") else 3, 1, "v"))
    builder.add(Entry("b/r/n", 1, 1, "v"))
    builder.add(Entry("b/r/n/below", 1, 1, "v"))
    builder.add(Entry("b/r/slash/", 9, 1, "v"))
    builder.add(Entry("b/r/size", -1, 1, "v"))
    builder.add(Entry("b/r/huge", 2**63, 1, "v"))
    builder.add(Entry("b/r/version", 1, 1, "\ud800"))
    with builder.seal() as catalog:
        served = {path for path, _ in catalog.files()}
        assert served == {p for p, place in SERVED if not place.directory} | {"b/r/n/below"}
        assert dict(catalog.skipped()) == dict(SKIPPED) | {
            "b/r/n": names.BESIDE_DIRECTORY,
            "b/r/slash/": names.SLASH,
            "b/r/size": names.SIZE,
            "b/r/huge": names.SIZE,
            "b/r/version": names.VERSION,
        }
        assert catalog.summary.skipped == len(SKIPPED) + 5
        for path, place in SERVED:
            row = catalog.find(path)
            assert row is not None
            assert row.name == place.name
            assert catalog.object_path(row.id) == path.removesuffix("/")
