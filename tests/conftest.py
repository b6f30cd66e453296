"""What the tests share: a real S3 server, buckets, a slow line, cache directories, and a watch over what they leave.

Ground truth for "how often was this object read" is the throttle's account (`throttled.reads`), never a counter
of the code under test.
"""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import shutil
import signal
import subprocess
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from cachefs_sidecar.testbed import S3Server, Throttle, stop_fetcher
from cachefs_sidecar.testbed.server import s3_options

# Every process that a test starts, however detached, inherits this variable, and is found by it.
TAG = "CACHEFS_TEST_RUN"

# What a test leaves behind may still be ending when the test has ended.
LEAVING_SECONDS = 5.0

# Credentials and settings of whoever runs the tests must not change what they show.
FOREIGN = ("AWS_", "AZURE_", "CACHEFS_", "FSSPEC_", "GCS_", "GOOGLE_", "S3FS_", "STORAGE_")

CAP_SYS_ADMIN = 21

_buckets = itertools.count(1)


# --- where the tests run ------------------------------------------------------------------------------------


def pytest_configure(config: pytest.Config) -> None:
    for name in list(os.environ):
        if name.startswith(FOREIGN):
            del os.environ[name]
    os.environ[TAG] = uuid.uuid4().hex
    os.environ["AWS_EC2_METADATA_DISABLED"] = "true"  # else a client without credentials asks the network for some


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    no_fuse, no_root = why_no_fuse(), "" if os.geteuid() == 0 else "needs to be root"
    for item in items:
        for marker, reason in (("needs_fuse", no_fuse), ("needs_root", no_root)):
            if reason and item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


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


# --- storage ------------------------------------------------------------------------------------------------


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


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A real S3 server; shared, so a test that stops it starts it again (or makes one of its own)."""
    root = tmp_path_factory.mktemp("s3") / "buckets"
    root.mkdir()
    with S3Server(root) as server:
        yield server


@pytest.fixture
def bucket(s3_server: S3Server) -> Iterator[Bucket]:
    """A fresh, empty bucket."""
    name, folder = _make_bucket(s3_server)
    yield Bucket(name, folder, s3_server.endpoint, s3_server)
    shutil.rmtree(folder)


@pytest.fixture
def throttled(s3_server: S3Server) -> Iterator[ThrottledBucket]:
    """A fresh, empty bucket behind a throttle of its own."""
    name, folder = _make_bucket(s3_server)
    with Throttle(s3_server.port, latency=0) as throttle:
        yield ThrottledBucket(name, folder, throttle.endpoint, s3_server, throttle=throttle)
    shutil.rmtree(folder)


def _make_bucket(server: S3Server) -> tuple[str, Path]:
    name = f"bucket-{next(_buckets):04d}"
    folder = server.root / name
    folder.mkdir()
    return name, folder


# --- caches --------------------------------------------------------------------------------------------------


@pytest.fixture
def cache_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The home of a cache, not yet made. Its fetcher, if a reader starts one, is ended after the test."""
    monkeypatch.setenv("CACHEFS_MIN_FREE", "0")
    monkeypatch.setenv("CACHEFS_IDLE", "2")
    monkeypatch.setenv("CACHEFS_RUNTIME_DIR", str(tmp_path / "runtime"))
    home = tmp_path / "cache"
    yield home
    stop_fetcher(home)


# --- nothing is left behind ------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def nothing_left_behind(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Fail a test that leaves a process, a zombie or a mount; end what it left, so that the next starts clean."""
    before = set(_pids())
    yield
    left = _left_processes(before)
    deadline = time.monotonic() + LEAVING_SECONDS
    while left and time.monotonic() < deadline:
        time.sleep(0.01)
        left = _left_processes(before)
    mounts = _mounts_below(tmp_path_factory.getbasetemp())
    for pid in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    for mount in mounts:
        subprocess.run(["umount", "-l", mount], check=False)
    complaints = [f"process {pid}: {command}" for pid, command in left.items()]
    complaints += [f"mount {mount}" for mount in mounts]
    if complaints:
        pytest.fail("the test left behind " + "; ".join(complaints))


def _pids() -> Iterator[int]:
    return (int(name) for name in os.listdir("/proc") if name.isdigit())


def _left_processes(before: set[int]) -> dict[int, str]:
    """Our processes that did not run before: those with our tag, and children of ours that nobody reaped."""
    multiprocessing.active_children()  # reaps those that have ended
    tag = f"{TAG}={os.environ[TAG]}".encode()
    left: dict[int, str] = {}
    for pid in set(_pids()) - before:
        try:
            environ = Path(f"/proc/{pid}/environ").read_bytes()
            command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            state, parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:2]
        except OSError:
            continue  # it has ended, or is not ours
        ours = int(parent) == os.getpid()
        # These two serve every later use of multiprocessing in this process and end with it.
        lasting = "multiprocessing.resource_tracker" in command or "multiprocessing.forkserver" in command
        if (tag in environ or ours) and not (ours and lasting):
            left[pid] = command or f"(zombie, state {state})"
    return left


def _mounts_below(folder: Path) -> list[str]:
    mounts = [line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines()]
    return [mount for mount in mounts if mount.startswith(f"{folder}/")]
