"""On the loop while the disk is prompt, in threads while it is not: who is held up by a slow disk."""

from __future__ import annotations

import threading
import time
from typing import cast

import pytest

from cachefs.config import CacheConfig
from cachefs.digest import content_key
from cachefs.fetcher import storing
from cachefs.fetcher.storing import Storing
from cachefs.store import Store

LINKS = [("d" * 32, "a" * 32)]


class Watched(Store):
    """A store that notes who called it, and takes `pause` seconds."""

    pause = 0.0
    callers: list[threading.Thread]

    def put(self, data, *, links=(), tag=b""):
        self.callers.append(threading.current_thread())
        time.sleep(self.pause)
        return super().put(data, links=links, tag=tag)


@pytest.fixture
def store(tmp_path):
    made = cast(Watched, Watched.open(CacheConfig.make(tmp_path / "cache", min_free=0)))
    made.callers = []
    return made


def here(store: Watched) -> list[bool]:
    return [caller is threading.main_thread() for caller in store.callers]


async def test_small_on_the_loop_and_large_in_a_thread(store):
    hand = Storing(store)
    for data in (b"small", bytes(storing.SMALL_BYTES + 1)):
        key = await hand.put(data, LINKS)
        assert key == content_key(data)
        assert hand.file(key) == str(store.path(key))
    assert here(store) == [True, False]


async def test_a_slow_disk_is_left_to_threads_for_a_while(store, monkeypatch):
    hand = Storing(store)
    store.pause = storing.PROMPT_SECONDS * 4
    await hand.put(b"1", LINKS)  # the one that finds out
    await hand.put(b"2", LINKS)
    store.pause = 0.0
    await hand.put(b"3", LINKS)
    assert here(store) == [True, False, False]
    later = time.monotonic() + storing.WARY_SECONDS
    monkeypatch.setattr("cachefs.fetcher.storing.time.monotonic", lambda: later)
    await hand.put(b"4", LINKS)
    assert here(store)[3:] == [True]


async def test_one_that_fails_slowly_counts_too(store, monkeypatch):
    hand = Storing(store)

    def fail(data, *, links=(), tag=b""):
        time.sleep(storing.PROMPT_SECONDS * 4)
        raise OSError("the disk fails")

    monkeypatch.setattr(store, "put", fail)
    with pytest.raises(OSError, match="the disk fails"):
        await hand.put(b"1", LINKS)
    monkeypatch.undo()
    await hand.put(b"2", LINKS)
    assert here(store) == [False]


async def test_of_several_directories_the_one_that_has_it(tmp_path):
    store = Store.open(CacheConfig.make([tmp_path / "a", tmp_path / "b"], min_free=0))
    hand = Storing(store)
    for number in range(8):
        key = await hand.put(b"%d" % number, LINKS)
        assert hand.file(key) == str(store.path(key))
