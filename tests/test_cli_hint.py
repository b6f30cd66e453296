"""`cachefs hint`, and what `cachefs status` says of who gives hints: real storage, real fetchers, a real mount."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data.distributed import DistributedSampler

from tests.command_line import CommandLine, credentials, s3, script
from tests.machine import ThrottledBucket
from tests.test_fetcher import wait_until

COUNT = 30


@pytest.fixture
def photos(throttled: ThrottledBucket, monkeypatch: pytest.MonkeyPatch) -> ThrottledBucket:
    for number in range(COUNT):
        throttled.put(f"set/{number:02d}.jpg", b"%d" % number * 5000)
    for name, value in credentials(throttled.options).items():
        monkeypatch.setenv(name, value)
    return throttled


def write(file: Path, *names: str) -> Path:
    file.write_text("".join(f"{name}\n" for name in names))
    return file


def test_what_is_named_is_fetched_once(cachefs: CommandLine, photos: ThrottledBucket, tmp_path: Path):
    order = write(tmp_path / "order", "set/05.jpg", f"{photos.name}/set/04.jpg", f"{photos.url}/set/03.jpg")
    keys = s3(photos.options)
    done = cachefs("hint", photos.url, order, "--once", *keys, "--json").ok().json
    assert (done["named"], done["fetched"], done["bytes"], done["failed"]) == (3, 3, 15_000, 0)
    assert photos.reads == {"set/05.jpg": 1, "set/04.jpg": 1, "set/03.jpg": 1}
    assert "3 objects named, 0 fetched now" in cachefs("hint", photos.url, order, "--once", *keys).ok().out
    assert photos.throttle.traffic().object_reads == 3


def test_a_mount_finds_what_was_named(cachefs: CommandLine, photos: ThrottledBucket, tmp_path: Path):
    (tmp_path / "mnt").mkdir()
    cachefs("mount", photos.url, tmp_path / "mnt", *s3(photos.options)).ok()
    try:
        order = write(tmp_path / "order", "set", str(tmp_path / "mnt/set/02.jpg"), "set/nothing.jpg")
        outcome = cachefs("hint", tmp_path / "mnt", order, "--once")
        assert outcome.code == 1
        assert "set/nothing.jpg: was not there when the dataset was listed" in outcome.err
        assert photos.reads == {f"set/{n:02d}.jpg": 1 for n in range(COUNT)}
        for number in range(COUNT):
            assert (tmp_path / f"mnt/set/{number:02d}.jpg").read_bytes() == b"%d" % number * 5000
        assert photos.throttle.traffic().object_reads == COUNT
    finally:
        cachefs("umount", tmp_path / "mnt").ok()


def test_names_come_as_a_stream_and_it_stays_until_it_is_told(
    cachefs: CommandLine, photos: ThrottledBucket, cache_dir: Path
):
    with subprocess.Popen(
        [sys.executable, "-m", "cachefs_sidecar", "hint", photos.url, "-", "-d", str(cache_dir), *s3(photos.options)],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as command:
        assert command.stdin is not None
        for number in range(3):
            command.stdin.write(b"set/%02d.jpg\n" % number)
            command.stdin.flush()
            wait_until(lambda number=number: len(photos.reads) == number + 1)
        command.stdin.write(b"set/09.jpg")  # the last line may end without an end
        command.stdin.close()
        wait_until(lambda: len(photos.reads) == 4)
        (found,) = cachefs("status", "--json").ok().json["consumers"]
        assert found["pid"] == command.pid
        said = cachefs("status").ok().out
        assert f"cachefs hint {photos.url} (pid {command.pid})" in said
        command.send_signal(signal.SIGINT)
        assert command.wait(30) == 130
        assert command.stderr is not None
        assert b"Traceback" not in command.stderr.read()
    wait_until(lambda: cachefs("status", "--json").json["consumers"] == [])


def test_what_does_not_fit_is_said(cachefs: CommandLine, photos: ThrottledBucket, tmp_path: Path):
    keys = s3(photos.options)
    cachefs("warm", photos.url, "--size", "40K", "--list", write(tmp_path / "none"), *keys)
    names = [f"set/{number:02d}.jpg" for number in range(COUNT)]
    outcome = cachefs("hint", photos.url, write(tmp_path / "order", *names), "--once", *keys)
    assert outcome.code == 1
    assert "the cache is full" in outcome.err


def test_the_order_of_a_sampler(cachefs: CommandLine, photos: ThrottledBucket, tmp_path: Path):
    names = [f"set/{number:02d}.jpg" for number in range(COUNT)]
    keys = s3(photos.options)
    options = ["--sampler", "distributed", "--seed", "5", "--world", "4", "--rank", "1", "--rank", "3"]
    files = write(tmp_path / "files", *names)
    assert cachefs("hint", photos.url, files, "--once", *options, "--json", *keys).ok().json["named"] == 16
    data: Any = range(COUNT)
    samplers: list[Any] = [DistributedSampler(data, 4, rank, seed=5) for rank in (1, 3)]
    assert photos.reads == {names[number]: 1 for sampler in samplers for number in sampler}
    cachefs("hint", photos.url, files, "--once", *options, "--epochs", "0-2", "--whole-batches", "4", *keys).ok()
    assert len(photos.reads) > 20
    assert set(photos.reads.values()) == {1}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["hint", "x"], ["FILE"]),
        (["hint", "x", "/no/such/list"], ["/no/such/list", "No such file"]),
        (["hint", "", "-"], ["ORIGIN is empty"]),
        (["hint", "x", "/dev/null", "--sampler", "distributed"], ["empty"]),
        (["hint", "x", "/etc/passwd", "--sampler", "distributed", "--rank", "4"], ["rank 4 of 1"]),
        (["hint", "x", "/etc/passwd", "--sampler", "random", "--rank", "4"], ["--rank mean nothing"]),
        (["hint", "x", "/etc/passwd", "--sampler", "random", "--epochs", "4-2"], ["--epochs '4-2'"]),
    ],
)
def test_wrong_use(cachefs: CommandLine, arguments: list[str], words: list[str]):
    cachefs(*arguments).failed(2, *words)


def test_names_that_are_none(photos: ThrottledBucket, cache_dir: Path):
    command: list[str | Path] = ["hint", photos.url, "-", "--once", "-d", cache_dir, *s3(photos.options)]
    script(*command, stdin=b"\xff\xfe\n").failed(2, "name 1 is not UTF-8")
    script(*command, stdin=b"a\0b\n").failed(2, "add -0")
    script(*command, "-0", stdin=b"set/01.jpg\0set/02.jpg\0").ok()
    assert photos.reads == {"set/01.jpg": 1, "set/02.jpg": 1}
