"""A process that reads an epoch with PyTorch's DataLoader as told, with hints or without: `python -m bench.training`.

Orders are JSON lines on stdin, each answered by a line on stdout. Every byte is compared by digest in the workers (2 us
per file). It ends with its stdin, so with whoever started it.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import fsspec
import torch
from torch.utils.data import DataLoader, Dataset, RandomSampler

import cachefs.torch
from cachefs.digest import content_key

WORKERS = 2
BATCH = 32


class Files(Dataset[tuple[int, bool]]):
    """(bytes, whether they are the right ones) of each file."""

    def __init__(self, fs: Any, root: str, keys: dict[str, str]) -> None:
        self.fs = fs
        self.paths = [f"{root}/{name}" for name in keys]
        self.keys = [bytes.fromhex(key) for key in keys.values()]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, number: int) -> tuple[int, bool]:
        data = self.fs.cat_file(self.paths[number])
        return len(data), content_key(data) == self.keys[number]


def epoch(files: Files, seed: int, *, hints: bool) -> dict[str, Any]:
    """seconds: from the first request for a batch to the last batch."""
    files.fs.exists(files.paths[0])  # a fetcher runs: how long it takes to start is not what is measured
    sampler: Any = RandomSampler(files, generator=torch.Generator().manual_seed(seed))
    if hints:
        sampler = cachefs.torch.hinted(sampler, files.paths, files.fs)
    began, size, wrong = time.perf_counter(), 0, 0
    for sizes, right in DataLoader(files, batch_size=BATCH, sampler=sampler, num_workers=WORKERS):
        size += int(sizes.sum())
        wrong += int((~right).sum())
    return {"seconds": time.perf_counter() - began, "bytes": size, "files": len(files), "wrong": wrong}


def cost(files: Files, count: int) -> dict[str, Any]:
    """CPU seconds per sample that hints take from this process, over an epoch of `count` samples, all announced."""
    numbers: Any = range(count)
    paths = [files.paths[number % len(files)] for number in numbers]
    plain: Any = RandomSampler(numbers)
    hinted: Any = cachefs.torch.hinted(RandomSampler(numbers), paths, files.fs)
    spent = []
    for sampler in (plain, hinted):
        for _ in sampler:  # once for the names, which are told once and not every epoch
            pass
        began = time.process_time()
        for _ in sampler:
            pass
        spent.append(time.process_time() - began)
    return {"seconds": max(0.0, spent[1] - spent[0]) / count}


def main() -> None:
    way = json.loads(sys.stdin.readline())
    keys = dict(sorted(json.loads(Path(way["manifest"]).read_bytes()).items())[: way["files"]])
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        fs = fsspec.filesystem("cachefs", cache_dir=order["home"], **way["options"])
        files = Files(fs, way["root"], keys)
        if order["do"] == "cost":
            print(json.dumps(cost(files, order["count"])), flush=True)
        else:
            print(json.dumps(epoch(files, order["seed"], hints=order["do"] == "hints")), flush=True)


if __name__ == "__main__":
    main()
