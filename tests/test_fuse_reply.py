"""Replies with bytes of files: the same through a pipe and through memory, and what goes wrong leaves nothing."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from cachefs_sidecar.fuse import reply as reply_module
from cachefs_sidecar.fuse import wire
from cachefs_sidecar.fuse.reply import MOST_PIPED, PAGE, Reply
from tests.kernel.mounting import drop_pages

SIZES = [1, 511, PAGE, PAGE + 1, 110_001, MOST_PIPED, MOST_PIPED + 1, (1 << 20) - 2 * PAGE]


@pytest.fixture
def device() -> Iterator[tuple[int, int]]:
    """(what is read from it, itself): a pipe in place of /dev/fuse, to which splice(2) moves pages as well."""
    out, into = os.pipe()
    fcntl.fcntl(into, fcntl.F_SETPIPE_SZ, 1 << 20)
    yield out, into
    os.close(out)
    os.close(into)


def on_disk(folder: Path, content: bytes) -> int:
    """A descriptor of a file that is on the disk and not in memory."""
    file = folder / "blob"
    file.write_bytes(content)
    with file.open("rb") as written:
        os.fsync(written.fileno())
    drop_pages(file)
    return os.open(file, os.O_RDONLY)


def sent(reply: Reply, device: tuple[int, int], unique: int = 8) -> bytes:
    """The body of what was sent, whose header must be right."""
    reply.send(device[1], unique)
    packet = os.read(device[0], 1 << 21)
    assert packet[: wire.OUT_HEADER_BYTES] == wire.out_header(len(packet) - wire.OUT_HEADER_BYTES, 0, unique)
    return packet[wire.OUT_HEADER_BYTES :]


@pytest.mark.parametrize("through_pipe", [True, False])
@pytest.mark.parametrize("size", SIZES)
def test_a_whole_file(tmp_path: Path, device: tuple[int, int], size: int, through_pipe: bool) -> None:
    content = os.urandom(size)
    fd = on_disk(tmp_path, content)
    reply = Reply(1 << 20, through_pipe=through_pipe)
    assert reply.fill(8, fd, 0, size)
    if reply.visible:
        assert reply.payload[:size] == content
    assert sent(reply, device) == content
    os.close(fd)


def test_a_piece_in_the_middle_and_one_that_begins_anywhere(tmp_path: Path, device: tuple[int, int]) -> None:
    content = os.urandom(300_000)
    reply = Reply(1 << 20, through_pipe=True)
    for position, length in ((PAGE, 5 * PAGE), (2 * PAGE, 300_000 - 2 * PAGE), (7, 100), (4097, 200_000)):
        fd = on_disk(tmp_path, content)
        assert reply.fill(8, fd, position, length)
        assert sent(reply, device) == content[position : position + length]
        os.close(fd)


def test_bytes_that_are_to_be_seen_are_seen(tmp_path: Path, device: tuple[int, int]) -> None:
    content = os.urandom(110_000)
    fd = on_disk(tmp_path, content)
    reply = Reply(1 << 20, through_pipe=True)
    assert reply.fill(8, fd, 0, len(content), look=True)
    assert reply.visible
    assert reply.payload[: len(content)] == content
    assert sent(reply, device) == content
    os.close(fd)


def test_what_is_in_memory_comes_from_there(tmp_path: Path, device: tuple[int, int]) -> None:
    content = os.urandom(110_000)
    fd = on_disk(tmp_path, content)
    os.read(fd, 1 << 20)
    reply = Reply(1 << 20, through_pipe=True)
    found = reply.pages(fd, 0, len(content))
    if found is None:
        pytest.skip("this kernel has no cachestat(2) (Linux 6.5)")
    assert found[0] == -(-len(content) // PAGE)
    assert reply.fill(8, fd, 0, len(content))
    assert reply.visible
    assert sent(reply, device) == content
    assert reply.pages(fd, 0, len(content)) == (0, 0)
    os.close(fd)


def test_a_file_that_is_too_short_leaves_nothing_behind(tmp_path: Path, device: tuple[int, int]) -> None:
    fd = on_disk(tmp_path, os.urandom(5000))
    reply = Reply(1 << 20, through_pipe=True)
    assert not reply.fill(8, fd, 0, 50_000)
    assert not reply.fill(8, fd, 2 * PAGE, 100)
    os.close(fd)
    content = os.urandom(5000)
    fd = on_disk(tmp_path, content)
    assert reply.fill(10, fd, 0, 5000)
    assert sent(reply, device, 10) == content
    os.close(fd)


def test_a_reply_that_is_not_sent_leaves_nothing_behind(tmp_path: Path, device: tuple[int, int]) -> None:
    reply = Reply(1 << 20, through_pipe=True)
    for unique, content in ((8, os.urandom(50_000)), (10, os.urandom(60_000))):
        fd = on_disk(tmp_path, content)
        assert reply.fill(unique, fd, 0, len(content))
        os.close(fd)
    assert sent(reply, device, 10) == content
    fd = on_disk(tmp_path, content)
    assert reply.fill(12, fd, 0, len(content))
    os.close(fd)
    assert reply.clear() == 0
    assert sent(reply, device, 14) == b""


def test_a_reply_that_is_not_taken_leaves_nothing_behind(tmp_path: Path, device: tuple[int, int]) -> None:
    reply = Reply(1 << 20, through_pipe=True)
    broken, into = os.pipe()
    os.close(broken)
    for unique in (8, 10):
        content = os.urandom(50_000)
        fd = on_disk(tmp_path, content)
        assert reply.fill(unique, fd, 0, len(content))
        os.close(fd)
        if unique == 8:
            with pytest.raises(BrokenPipeError):
                reply.send(into, unique)
    assert sent(reply, device, 10) == content
    os.close(into)


def test_a_disk_that_fails_is_no_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fd = on_disk(tmp_path, os.urandom(50_000))
    reply = Reply(1 << 20, through_pipe=True)

    def failing(*_: object, **__: object) -> int:
        raise OSError(errno.EIO, "a bad sector")

    monkeypatch.setattr(reply_module, "_splice", failing)
    assert not reply.fill(8, fd, 0, 50_000)
    monkeypatch.undo()
    assert reply.fill(8, fd, 0, 50_000)
    os.close(fd)
    assert not reply.fill(8, fd, 0, 50_000)  # EBADF, for any other error


@pytest.mark.parametrize("missing", ["pipes", "pages", "O_DIRECT"])
def test_a_kernel_that_lacks_something(
    tmp_path: Path, device: tuple[int, int], missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = fcntl.fcntl

    def refusing(fd: int, command: int, argument: int = 0) -> int:
        if missing == "pipes" and command == fcntl.F_SETPIPE_SZ:
            raise PermissionError(errno.EPERM, "no larger pipe")
        if missing == "O_DIRECT" and argument == os.O_DIRECT:
            raise OSError(errno.EINVAL, "not on this file system")
        return real(fd, command, argument)

    monkeypatch.setattr(fcntl, "fcntl", refusing)
    monkeypatch.setattr(reply_module, "_fcntl", refusing)
    reply = Reply(1 << 20, through_pipe=True)
    if missing == "pages":
        monkeypatch.setattr(reply, "_cachestat", lambda _: -1)
    content = os.urandom(110_000)
    fd = on_disk(tmp_path, content)
    assert reply.fill(8, fd, 0, len(content))
    assert reply.visible
    assert sent(reply, device) == content
    os.close(fd)
