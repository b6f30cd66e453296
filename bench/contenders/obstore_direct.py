"""obstore straight from the origin: the fastest S3 client that Python has, and no cache."""

from __future__ import annotations

from collections.abc import Iterator
from typing import IO, Any, cast

from bench.contenders.contender import Bytes, Contender


class Obstore(Contender):
    title = "obstore"
    settings = "S3Store, one per process; get(path).bytes(), get(path).stream(), get_range(path)"
    cached = False
    packages = ("obstore",)

    def before_fork(self) -> None:
        import obstore  # noqa: F401

    def after_fork(self) -> None:
        from obstore.store import S3Store

        config: Any = {
            "endpoint": self.place.endpoint,
            "access_key_id": self.place.key,
            "secret_access_key": self.place.secret,
            "region": "us-east-1",
            "virtual_hosted_style_request": False,
        }
        self.store = S3Store(self.place.bucket, config=config, client_options={"allow_http": True})

    def open(self, name: str) -> IO[bytes]:
        return cast(IO[bytes], _Ranges(self.store, f"{self.place.prefix}/{name}"))

    def read(self, name: str) -> Bytes:
        return memoryview(self.store.get(f"{self.place.prefix}/{name}").bytes())

    def chunks(self, name: str) -> Iterator[Bytes]:
        for piece in self.store.get(f"{self.place.prefix}/{name}").stream():
            yield memoryview(piece)

    def names(self) -> Iterator[str]:
        skip = len(self.place.prefix) + 1
        for batch in self.store.list(self.place.prefix):
            yield from (entry["path"][skip:] for entry in batch)


class _Ranges:
    """What is read of an object, at the position that was sought, is asked for as a range and nothing more."""

    def __init__(self, store: Any, path: str) -> None:
        self._store, self._path, self._at = store, path, 0

    def seek(self, position: int) -> None:
        self._at = position

    def read(self, size: int) -> bytes:
        data = bytes(self._store.get_range(self._path, start=self._at, length=size))
        self._at += len(data)
        return data
