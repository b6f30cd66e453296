"""Contenders that do what none should, for the tests of the bench: `--contender tests.broken_contenders:Flipped`."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

from bench.contenders.contender import Bytes
from bench.contenders.native import Native


class Flipped(Native):
    """One bit of one file is wrong."""

    title = "one wrong bit"

    def read(self, name: str) -> Bytes:
        data = bytearray(super().read(name))
        if name.endswith("_00003.jpg"):
            data[50] ^= 1
        return data


class Forgetful(Native):
    """One file never comes."""

    title = "one file too few"

    def epoch(self, share: Sequence[str]) -> Iterator[tuple[str, Bytes]]:
        return super().epoch([name for name in share if not name.endswith("_00003.jpg")])


class Failing(Native):
    title = "one that fails"

    def read(self, name: str) -> Bytes:
        raise PermissionError(f"{name}: not today")


class Hanging(Native):
    title = "one that hangs"

    def read(self, name: str) -> Bytes:
        time.sleep(600)
        return b""


class Absent(Native):
    title = "one that is not installed"
    packages = ("cachefs-no-such-package",)
