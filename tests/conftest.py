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
from pathlib import Path

import hypothesis
import pytest

from cachefs_sidecar.testbed import S3Server, Throttle, stop_fetcher
from tests.command_line import CommandLine
from tests.machine import Bucket, ThrottledBucket, why_no_fuse

__all__ = ["Bucket", "ThrottledBucket"]  # for the annotations of tests

# Every process that a test starts, however detached, inherits this variable, and is found by it.
TAG = "CACHEFS_TEST_RUN"

# What a test leaves behind may still be ending when the test has ended, and takes its time where others use the
# processors and the disk. What would stay is found all the same.
LEAVING_SECONDS = 30.0

# A busy machine holds up any example for longer than the 0.2 s that hypothesis allows it, and the making of the first
# ten for longer than a second. What hangs is ended by pytest-timeout.
hypothesis.settings.register_profile("busy", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("busy")

# Credentials and settings of whoever runs the tests must not change what they show.
FOREIGN = ("AWS_", "AZURE_", "CACHEFS_", "FSSPEC_", "GCS_", "GOOGLE_", "S3FS_", "STORAGE_")

_buckets = itertools.count(1)


# --- where the tests run ------------------------------------------------------------------------------------


def pytest_configure(config: pytest.Config) -> None:
    for name in list(os.environ):
        if name.startswith(FOREIGN):
            del os.environ[name]
    os.environ[TAG] = uuid.uuid4().hex
    os.environ["AWS_EC2_METADATA_DISABLED"] = "true"  # else a client without credentials asks the network for some
    # A shell without job control has what it starts in the background ignore Ctrl-C, and so would all that tests start.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    no_fuse, no_root = why_no_fuse(), "" if os.geteuid() == 0 else "needs to be root"
    for item in items:
        for marker, reason in (("needs_fuse", no_fuse), ("needs_root", no_root)):
            if reason and item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


# --- storage ------------------------------------------------------------------------------------------------


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
        parent = _proc(pid, "stat").rpartition(b")")[2].split()[1:2]  # after the name come state and parent
        ours = parent == [str(os.getpid()).encode()]
        command = _proc(pid, "cmdline").replace(b"\0", b" ").decode(errors="replace")
        # These two serve every later use of multiprocessing in this process and end with it.
        lasting = "multiprocessing.resource_tracker" in command or "multiprocessing.forkserver" in command
        if (ours or tag in _proc(pid, "environ")) and not (ours and lasting):
            left[pid] = command or "a zombie"
    return left


def _proc(pid: int, name: str) -> bytes:
    """b"" for a process that has ended, and for what is not ours to read."""
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes()
    except OSError:
        return b""


def _mounts_below(folder: Path) -> list[str]:
    mounts = [line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines()]
    return [mount for mount in mounts if mount.startswith(f"{folder}/")]


@pytest.fixture
def cachefs(capsys: pytest.CaptureFixture[str], cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> CommandLine:
    """The command line, with `cache_dir` as its cache."""
    monkeypatch.setenv("CACHEFS_DIR", str(cache_dir))
    monkeypatch.setenv("CACHEFS_IDLE", "60")  # the fetcher that one command starts is there for the next, however slow
    return CommandLine(capsys)
