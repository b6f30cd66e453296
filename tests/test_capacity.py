"""Capacity is never exceeded, and who gives room to whom."""

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cachefs.config import Floor
from cachefs.errors import CacheFull
from cachefs.fetcher.capacity import Capacity, allocated
from cachefs.fetcher.residency import Candidate, victims


@given(st.lists(st.tuples(st.integers(0, 100_000), st.sampled_from(["commit", "cancel", "hold"])), max_size=50))
def test_used_and_reserved_never_pass_the_limit(tmp_path_factory, steps):
    room = Capacity(1_000_000, Floor())
    expected = 0
    for size, end in steps:
        try:
            reserved = room.reserve(size, tmp_path_factory.getbasetemp())
        except CacheFull:
            assert room.used + room.reserved + allocated(size) > 1_000_000
            continue
        expected += 0 if end == "cancel" else allocated(size)
        if end == "commit":
            room.commit(reserved)
        elif end == "cancel":
            room.cancel(reserved)
        assert room.used + room.reserved == expected <= 1_000_000


def test_the_floor_counts_what_is_reserved_but_not_written(monkeypatch, tmp_path):
    disk = SimpleNamespace(f_bavail=100, f_blocks=1000, f_frsize=4096)
    monkeypatch.setattr("os.statvfs", lambda _: disk)
    room = Capacity(None, Floor.parse("5%"))  # 50 blocks stay free, so 50 may be taken
    room.reserve(49 * 4096, tmp_path)
    room.reserve(1, tmp_path)
    with pytest.raises(CacheFull, match="floor"):
        room.reserve(1, tmp_path)


def test_victims_are_idle_datasets_least_recently_used_first():
    have = [
        Candidate("busy", 1, True),
        Candidate("new", 9, False),
        Candidate("old", 2, False),
        Candidate("me", 0, False),
    ]
    assert victims([*have, Candidate("pinned", 0, False, True)], wanted_by="me") == ["old", "new"]
