"""Many readers of large objects at the moment when these become whole: their bytes, once from the origin, no error."""

from __future__ import annotations

import os
import random
import threading
from pathlib import Path

from cachefs.client import Connection
from cachefs.client.session import Session
from cachefs.config import CacheConfig
from cachefs.digest import BLOCK_SIZE

OBJECTS, BLOCKS, READERS = 12, 3, 32
SIZE = (BLOCKS - 1) * BLOCK_SIZE + 5


def test_readers_that_ask_while_an_object_becomes_whole(tmp_path: Path, cache_dir: Path) -> None:
    origin = tmp_path / "origin"
    origin.mkdir()
    versions = {}
    for number in range(OBJECTS):
        file = origin / str(number)
        with file.open("wb") as out:
            out.truncate(SIZE - 5)
            out.seek(SIZE - 5)
            out.write(b"%05d" % number)
        versions[file] = f"{file.stat().st_mtime_ns}-{SIZE}"
    connection = Connection(CacheConfig.make([cache_dir], min_free=0), Session("file", {}, {}, root=str(origin)))
    failures: list[str] = []

    def read(seed: int) -> None:
        dice = random.Random(seed)
        for file, version in versions.items():
            for block in dice.sample(range(BLOCKS), BLOCKS):
                offset = block * BLOCK_SIZE
                expected = bytes(5) if block < BLOCKS - 1 else b"%05d" % int(file.name)
                try:
                    located = connection.need(str(file), version=version, size=SIZE, offset=offset, length=5)
                    try:
                        if located.read(offset, 5) != expected:
                            failures.append(f"{file.name}: other bytes at {offset}")
                    finally:
                        os.close(located.fd)
                except OSError as error:
                    failures.append(repr(error))

    readers = [threading.Thread(target=read, args=(seed,)) for seed in range(READERS)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    assert failures == []
    counters = connection.status().status["counters"]
    assert counters["origin_requests"] == OBJECTS * BLOCKS
    connection.close()
