"""What a way to read training data has to be able to do, to be compared with others.

A contender is made twice from the same `Place`: by the bench, which lets its daemons run, and by the processes that
read. `before_fork` and `after_fork` are called in the order in which a PyTorch DataLoader would: once in the main
process, then in each worker.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import IO, Any, ClassVar

# What a reader takes at a time of a file that it reads from its beginning to its end.
CHUNK = 1 << 20

Bytes = bytes | bytearray | memoryview


@dataclass(frozen=True)
class Place:
    """Where a contender plays. folder: its own, on the disk that is measured. source: the folder behind the origin's
    bucket. prefix: of the dataset in the bucket. limit: bytes that its cache may take, 0 = no limit."""

    folder: str
    source: str
    endpoint: str
    key: str
    secret: str
    bucket: str
    prefix: str
    limit: int = 0

    @property
    def root(self) -> str:
        return f"{self.bucket}/{self.prefix}"

    @property
    def s3fs(self) -> dict[str, Any]:
        """Options as s3fs takes them, and cachefs too."""
        return {
            "key": self.key,
            "secret": self.secret,
            "endpoint_url": self.endpoint,
            "client_kwargs": {"region_name": "us-east-1"},
        }

    @property
    def environ(self) -> dict[str, str]:
        """The same for whoever looks into the environment."""
        return {
            "AWS_ACCESS_KEY_ID": self.key,
            "AWS_SECRET_ACCESS_KEY": self.secret,
            "AWS_ENDPOINT_URL": self.endpoint,
            "S3_ENDPOINT_URL": self.endpoint,
            "AWS_REGION": "us-east-1",
            "AWS_DEFAULT_REGION": "us-east-1",
        }


class Contender:
    """One way to read.

    title: in tables. settings: how it is set up, for the report. form: which form of the dataset it reads ("files", or
    that of its own). cached: it keeps what it read. bounded: it can be told how much. packages: what it needs of PyPI.
    loader: the class or function of its DataLoader. hints: it says the loader's order to the storage.
    """

    title: ClassVar[str]
    settings: ClassVar[str]
    form: ClassVar[str] = "files"
    cached: ClassVar[bool] = True
    bounded: ClassVar[bool] = False
    packages: ClassVar[tuple[str, ...]] = ()
    loader: ClassVar[str] = "torch.utils.data:DataLoader"
    hints: ClassVar[bool] = False

    def __init__(self, place: Place) -> None:
        self.place = place
        self.folder = Path(place.folder)

    @classmethod
    def missing(cls) -> str:
        """Why it cannot run on this machine; "" when it can."""
        for package in cls.packages:
            try:
                metadata.version(package)
            except metadata.PackageNotFoundError:
                return f"the package {package} is not installed"
        return ""

    # --- in the process of the bench ---

    def running(self, environ: Mapping[str, str]) -> AbstractContextManager[Sequence[int]]:
        """What runs beside the readers, while they read; yields the pids of its processes."""
        return nullcontext(())

    def kept_in(self) -> list[Path]:
        """Folders with the files whose pages are to be forgotten, for reads that must come from the disk."""
        return [self.folder]

    # --- in the processes that read ---

    def before_fork(self) -> None:
        """Import what is needed, and make what a DataLoader's main process would make."""

    def after_fork(self) -> None:
        """Open clients: this is the process that reads."""

    def open(self, name: str) -> IO[bytes]:
        raise NotImplementedError

    def read(self, name: str) -> Bytes:
        with self.open(name) as file:
            return file.read()

    def chunks(self, name: str) -> Iterator[Bytes]:
        with self.open(name) as file:
            while data := file.read(CHUNK):
                yield data

    def names(self) -> Iterator[str]:
        """Of every file, as a loader finds them before its first epoch."""
        raise NotImplementedError

    def epoch(self, share: Sequence[str]) -> Iterator[tuple[str, Bytes]]:
        """What this process reads of one epoch. share: its part of the names, shuffled."""
        for name in share:
            yield name, self.read(name)


class Folder(Contender):
    """One whose files are below a folder, so that any program reads them."""

    @property
    def point(self) -> Path:
        return self.folder / "mount"

    def open(self, name: str) -> IO[bytes]:
        return open(f"{self.point}/{name}", "rb")  # as everybody writes it

    def names(self) -> Iterator[str]:
        skip = len(str(self.point)) + 1
        for folder, _, files in os.walk(self.point):
            below = folder[skip:]
            yield from (f"{below}/{file}" if below else file for file in files)
