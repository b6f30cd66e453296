"""Those that fsspec opens: ours, s3fs itself, and the caches that come with fsspec."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import IO, Any, ClassVar

from bench.contenders.contender import CHUNK, Bytes, Contender
from cachefs_sidecar.testbed import fetcher_pid, stop_fetcher


class ThroughFsspec(Contender):
    protocol: ClassVar[str]
    imported: ClassVar[tuple[str, ...]]

    def options(self) -> dict[str, Any]:
        raise NotImplementedError

    def before_fork(self) -> None:
        import fsspec

        for protocol in self.imported:
            fsspec.get_filesystem_class(protocol)

    def after_fork(self) -> None:
        import fsspec

        self.fs: Any = fsspec.filesystem(self.protocol, **self.options())

    def open(self, name: str) -> IO[bytes]:
        file: IO[bytes] = self.fs.open(f"{self.place.root}/{name}", "rb")
        return file

    def names(self) -> Iterator[str]:
        skip = len(self.place.root) + 1
        return (path[skip:] for path in self.fs.find(self.place.root))


class Url(ThroughFsspec):
    title = "cachefs URL"
    settings = "fsspec.filesystem('cachefs', target_protocol='s3', cache_dir=DIR[, cache_size=LIMIT])"
    bounded = True
    protocol = "cachefs"
    imported = ("cachefs",)

    def options(self) -> dict[str, Any]:
        size = {"cache_size": self.place.limit} if self.place.limit else {}
        cache_dir = str(self.folder / "cache")
        return {"target_protocol": "s3", "target_options": self.place.s3fs, "cache_dir": cache_dir, **size}

    @contextmanager
    def running(self, environ: Mapping[str, str]) -> Iterator[Sequence[int]]:
        try:
            yield _LaterFetcher(self)
        finally:
            stop_fetcher(self.folder / "cache")


class _LaterFetcher(Sequence[int]):
    """The fetcher's pid, known once a reader has started it."""

    def __init__(self, url: Url) -> None:
        self._home = url.folder / "cache"

    def __len__(self) -> int:
        return int(fetcher_pid(self._home) is not None)

    def __getitem__(self, index: Any) -> Any:
        pid = fetcher_pid(self._home)
        return ([] if pid is None else [pid])[index]


class S3fs(ThroughFsspec):
    title = "s3fs"
    settings = "fs.cat_file with max_concurrency=1, which spares a request for the size; ranges: cache_type='none'"
    cached = False
    packages = ("s3fs",)
    protocol = "s3"
    imported = ("s3",)

    def options(self) -> dict[str, Any]:
        return {**self.place.s3fs, "max_concurrency": 1}

    def open(self, name: str) -> IO[bytes]:
        file: IO[bytes] = self.fs.open(f"{self.place.root}/{name}", "rb", cache_type="none")
        return file

    def chunks(self, name: str) -> Iterator[Bytes]:
        with super().open(name) as file:
            while data := file.read(CHUNK):
                yield data

    def read(self, name: str) -> Bytes:
        data: bytes = self.fs.cat_file(f"{self.place.root}/{name}")
        return data


class Simplecache(ThroughFsspec):
    title = "fsspec simplecache"
    settings = "simplecache over s3fs, cache_storage=DIR, same_names=False"
    packages = ("s3fs",)
    protocol = "simplecache"
    imported = ("simplecache", "s3")

    def options(self) -> dict[str, Any]:
        cache = str(self.folder / "cache")
        return {"target_protocol": "s3", "target_options": self.place.s3fs, "cache_storage": cache}


class Filecache(Simplecache):
    title = "fsspec filecache"
    settings = "filecache over s3fs, cache_storage=DIR, check_files=False, expiry_time=None (nothing expires)"
    protocol = "filecache"

    def options(self) -> dict[str, Any]:
        return {**super().options(), "check_files": False, "expiry_time": None}


class Blockcache(Filecache):
    title = "fsspec blockcache"
    settings = "blockcache over s3fs, cache_storage=DIR, check_files=False, blocks of 5 MiB (its default)"
    protocol = "blockcache"
