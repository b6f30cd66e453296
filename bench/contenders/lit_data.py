"""LitData, on the images in its chunks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.contenders.contender import Bytes
from bench.contenders.formats import SHARD, Format, named


class LitData(Format):
    title = "litdata"
    settings = "StreamingDataset(Dir(DIR, url=...), shuffle=True[, max_cache_size=LIMIT]), chunks made by optimize()"
    form = "litdata"
    bounded = True
    packages = ("litdata",)

    @classmethod
    def convert(cls, files: Path, target: Path) -> None:
        import litdata

        inputs = [(name, str(file)) for name, file in named(files)]
        litdata.optimize(_sample, inputs, output_dir=str(target), chunk_bytes=SHARD, num_workers=1, verbose=False)

    def before_fork(self) -> None:
        import litdata
        from litdata.streaming import downloader
        from litdata.streaming.cache import Dir

        downloader._OBSTORE_CLIENT_OPTIONS["allow_http"] = True  # it expects TLS of every S3 server
        where = Dir(path=str(self.folder / "cache"), url=self.url)
        options = {"endpoint_url": self.place.endpoint}
        limit = {"max_cache_size": self.place.limit} if self.place.limit else {}
        self.dataset: Any = litdata.StreamingDataset(where, shuffle=True, storage_options=options, **limit)

    def samples(self) -> Iterator[tuple[str, Bytes]]:
        return ((sample["name"], sample["data"]) for sample in self.dataset)


def _sample(named_file: tuple[str, str]) -> dict[str, Any]:
    name, file = named_file
    return {"name": name, "data": Path(file).read_bytes()}
