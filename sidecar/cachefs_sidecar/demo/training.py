"""The training job: a shuffled PyTorch DataLoader that reads, checks and decodes every image.

Nothing is trained, because a demonstration has no GPU to wait for: the rate shown is what the loader can feed.
"""

from __future__ import annotations

import io
import multiprocessing
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Generator as Seed
from torch import Tensor, from_numpy
from torch.utils.data import DataLoader, Dataset

from cachefs.digest import content_key
from cachefs_sidecar.demo.ways import Reader, WrongBytes

WORKERS = 4
BATCH = 32

# The edge of the square, in pixels, that image classifiers are trained on.
EDGE = 224

# Loaded once by the server that all workers are forked from, instead of by each of them.
PRELOAD = ["cachefs_sidecar.demo.training", "numpy", "PIL.Image", "s3fs", "cachefs.filesystem"]


class Photographs(Dataset[tuple[Tensor, int]]):
    """Images and class numbers. keys: the content key of each name; every read is compared with it."""

    def __init__(self, reader: Reader, keys: Mapping[str, bytes]) -> None:
        self.reader = reader
        self.keys = dict(keys)
        self.names = sorted(reader.names())
        self.classes = {kind: number for number, kind in enumerate(sorted({n.split("/")[0] for n in self.names}))}
        if missing := self.keys.keys() ^ set(self.names):
            raise WrongBytes(f"{reader.title}: {len(missing)} names differ from the source, such as {min(missing)}")

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        import numpy
        from PIL import Image

        name = self.names[index]
        data = self.reader.read(name)
        if content_key(data) != self.keys[name]:
            raise WrongBytes(f"{self.reader.title}: {name} differs from the source")
        with Image.open(io.BytesIO(data)) as image:
            pixels = numpy.array(image.convert("RGB").resize((EDGE, EDGE)))
        return from_numpy(pixels).permute(2, 0, 1), self.classes[name.split("/")[0]]


@contextmanager
def loader(dataset: Photographs) -> Iterator[DataLoader[Any]]:
    """A loader whose workers live for all epochs and are gone after the block."""
    context = multiprocessing.get_context("forkserver")  # as Python 3.14 does by default: no inherited threads
    context.set_forkserver_preload(PRELOAD)
    # Four workers on two cores: torch thinks that too many, but they wait for the origin more than they compute.
    warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)
    seed = Seed()
    seed.manual_seed(1)
    batches: DataLoader[Any] = DataLoader(
        dataset,
        batch_size=BATCH,
        shuffle=True,
        generator=seed,
        num_workers=WORKERS,
        persistent_workers=True,
        multiprocessing_context=context,
        worker_init_fn=_leave_tidily,
    )
    try:
        yield batches
    finally:
        # Workers end with their iterator. Left to the garbage collector, they would outlive what they read from.
        iterator, batches._iterator = batches._iterator, None
        if iterator is not None:
            iterator._shutdown_workers()  # type: ignore[attr-defined]


def _leave_tidily(_: int) -> None:
    """A worker that is ended with its whole process group removes its temporary directory first."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))


def run_epoch(batches: DataLoader[Any], made: Callable[[int], None]) -> int:
    """Read everything once; returns how many images came. Raises WrongBytes, and what a worker's read raised."""
    count = 0
    for images, _ in batches:
        count += len(images)
        made(len(images))
    return count
