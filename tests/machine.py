"""What the tests run on: what this machine can do, and the buckets that the fixtures of conftest.py hand out."""

from __future__ import annotations

import os
import shutil
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cachefs_sidecar.testbed import S3Server, Throttle
from cachefs_sidecar.testbed.server import s3_options

CAP_SYS_ADMIN = 21


def why_no_fuse() -> str:
    """What keeps this machine from mounting; "" when nothing does."""
    try:
        os.close(os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        return f"/dev/fuse: {error.strerror}"
    status = Path("/proc/self/status").read_text()
    capabilities = int(status.split("CapEff:")[1].split()[0], 16)
    if capabilities >> CAP_SYS_ADMIN & 1 or shutil.which("fusermount3"):
        return ""
    return "mounting needs CAP_SYS_ADMIN or fusermount3 (package fuse3)"


@dataclass(frozen=True)
class Bucket:
    """A bucket of the S3 server and the directory behind it. options: as s3fs and cachefs take them."""

    name: str
    folder: Path
    endpoint: str
    server: S3Server

    @property
    def url(self) -> str:
        return f"s3://{self.name}"

    @property
    def options(self) -> dict[str, Any]:
        return s3_options(self.endpoint, self.server.options["key"], self.server.options["secret"])

    def put(self, key: str, data: bytes) -> str:
        """Make or replace an object, at once and whole; returns its path, bucket/key."""
        file = self.folder / key
        file.parent.mkdir(parents=True, exist_ok=True)
        # Replaced, never rewritten: an answer that is under way keeps the bytes that it began with.
        temporary = self.folder.parent.parent / f"put-{uuid.uuid4().hex}"
        temporary.write_bytes(data)
        temporary.replace(file)
        return f"{self.name}/{key}"

    def delete(self, key: str) -> None:
        (self.folder / key).unlink()


@dataclass(frozen=True)
class ThrottledBucket(Bucket):
    """A bucket seen through a throttle (latency 0 unless a test sets it)."""

    throttle: Throttle = field(kw_only=True)

    @property
    def reads(self) -> dict[str, int]:
        """GETs by key, ranged ones too."""
        prefix = self.name + "/"
        objects = self.throttle.traffic().objects
        return {path.removeprefix(prefix): n for path, n in objects.items() if path.startswith(prefix)}
