"""What the contenders with a form of dataset of their own share: they decide by themselves what is read next."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar

from bench.contenders.contender import Bytes, Contender

# Bytes of one shard. Their makers recommend 50 to 100 MB; the bench's datasets are small, and so are their shards:
# every worker must have some.
SHARD = 2_000_000


class Format(Contender):
    """A dataset that was converted beforehand. Its samples carry the names of the files that they were made from."""

    form: ClassVar[str]

    @classmethod
    def convert(cls, files: Path, target: Path) -> None:
        """Make this form from all files below `files`. Not timed."""
        raise NotImplementedError

    def samples(self) -> Iterator[tuple[str, Bytes]]:
        """This worker's part of one epoch."""
        raise NotImplementedError

    def epoch(self, share: Sequence[str]) -> Iterator[tuple[str, Bytes]]:
        return self.samples()

    @property
    def url(self) -> str:
        return f"s3://{self.place.root}"


def named(files: Path) -> Iterator[tuple[str, Path]]:
    """(name below `files`, file) of all, in an order that says nothing."""
    yield from sorted((str(file.relative_to(files)), file) for file in files.rglob("*") if file.is_file())
