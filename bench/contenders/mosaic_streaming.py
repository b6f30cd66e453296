"""MosaicML Streaming, on the images in its MDS shards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from bench.contenders.contender import Bytes
from bench.contenders.formats import SHARD, Format, named


class MosaicStreaming(Format):
    title = "mosaicml-streaming"
    settings = (
        "StreamingDataset(remote=..., local=DIR, shuffle=True, batch_size=32[, cache_limit=LIMIT]), MDS shards; "
        "its S3 client made anew in each worker, because forked ones share a connection"
    )
    form = "mds"
    bounded = True
    packages = ("mosaicml-streaming",)

    @classmethod
    def convert(cls, files: Path, target: Path) -> None:
        columns = {"name": "str", "data": "bytes"}
        with _streaming().MDSWriter(out=str(target), columns=columns, size_limit=SHARD) as out:
            for name, file in named(files):
                out.write({"name": name, "data": file.read_bytes()})

    def before_fork(self) -> None:
        limit = {"cache_limit": self.place.limit} if self.place.limit else {}
        where = {"remote": self.url, "local": str(self.folder / "cache")}
        self.dataset: Any = _streaming().StreamingDataset(**where, shuffle=True, batch_size=32, **limit)

    def after_fork(self) -> None:
        # Forked workers inherit the connection over which the main process fetched the index, and mix up their answers:
        # as of 0.13.0 it then returns wrong samples, in a DataLoader too. With this each makes a client of its own.
        for stream in self.dataset.streams:
            stream._downloader._s3_client = None

    def samples(self) -> Iterator[tuple[str, Bytes]]:
        return ((sample["name"], sample["data"]) for sample in self.dataset)


def _streaming() -> Any:
    """The library, which imports torchvision and uses nothing of it here."""
    import torch

    if not torch.cuda.is_available():
        # A torchvision built for CUDA does not import beside a torch that is not, for want of these operators.
        for operator in ("nms", "qnms"):
            with suppress(RuntimeError):
                torch.library.define(f"torchvision::{operator}", "(Tensor dets, Tensor scores, float t) -> Tensor")
    import streaming

    return streaming
