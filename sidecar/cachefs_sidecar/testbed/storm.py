"""Readers of a mount that compare every byte, while somebody kills what serves them.

Each read goes past the page cache, and each reader is a process of its own: `python -m ...testbed.storm MOUNT PLAIN`
reads until its stdin ends and compares with the same files in the folder PLAIN.
"""

from __future__ import annotations

import contextlib
import errno
import json
import mmap
import os
import random
import select
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from cachefs_sidecar.testbed.fetchers import fetcher_pid

# Of a file above this only a part is read at a time.
WHOLE = 1024 * 1024

# O_DIRECT wants memory at a multiple of this, and offsets too.
PAGE = 4096

# A reader that is told to end and does not in this time hangs in a read.
END_SECONDS = 150.0

# A worker that was killed comes again within milliseconds; a fetcher when a read needs one.
COME_SECONDS = 30.0

_dice = random.Random()  # noqa: S311 - chance, not secrets


@dataclass
class Tally:
    """What readers met. failed: errno name -> times. seconds: of each read, from open to close."""

    failed: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    @property
    def reads(self) -> int:
        return len(self.seconds)

    @property
    def worst(self) -> float:
        return max(self.seconds, default=0.0)

    def quantile(self, share: float) -> float:
        ordered = sorted(self.seconds)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0

    def __str__(self) -> str:
        return (
            f"{self.reads} reads, {sum(self.failed.values())} failed {dict(self.failed)}, {len(self.wrong)} wrong; "
            f"p50 {self.quantile(0.5) * 1e3:.1f} ms, p99 {self.quantile(0.99) * 1e3:.0f} ms, "
            f"p99.9 {self.quantile(0.999) * 1e3:.0f} ms, worst {self.worst * 1e3:.0f} ms"
        )


class Readers:
    """`count` processes that read the files of `mountpoint` and compare with `plain`, until `end`."""

    def __init__(self, mountpoint: Path, plain: Path, count: int) -> None:
        command = [sys.executable, "-m", "cachefs_sidecar.testbed.storm", str(mountpoint), str(plain)]
        self._processes = [
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(count)
        ]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.kill()
            process.communicate()

    def end(self) -> Tally:
        """Raises RuntimeError when a reader died (of SIGBUS, when a page could not be had) or hangs."""
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.close()
            process.stdin = None
        tally = Tally()
        deadline = time.monotonic() + END_SECONDS
        for process in self._processes:
            try:
                out, _ = process.communicate(timeout=max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                raise RuntimeError("a reader hangs") from None
            if process.returncode:
                raise RuntimeError(f"a reader died: {process.returncode}")
            told = json.loads(out)
            tally.failed.update(told["failed"])
            tally.wrong += told["wrong"]
            tally.seconds += told["seconds"]
        return tally


class Killer:
    """Kills workers and fetchers of one mount, and counts. keeper: its pid, which changes. home: of its cache."""

    def __init__(self, keeper: Callable[[], int], home: Path) -> None:
        self._keeper = keeper
        self._home = home
        self.killed: Counter[str] = Counter()

    def worker(self) -> bool:
        """Kill one by chance; False when there is none."""
        keeper = self._keeper()
        children = Path(f"/proc/{keeper}/task/{keeper}/children").read_text().split()
        return bool(children) and self._kill("worker", int(_dice.choice(children)))

    def fetcher(self) -> bool:
        """Kill it; False when there is none."""
        pid = fetcher_pid(self._home)
        return pid is not None and self._kill("fetcher", pid)

    def storm(self, count: int, seconds: float) -> float:
        """Kill so many, workers and fetchers in turn, within about `seconds`; the seconds that it took.

        A fetcher takes an eighth of a second to start, and its turn waits for it. Raises RuntimeError when none comes.
        """
        began = time.monotonic()
        for number in range(count):
            kill = self.fetcher if number % 2 else self.worker
            due = time.monotonic() + COME_SECONDS
            while not kill():
                if time.monotonic() > due:
                    raise RuntimeError("whoever was killed does not come again")
                time.sleep(0.002)
            time.sleep(_dice.uniform(0, 2 * seconds / count))
        return time.monotonic() - began

    def _kill(self, what: str, pid: int) -> bool:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
            self.killed[what] += 1
            return True
        return False


# --- a reader ----------------------------------------------------------------------------------------------------


def _read(file: Path, size: int) -> Iterator[tuple[int, bytes]]:
    """Pieces of a file as (offset, bytes), read in a way that is drawn by chance, past the page cache."""
    way = _dice.choice(("pages", "direct", "map"))
    fd = os.open(file, os.O_RDONLY | (os.O_DIRECT if way == "direct" else 0))
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        offset = 0 if size <= WHOLE else _dice.randrange(0, size - WHOLE, PAGE)
        length = min(size, WHOLE)
        if way == "map":
            with mmap.mmap(fd, 0, prot=mmap.PROT_READ) as view:
                view.madvise(mmap.MADV_RANDOM)  # each page is a request of its own
                for at in (offset, offset + _dice.randrange(length)):
                    yield at, view[at : at + 1]
        elif way == "direct":
            with mmap.mmap(-1, -(-length // PAGE) * PAGE) as memory:
                count = os.preadv(fd, [memory], offset)
                yield offset, memory[:count]
        else:
            yield offset, os.pread(fd, length, offset)
    finally:
        os.close(fd)


def _main(mountpoint: Path, plain: Path) -> None:
    files = [file for file in plain.rglob("*") if file.is_file()]
    tally = Tally()
    while not select.select([sys.stdin], [], [], 0)[0]:
        source = _dice.choice(files)
        name = str(source.relative_to(plain))
        size = source.stat().st_size
        began = time.monotonic()
        try:
            pieces = list(_read(mountpoint / name, size))
            if _dice.random() < 0.1:
                os.getxattr(mountpoint / name, "user.cachefs.version")  # the kernel remembers none of it
        except OSError as error:
            tally.failed[errno.errorcode.get(error.errno or 0, "?")] += 1
            continue
        tally.seconds.append(time.monotonic() - began)
        with source.open("rb") as right:
            for offset, data in pieces:
                right.seek(offset)
                whole = len(data) in (1, min(size, WHOLE))  # a short read of a regular file is a wrong one
                if not whole or right.read(len(data)) != data:
                    tally.wrong.append(f"{name} at {offset}, {len(data)} bytes")
    print(json.dumps({"failed": tally.failed, "wrong": tally.wrong, "seconds": tally.seconds}))  # noqa: T201


if __name__ == "__main__":
    _main(Path(sys.argv[1]), Path(sys.argv[2]))
