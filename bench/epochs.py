"""A process that reads epochs by URL, each file once per epoch in a fresh order: `python -m bench.epochs`.

Orders are JSON lines on stdin, each answered by a line on stdout, with what the fetcher asked the origin for meanwhile.
Every byte is compared by digest. It ends with its stdin, so with whoever started it.
"""

from __future__ import annotations

import json
import random
import sys
import time
from array import array
from contextlib import closing
from pathlib import Path
from typing import Any

import fsspec

from cachefs.client import Connection
from cachefs.digest import content_key
from cachefs.hints.places import place_of

# Between an order that is read and the one that is said of it when hints are wrong on purpose.
ANOTHER = 1 << 20


def shuffled(count: int, seed: int) -> list[int]:
    numbers = list(range(count))
    random.Random(seed).shuffle(numbers)
    return numbers


class Reader:
    def __init__(self, fs: Any, root: str, keys: dict[str, bytes]) -> None:
        self.fs = fs
        self.paths = [f"{root}/{name}" for name in keys]
        self.keys = list(keys.values())

    def counted(self) -> tuple[int, int]:
        """(requests at the origin so far, of these for what a consumer that still lives never read)."""
        with closing(Connection(self.fs.config, None)) as connection:
            status: Any = connection.status().status
        return status["counters"]["origin_requests"], sum(each["in_vain"] for each in status["consumers"])

    def epochs(self, seeds: list[int], hints: str) -> dict[str, Any]:
        """hints: none, right, or wrong."""
        count, wrong, number, seconds = len(self.paths), 0, 0, list[float]()
        self.fs.exists(self.paths[0])
        consumer = None
        if hints != "none":
            consumer = place_of(self.paths, self.fs).consumer("bench")
        before, _ = self.counted()
        if consumer is not None:
            for seed in seeds:
                consumer.plan(array("I", shuffled(count, seed + (ANOTHER if hints == "wrong" else 0))))
        for seed in seeds:
            began = time.perf_counter()
            for index in shuffled(count, seed):
                wrong += content_key(self.fs.cat_file(self.paths[index])) != self.keys[index]
                number += 1
                if consumer is not None:
                    consumer.at(number)
            seconds.append(time.perf_counter() - began)
        after, in_vain = self.counted()
        if consumer is not None:
            consumer.close()
        return {"requests": after - before, "in_vain": in_vain, "files": number, "wrong": wrong, "seconds": seconds}


def main() -> None:
    way = json.loads(sys.stdin.readline())
    keys = {name: bytes.fromhex(key) for name, key in json.loads(Path(way["manifest"]).read_bytes()).items()}
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        fs = fsspec.filesystem("cachefs", cache_dir=order["home"], cache_size=order["size"], **way["options"])
        reader = Reader(fs, way["root"], keys)
        print(json.dumps(reader.epochs(order["seeds"], order["hints"])), flush=True)


if __name__ == "__main__":
    main()
