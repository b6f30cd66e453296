"""s3fs-fuse (Debian package s3fs) with its local cache, and what its manual offers for data that does not change."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from bench.contenders.contender import Folder
from bench.contenders.mounting import program, served

OPTIONS = (
    "ro,use_path_request_style,kernel_cache,enable_noobj_cache,max_stat_cache_size=2000000,"
    "stat_cache_expire=86400,multireq_max=100,parallel_count=10"
)


class S3fsFuse(Folder):
    title = "s3fs-fuse"
    settings = f"s3fs BUCKET:/PREFIX POINT -o use_cache=DIR,{OPTIONS}"

    @classmethod
    def missing(cls) -> str:
        return "" if program("s3fs") else "the program s3fs (Debian package s3fs) is not installed"

    @contextmanager
    def running(self, environ: Mapping[str, str]) -> Iterator[Sequence[int]]:
        cache = self.folder / "cache"
        cache.mkdir(parents=True, exist_ok=True)
        what = f"{self.place.bucket}:/{self.place.prefix}"
        options = f"url={self.place.endpoint},use_cache={cache},{OPTIONS}"
        with served([program("s3fs"), what, str(self.point), "-f", "-o", options], self.point, environ) as pid:
            yield [pid]
