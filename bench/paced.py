"""A process that reads files one by one at a steady rate, as a training step takes them: `python -m bench.paced`.

Orders are JSON lines on stdin, each answered by a line on stdout: the seconds that each file took, from its open until
its close. Bytes are compared by digest between two files, when the clock stands still. It ends with its stdin.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from array import array
from pathlib import Path
from typing import Any

from bench.reader import files
from cachefs.digest import content_key
from cachefs.hints.places import place_of

# The prefetcher gets as far ahead as a loader's workers let it while they start.
AHEAD_SECONDS = 0.5


def paced(root: str, keys: dict[str, bytes], order: dict[str, Any]) -> dict[str, Any]:
    """order: rate (files per second), seed, hints."""
    names = sorted(keys)
    numbers = list(range(len(names)))
    random.Random(order["seed"]).shuffle(numbers)
    consumer = place_of([f"{root}/{name}" for name in names]).consumer("bench") if order["hints"] else None
    if consumer is not None:
        consumer.plan(array("I", numbers))
        time.sleep(AHEAD_SECONDS)
    read, spent, wrong = files(root), [], 0
    begin = time.perf_counter()
    for count, number in enumerate(numbers):
        time.sleep(max(0.0, begin + count / order["rate"] - time.perf_counter()))
        name = names[number]
        began = time.perf_counter()
        data = read(name)
        spent.append(time.perf_counter() - began)
        wrong += content_key(data) != keys[name]
        if consumer is not None:
            consumer.at(count + 1)
    if consumer is not None:
        consumer.close()
    return {"spent": spent, "wrong": wrong, "files": len(names)}


def forget(root: str, names: list[str]) -> None:
    """Take files out of the page cache."""
    for name in names:
        fd = os.open(f"{root}/{name}", os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def main() -> None:
    way = json.loads(sys.stdin.readline())
    keys = {name: bytes.fromhex(key) for name, key in json.loads(Path(way["manifest"]).read_bytes()).items()}
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        forget(order["root"], list(keys))
        print(json.dumps(paced(order["root"], keys, order)), flush=True)


if __name__ == "__main__":
    main()
