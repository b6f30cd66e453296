"""A training process that wants a given number of samples a second, with hints: `python -m bench.demand`.

Computing is sleeping. The next batch is taken while the last one is computed, as a loader does that copies to the GPU;
one that comes later than that stalls it. Orders are JSON lines on stdin, each answered by a line on stdout. It ends
with its stdin, so with whoever started it.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import fsspec
import torch
from torch.utils.data import DataLoader, RandomSampler

import cachefs.torch
from bench.training import BATCH, WORKERS, Files


def epochs(files: Files, seed: int, rates: list[float]) -> list[dict[str, Any]]:
    """One epoch for each rate, of samples a second; 0: as many as come. begin, end: of the clock that all processes
    have; from the first batch to the last. stall: seconds of that in which a batch was waited for."""
    files.fs.exists(files.paths[0])
    sampler: Any = RandomSampler(files, generator=torch.Generator().manual_seed(seed))
    sampler = cachefs.torch.hinted(sampler, files.paths, files.fs)
    loader = DataLoader(files, batch_size=BATCH, sampler=sampler, num_workers=WORKERS, persistent_workers=True)
    return [_epoch(iter(loader), BATCH / rate if rate else 0.0) for rate in rates]


def _epoch(batches: Any, step: float) -> dict[str, Any]:
    stall, count, wrong, begin, busy_until = 0.0, 0, 0, 0.0, 0.0
    for sizes, right in batches:
        now = time.monotonic()
        begin = begin or now
        busy_until = busy_until or now
        stall += max(0.0, now - busy_until)
        time.sleep(max(0.0, busy_until - now))
        busy_until = max(now, busy_until) + step
        count += len(sizes)
        wrong += int((~right).sum())
    return {"begin": begin, "end": max(busy_until, time.monotonic()), "stall": stall, "files": count, "wrong": wrong}


def main() -> None:
    way = json.loads(sys.stdin.readline())
    keys = dict(sorted(json.loads(Path(way["manifest"]).read_bytes()).items())[: way["files"]])
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        fs = fsspec.filesystem("cachefs", cache_dir=order["home"], cache_size=order["size"], **way["options"])
        files = Files(fs, way["root"], keys)
        print(json.dumps({"epochs": epochs(files, order["seed"], order["rates"])}), flush=True)


if __name__ == "__main__":
    main()
