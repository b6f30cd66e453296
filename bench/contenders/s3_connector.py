"""AWS's own connector for PyTorch, straight from the origin."""

from __future__ import annotations

from collections.abc import Iterator
from typing import IO, Any, cast

from bench.contenders.contender import Bytes, Contender


class S3Connector(Contender):
    title = "s3torchconnector"
    settings = "S3Client with force_path_style; get_object(...).read(), the default (sequential) reader"
    cached = False
    packages = ("s3torchconnector",)

    def before_fork(self) -> None:
        import s3torchconnector  # noqa: F401

    def after_fork(self) -> None:
        from s3torchconnector import S3ClientConfig
        from s3torchconnector._s3client import S3Client

        config = S3ClientConfig(force_path_style=True)
        self.client: Any = S3Client(region="us-east-1", endpoint=self.place.endpoint, s3client_config=config)

    def open(self, name: str) -> IO[bytes]:
        return cast(IO[bytes], self.client.get_object(self.place.bucket, f"{self.place.prefix}/{name}"))

    def read(self, name: str) -> Bytes:
        return self.open(name).read()

    def names(self) -> Iterator[str]:
        skip = len(self.place.prefix) + 1
        for page in self.client.list_objects(self.place.bucket, f"{self.place.prefix}/"):
            yield from (entry.key[skip:] for entry in page.object_info)
