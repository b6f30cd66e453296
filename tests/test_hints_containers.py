"""A consumer and a fetcher in different pid namespaces, as containers are: neither has a number for the other."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from array import array
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cachefs import CacheFileSystem
from cachefs.hints.consumer import Consumer
from cachefs.packets import peer_handle
from tests.command_line import CommandLine
from tests.filesystems import make_file_system
from tests.machine import ThrottledBucket
from tests.test_fetcher import wait_until
from tests.test_hints import consumers, content, fill

COUNT = 10

# Reads something, which starts a fetcher in the same namespace, and stays: a namespace ends with its first process.
STARTER = """
import sys, fsspec, json
told = json.loads(sys.stdin.readline())
fs = fsspec.filesystem("cachefs", target_protocol="s3", target_options=told["options"], cache_dir=told["home"])
print(len(fs.cat_file(told["name"])), flush=True)
sys.stdin.readline()
"""


@pytest.fixture
def fs(throttled: ThrottledBucket, cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[CacheFileSystem]:
    """Its fetcher is in a namespace that sees none of us."""
    monkeypatch.setenv("CACHEFS_IDLE", "60")
    names = fill(throttled, COUNT)
    alone = ["unshare", "--pid", "--fork", "--kill-child"]
    if os.geteuid() or subprocess.run([*alone, "true"], check=False, capture_output=True).returncode:
        pytest.skip("needs to be root, and unshare(1), to make a pid namespace")
    starter = subprocess.Popen(
        [*alone, sys.executable, "-c", STARTER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert starter.stdin is not None
    assert starter.stdout is not None
    try:
        told = {"options": throttled.options, "home": str(cache_dir), "name": names[0]}
        starter.stdin.write(json.dumps(told) + "\n")
        starter.stdin.flush()
        assert starter.stdout.readline() == f"{len(content(0))}\n"
        made = make_file_system(throttled, cache_dir)
        made.config = replace(made.config, fetcher="require")
        yield made
    finally:
        starter.kill()
        starter.communicate()


def names_of(bucket: ThrottledBucket) -> list[str]:
    return [f"{bucket.name}/set/{number:04d}.jpg" for number in range(COUNT)]


def _consume(fs: CacheFileSystem, names: list[str], ready: Any) -> None:
    consumer = Consumer(fs.config, fs.dataset_of(names[0])[1], names, label="elsewhere")
    consumer.plan(array("I", range(len(names))))
    child = os.fork()  # a loader's worker, with a copy of the socket
    if child:
        ready.put(child)
    time.sleep(60)


@pytest.mark.needs_root
def test_the_end_of_a_consumer_in_another_container_is_noticed(
    throttled: ThrottledBucket, fs: CacheFileSystem, cache_dir: Path, capsys: pytest.CaptureFixture[str]
):
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with here, there:
        try:
            os.close(here.getsockopt(socket.SOL_SOCKET, 77))
        except OSError:
            pytest.skip("the kernel does not tell who is at the other end (SO_PEERPIDFD, Linux 6.5)")
    context = multiprocessing.get_context("fork")
    ready = context.Queue()
    process = context.Process(target=_consume, args=(fs, names_of(throttled), ready))
    process.start()
    worker = ready.get(timeout=30)
    try:
        (found,) = consumers(fs.config)
        assert (found["label"], found["pid"]) == ("elsewhere", 0)
        shown = CommandLine(capsys)("status", "--cache-dir", cache_dir).ok().out
        assert "elsewhere (in another container): item 0 of 10" in shown
        wait_until(lambda: consumers(fs.config)[0]["ahead"] == COUNT)
        os.kill(process.pid or 0, signal.SIGKILL)
        wait_until(lambda: consumers(fs.config) == [])
        assert Path(f"/proc/{worker}").exists()
    finally:
        os.kill(worker, signal.SIGKILL)
        process.join()


class Older:
    """A socket of a kernel that knows no SO_PEERPIDFD, with a peer of that number (0: in another namespace)."""

    def __init__(self, pid: int, error: int = errno.ENOPROTOOPT) -> None:
        self._pid = pid
        self._error = error

    def getsockopt(self, level: int, name: int, *size: int) -> Any:
        if name == socket.SO_PEERCRED:
            return struct.pack("3i", self._pid, 0, 0)
        raise OSError(self._error, os.strerror(self._error))


def test_an_older_kernel_knows_the_number_of_the_process_if_it_can_be_seen() -> None:
    def handle(*told: int) -> int:
        return peer_handle(Older(*told))  # type: ignore[arg-type]

    ours = handle(os.getpid())
    assert os.readlink(f"/proc/self/fd/{ours}") == "anon_inode:[pidfd]"
    os.close(ours)
    assert handle(0) == -1
    for gone in ((2**22 + 1,), (os.getpid(), errno.ESRCH)):  # a number above the largest (proc(5), pid_max)
        with pytest.raises(ProcessLookupError):
            handle(*gone)
