"""Bytes in passing: memory is bounded and no descriptor is lost."""

import os

from cachefs.fetcher.transit import Transit, TransitStation, memory_file


def transit(count: int) -> Transit:
    return Transit(memory_file(b"x" * count), 0, count, count, "v", 0)


def test_the_oldest_leave_when_there_is_no_room():
    station = TransitStation(keep=250)
    before = len(os.listdir("/proc/self/fd"))
    for n in range(5):
        station.put(n, transit(100))
    assert [n for n in range(5) if station.get(n)] == [3, 4]
    assert len(os.listdir("/proc/self/fd")) == before + 2
    station.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_what_is_larger_than_the_room_is_still_handed_over():
    station = TransitStation(keep=10)
    station.put("a", transit(100))
    held = station.get("a")
    assert held is not None
    assert os.pread(held.fd, 200, 0) == b"x" * 100
    station.close()


def test_replacing_one_closes_it():
    station = TransitStation()
    before = len(os.listdir("/proc/self/fd"))
    station.put("a", transit(1))
    station.put("a", transit(2))
    assert len(os.listdir("/proc/self/fd")) == before + 1
    station.close()


def test_one_that_is_pushed_out_stays_open_for_whoever_has_it():
    """Else its number would be another file's by the time that the reader is given it."""
    station = TransitStation(keep=100)
    before = len(os.listdir("/proc/self/fd"))
    held = transit(100)
    station.put("a", held)
    station.put("b", transit(100))
    assert station.get("a") is None
    assert os.pread(held.fd, 200, 0) == b"x" * 100
    del held
    station.close()
    assert len(os.listdir("/proc/self/fd")) == before
