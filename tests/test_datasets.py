"""The records of datasets: what is read of a file that another version wrote, and what a change keeps."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import pytest

from cachefs import datasets
from cachefs.datasets import DatasetRecord


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path


def test_a_record_of_an_older_version_loads(home: Path) -> None:
    record = DatasetRecord("s3 x", "bucket/set", snapshot="g3")
    datasets.save(home, record)
    file = home / "datasets" / f"{record.id}.json"
    old = json.loads(file.read_text())
    del old["pinned"], old["last_id"]
    file.write_text(json.dumps(old))
    assert datasets.load(home, "s3 x", "bucket/set") == record
    assert datasets.pinned(home) == frozenset()


@pytest.mark.parametrize("pinned", ["no", 1, None, [], {}])
def test_only_true_is_pinned(home: Path, pinned: object) -> None:
    record = DatasetRecord("s3 x", "bucket/set")
    datasets.save(home, record)
    file = home / "datasets" / f"{record.id}.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "pinned": pinned}))
    assert datasets.load(home, "s3 x", "bucket/set") == record


def test_an_update_keeps_what_others_changed_and_is_no_use(home: Path) -> None:
    stale = DatasetRecord("s3 x", "bucket/set")
    datasets.save(home, stale)
    os.utime(home / "datasets" / f"{stale.id}.json", (1000, 1000))
    datasets.update(home, stale, pinned=True)
    new = datasets.update(home, stale, snapshot="g2")
    assert (new.pinned, new.snapshot) == (True, "g2")
    assert datasets.load(home, "s3 x", "bucket/set") == new
    assert datasets.last_use(home, stale.id) == 1000
    assert datasets.pinned(home) == {stale.id}


def test_updates_at_the_same_time_lose_none(home: Path) -> None:
    records = DatasetRecord("s3 x", "a")
    datasets.save(home, records)

    def change(field: str) -> None:
        for number in range(200):
            value = number % 2 == 0 if field == "pinned" else f"g{number}" if field == "snapshot" else number
            assert getattr(datasets.update(home, records, **{field: value}), field) == value

    threads = [threading.Thread(target=change, args=(f,)) for f in ("pinned", "snapshot", "last_id")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    final = datasets.load(home, "s3 x", "a")
    assert final is not None
    assert (final.pinned, final.snapshot, final.last_id) == (False, "g199", 199)
