"""The processes that read for a contender: `python -m bench.comparisons.member`, one main process and its workers.

Built as a PyTorch DataLoader is: the main process imports and prepares, then forks the workers, which read. Orders
are JSON lines on stdin, each answered by one line on stdout. What was read is kept in memory until the clocks of all
workers have stopped, and compared then; the memory is made ready beforehand, so that keeping costs what throwing away
does.
"""

from __future__ import annotations

import ctypes
import json
import multiprocessing
import os
import random
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from bench.contenders import Contender, Place, load
from bench.contenders.contender import Bytes
from bench.contenders.formats import Format
from cachefs.digest import content_key

# glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8
MOST = 2**31 - 1


def main() -> None:
    told = json.loads(sys.stdin.readline())
    kind = load(told["contender"])
    if issubclass(kind, Format):
        import torch  # noqa: F401 - a training process has it in any case: it is no cost of the contender
    began = time.perf_counter()
    contender = kind(Place(**told["place"]))
    contender.before_fork()
    prepared = time.perf_counter() - began
    fork = multiprocessing.get_context("fork")
    workers: list[Connection] = []
    pids: list[int] = []
    for part in range(told["workers"]):
        ours, theirs = fork.Pipe()
        process = fork.Process(target=_work, args=(theirs, contender, told, part), daemon=True)
        process.start()
        theirs.close()
        workers.append(ours)
        pids.append(process.pid or 0)
    for worker in workers:
        worker.recv()
    _say({"pids": [os.getpid(), *pids], "prepared": prepared})
    for line in sys.stdin:
        for worker in workers:
            worker.send(json.loads(line))
        _say({"answers": [_answer(worker) for worker in workers]})
    for pid in pids:
        os.kill(pid, signal.SIGKILL)  # they have nothing to save, and threads that may not end


def _answer(worker: Connection) -> dict[str, Any]:
    try:
        answer: dict[str, Any] = worker.recv()
    except EOFError:
        return {"error": "a worker ended"}
    return answer


def _say(what: dict[str, Any]) -> None:
    print(json.dumps(what), flush=True)


# --- a worker ---------------------------------------------------------------------------------------------------


