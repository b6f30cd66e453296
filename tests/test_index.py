"""The index holds bytes only, survives damage, and sees its own unsaved writes."""

import logging
import sqlite3

import pytest

from cachefs.fetcher.index import BATCH, Index, Known, Seen


def known(n: int = 1) -> Known:
    return Known(bytes([n % 256]) * 16, n, 5, f"etag{n}", f"bucket/a{n}.jpg", "d" * 32)


def test_what_is_learned_is_known_before_and_after_a_restart(tmp_path):
    index = Index(tmp_path / "index")
    for n in range(BATCH + 3):
        index.learn("s3", known(n))
    index.see("d" * 32, "g1", "bucket/a", Seen("etag", 3, 4))
    index.learn_content("md5:1", 3, b"k" * 16)
    index.forget("s3", known(2).path, known(2).version)

    index.flush()

    def check(index: Index) -> None:
        assert index.known("s3", known(1).path, known(1).version) == known(1)
        assert index.known("gs", known(1).path, known(1).version) is None, "another origin"
        assert index.known("s3", known(2).path, known(2).version) is None
        assert index.seen("d" * 32, "g1", "bucket/a") == Seen("etag", 3, 4)
        assert index.seen("d" * 32, "g2", "bucket/a") is None, "another snapshot"
        assert index.same_content("md5:1", 3) == b"k" * 16
        assert index.same_content("md5:1", 4) is None
        assert len(list(index.records())) == BATCH + 2

    check(index)
    index.close()
    again = Index(tmp_path / "index")
    check(again)
    again.close()


def test_a_damaged_index_is_replaced_and_said_once(tmp_path, caplog):
    index = Index(tmp_path / "index")
    index.learn("s3", known())
    index.close()
    for file in (tmp_path / "index").iterdir():
        file.write_bytes(b"not a database at all" * 500)
    with caplog.at_level(logging.WARNING):
        index = Index(tmp_path / "index")
        assert index.known("s3", known().path, known().version) is None
    assert len(caplog.records) == 1
    index.learn("s3", known())
    index.flush()
    assert index.known("s3", known().path, known().version) == known()
    index.close()


def test_nothing_is_unpickled(tmp_path):
    index = Index(tmp_path / "index")
    index.learn("s3", known())
    index.close()
    database = sqlite3.connect(tmp_path / "index" / "cache.db")
    with database:
        database.execute("UPDATE Cache SET mode = 4")  # diskcache's MODE_PICKLE
    database.close()
    index = Index(tmp_path / "index")
    assert index.known("s3", known().path, known().version) is None
    index.close()
    with pytest.raises(TypeError):
        index._cache.disk.store("text", False)
