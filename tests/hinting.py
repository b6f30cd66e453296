"""A program that reads with hints, for tests that kill it, or its fetcher, at a chosen moment.

`python -m tests.hinting` takes lives as lines of JSON. Each is lived by a fork, so that a killed one costs no new
imports. It says what it has read before its end, waits for a line, and ends; then comes how it ended.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import torch
from torch.utils.data.distributed import DistributedSampler

import cachefs
import cachefs.torch
from cachefs import packets
from cachefs.hints import consumer, line, reading
from cachefs.messages import decode_request

SIZE = 6000


def content(number: int) -> bytes:
    return f"{number:06d}".encode() * (SIZE // 6)


class Point:
    """Where somebody is killed: at an item, or before, during or after the nth request of a kind."""

    def __init__(self, told: dict[str, Any], home: Path) -> None:
        self._told = told
        self._home = home
        self._sent: Counter[str] = Counter()
        self.struck = False
        self._watch()

    def _watch(self) -> None:
        ask, send = line.Line.ask, packets.send

        def watched_send(sock: Any, data: bytes, descriptor: int = -1) -> None:
            kind = type(decode_request(data)).__name__
            self._sent[kind] += 1
            self._at(kind, "before")
            send(sock, data, descriptor)
            self._at(kind, "during")

        def watched_ask(self_: line.Line, request: Any, *rest: Any) -> Any:
            reply = ask(self_, request, *rest)
            self._at(type(request).__name__, "after")
            return reply

        line.send = watched_send  # type: ignore[attr-defined]
        line.Line.ask = watched_ask  # type: ignore[assignment,method-assign]

    def _at(self, kind: str, when: str) -> None:
        told = self._told
        if (told.get("kind"), told.get("nth"), told.get("when")) == (kind, self._sent[kind], when):
            self._strike()

    def item(self, number: int) -> None:
        if self._told.get("item") == number:
            self._strike()

    def _strike(self) -> None:
        if self.struck:
            return
        self.struck = True
        if self._told["who"] == "consumer":
            os.kill(os.getpid(), signal.SIGKILL)
        try:
            pid = int((self._home / "run" / "fetcher.lock").read_text())
            os.kill(pid, signal.SIGKILL)
        except (OSError, ValueError):
            self.struck = False  # there is none yet; the next of its kind will do


def order(life: dict[str, Any], fs: Any) -> Iterator[int]:
    """Numbers of the names in the order in which they are read, hinted."""
    names = life["names"]
    if life["way"] == "paths":
        numbers = {name: number for number, name in enumerate(names)}
        yield from (numbers[path] for path in cachefs.hinted(names, fs, label=life["label"]))
        return
    sampler = DistributedSampler(range(len(names)), 1, 0, seed=1)  # type: ignore[arg-type,var-annotated]
    hinted = cachefs.torch.hinted(sampler, names, fs, label=life["label"])
    for epoch in (0, 1, 5):  # the last was not to be foreseen: what was announced for it is replaced
        hinted.set_epoch(epoch)
        yield from hinted


def live(life: dict[str, Any]) -> None:
    consumer.LOOK_SECONDS = 0.05
    reading.PATHS, reading.LEFT = len(life["names"]) // 2, 10  # so that a plan is extended
    fs = fsspec.filesystem(
        "cachefs",
        target_protocol="s3",
        target_options=life["options"],
        cache_dir=life["home"],
        skip_instance_cache=True,
    )
    point = Point(life["point"], Path(life["home"]))
    if life["worker"] and not os.fork():
        time.sleep(0.3)  # a loader's worker: here it is older than the consumer, and the next is younger
        os._exit(0)
    read, worker, last = 0, 0, len(life["names"]) * (1 if life["way"] == "paths" else 3)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        for number in order(life, fs):
            if fs.cat_file(life["names"][number]) != content(number):
                raise AssertionError(f"wrong bytes of {life['names'][number]}")
            read += 1
            point.item(read)
            if life["worker"] and read == 2:
                worker = os.fork()
                if not worker:
                    time.sleep(100)
                    os._exit(0)
                print(json.dumps({"worker": worker}), flush=True)
            if read == last - 1:
                fs.cat_file(life["straggler"])  # nobody announced it, so there is a fetcher
                time.sleep(0.2)
            if read == last:
                print(json.dumps({"read": read, "warned": [str(w.message) for w in warned]}), flush=True)
                sys.stdin.readline()


def main() -> None:
    torch.set_num_threads(1)
    while told := sys.stdin.readline():
        child = os.fork()
        if not child:
            try:
                live(json.loads(told))
            except BaseException:
                sys.excepthook(*sys.exc_info())
                os._exit(1)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        print(json.dumps({"ended": os.waitstatus_to_exitcode(status)}), flush=True)


if __name__ == "__main__":
    main()