def _work(orders: Connection, contender: Contender, told: dict[str, Any], part: int) -> None:
    sys.stdin.close()
    of = told["workers"]
    truth = Truth(told)
    _keep_memory(told["memory"] // of)
    if isinstance(contender, Format):
        _pose_as_loader(part, of)
    orders.send("ready")
    worker = Worker(contender, truth, part, of)
    while True:
        try:
            order = orders.recv()
        except EOFError:
            return
        try:
            orders.send(worker.obey(order))
        except Exception as error:  # noqa: BLE001 - whatever a contender's library raises is its result
            traceback.print_exc()
            orders.send({"error": f"{type(error).__name__}: {error}"[:400]})


class Truth:
    """What the files really hold. Ranges are compared with the files behind the origin themselves."""

    def __init__(self, told: dict[str, Any]) -> None:
        self.keys: dict[str, str] = json.loads(Path(told["manifest"]).read_bytes())
        self._files = Path(told["files"])

    def share(self, seed: int, part: int, of: int) -> list[str]:
        names = sorted(self.keys)
        random.Random(seed).shuffle(names)
        return names[part::of]

    def differs(self, name: str, start: int | None, data: Bytes) -> bool:
        if start is None or name not in self.keys:
            return self.keys.get(name) != content_key(data).hex()
        with (self._files / name).open("rb") as file:
            file.seek(start)
            return file.read(len(data)) != bytes(data)

    def size(self, name: str) -> int:
        return (self._files / name).stat().st_size


class Worker:
    """One worker's share. kept: (name, start or None for a whole file, its bytes) of what the last order read."""

    def __init__(self, contender: Contender, truth: Truth, part: int, of: int) -> None:
        self.contender, self.truth, self.part, self.of = contender, truth, part, of
        self.kept: list[tuple[str, int | None, Bytes]] = []
        self.failed: dict[str, str] = {}
        self.first = 0.0
        self.opened = False

    def obey(self, order: dict[str, Any]) -> dict[str, Any]:
        if order["do"] == "compare":
            return self.compare()
        work: Callable[[dict[str, Any]], int] = getattr(self, order["do"])
        self.kept, self.failed, self.first = [], {}, 0.0
        share = self.truth.share(order.get("seed", 0), self.part, self.of)
        begin, used = time.monotonic(), _cpu()
        if not self.opened:
            self.contender.after_fork()
            self.opened = True
        done = work({**order, "share": share})
        end, used = time.monotonic(), _cpu() - used
        return {
            "begin": begin,
            "end": end,
            "first": self.first or end,
            "cpu": used,
            "files": done,
            "bytes": sum(len(data) for _, _, data in self.kept),
            "failed": self.failed,
        }

    def compare(self) -> dict[str, Any]:
        wrong = [name for name, start, data in self.kept if self.truth.differs(name, start, data)]
        names = sorted({name for name, _, _ in self.kept})
        self.kept = []
        return {"wrong": wrong, "names": names}

    # --- orders: each returns how many things it did ---

    def epoch(self, order: dict[str, Any]) -> int:
        for name, data in self.contender.epoch(order["share"]):
            self.first = self.first or time.monotonic()
            self.kept.append((name, None, data))
        return len(self.kept)

    def epoch_tolerantly(self, order: dict[str, Any]) -> int:
        """As `epoch`, but a file that cannot be read is noted and left out."""
        if isinstance(self.contender, Format):
            return self.epoch(order)
        for name in order["share"]:
            try:
                self.kept.append((name, None, self.contender.read(name)))
            except Exception as error:  # noqa: BLE001 - whatever a contender's library raises is its result
                self.failed[name] = f"{type(error).__name__}: {error}"[:200]
        return len(self.kept)

    def stream(self, order: dict[str, Any]) -> int:
        for name in order["share"]:
            self.kept.append((name, None, b"".join(self.contender.chunks(name))))
        return len(self.kept)

    def ranges(self, order: dict[str, Any]) -> int:
        """`count` ranges of `size` bytes at random places of files that stay open."""
        dice = random.Random(f"{order['seed']}/{self.part}")
        names, size = sorted(self.truth.keys), order["size"]
        files = {name: self.contender.open(name) for name in names}
        for _ in range(order["count"] // self.of):
            name = dice.choice(names)
            start = dice.randrange(self.truth.size(name) - size)
            files[name].seek(start)
            self.kept.append((name, start, _exactly(files[name], size)))
        for file in files.values():
            getattr(file, "close", lambda: None)()
        return len(self.kept)

    def names(self, order: dict[str, Any]) -> int:
        """Only the first worker looks; what it finds is compared with what there is."""
        if self.part:
            return 0
        found = list(self.contender.names())
        self.kept = [(name, 0, b"") for name in found]
        return len(found)


def _exactly(file: Any, size: int) -> bytes:
    pieces, left = [], size
    while left and (data := file.read(left)):
        pieces.append(data)
        left -= len(data)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def _cpu() -> float:
    """Seconds of this process with all its threads, and of the programs that it has run to their end."""
    spent = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in spent)


def _keep_memory(size: int) -> None:
    """Have `size` bytes of heap that are never given back, so that memory for what is read costs no page faults."""
    libc = ctypes.CDLL(None)
    for option, value in ((M_ARENA_MAX, 1), (M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, MOST)):
        libc.mallopt(option, value)
    bytearray(size)


def _pose_as_loader(part: int, of: int) -> None:
    """Let libraries that ask torch which DataLoader worker they are in find that they are in one."""
    from torch.utils.data._utils import worker

    nothing: Any = None
    worker._worker_info = worker.WorkerInfo(id=part, num_workers=of, seed=part, dataset=nothing)


if __name__ == "__main__":
    main()
