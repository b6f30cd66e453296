"""A process that reads files as told and says how long that took: `python -m bench.reader`.

It takes orders as JSON lines on stdin and answers each with a line on stdout. The first says how to read and what
the bytes must be; each further one is a pass over some of the files. Digests are compared outside the timed part:
read one by one, the clock stands still while a file is compared; read several at once, all bytes are kept until
the clock has stopped. It ends with its stdin, so with whoever started it.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from cachefs.digest import content_key

# Larger than any image, so that one call reads a whole file and a second finds its end, as most readers do.
BUFFER = 1 << 20

# Reads a whole file. The memory may be used again by the next call.
Read = Callable[[str], "memoryview | bytes"]


def files(root: str) -> Read:
    """Plain system calls into one buffer: the least a program can do, so that what is left is the file system's."""
    buffer = bytearray(BUFFER)
    view = memoryview(buffer)
    vector = [buffer]

    def read(name: str) -> memoryview:
        fd = os.open(f"{root}/{name}", os.O_RDONLY)
        length = os.readv(fd, vector)
        os.close(fd)
        return view[:length]

    return read


def files_kept(root: str) -> Read:
    """The same with memory of its own for each file."""

    def read(name: str) -> bytes:
        fd = os.open(f"{root}/{name}", os.O_RDONLY)
        try:
            size = os.fstat(fd).st_size
            data = os.read(fd, size)
            while len(data) < size and (more := os.read(fd, size - len(data))):
                data += more
            return data
        finally:
            os.close(fd)

    return read


def pieces(file: str, size: int) -> Read:
    """Pieces of one file, named by where they begin, into one buffer."""
    fd = os.open(file, os.O_RDONLY)
    buffer = bytearray(size)
    view = memoryview(buffer)
    vector = [buffer]
    return lambda name: view[: os.preadv(fd, vector, int(name))]


def fsspec_files(protocol: str, options: dict[str, Any], root: str) -> Read:
    """`fs.open(path).read()` through fsspec."""
    import fsspec

    fs = fsspec.filesystem(protocol, **options)

    def read(name: str) -> bytes:
        with fs.open(f"{root}/{name}", "rb") as file:
            data: bytes = file.read()
        return data

    return read


def one_by_one(read: Read, names: list[str], keys: dict[str, bytes]) -> dict[str, Any]:
    """seconds: the sum over the files, each timed by itself."""
    clock, spent, size = time.perf_counter, 0.0, 0
    wrong: list[str] = []
    for name in names:
        began = clock()
        data = read(name)
        spent += clock() - began
        size += len(data)
        if content_key(data) != keys[name]:
            wrong.append(name)
    return {"seconds": spent, "files": len(names), "bytes": size, "wrong": wrong}


def in_pairs(reads: list[Read], names: list[str], keys: dict[str, bytes]) -> dict[str, Any]:
    """Each file by every way, the first one first and last in turn. times: of each way, in us for one file."""
    clock, size = time.perf_counter, 0
    wrong: list[str] = []
    spent: list[list[float]] = [[] for _ in reads]
    ways = list(zip(reads, spent, strict=True))
    for name in names:
        ways.reverse()
        for read, times in ways:
            began = clock()
            data = read(name)
            times.append(clock() - began)
            size += len(data)
            if content_key(data) != keys[name]:
                wrong.append(name)
    return {
        "seconds": sum(map(sum, spent)),
        "files": len(names) * len(reads),
        "bytes": size,
        "wrong": wrong,
        "times": [_percentiles(times) for times in spent],
    }


