"""cachefs/SEMANTICS.md, executed: every block in a bucket, a cache and a process tree of its own."""

from __future__ import annotations

import concurrent.futures
import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import signal
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from cachefs import digest
from cachefs_sidecar.control import list_mounts, mount_status
from tests.command_line import s3, script
from tests.machine import ThrottledBucket
from tests.nodes import Node, cluster

PAGE = Path(__file__).resolve().parents[1] / "cachefs" / "SEMANTICS.md"


def blocks() -> Iterator[Any]:
    heading, count = "", 0
    for part in re.finditer(r"^## ([^\n]+)$|^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL):
        if part[1]:
            heading, count = part[1], 0
            continue
        count += 1
        line = PAGE.read_text()[: part.start()].count("\n") + 1
        marks = [pytest.mark.needs_fuse] if "mount()" in part[2] else []
        name = re.sub(r"\W+", "-", heading).strip("-").lower()
        yield pytest.param("\n" * line + part[2], id=f"{name}-{count}", marks=marks)


class _Node:
    """A node of a cluster."""

    def __init__(self, node: Node, world: World) -> None:
        self.name = node.name
        self.kill = node.kill
        self._node = node
        self._world = world

    def names(self) -> list[str]:
        """As a file system that begins now shows them."""
        paths = self._world.filesystem(cache_dir=str(self._node.home)).find(self._world.name)
        return sorted(path.removeprefix(f"{self._world.name}/") for path in paths)

    def refresh(self) -> list[str]:
        """The nodes that were not taken along."""
        cache: list[str | Path] = ["--cache-dir", self._node.home, "--json"]
        outcome = script("refresh", self._world.url, *cache, *s3(self._world.bucket.options))
        behind = [each["node"] for each in outcome.json[0]["behind"]]
        assert outcome.code == (1 if behind else 0)
        return behind


class World:
    """What the blocks' words mean."""

    def __init__(self, bucket: ThrottledBucket, home: Path, folder: Path) -> None:
        self.bucket = bucket
        self.home = home
        self.name = bucket.name
        self.url = bucket.url
        self._folder = folder
        self._mountpoint = folder / "data"
        self._open = contextlib.ExitStack()
        self.errno, self.hashlib, self.os, self.shutil, self.stat = errno, hashlib, os, shutil, stat
        self.concurrent, self.digest = concurrent, digest

    def put(self, key: str, data: bytes) -> None:
        self.bucket.put(key, data)

    def delete(self, key: str) -> None:
        self.bucket.delete(key)

    def reads(self) -> int:
        return self.bucket.throttle.reset().object_reads

    def origin_bytes(self) -> int:
        return self.bucket.throttle.traffic().bytes_down

    def cachefs(self, *arguments: str | Path, code: int = 0) -> str:
        words = list(arguments)
        if self._mountpoint not in arguments or arguments[0] == "mount":  # a mount knows its cache
            words += ["--cache-dir", self.home]
        if any(str(a).startswith("s3:") for a in arguments):
            words += s3(self.bucket.options)
        outcome = script(*words)
        assert outcome.code == code, outcome
        return outcome.said

    def status(self) -> Any:
        return json.loads(self.cachefs("status", "--json"))["cache"]

    def mount(self) -> Path:
        self._mountpoint.mkdir()
        self.cachefs("mount", self.url, self._mountpoint)
        return self._mountpoint

    def filesystem(self, **options: Any) -> Any:
        return fsspec.filesystem(
            "cachefs",
            target_protocol="s3",
            target_options=self.bucket.options,
            skip_instance_cache=True,
            **{"cache_dir": str(self.home), **options},
        )

    def blobs(self) -> list[Path]:
        return [file for file in (self.home / "blobs").rglob("*") if file.is_file()]

    def rot(self, blob: Path) -> None:
        """Change a byte as a failing disk does: the file system notices nothing."""
        info = blob.stat()
        blob.chmod(0o600)
        data = bytearray(blob.read_bytes())
        data[len(data) // 2] ^= 1
        blob.write_bytes(data)
        os.utime(blob, ns=(info.st_atime_ns, info.st_mtime_ns))

    @contextlib.contextmanager
    def origin_stopped(self) -> Iterator[None]:
        self.bucket.throttle.refuse()
        try:
            yield
        finally:
            self.bucket.throttle.heal()

    @contextlib.contextmanager
    def refused(self, number: int, *words: str) -> Iterator[None]:
        with pytest.raises(OSError) as caught:
            yield
        assert caught.value.errno == number, caught.value
        for word in words:
            assert word in str(caught.value)

    def kill_fetcher(self) -> None:
        os.kill(int((self.home / "run" / "fetcher.lock").read_text()), signal.SIGKILL)

    def kill_worker(self) -> None:
        mounted = next(each for each in list_mounts() if Path(each.mountpoint) == self._mountpoint)
        os.kill(mount_status(mounted)["workers"][0]["pid"], signal.SIGKILL)

    def nodes(self, count: int) -> list[_Node]:
        nodes = self._open.enter_context(cluster(self._folder, self.bucket, count))
        for node in nodes:
            node.connection.make_catalog()
        return [_Node(node, self) for node in nodes]

    def names(self) -> dict[str, Any]:
        return {each: getattr(self, each) for each in (*vars(self), *dir(type(self))) if not each.startswith("_")}

    def close(self) -> None:
        self._open.close()
        if os.path.ismount(self._mountpoint):
            self.cachefs_umount()

    def cachefs_umount(self) -> None:
        outcome = script("umount", self._mountpoint)
        assert outcome.code == 0, outcome


@pytest.mark.parametrize("block", list(blocks()))
def test_promise(block: str, throttled: ThrottledBucket, cache_dir: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("TEST_KEY", throttled.options["key"])
    monkeypatch.setenv("TEST_SECRET", throttled.options["secret"])
    world = World(throttled, cache_dir, tmp_path)
    try:
        exec(compile(block, str(PAGE), "exec"), world.names())
    finally:
        world.close()
