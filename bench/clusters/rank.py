"""A process that reads on one node of a cluster, as a rank of one or more jobs does: `python -m bench.clusters.rank`.

Orders are JSON lines on stdin, each answered by a line on stdout: which objects to read by URL, for each job in its
order, and how many of a job at once. A line before the answer says when so many were read. Every byte is compared by
digest. It ends with its stdin, so with whoever started it.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec

from cachefs.digest import content_key

# Of the texts of errors so many are told.
ERRORS_TOLD = 3


class Order:
    """One order, carried out by several threads."""

    def __init__(self, fs: Any, names: list[str], keys: list[bytes], tell_at: int | None) -> None:
        self._fs = fs
        self._names = names
        self._keys = keys
        self._tell_at = tell_at
        self._lock = threading.Lock()
        self._times: list[float] = []
        self._wrong: list[str] = []
        self._failed: list[str] = []

    def read(self, jobs: list[list[int]], at_once: int) -> dict[str, Any]:
        """begin, end: of the clock that all processes have. slowest, p99, p50: seconds of one read."""
        began = time.monotonic()
        readers = [turns for turns in map(iter, jobs) for _ in range(at_once)]
        with ThreadPoolExecutor(len(readers)) as pool:
            list(pool.map(self._reader, readers))
        ended, times = time.monotonic(), sorted(self._times) or [0.0]
        return {
            "begin": began,
            "end": ended,
            "files": len(self._times),
            "wrong": self._wrong[:ERRORS_TOLD],
            "failed": len(self._failed),
            "errors": self._failed[:ERRORS_TOLD],
            "slowest": times[-1],
            "p99": times[int(0.99 * len(times))],
            "p50": times[len(times) // 2],
        }

    def _reader(self, turns: Iterator[int]) -> None:
        while True:
            with self._lock:  # several share a job
                number = next(turns, None)
            if number is None:
                return
            self._one(number)

    def _one(self, number: int) -> None:
        began = time.monotonic()
        try:
            data = self._fs.cat_file(self._names[number])
        except Exception as error:  # noqa: BLE001 - whatever a reader would have met
            self._failed.append(f"{type(error).__name__}: {error}")
            data = None
        took = time.monotonic() - began
        if data is not None and content_key(data) != self._keys[number]:
            self._wrong.append(self._names[number])
        with self._lock:
            self._times.append(took)
            if len(self._times) == self._tell_at:
                _say({"read": self._tell_at})


def _say(answer: dict[str, Any]) -> None:
    print(json.dumps(answer), flush=True)


def main() -> None:
    way = json.loads(sys.stdin.readline())
    manifest = json.loads(Path(way["manifest"]).read_bytes())
    names = [f"{way['root']}/{name}" for name in manifest]
    keys = [bytes.fromhex(key) for key in manifest.values()]
    fs = fsspec.filesystem("cachefs", cache_dir=way["home"], **way["options"])
    fs.exists(names[0])  # the catalog is open, and the fetcher known
    _say({"ready": True})
    for line in sys.stdin:
        order = json.loads(line)
        _say(Order(fs, names, keys, order["tell_at"]).read(order["jobs"], order["at_once"]))


if __name__ == "__main__":
    main()