def _percentiles(times: list[float]) -> dict[str, float]:
    ordered = sorted(times)
    return {f"p{share}": ordered[len(ordered) * share // 100] * 1e6 for share in (50, 99)}


def threads_at_once(read: Read, names: list[str], keys: dict[str, bytes], readers: int) -> dict[str, Any]:
    """seconds: from the first request until every byte is here. readers: threads."""
    with ThreadPoolExecutor(readers) as pool:
        list(pool.map(int, range(readers)))  # they exist before the clock runs
        began, used = time.perf_counter(), time.process_time()
        found = list(pool.map(read, names))
        seconds, used = time.perf_counter() - began, time.process_time() - used
    return _compared(names, found, keys) | {"seconds": seconds, "cpu": used}


def end_to_end(file: str, size: int) -> Callable[[list[str], dict[str, bytes]], dict[str, Any]]:
    """Opens one file and reads it in stretches of `size`, which are all kept. seconds: from open to the last byte.

    The memory for them is taken once, for all passes. Taken anew in each, it would be just the pages that the page
    cache had given back before, and the page cache would be filled from others, which are colder.
    """
    whole = bytearray(os.stat(file).st_size)  # bytes of 0: the memory is there before the clock runs

    def read(names: list[str], keys: dict[str, bytes]) -> dict[str, Any]:
        begins = sorted(map(int, names))
        views = [[memoryview(whole)[start : start + size]] for start in begins]
        began = time.perf_counter()
        fd = os.open(file, os.O_RDONLY)
        lengths = [os.readv(fd, view) for view in views]
        os.close(fd)
        seconds = time.perf_counter() - began
        found = [view[0][:length] for view, length in zip(views, lengths, strict=True)]
        result = _compared([str(start) for start in begins], found, keys) | {"seconds": seconds}
        for (view,) in views:  # so that what is right in the next pass was read in it
            view[:] = bytes(len(view))
        return result

    return read


def obstore_at_once(options: dict[str, Any], names: list[str], keys: dict[str, bytes], readers: int) -> dict[str, Any]:
    """The same for bare obstore, on the fastest event loop there is."""
    import uvloop
    from obstore import get_async
    from obstore.store import S3Store

    store = S3Store(options["bucket"], config=options["config"], client_options={"allow_http": True})
    prefix = options["prefix"]

    async def run() -> dict[str, Any]:
        found: list[Any] = [b""] * len(names)
        left = iter(enumerate(names))

        async def reader() -> None:
            for number, name in left:
                found[number] = await (await get_async(store, f"{prefix}/{name}")).bytes_async()

        began, used = time.perf_counter(), time.process_time()
        await asyncio.gather(*(reader() for _ in range(readers)))
        seconds, used = time.perf_counter() - began, time.process_time() - used
        return _compared(names, [memoryview(data) for data in found], keys) | {"seconds": seconds, "cpu": used}

    return uvloop.run(run())


def _compared(names: list[str], found: list[Any], keys: dict[str, bytes]) -> dict[str, Any]:
    wrong = [name for name, data in zip(names, found, strict=True) if content_key(data) != keys[name]]
    return {"files": len(names), "bytes": sum(map(len, found)), "wrong": wrong}


def portion(names: list[str], order: dict[str, Any]) -> list[str]:
    """Every `of`th file beginning with `part`, in the order that `seed` shuffles all of them into."""
    shuffled = list(names)
    random.Random(order["seed"]).shuffle(shuffled)
    return shuffled[order.get("part", 0) :: order.get("of", 1)]


def _passes(way: dict[str, Any]) -> Callable[[list[str], dict[str, bytes]], dict[str, Any]]:
    readers = int(way.get("readers", 1))
    match way["kind"]:
        case "files" if readers == 1:
            single = files(way["root"])
            return lambda names, keys: one_by_one(single, names, keys)
        case "pair":
            reads = [files(root) for root in way["roots"]]
            return lambda names, keys: in_pairs(reads, names, keys)
        case "files":
            kept = files_kept(way["root"])
            return lambda names, keys: threads_at_once(kept, names, keys, readers)
        case "records":
            record = pieces(way["file"], way["size"])
            return lambda names, keys: one_by_one(record, names, keys)
        case "stretches":
            return end_to_end(way["file"], way["size"])
        case "fsspec":
            through = fsspec_files(way["protocol"], way["options"], way["root"])
            return lambda names, keys: one_by_one(through, names, keys)
        case "obstore":
            return lambda names, keys: obstore_at_once(way["options"], names, keys, readers)
        case other:
            raise ValueError(f"no way to read is called {other!r}")


def main() -> None:
    way = json.loads(sys.stdin.readline())
    keys = {name: bytes.fromhex(key) for name, key in json.loads(Path(way["manifest"]).read_bytes()).items()}
    names = sorted(keys)
    run = _passes(way)
    print(json.dumps({"ready": os.getpid()}), flush=True)
    for order in sys.stdin:
        print(json.dumps(run(portion(names, json.loads(order)), keys)), flush=True)


if __name__ == "__main__":
    main()
