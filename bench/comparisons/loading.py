"""A training process with a real PyTorch DataLoader over a contender: `python -m bench.comparisons.loading`.

It is told as bench.comparisons.member is, and knows two orders: `load` an epoch, decoded or not, and `train`, which is
bench.comparisons.accelerator's. What came is compared after the clock has stopped. Where pixels and not bytes leave a
worker, the worker takes the digest of the bytes before it decodes them: 10 us beside some milliseconds.
"""

from __future__ import annotations

import io
import json
import random
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader, Dataset, IterableDataset

from bench.comparisons.trainer import BATCH, EDGE
from bench.contenders import Contender, Place, load
from bench.contenders.contender import Bytes
from bench.contenders.formats import Format
from cachefs.digest import content_key

# Short epochs are repeated, until this many seconds or so many epochs, and their median counts.
ENOUGH = 0.4
MOST_EPOCHS = 5

# What a worker makes of a sample's bytes, and hands to the main process.
Make = Callable[[Bytes], Any]


def as_bytes(data: Bytes) -> bytes:
    return bytes(data)


def as_key(data: Bytes) -> bytes:
    return content_key(data)


def as_pixels(data: Bytes) -> tuple[bytes, Any]:
    """The digest, and what a classifier would be fed."""
    import numpy
    from PIL import Image
    from torch import from_numpy

    with Image.open(io.BytesIO(data)) as image:
        pixels = numpy.array(image.convert("RGB").resize((EDGE, EDGE)))
    return content_key(data), from_numpy(pixels).permute(2, 0, 1)


class Files(Dataset[tuple[str, Any]]):
    def __init__(self, contender: Contender, names: Sequence[str], make: Make) -> None:
        self.contender, self.names, self.make = contender, names, make

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[str, Any]:
        name = self.names[index]
        return name, self.make(self.contender.read(name))


class Samples(IterableDataset[tuple[str, Any]]):
    def __init__(self, contender: Contender, make: Make) -> None:
        self.contender, self.make = contender, make

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        return ((name, self.make(data)) for name, data in self.contender.epoch([]))


class Batches:
    """Lists of numbers, which may be others in each epoch."""

    def __init__(self, lists: list[list[int]]) -> None:
        self.lists = lists

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.lists)

    def __len__(self) -> int:
        return len(self.lists)


def loader(
    contender: Contender, names: Sequence[str], make: Make, workers: int, batches: int | Batches
) -> DataLoader[Any]:
    """Over `names`, in the lists of their numbers that `batches` yields, or in batches of so many in order.

    A contender with its own form reads everything, in an order of its own.
    """
    module, _, member = contender.loader.partition(":")
    kind = getattr(import_module(module), member)
    dataset: Any = Files(contender, names, make)
    how: dict[str, Any] = {"batch_size": batches} if isinstance(batches, int) else {"batch_sampler": batches}
    if isinstance(contender, Format):
        dataset, how = Samples(contender, make), {"batch_size": BATCH}
    made: DataLoader[Any] = kind(
        dataset,
        num_workers=workers,
        collate_fn=list,
        worker_init_fn=lambda _: contender.after_fork(),
        multiprocessing_context="fork",
        persistent_workers=True,
        **how,
    )
    return made


def epoch(contender: Contender, keys: dict[str, str], order: dict[str, Any]) -> dict[str, Any]:
    """Epochs of `samples` samples by workers that live already, as persistent ones do."""
    names = sorted(keys)
    random.Random(order["seed"]).shuffle(names)
    names = names[: order["samples"]]
    batches = Batches([[number % len(names)] for number in range(order["workers"])])
    loads = loader(contender, names, as_pixels if order["decode"] else as_bytes, order["workers"], batches)
    for _ in loads:  # each worker has started, and has read something
        pass
    batches.lists = [list(range(start, min(start + BATCH, len(names)))) for start in range(0, len(names), BATCH)]
    came: list[tuple[str, Any]] = []
    rates: list[float] = []
    used = 0.0
    while not rates or (used < ENOUGH and len(rates) < MOST_EPOCHS):
        before, began = len(came), time.perf_counter()
        for batch in loads:
            came += batch
        seconds = time.perf_counter() - began
        rates.append((len(came) - before) / seconds)
        used += seconds
    _end(loads)
    digests = {name: what[0] if order["decode"] else content_key(what) for name, what in came}
    wanted = keys if isinstance(contender, Format) else {name: keys[name] for name in names}
    return {"rate": statistics.median(rates), "samples": len(came), **differences(wanted, digests)}


def _end(loads: DataLoader[Any]) -> None:
    """End the workers now: the next loader is to have the machine for itself."""
    iterator, loads._iterator = loads._iterator, None
    shut = getattr(iterator, "_shutdown_workers", None)
    if shut is not None:
        shut()


def differences(keys: dict[str, str], digests: dict[str, bytes]) -> dict[str, Any]:
    wrong = [name for name, digest in digests.items() if keys.get(name) != digest.hex()]
    return {"wrong": wrong, "missing": sorted(keys.keys() - digests.keys())}


def main() -> None:
    from bench.comparisons import accelerator

    warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)
    told = json.loads(sys.stdin.readline())
    contender = load(told["contender"])(Place(**told["place"]))
    keys = json.loads(Path(told["manifest"]).read_bytes())
    contender.before_fork()
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        work = {"load": epoch, "train": accelerator.train}[order["do"]]
        try:
            answer = work(contender, keys, order)
        except Exception as error:  # noqa: BLE001 - whatever a contender's library raises is its result
            answer = {"error": f"{type(error).__name__}: {error}"[-400:]}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
